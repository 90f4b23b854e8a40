//! The client's side: OpenAI-compatible HTTP with server-sent events and WebSocket, gRPC, health and metrics.

mod answer;
mod connections;
mod constrained;
mod direct;
mod error;
mod events;
mod fields;
mod grpc;
mod http;
mod metrics;
mod models;
mod parameters;
mod request;
mod run;
mod sent;
#[cfg(test)]
mod tests;
mod vectors;
mod websocket;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::delays::Delays;
use crate::edge::Edge;

pub use direct::{Direct, DirectAnswer, DirectRequest, Piece, Refusal, Templates, TokenCounts};
pub use request::Dialect;

/// Settings of the API.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    /// Largest request body.
    pub body_bytes: usize,
    /// Longest a request may take, from its head to its last token.
    pub deadline: Duration,
    /// Longest a client may take to send a request's head, and then between two parts of its body.
    pub patience: Duration,
    /// Longest that running requests may go on once the server is told to stop.
    pub drain: Duration,
    /// Counts how long tokens of event streams took from the arrival of a worker's reply to the write to the client's socket.
    pub delays: Arc<Delays>,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self {
            body_bytes: 8 << 20,
            deadline: Duration::from_secs(600),
            patience: Duration::from_secs(30),
            drain: Duration::from_secs(30),
            delays: Arc::default(),
        }
    }
}

/// Why serving ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The reflection service could not be built.
    #[error("the gRPC reflection service cannot be built")]
    Reflection(#[source] tonic_reflection::server::Error),
}

/// What every handler sees.
pub(crate) struct Shared {
    edge: Edge,
    options: ApiOptions,
    models: models::Models,
    metrics: Arc<metrics::Metrics>,
    /// Seconds since 1970.
    started: u64,
    /// True once the server is to stop.
    stopping: watch::Receiver<bool>,
}

impl Shared {
    fn new(edge: Edge, options: ApiOptions, stopping: watch::Receiver<bool>) -> Self {
        Self {
            metrics: Arc::new(metrics::Metrics::new(edge.clone(), Arc::clone(&options.delays))),
            models: models::Models::default(),
            started: models::unix_seconds(),
            stopping,
            options,
            edge,
        }
    }
}

/// Serves HTTP and gRPC until `shutdown` completes; then takes no new connections, closes those without a running request, and gives
/// running requests [`ApiOptions::drain`] to end.
///
/// # Errors
/// When a service cannot be built.
pub async fn serve(
    edge: Edge,
    http: TcpListener,
    grpc: TcpListener,
    options: ApiOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let (stop, stopping) = watch::channel(false);
    let drain = options.drain;
    let shared = Arc::new(Shared::new(edge, options, stopping));
    let servers = async { tokio::join!(http::serve(Arc::clone(&shared), http), grpc::serve(Arc::clone(&shared), grpc)).1 };
    let mut servers = std::pin::pin!(servers);
    let mut shutdown = std::pin::pin!(shutdown);
    tokio::select! {
        ended = &mut servers => return ended,
        () = &mut shutdown => {}
    }
    // No receiver left means that both servers have ended.
    let _ = stop.send(true);
    tokio::time::timeout(drain, servers).await.unwrap_or(Ok(()))
}

/// Completes when the server is to stop.
async fn stopped(mut stopping: watch::Receiver<bool>) {
    // An error means that the server is gone, which is a stop as well.
    let _ = stopping.wait_for(|stop| *stop).await;
}
