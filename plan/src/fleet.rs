//! The fleet as a router sees it: deployments, replicas and where their workers listen.

use crate::{adapter::AdapterSource, shard::KvGeometry};
use serde::{Deserialize, Serialize};

/// The whole state pushed to routers. States with a lower `(term, number)` than one already taken are ignored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FleetState {
    /// Lease term of whoever pushes.
    pub term: u64,
    /// Number of the state in its term.
    pub number: u64,
    /// Deployments served in this namespace.
    pub deployments: Vec<FleetDeployment>,
    /// Every router of the pool; empty where there is no other.
    pub routers: Vec<FleetRouter>,
}

/// One router of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetRouter {
    /// Unique name.
    pub name: String,
    /// Where other routers reach it: `host:port`.
    pub address: String,
    /// Whose it is: the deployment whose own router it is, or nothing for one of the namespace's.
    #[serde(default)]
    pub pool: String,
}

/// One deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FleetDeployment {
    /// Resource name.
    pub name: String,
    /// Name in the `model` field of requests.
    pub model: String,
    /// Other names it answers to.
    pub aliases: Vec<String>,
    /// What requests are checked against: the limits of the newest revision.
    pub limits: ReplicaLimits,
    /// Chat and queue settings.
    pub serving: ServingSettings,
    /// Whose routers drive its replicas, as in [`FleetRouter::pool`]; others that are told of it reach them through those.
    #[serde(default)]
    pub drivers: String,
    /// Its replicas.
    pub replicas: Vec<FleetReplica>,
    /// Low-rank adapters that every replica is to have.
    #[serde(default)]
    pub adapters: Vec<FleetAdapter>,
}

/// A low-rank adapter of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetAdapter {
    /// What requests name behind the model's name and a colon.
    pub name: String,
    /// Where workers find it.
    pub source: AdapterSource,
}

/// What one replica can hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaLimits {
    /// KV groups and blocks; an encoder has none.
    pub kv: KvGeometry,
    /// Longest sequence in tokens.
    pub max_context: usize,
    /// Most sequences in a step.
    pub max_batch_sequences: usize,
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Reuse KV blocks of equal prefixes.
    pub prefix_caching: bool,
}

impl ReplicaLimits {
    /// Whether the model is an encoder, of which nothing is kept from step to step: it has no KV groups.
    pub fn is_encoder(&self) -> bool {
        self.kv.groups.is_empty()
    }
}

/// Settings that routers follow and workers know nothing of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServingSettings {
    /// Chat template that replaces the model's own.
    pub chat_template: Option<ChatTemplate>,
    /// Put before the first message when a request has no system message.
    pub system_prompt: Option<String>,
    /// How a replica is chosen.
    pub policy: RoutingPolicy,
    /// Most requests waiting.
    pub queue_requests: usize,
    /// Longest wait in seconds.
    pub queue_seconds: u64,
    /// Most tokens drafted for a sequence in a step by looking up where its last ones stood before; 0: none. Drafts change no token.
    pub prompt_lookup: usize,
    /// What happens to requests while there is no replica; `None` refuses them, since nothing would wake one.
    pub hold: Option<HoldSettings>,
    /// Why there are no replicas, where none are wanted and no request changes that.
    pub stopped: Option<Stopped>,
}

/// Why a deployment has no replicas, and gets none until somebody changes its resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stopped {
    /// `spec.suspend` is true.
    Suspended,
    /// `spec.replicas` is 0, and nobody else decides the number.
    ScaledToZero,
}

/// Requests that wait for the first replica of a deployment that is scaled to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldSettings {
    /// Most requests held.
    pub requests: usize,
    /// Longest that one is held, in seconds.
    pub seconds: u64,
}

/// Where a chat template comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChatTemplate {
    /// `<start_of_turn>` form.
    Gemma,
    /// `<|im_start|>` form.
    ChatML,
    /// `<|start_header_id|>` form.
    Llama3,
    /// Jinja source.
    Inline(String),
}

/// How a replica is chosen for a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the names say it")]
pub enum RoutingPolicy {
    #[default]
    PrefixAware,
    LeastLoad,
    RoundRobin,
    Random,
}

/// One replica: its workers and their addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetReplica {
    /// Unique name.
    pub name: String,
    /// Revision of the spec it runs.
    pub revision: String,
    /// Digests and settings that decide its bits; streams move only between equal ids.
    pub numerics: String,
    /// Share of new requests, relative to the other replicas.
    pub weight: u32,
    /// No new requests; running ones move away.
    pub draining: bool,
    /// What it can hold. Revisions differ.
    pub limits: ReplicaLimits,
    /// `workers[stage][rank]`: address `host:port`.
    pub workers: Vec<Vec<String>>,
    /// The model that guesses for it. It changes no bit, and comes and goes while the replica runs.
    #[serde(default)]
    pub draft: Option<FleetDraft>,
}

/// A small model of the same vocabulary beside a replica, in one worker of its own, that guesses the tokens which come next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetDraft {
    /// Its worker's address `host:port`.
    pub worker: String,
    /// What it can hold.
    pub limits: ReplicaLimits,
    /// What a step of one row takes, in thousandths of such a step of the replica.
    pub cost: u32,
    /// Its tokens were found to be the model's; else a router compares them before it asks for guesses.
    #[serde(default)]
    pub compared: bool,
}
