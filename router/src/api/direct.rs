//! Requests from this process rather than from a socket: the same checks, defaults, tokenizing and streams.

use std::sync::Arc;

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::ApiError;
use super::request::{Dialect, Request};
use super::run::Run;
use super::{ApiOptions, Shared};
use crate::edge::{Edge, FinishReason};

/// Answers requests of its own process.
pub struct Direct {
    shared: Arc<Shared>,
    /// Never told to stop: whoever holds it decides.
    _stop: watch::Sender<bool>,
}

/// Which of a model's chat templates there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Templates {
    /// The model's files hold one.
    pub own: bool,
    /// Conversations can be rendered, with it or with one from the deployment.
    pub any: bool,
}

/// A request that was read and checked.
pub struct DirectRequest(Request);

/// An answer as it comes. Dropping it cancels the request.
pub struct DirectAnswer(Run);

/// What became certain of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text.
    pub text: String,
    /// Why the answer ended, with its last piece.
    pub finish: Option<FinishReason>,
}

/// Tokens of a request so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenCounts {
    /// Of the prompt.
    pub prompt: u64,
    /// Of the prompt, those whose KV entries were found in the prefix cache.
    pub cached: u64,
    /// Of the answer.
    pub completion: u64,
}

/// Why a request has no answer, in the words an HTTP client would see.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For a person.
    pub message: String,
    /// The `code` of the error object.
    pub code: &'static str,
    /// The request is at fault, and not the server.
    pub request: bool,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self { request: error.status.is_client_error(), code: error.code, message: error.message }
    }
}

impl DirectRequest {
    /// Reads the JSON object that a client would send to `/v1/completions` or `/v1/chat/completions`.
    ///
    /// # Errors
    /// When a parameter is not known, of the wrong type or out of range.
    pub fn parse(dialect: Dialect, body: &Value) -> Result<Self, Refusal> {
        Ok(Self(Request::parse(dialect, body.to_string().as_bytes())?))
    }
}

impl Direct {
    /// Answers with the models of `edge`.
    pub fn new(edge: Edge, options: ApiOptions) -> Self {
        let (stop, stopping) = watch::channel(false);
        Self { shared: Arc::new(Shared::new(edge, options, stopping)), _stop: stop }
    }

    /// The chat templates of `model`.
    ///
    /// # Errors
    /// When the model is not known, or its tokenizer cannot be read.
    pub async fn templates(&self, model: &str) -> Result<Templates, Refusal> {
        let model = self.shared.models.get(&self.shared.edge, model).await?;
        Ok(Templates { own: model.tokenizer.has_own_template(), any: model.tokenizer.has_template() })
    }

    /// Starts a request.
    ///
    /// # Errors
    /// When its text cannot become a prompt that the model takes, or it is not admitted.
    pub async fn start(&self, request: DirectRequest) -> Result<DirectAnswer, Refusal> {
        let job = request.0.prepare(&self.shared, Instant::now()).await?;
        Ok(DirectAnswer(Run::start(&self.shared.edge, &self.shared.metrics, job)?))
    }
}

impl DirectAnswer {
    /// The next piece; `None` after the end. Cancel-safe. Of several choices the pieces come as they are made.
    ///
    /// # Errors
    /// When the answer broke off.
    pub async fn next(&mut self) -> Option<Result<Piece, Refusal>> {
        let delta = self.0.next().await?;
        Some(delta.map(|delta| Piece { text: delta.text, finish: delta.finish }).map_err(Refusal::from))
    }

    /// The tokens so far.
    pub fn counts(&self) -> TokenCounts {
        let usage = self.0.usage();
        TokenCounts { prompt: usage.prompt_tokens, cached: usage.cached_tokens, completion: usage.completion_tokens }
    }
}
