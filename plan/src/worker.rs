//! What one worker process is told when it starts.

use serde::{Deserialize, Serialize};

use crate::{
    model::ModelConfig,
    shard::{KvGeometry, Shard},
};

/// Everything a worker needs to load its slice and join its replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// Unique name of the replica.
    pub replica: String,
    /// Source of the model: `file:…`, `hf://…`, `http(s)://…`.
    pub uri: String,
    /// `sha256:<hex>` of the model's (single) weight file, when pinned.
    pub digest: Option<String>,
    /// Model shape.
    pub config: ModelConfig,
    /// What this worker owns.
    pub shard: Shard,
    /// KV cache layout.
    pub kv: KvGeometry,
    /// Longest sequence, in tokens.
    pub max_context: usize,
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Compute threads; at least 1.
    pub threads: usize,
    /// How the ranks of a stage talk.
    pub collective: CollectiveKind,
}

/// Transport of the collectives of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CollectiveKind {
    /// Shared memory; ranks on one machine.
    SharedMemory,
    /// Unix socket; ranks on one machine.
    Unix,
    /// TCP; any placement.
    Tcp,
}

/// One router's claim on a replica. Compared whole; ordered by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epoch {
    /// Ascending; 0 is before any epoch.
    pub number: u64,
    /// Random, so that two epochs of one number are told apart.
    pub session: u64,
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:016x}", self.number, self.session)
    }
}
