//! HTTP routes, and what holds for all of them: request ids, limits, the error object.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::{FutureExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tracing::debug;

use super::answer::Answer;
use super::connections::Protocol;
use super::error::ApiError;
use super::request::{Dialect, Request};
use super::run::Run;
use super::sent::Due;
use super::{Shared, connections, events, models, stopped, vectors, websocket};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// How long a body that is under way may stand still once the server is to stop.
const LAST_PART: Duration = Duration::from_secs(1);
/// Bytes beyond the limit that are read and dropped, so that a client that sends before it reads gets to see its refusal.
const OVERRUN: usize = 64 << 20;

/// The request's id, given or drawn.
#[derive(Clone)]
pub(super) struct RequestId(pub(super) Arc<str>);

pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let (stopping, patience, edge) = (shared.stopping.clone(), shared.options.patience, shared.edge.clone());
    let delays = Arc::clone(&shared.options.delays);
    connections::serve((listener, Protocol::Http), routes(shared), edge, (patience, delays), stopping).await;
}

fn routes(shared: Arc<Shared>) -> axum::Router {
    axum::Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/embeddings", post(vectors::embeddings))
        .route("/v1/rerank", post(vectors::rerank))
        .route("/v1/score", post(vectors::score))
        .route("/v1/classify", post(vectors::classify))
        .route("/v1/stream", get(websocket::open))
        .route("/health", get(health))
        .route("/live", get(live))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .layer(from_fn_with_state(Arc::clone(&shared), around))
        .with_state(shared)
}

/// Gives every request an id and every answer the same, counts answers, and turns a handler that failed into a 500.
async fn around(State(shared): State<Arc<Shared>>, mut request: HttpRequest, next: Next) -> Response {
    let valid = |v: &&str| !v.is_empty() && v.len() <= 128 && v.bytes().all(|b| b.is_ascii_graphic());
    let given = request.headers().get(&REQUEST_ID).and_then(|v| v.to_str().ok()).filter(valid);
    let id: Arc<str> = given.map_or_else(draw_id, str::to_owned).into();
    let route = route(request.uri().path());
    request.extensions_mut().insert(RequestId(Arc::clone(&id)));
    let arrived = Instant::now();
    // A panic in one handler must not take a connection's other requests along.
    let mut response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => ApiError::internal("the request failed inside the server").into_response(),
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let status = response.status().as_u16();
    shared.metrics.answered(route, status);
    debug!(request = &*id, route, status, elapsed_ms = arrived.elapsed().as_millis() as u64, "answered");
    response
}

/// The route of a path, from a closed list, for metrics.
fn route(path: &str) -> &'static str {
    const ROUTES: [&str; 13] = [
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v1/classify",
        "/v1/stream",
        "/health",
        "/live",
        "/ready",
        "/metrics",
        "/version",
    ];
    match ROUTES.into_iter().find(|r| *r == path) {
        Some(route) => route,
        None if path.starts_with("/v1/models/") => "/v1/models/{id}",
        None => "other",
    }
}

/// An id that no other request has.
pub(super) fn draw_id() -> String {
    use std::hash::{BuildHasher, Hasher};
    let random = || std::hash::RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

async fn completions(state: State<Arc<Shared>>, request: HttpRequest) -> Result<Response, ApiError> {
    generate(state.0, Dialect::Completions, request).await
}

async fn chat(state: State<Arc<Shared>>, request: HttpRequest) -> Result<Response, ApiError> {
    generate(state.0, Dialect::Chat, request).await
}

async fn generate(shared: Arc<Shared>, dialect: Dialect, request: HttpRequest) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let id = request.extensions().get::<RequestId>().map_or_else(|| draw_id().into(), |id| Arc::clone(&id.0));
    let due = request.extensions().get::<Due>().cloned();
    let limit = shared.options.deadline;
    let body = tokio::time::timeout(limit, read_body(&shared, request));
    let body = body.await.map_err(|_| ApiError::deadline(limit.as_secs()))??;
    let request = Request::parse(dialect, &body)?;
    drop(body);
    let (streaming, model) = (request.streaming, request.model.clone());
    let job = tokio::time::timeout_at(arrived + limit, request.prepare(&shared, arrived));
    let job = job.await.map_err(|_| ApiError::deadline(limit.as_secs()))??;
    let logprobs = job.parameters.logprobs;
    let mut run = Run::start(&shared.edge, &shared.metrics, job)?;
    // A client whose model other routers serve is to open its next connection, which its service leads to them.
    let close = shared.edge.is_driven_elsewhere(&model).then(|| [(header::CONNECTION, HeaderValue::from_static("close"))]);
    let answer = Answer::new(dialect, &id, model, &run, logprobs, streaming);
    if !streaming.stream {
        return Ok((close, Json(answer.collect(&mut run).await?)).into_response());
    }
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((close, headers, Body::from_stream(events::stream(answer, run, due))).into_response())
}

/// The body, if its type and size are right.
pub(super) async fn read_body(shared: &Shared, request: HttpRequest) -> Result<Vec<u8>, ApiError> {
    let json = |headers: &HeaderMap| {
        let Some(value) = headers.get(header::CONTENT_TYPE) else { return Err("no content type".to_owned()) };
        let text = value.to_str().unwrap_or("text that is not ASCII");
        let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let fits = essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"));
        if fits { Ok(()) } else { Err(format!("content type {text:?}")) }
    };
    json(request.headers()).map_err(|got| {
        ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            format!("the body has {got}, expected application/json"),
        )
    })?;
    let plain = |v: &HeaderValue| v.as_bytes().eq_ignore_ascii_case(b"identity");
    if let Some(coding) = request.headers().get_all(header::CONTENT_ENCODING).iter().find(|v| !plain(v)) {
        let message = format!("the body has content encoding {coding:?}, expected none: bodies are not decompressed");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_content_encoding", message));
    }
    let limit = shared.options.body_bytes;
    let too_large = || {
        let message = format!("the body is larger than the limit of {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    // Who asks before sending is answered before anything is sent.
    if request.headers().contains_key(header::EXPECT) && announced.is_some_and(|n| n > limit as u64) {
        return Err(too_large());
    }
    let mut parts = request.into_body().into_data_stream();
    let (mut body, mut taken) = (Vec::new(), 0);
    let patience = shared.options.patience;
    let stalled = |_| {
        let message = format!("nothing more of the body came for {} s", patience.as_secs_f32());
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_stalled", message)
    };
    let mut next = async || {
        tokio::select! {
            part = tokio::time::timeout(patience, parts.next()) => part.map_err(stalled),
            () = async { stopped(shared.stopping.clone()).await; tokio::time::sleep(LAST_PART).await } => Err(ApiError::stopping()),
        }
    };
    while let Some(part) = next().await? {
        let part = part.map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "invalid_body", "the body could not be read to its end"))?;
        taken += part.len();
        if taken <= limit {
            body.extend_from_slice(&part);
        } else if taken > limit.saturating_add(OVERRUN) {
            break;
        }
    }
    if taken <= limit { Ok(body) } else { Err(too_large()) }
}

async fn unknown_route(request: HttpRequest) -> ApiError {
    let path = request.uri().path();
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is nothing at {} {path}", request.method()))
}

async fn unknown_method(request: HttpRequest) -> ApiError {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

async fn live() -> Json<Value> {
    Json(json!({"status": "live"}))
}

/// Whether this process can answer at all; says which models can.
async fn health(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let models = shared.edge.models();
    let ready = models.iter().map(|m| (m.name.clone(), Value::from(m.ready_replicas > 0)));
    Json(json!({"status": "ok", "ready": ready.collect::<serde_json::Map<_, _>>()}))
}

/// 200 once a real token came through every stage of each model, 503 before and while stopping.
async fn ready(State(shared): State<Arc<Shared>>) -> Result<Json<Value>, ApiError> {
    let models = shared.edge.models();
    let waiting: Vec<&str> = models.iter().map(|m| m.name.as_str()).filter(|name| !shared.edge.ready(name)).collect();
    let refuse = |message: String| {
        Err(ApiError { retry_after_seconds: Some(1), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message) })
    };
    if *shared.stopping.borrow() {
        return refuse("the server is stopping".to_owned());
    }
    if models.is_empty() {
        return refuse("no model is deployed".to_owned());
    }
    if !waiting.is_empty() {
        return refuse(format!("no replica is ready for {}", waiting.join(", ")));
    }
    Ok(Json(json!({"status": "ready"})))
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Result<Response, ApiError> {
    let text = shared.metrics.encode().map_err(|e| ApiError::internal(e.to_string()))?;
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
