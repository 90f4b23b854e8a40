//! Replicas: what drives one whole copy of a model, wherever it runs.
//!
//! A [`Replica`] is dialled again and again over its life; every [`Session`] it opens starts from empty workers. Steps go in
//! and replies come out in the same order. How the steps travel (gRPC to worker processes, a thread with an engine in it, a
//! simulation) is the implementation's business; what they contain is the scheduler's.

mod loading;
pub(crate) mod owner;
pub mod simulated;
mod workers;

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

pub use loading::{Loading, loading};
use plan::{
    adapter::AdapterSource,
    card::ModelCard,
    fleet::FleetReplica,
    step::{Output, Step},
};
use tokio::{sync::mpsc, time::Instant};
pub use workers::WorkersConnector;

/// A boxed future, so that traits with async functions can be objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One whole copy of a model.
pub trait Replica: Send + Sync + 'static {
    /// Pipeline stages; at least 1. At most `stages + 1` steps are in flight.
    fn stages(&self) -> usize;

    /// Opens a session: every worker of the replica is ready for steps and has no sequences and no KV content.
    ///
    /// At most one session is open at a time; the caller drops the last one before it asks for another.
    fn open(&self) -> BoxFuture<'_, Result<Session, ReplicaError>>;

    /// What its workers bring from servers, as far as they said when a session was last asked for.
    fn fetching(&self) -> Fetching {
        Fetching::default()
    }

    /// Where the time of its workers went so far, by stage, then rank; none where they do not say.
    fn times(&self) -> Vec<WorkerTimes> {
        Vec::new()
    }

    /// The files the router needs to tokenize for the model.
    fn card(&self) -> BoxFuture<'_, Result<Arc<ModelCard>, ReplicaError>>;
}

/// Where a worker's time went in the steps that it answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerTimes {
    /// Pipeline stage, from 0.
    pub stage: usize,
    /// Rank in the stage, from 0.
    pub rank: usize,
    /// Steps answered.
    pub steps: u64,
    /// Computing.
    pub compute: Duration,
    /// Exchanges with the ranks of its stage.
    pub collective: Duration,
    /// Sending to other stages.
    pub link: Duration,
    /// Waiting for its input: the stage before, or tokens that are drawn.
    pub wait: Duration,
}

/// Bytes that the workers of a replica bring from servers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetching {
    /// Those that are there.
    pub done: u64,
    /// All of them; 0 where every file was there before.
    pub total: u64,
}

/// A live session. Dropping it ends the session; the implementation stops when `steps` closes.
#[derive(Debug)]
pub struct Session {
    /// Steps, in order. The capacity is at least `stages + 1`, so that a send never waits for a reply.
    pub steps: mpsc::Sender<Step>,
    /// One reply per step, in order, from the last stage; after an error, or when the channel closes, nothing more.
    /// The capacity is at least `stages + 2`: every step in flight and one error.
    pub replies: mpsc::Receiver<Result<StepReply, ReplicaError>>,
    /// What becomes of the slots of adapters, all of which are empty at first.
    pub adapters: AdapterLine,
    /// Why its steps may have no masks; `None`: they may.
    pub unmasked: Option<String>,
}

/// Most orders that may wait to be sent to the workers, and answers that may wait to be taken.
pub const ADAPTER_ORDERS: usize = 256;

/// The way of orders about adapters, and of the answers.
#[derive(Debug)]
pub struct AdapterLine {
    /// Orders, in order; an unload takes effect behind the steps that were replied to before it was sent.
    pub orders: mpsc::Sender<AdapterOrder>,
    /// One answer to each load, once every worker has the adapter or one of them cannot have it; in any order.
    pub answers: mpsc::Receiver<AdapterAnswer>,
}

/// The other end of an [`AdapterLine`].
#[derive(Debug)]
pub struct AdapterEnd {
    /// See [`AdapterLine::orders`].
    pub orders: mpsc::Receiver<AdapterOrder>,
    /// See [`AdapterLine::answers`].
    pub answers: mpsc::Sender<AdapterAnswer>,
}

impl AdapterLine {
    /// Both ends of a new one.
    pub fn new() -> (Self, AdapterEnd) {
        let ((orders, receive_orders), (send_answers, answers)) = (mpsc::channel(ADAPTER_ORDERS), mpsc::channel(ADAPTER_ORDERS));
        (Self { orders, answers }, AdapterEnd { orders: receive_orders, answers: send_answers })
    }
}

/// Fills or empties a slot on every worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdapterOrder {
    /// Loads an adapter beside running steps, and puts it into a slot, from 1 on, that is empty.
    Load {
        /// The slot.
        slot: u32,
        /// The adapter.
        adapter: AdapterSource,
    },
    /// Empties a slot.
    Unload {
        /// The slot.
        slot: u32,
    },
}

/// What became of a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterAnswer {
    /// The slot.
    pub slot: u32,
    /// Steps may name the slot, or why not; of workers that do have the adapter the slot is then still to be emptied.
    pub result: Result<(), String>,
}

/// What the last stage says about a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReply {
    /// The step's number.
    pub step: u64,
    /// When it came.
    pub arrived: Instant,
    /// Results in the order of the step's sequences and their wants.
    pub outputs: Vec<Output>,
}

/// Why a session could not be opened, or ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReplicaError {
    /// A worker cannot be reached, or its connection broke.
    #[error("worker {worker} is gone: {detail}")]
    Lost {
        /// Address, or another name.
        worker: String,
        /// What was seen.
        detail: String,
    },
    /// A worker's heartbeats stopped.
    #[error("worker {worker} has been silent for {millis} ms")]
    Silent {
        /// Address, or another name.
        worker: String,
        /// Since when.
        millis: u64,
    },
    /// A worker makes no progress in a step.
    #[error("worker {worker} has been stuck at step {step}, layer {layer} for {millis} ms")]
    Stuck {
        /// Address, or another name.
        worker: String,
        /// The step.
        step: u64,
        /// Layers finished in it.
        layer: u32,
        /// Since when.
        millis: u64,
    },
    /// A worker ended the session.
    #[error("worker {worker} ended the session: {reason}: {detail}")]
    Failed {
        /// Address, or another name.
        worker: String,
        /// From the closed list of `worker.proto`.
        reason: String,
        /// For a person.
        detail: String,
    },
    /// A worker sent what cannot be.
    #[error("worker {worker} broke the protocol: {detail}")]
    Protocol {
        /// Address, or another name.
        worker: String,
        /// What was expected and what came.
        detail: String,
    },
    /// Weights are still being loaded.
    #[error("worker {worker} has loaded {percent} % of its weights")]
    Loading {
        /// Address, or another name.
        worker: String,
        /// 0 to 100.
        percent: u8,
    },
    /// The router is stopping, or the replica left the fleet.
    #[error("the session was closed")]
    Closed,
}

impl ReplicaError {
    /// Stable, low-cardinality key for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Lost { .. } => "worker_lost",
            Self::Silent { .. } => "worker_silent",
            Self::Stuck { .. } => "worker_stuck",
            Self::Failed { .. } => "worker_failed",
            Self::Protocol { .. } => "protocol",
            Self::Loading { .. } => "loading",
            Self::Closed => "closed",
        }
    }
}

/// Makes the [`Replica`] for each replica that appears in the fleet.
pub trait Connector: Send + Sync + 'static {
    /// Called once for each replica of a fleet state and again when its workers change. Does not dial.
    fn replica(&self, replica: &FleetReplica) -> Arc<dyn Replica>;

    /// What drives the draft model that the record of a replica names; called again when that changes. `None`: this connector has none. Does
    /// not dial.
    fn draft(&self, _replica: &FleetReplica) -> Option<Arc<dyn Replica>> {
        None
    }
}
