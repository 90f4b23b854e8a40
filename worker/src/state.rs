//! What the parts of a worker share.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use engine::Progress;
use identity::Identity;
use plan::worker::{CollectiveKind, WorkerSpec};
use proto::{bearer::Bearer, worker as wire};
use source::{Source, SourceOptions};
use tokio::{runtime::Handle, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    adapters::Adapters,
    collective::{Address, Lobby, Unjoined, Waits},
    compute::Jobs,
    gate::Gate,
    options::Deadlines,
};

/// One worker process.
pub(crate) struct Worker {
    pub(crate) spec: WorkerSpec,
    pub(crate) deadlines: Deadlines,
    pub(crate) incarnation: u64,
    pub(crate) bearer: Bearer,
    pub(crate) identity: Option<Identity>,
    pub(crate) gate: Gate,
    pub(crate) lobby: Arc<Lobby>,
    pub(crate) collective_address: Address,
    pub(crate) loading: Loading,
    /// How weights are fetched; the digest is another for each source.
    pub(crate) source: SourceOptions,
    pub(crate) adapters: Adapters,
    /// Sessions for the engine thread.
    pub(crate) jobs: Jobs,
    /// Tasks of sessions and links.
    pub(crate) tasks: TaskTracker,
    /// Everything ends.
    pub(crate) stop: CancellationToken,
    /// Where input and output happen.
    pub(crate) runtime: Handle,
    /// An epoch is being granted.
    pub(crate) granting: AtomicBool,
}

/// How far the weights are.
pub(crate) struct Loading {
    /// Read from files that are here.
    bytes: AtomicU64,
    /// Brought here from a server, and what there is to bring.
    fetched: AtomicU64,
    to_fetch: AtomicU64,
    /// The engine's counters, once it is loaded.
    progress: OnceLock<Arc<Progress>>,
    /// The model's files, once they are open.
    pub(crate) source: watch::Sender<Option<Arc<Source>>>,
}

impl Default for Loading {
    fn default() -> Self {
        Self {
            bytes: AtomicU64::default(),
            fetched: AtomicU64::default(),
            to_fetch: AtomicU64::default(),
            progress: OnceLock::new(),
            source: watch::Sender::new(None),
        }
    }
}

impl Loading {
    pub(crate) fn read(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn fetched(&self, bytes: u64, of: u64) {
        self.fetched.store(bytes, Ordering::Relaxed);
        self.to_fetch.store(of, Ordering::Relaxed);
    }

    fn fetching(&self) -> (u64, u64) {
        (self.fetched.load(Ordering::Relaxed), self.to_fetch.load(Ordering::Relaxed))
    }

    /// The part that is done, of bringing and reading, of a worker that has `all` bytes to read.
    fn fraction(&self, all: u64) -> f64 {
        let (read, (fetched, to_fetch)) = (self.bytes.load(Ordering::Relaxed), self.fetching());
        ((read + fetched) as f64 / (all + to_fetch).max(1) as f64).min(1.0)
    }

    pub(crate) fn loaded(&self, progress: Arc<Progress>) {
        // The engine is loaded once.
        let _ = self.progress.set(progress);
    }

    pub(crate) fn progress(&self) -> Option<&Arc<Progress>> {
        self.progress.get()
    }
}

impl Worker {
    pub(crate) fn stage(&self) -> usize {
        self.spec.shard.stage
    }

    pub(crate) fn rank(&self) -> usize {
        self.spec.shard.rank
    }

    /// Whether it draws the tokens.
    pub(crate) fn samples(&self) -> bool {
        self.spec.shard.is_last() && self.rank() == 0
    }

    pub(crate) fn identity(&self) -> wire::WorkerIdentity {
        wire::WorkerIdentity {
            replica: self.spec.replica.clone(),
            stage: self.stage() as u32,
            rank: self.rank() as u32,
            incarnation: self.incarnation,
        }
    }

    /// The answer to a probe.
    pub(crate) fn probed(&self) -> wire::ProbeReply {
        let loaded = self.loading.progress().is_some();
        let (fetched_bytes, fetch_bytes) = self.loading.fetching();
        wire::ProbeReply {
            identity: Some(self.identity()),
            highest: Some(proto::convert::encode_epoch(self.gate.highest())),
            loaded,
            progress: if loaded { 1.0 } else { self.loading.fraction(self.spec.shard.bytes_to_load()) as f32 },
            collective_address: self.collective_address.to_string(),
            fetched_bytes,
            fetch_bytes,
        }
    }

    /// The ranks of its stage, before a session joins them.
    pub(crate) fn unjoined(&self) -> Unjoined {
        Unjoined { rank: self.rank(), ranks: self.spec.shard.ranks }
    }

    /// How long the ranks of its stage wait for each other.
    pub(crate) fn waits(&self) -> Waits {
        let shard = &self.spec.shard;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // Shared memory means one machine, and then the other stages are usually there too.
        let crowded = shard.stages * shard.ranks * self.spec.threads > cores;
        let spin = if self.spec.collective == CollectiveKind::SharedMemory && !crowded { SPIN } else { Duration::ZERO };
        Waits { meet: self.deadlines.meet, exchange: self.deadlines.exchange, spin }
    }
}

/// Awake in a wait: several times what ranks that compute equal shares are apart, and far less than a scheduler's slice.
const SPIN: Duration = Duration::from_micros(50);
