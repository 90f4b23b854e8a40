//! Snapshots of what the edge serves and how busy it is, for `/v1/models`, `/metrics` and the report to the control plane.

use plan::fleet::{ReplicaLimits, ServingSettings};

use crate::{replica::Fetching, scheduler::StepSizes};

/// One model that requests can name.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelStatus {
    /// Name in the `model` field of requests.
    pub name: String,
    /// Other names it answers to.
    pub aliases: Vec<String>,
    /// Resource name of its deployment.
    pub deployment: String,
    /// What its replicas can hold.
    pub limits: ReplicaLimits,
    /// Chat and queue settings.
    pub serving: ServingSettings,
    /// Names of its adapters; requests name one as `name:adapter`.
    pub adapters: Vec<String>,
    /// Replicas in the fleet.
    pub replicas: usize,
    /// Replicas from which a token came out of the last stage.
    pub ready_replicas: usize,
}

/// How busy a deployment is. Counters only grow while the deployment stays in the fleet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeploymentLoad {
    /// Resource name.
    pub deployment: String,
    /// Name in the `model` field of requests.
    pub model: String,
    /// Sequences waiting.
    pub queued: usize,
    /// Requests that wait because there is no replica at all.
    pub held: usize,
    /// Sequences in batches.
    pub running: usize,
    /// Fraction of KV blocks in use by sequences, 0 to 1; the fullest group, the mean over ready replicas.
    pub kv_used: f32,
    /// 90th percentile of the time from submission to the first token, in seconds, over the last 512 streams.
    pub ttft_p90_seconds: Option<f32>,
    /// 90th percentile of the time between tokens of a stream, in seconds, over the last 4,096 tokens.
    pub itl_p90_seconds: Option<f32>,
    /// Tokens emitted per second over the last 10 s.
    pub tokens_per_second: f32,
    /// Tokens emitted.
    pub tokens_total: u64,
    /// Prompt tokens processed or found in the cache.
    pub prompt_tokens_total: u64,
    /// Tokens looked up in the prefix cache.
    pub prefix_query_tokens_total: u64,
    /// Tokens found in the prefix cache.
    pub prefix_hit_tokens_total: u64,
    /// Sequences put back into the queue because blocks ran out.
    pub preemptions_total: u64,
    /// Times that drafts of a sequence were verified.
    pub drafts_total: u64,
    /// Tokens in drafts.
    pub draft_tokens_total: u64,
    /// Drafted tokens that were what was drawn.
    pub accepted_tokens_total: u64,
    /// Sessions of draft models that ended in a failure.
    pub draft_failures_total: u64,
    /// Streams that went on after their replica was lost or drained.
    pub resumed_total: u64,
    /// Requests refused because the queue was full.
    pub refused_total: u64,
    /// Steps sent, by their number of tokens.
    pub step_sizes: StepSizes,
    /// Its replicas.
    pub replicas: Vec<ReplicaLoad>,
}

/// How busy a replica is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReplicaLoad {
    /// Unique name.
    pub name: String,
    /// A token came out of the last stage in the present session.
    pub ready: bool,
    /// No new requests are sent to it.
    pub draining: bool,
    /// This router drives it.
    pub drives: bool,
    /// Sequences of this router's clients that are on it or queued for it.
    pub sequences: usize,
    /// Sequences waiting.
    pub queued: usize,
    /// Sequences in batches.
    pub running: usize,
    /// Fraction of KV blocks in use by sequences, 0 to 1; the fullest group.
    pub kv_used: f32,
    /// Tokens per second of this router's clients, over the last 10 s.
    pub tokens_per_second: f32,
    /// 90th percentile of their time to the first token, in seconds, over the last minute.
    pub ttft_p90_seconds: Option<f32>,
    /// Steps finished in all sessions.
    pub steps_total: u64,
    /// Sessions that ended in a failure.
    pub failures_total: u64,
    /// What its workers bring from servers, if this router drives it.
    pub fetching: Fetching,
    /// Why the last session ended, or could not be opened.
    pub last_failure: Option<String>,
    /// The deployment's adapters, in its order.
    pub adapters: Vec<AdapterLoad>,
    /// Its draft model, where it has one and this router drives it.
    pub draft: Option<DraftLoad>,
}

/// How the draft model of a replica is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DraftLoad {
    /// It can be asked for guesses; neither this nor a failure: it is being loaded.
    pub ready: bool,
    /// Why it cannot, or what it was lost by.
    pub failure: Option<String>,
}

/// How an adapter is doing on a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterLoad {
    /// Its name.
    pub name: String,
    /// Its numerics id.
    pub numerics: String,
    /// Every worker has it; neither this nor a failure: it is to be loaded, or being loaded.
    pub ready: bool,
    /// Why it cannot be loaded.
    pub failure: Option<String>,
}
