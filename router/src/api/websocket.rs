//! `/v1/stream`: the requests and chunks of the streaming interface over a WebSocket.
//!
//! The client sends one JSON request as a text frame, with `messages` for a conversation or `prompt` for a text, and receives
//! the chunks of the event stream as text frames, then `[DONE]`. After that it may send the next request. An error arrives as
//! the usual error object, and the connection stays open. What the client sends while a request runs cancels nothing and
//! waits; closing the connection cancels.

use std::sync::Arc;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Extension, State};
use axum::http::StatusCode;
use axum::response::Response;
use tokio::time::Instant;

use super::Shared;
use super::answer::Answer;
use super::connections::Begun;
use super::error::ApiError;
use super::http::draw_id;
use super::request::{Dialect, Request};
use super::run::Run;
use super::stopped;

/// Messages that a client may send ahead of the answer to its first.
const MOST_WAITING: usize = 8;

pub(super) async fn open(
    State(shared): State<Arc<Shared>>,
    begun: Option<Extension<Begun>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, "not_a_websocket", e.body_text()))?;
    let limit = shared.options.body_bytes;
    Ok(upgrade.max_message_size(limit).max_frame_size(limit).on_upgrade(async move |socket| {
        // A conversation lasts longer than the answer to the request that opened it.
        let _begun = begun;
        converse(shared, socket).await;
    }))
}

async fn converse(shared: Arc<Shared>, mut socket: WebSocket) {
    let mut waiting = std::collections::VecDeque::new();
    loop {
        let text = match waiting.pop_front() {
            Some(text) => text,
            None => tokio::select! {
                message = socket.recv() => match message {
                    Some(Ok(Message::Text(text))) => text,
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                    Some(Ok(Message::Binary(_))) => return refuse_binary(&mut socket).await,
                    _ => return,
                },
                () = stopped(shared.stopping.clone()) => return,
            },
        };
        let limit = shared.options.deadline;
        let started = tokio::time::timeout(limit, start(&shared, text.as_bytes())).await;
        let mut run = match started.unwrap_or_else(|_| Err(ApiError::deadline(limit.as_secs()))) {
            Ok(run) => run,
            Err(e) => {
                if socket.send(Message::text(e.body().to_string())).await.is_err() {
                    return;
                }
                continue;
            }
        };
        if answer(&mut socket, &mut run.0, &run.1, &mut waiting).await.is_err() {
            return;
        }
    }
}

/// Closes the connection with the code for data of a kind that is not taken (RFC 6455, section 7.4.1).
async fn refuse_binary(socket: &mut WebSocket) {
    let close = CloseFrame { code: close_code::UNSUPPORTED, reason: "requests are text frames".into() };
    if socket.send(Message::Close(Some(close))).await.is_ok() {
        // The client's own close frame ends the connection; whatever comes instead ends it too.
        let _ = socket.recv().await;
    }
}

async fn start(shared: &Shared, body: &[u8]) -> Result<(Run, Answer), ApiError> {
    let arrived = Instant::now();
    let conversation = serde_json::from_slice::<serde_json::Value>(body).is_ok_and(|v| v.get("messages").is_some());
    let dialect = if conversation { Dialect::Chat } else { Dialect::Completions };
    let request = Request::parse(dialect, body)?;
    let (streaming, model) = (request.streaming, request.model.clone());
    let job = request.prepare(shared, arrived).await?;
    let logprobs = job.parameters.logprobs;
    let run = Run::start(&shared.edge, &shared.metrics, job)?;
    let answer = Answer::new(dialect, &draw_id(), model, &run, logprobs, streaming);
    Ok((run, answer))
}

/// Sends all chunks. An error says that the connection is gone.
async fn answer(
    socket: &mut WebSocket,
    run: &mut Run,
    answer: &Answer,
    waiting: &mut std::collections::VecDeque<axum::extract::ws::Utf8Bytes>,
) -> Result<(), axum::Error> {
    let gone = || axum::Error::new("the client closed the connection");
    for chunk in answer.opening(run.choices()) {
        socket.send(Message::text(chunk)).await?;
    }
    loop {
        tokio::select! {
            delta = run.next() => match delta {
                Some(Ok(delta)) => socket.send(Message::text(answer.delta_text(&delta))).await?,
                Some(Err(e)) => {
                    socket.send(Message::text(e.body().to_string())).await?;
                    break;
                }
                None => {
                    if let Some(chunk) = answer.closing(run.usage()) {
                        socket.send(Message::text(chunk)).await?;
                    }
                    break;
                }
            },
            message = socket.recv() => match message {
                Some(Ok(Message::Text(text))) if waiting.len() < MOST_WAITING => waiting.push_back(text),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Binary(_))) => {
                    refuse_binary(socket).await;
                    return Err(gone());
                }
                _ => return Err(gone()),
            },
        }
    }
    socket.send(Message::text("[DONE]")).await
}
