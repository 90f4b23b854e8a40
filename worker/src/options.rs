//! What a worker is started with.

use std::{fmt, net::SocketAddr, time::Duration};

use identity::Identity;
use kernels::Isa;
use plan::worker::WorkerSpec;
use source::SourceOptions;

/// Everything [`crate::serve()`] needs.
#[derive(Clone)]
pub struct WorkerOptions {
    /// What this worker owns, and of which replica.
    pub spec: WorkerSpec,
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// What every call must carry, and calls to other workers do.
    pub token: Option<String>,
    /// What it proves to be, and has others prove; connections are plain without.
    pub identity: Option<Identity>,
    /// Routers, or a service that leads to any, to say where this worker is while it has no session: `http://host:port`.
    pub announce: Vec<String>,
    /// Instructions of the kernels.
    pub isa: Isa,
    /// How weights are fetched; the digest of the spec, where it has one, replaces that of these.
    pub source: SourceOptions,
    /// How long it waits for others.
    pub deadlines: Deadlines,
}

impl WorkerOptions {
    /// Options with the usual deadlines.
    pub fn new(spec: WorkerSpec, listen: SocketAddr, token: Option<String>, isa: Isa, source: SourceOptions) -> Self {
        Self { spec, listen, token, identity: None, announce: Vec::new(), isa, source, deadlines: Deadlines::default() }
    }
}

impl fmt::Debug for WorkerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerOptions")
            .field("replica", &self.spec.replica)
            .field("stage", &self.spec.shard.stage)
            .field("rank", &self.spec.shard.rank)
            .field("listen", &self.listen)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("identity", &self.identity)
            .field("announce", &self.announce)
            .field("isa", &self.isa)
            .field("source", &self.source)
            .field("deadlines", &self.deadlines)
            .finish()
    }
}

/// How long a worker waits for others.
///
/// A stopped or partitioned process is noticed by its heartbeats within a second, and then every wait of the session is interrupted. These are
/// for when the router that would notice is gone too, so they may be generous enough for a machine with more work than cores.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// Another worker's answer to a probe of the arbiter.
    pub probe: Duration,
    /// The workers of an epoch to find each other.
    pub meet: Duration,
    /// Other ranks in an exchange. Longer than `mask`, for which rank 0 may wait while the others wait for it.
    pub exchange: Duration,
    /// A mask, once everything before the draw is computed.
    pub mask: Duration,
    /// An owner that says nothing: its session is ended.
    pub owner: Duration,
    /// The first message of a session or link.
    pub hello: Duration,
    /// What is under way, when the worker stops.
    pub stop: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            probe: seconds(2),
            meet: seconds(5),
            exchange: seconds(5),
            mask: seconds(3),
            owner: seconds(5),
            hello: seconds(5),
            stop: seconds(2),
        }
    }
}
