//! A replica of worker processes, driven over gRPC.
//!
//! To open a session the router probes every worker, acquires an epoch from stage 0 rank 0, and says hello to all of them. Each step then goes
//! to every worker at once; the replies of the last stage's rank 0 are the session's. The session ends as a whole: on the first failure, broken
//! connection, silence, or worker that does not get on.

mod adapters;
mod card;
mod dial;
mod drive;
mod open;
mod pace;

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use identity::Identity;
use plan::{
    card::ModelCard,
    fleet::{FleetDraft, FleetReplica},
};
use proto::{bearer::Bearer, worker::WorkerAddress};
use tokio::{task::JoinHandle, time::timeout};

use self::dial::Remote;
use super::{BoxFuture, Connector, Fetching, Replica, ReplicaError, Session, WorkerTimes};

/// How long the driver of the last session may take to say goodbye before the next session is opened regardless.
const GOODBYE: std::time::Duration = std::time::Duration::from_secs(2);

/// Drives replicas whose workers listen at the addresses of the fleet state.
#[derive(Clone, Debug)]
pub struct WorkersConnector {
    bearer: Bearer,
    identity: Option<Identity>,
    router: String,
}

impl WorkersConnector {
    /// Calls carry `token`, where there is one.
    pub fn new(token: Option<String>) -> Self {
        static CONNECTORS: AtomicU64 = AtomicU64::new(0);
        // For the arbiter's log: which router, and which connector of it.
        let router = format!("router-{}-{}", std::process::id(), CONNECTORS.fetch_add(1, Ordering::Relaxed));
        Self { bearer: Bearer::new(token), identity: None, router }
    }

    /// Proves to be `identity` to workers, and has them prove their own names; without one, connections are plain.
    pub fn with_identity(self, identity: Option<Identity>) -> Self {
        Self { identity, ..self }
    }
}

impl Connector for WorkersConnector {
    fn replica(&self, replica: &FleetReplica) -> Arc<dyn Replica> {
        let layers = replica.limits.kv.groups.iter().map(|g| g.layers.len()).sum();
        Arc::new(Workers::new(replica, layers, self))
    }

    fn draft(&self, replica: &FleetReplica) -> Option<Arc<dyn Replica>> {
        let draft = replica.draft.as_ref()?;
        let own = FleetReplica {
            name: FleetDraft::name(&replica.name),
            limits: draft.limits.clone(),
            workers: vec![vec![draft.worker.clone()]],
            draft: None,
            ..replica.clone()
        };
        Some(self.replica(&own))
    }
}

/// One replica's workers.
struct Workers {
    name: String,
    /// Who drives it.
    router: String,
    stages: usize,
    /// Layers of the model.
    layers: usize,
    /// Most sequences in a step.
    sequences: usize,
    /// By stage, then rank.
    workers: Vec<Arc<Remote>>,
    /// What the workers said last of what they bring from servers.
    fetching: Mutex<Fetching>,
    /// Where their time went, in all sessions.
    times: Arc<Mutex<Vec<WorkerTimes>>>,
    /// The driver of the last session.
    driver: Mutex<Option<JoinHandle<()>>>,
}

impl Workers {
    fn new(replica: &FleetReplica, layers: usize, connector: &WorkersConnector) -> Self {
        let ranks = |(stage, ranks): (usize, &Vec<String>)| {
            let remote = |(rank, address): (usize, &String)| Arc::new(Remote::new(&replica.name, (stage, rank), address, connector));
            ranks.iter().enumerate().map(remote).collect::<Vec<_>>()
        };
        let workers: Vec<Arc<Remote>> = replica.workers.iter().enumerate().flat_map(ranks).collect();
        let times = workers.iter().map(|w| WorkerTimes { stage: w.stage, rank: w.rank, ..WorkerTimes::default() }).collect();
        Self {
            name: replica.name.clone(),
            router: connector.router.clone(),
            stages: replica.workers.len(),
            layers,
            sequences: replica.limits.max_batch_sequences,
            workers,
            fetching: Mutex::default(),
            times: Arc::new(Mutex::new(times)),
            driver: Mutex::new(None),
        }
    }

    /// The arbiter.
    fn first(&self) -> Result<&Remote, ReplicaError> {
        let missing = || ReplicaError::Lost { worker: self.name.clone(), detail: "the replica has no workers yet".into() };
        self.workers.first().map(Arc::as_ref).ok_or_else(missing)
    }

    /// Index of the worker that samples: rank 0 of the last stage.
    fn sampler(&self) -> usize {
        self.workers.iter().position(|w| w.stage + 1 == self.stages).unwrap_or(0)
    }
}

impl Replica for Workers {
    fn stages(&self) -> usize {
        self.stages.max(1)
    }

    fn open(&self) -> BoxFuture<'_, Result<Session, ReplicaError>> {
        Box::pin(async move {
            let last = self.driver.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(mut last) = last
                && timeout(GOODBYE, &mut last).await.is_err()
            {
                last.abort();
            }
            let opened = open::open(self).await?;
            let (session, driver) = drive::start(self, opened);
            *self.driver.lock().unwrap_or_else(PoisonError::into_inner) = Some(driver);
            Ok(session)
        })
    }

    fn fetching(&self) -> Fetching {
        *self.fetching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn times(&self) -> Vec<WorkerTimes> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn card(&self) -> BoxFuture<'_, Result<Arc<ModelCard>, ReplicaError>> {
        Box::pin(async move { card::fetch(self.first()?).await.map(Arc::new) })
    }
}
