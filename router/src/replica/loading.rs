//! How far a worker is with its weights, for whoever waits for it with a person watching.

use std::time::Duration;

use proto::{
    bearer::Bearer,
    worker::{ProbeRequest, worker_client::WorkerClient},
};
use tonic::transport::Endpoint;

use super::ReplicaError;

/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(2);

/// What a worker says about its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loading {
    /// All are loaded.
    pub done: bool,
    /// Part of its bytes that were read, 0 to 1.
    pub fraction: f32,
}

/// Asks the worker at `address` (`host:port`).
///
/// # Errors
/// When it does not answer.
pub async fn loading(address: &str, token: Option<&str>) -> Result<Loading, ReplicaError> {
    let lost = |detail: String| ReplicaError::Lost { worker: address.to_owned(), detail };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| lost(error.to_string()))?;
    let channel = endpoint.timeout(ANSWER).connect_timeout(ANSWER).connect().await.map_err(|error| lost(error.to_string()))?;
    let mut client = WorkerClient::with_interceptor(channel, Bearer::new(token.map(str::to_owned)));
    let reply = client.probe(ProbeRequest {}).await.map_err(|status| lost(status.to_string()))?.into_inner();
    Ok(Loading { done: reply.loaded, fraction: reply.progress })
}
