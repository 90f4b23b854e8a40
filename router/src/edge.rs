//! The seam between the API and the scheduler: a generation goes in, its tokens come out.
//!
//! The edge holds the client's side of a stream: prompt ids, emitted ids, sampling state. It picks a replica, and when that
//! replica is lost it submits the sequence again elsewhere, so that the API sees one unbroken stream.

mod admission;
mod evaluate;
mod handle;
pub(crate) mod stats;
mod status;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use plan::{
    fleet::Stopped,
    step::{Logprobs, Output, Sampling, TokenId, Want},
};

pub use handle::{Edge, EdgeOptions};
pub use status::{AdapterLoad, DeploymentLoad, DraftLoad, ModelStatus, ReplicaLoad};
pub use stream::TokenStream;

use crate::grammar::Constraint;

/// One sequence to generate, fully tokenized.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Prompt ids, at least one.
    pub prompt: Arc<[TokenId]>,
    /// How tokens are drawn; `seed` is set.
    pub sampling: Sampling,
    /// Most tokens to emit.
    pub max_tokens: u32,
    /// A token from this list ends the stream and is its last one.
    pub end_ids: Arc<[TokenId]>,
    /// `Some(n)`: score every prompt token and return that many alternatives (echo with log-probabilities).
    pub score_prompt: Option<u32>,
    /// What the output must match; `sampling.masked` says the same.
    pub constraint: Option<Constraint>,
}

/// What a stream says, in order: at most one `Prompt`, tokens, then exactly one `Finished` or `Failed`.
#[derive(Clone, Debug)]
pub enum StreamEvent {
    /// The prompt was processed; scores of prompt tokens 1.. when asked for (the first token has none).
    Prompt {
        /// Prompt tokens whose KV came from the prefix cache.
        cached_tokens: u32,
        /// One entry per prompt token from the second on; empty unless asked for.
        scores: Vec<Logprobs>,
    },
    /// The next token.
    Token {
        /// Its id.
        id: TokenId,
        /// Present when asked for.
        logprobs: Option<Logprobs>,
    },
    /// The end.
    Finished(FinishReason),
    /// The stream cannot go on; text for the client.
    Failed(StreamError),
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token was drawn.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
}

/// Why a stream broke.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamError {
    /// Its adapter was unloaded before it began, or while it moved from one replica to another.
    #[error("adapter {0} is not served any more")]
    NoAdapter(String),
    /// Its adapter is on no replica.
    #[error("adapter {name} cannot be loaded: {why}")]
    AdapterFailed {
        /// Its name.
        name: String,
        /// What a worker said.
        why: String,
    },
    /// No replica with the same numerics is left.
    #[error("no replica can continue this stream: {0}")]
    NoReplica(String),
    /// The engine refused the sequence.
    #[error("{0}")]
    Engine(String),
    /// The request waited longer than allowed for its first batch.
    #[error("the request waited {0} s in the queue, and no replica took it")]
    Queue(u64),
    /// The request took longer than allowed.
    #[error("deadline of {0} s passed")]
    Deadline(u64),
    /// There is no replica any more, and none is wanted.
    #[error("{}", stopped(.0, *.1))]
    Stopped(String, Stopped),
    /// The router is stopping.
    #[error("the router is stopping")]
    Stopping,
}

impl StreamError {
    /// Stable, low-cardinality key for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoAdapter(_) => "adapter_unloaded",
            Self::AdapterFailed { .. } => "adapter_failed",
            Self::NoReplica(_) => "no_replica",
            Self::Engine(_) => "engine",
            Self::Queue(_) => "queue_timeout",
            Self::Deadline(_) => "deadline",
            Self::Stopped(..) => "stopped",
            Self::Stopping => "stopping",
        }
    }
}

/// Words for a model that has no replicas because none are wanted. Whose resource it is can change that; a client cannot.
fn stopped(model: &str, why: Stopped) -> String {
    match why {
        Stopped::Suspended => format!("model {model} is suspended (spec.suspend of its deployment is true)"),
        Stopped::ScaledToZero => format!("model {model} is scaled to zero (spec.replicas of its deployment is 0)"),
    }
}

/// Why a generation was not admitted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SubmitError {
    /// No deployment has this name.
    #[error("model {0} does not exist")]
    UnknownModel(String),
    /// The model has no adapter of this name.
    #[error("model {model} has no adapter {adapter}; {}", served(.known))]
    UnknownAdapter {
        /// The model.
        model: String,
        /// What was asked for.
        adapter: String,
        /// What requests can name, as `model:adapter`.
        known: Vec<String>,
    },
    /// The queue is full.
    #[error("the queue of {queued} requests is full")]
    QueueFull {
        /// Requests waiting.
        queued: usize,
        /// When to try again.
        retry_after_seconds: u64,
    },
    /// No replica is ready and none is expected in time.
    #[error("no replica of {0} is ready")]
    NotReady(String),
    /// There is no replica, and none is wanted.
    #[error("{}", stopped(.0, *.1))]
    Stopped(String, Stopped),
    /// There is no replica, and as many requests as may wait for one do.
    #[error("{held} requests wait for the first replica of {model}, and no more may")]
    HoldFull {
        /// The model.
        model: String,
        /// Requests held.
        held: usize,
    },
    /// No worker gave what is needed to read the request while it waited.
    #[error("the request waited {seconds} s in the queue, and no replica of {model} took it: {detail}")]
    Queue {
        /// The model.
        model: String,
        /// How long.
        seconds: u64,
        /// What the last worker said.
        detail: String,
    },
    /// Prompt and output do not fit.
    #[error("prompt of {prompt} tokens does not fit the context of {context} tokens")]
    TooLong {
        /// Prompt tokens.
        prompt: usize,
        /// Longest sequence.
        context: usize,
    },
}

impl SubmitError {
    /// Stable, low-cardinality key for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownModel(_) => "unknown_model",
            Self::UnknownAdapter { .. } => "unknown_adapter",
            Self::QueueFull { .. } => "queue_full",
            Self::NotReady(_) => "not_ready",
            Self::Stopped(..) => "stopped",
            Self::HoldFull { .. } => "hold_full",
            Self::Queue { .. } => "queue_timeout",
            Self::TooLong { .. } => "too_long",
        }
    }
}

/// Names of adapters in words.
fn served(names: &[String]) -> String {
    if names.is_empty() { "it has none".to_owned() } else { format!("served are {}", names.join(", ")) }
}

/// A sequence of given ids, run for what a model computes at them rather than for text.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Ids, at least one.
    pub ids: Arc<[TokenId]>,
    /// What is computed where; `offset` is the absolute position in `ids`. Ascending by offset.
    pub wants: Vec<Want>,
    /// Most ids in one step; `None` leaves it to the scheduler.
    pub chunk: Option<usize>,
    /// Tokens to draw after the last id at temperature 0, end tokens or not.
    pub greedy: u32,
    /// All logits of every position that a greedy token is drawn at, before that token's own output.
    pub greedy_logits: bool,
}

/// Why an evaluation has no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EvaluateError {
    /// It was not admitted.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// It broke.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The ids are not what the model takes.
    #[error("{0}")]
    Invalid(String),
}

/// Results of an evaluation, in order of position, then of the wants there.
pub type Evaluated = Vec<Output>;
