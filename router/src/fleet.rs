//! The fleet as this router drives it: an owner for every replica, and the choice of one for each sequence.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use plan::{
    card::ModelCard,
    fleet::{FleetDeployment, FleetReplica, FleetState, RoutingPolicy},
    step::TokenId,
};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    edge::stats::Stats,
    replica::{
        Connector, Replica,
        owner::{Drive, Owner},
    },
    scheduler::BlockHash,
};

/// A replica that holds this many sequences more than another, and twice as many, gets no further ones for its cache.
const IMBALANCE: usize = 8;

/// What is served at the moment. Replaced as a whole when the fleet changes.
#[derive(Default)]
pub(crate) struct View {
    pub(crate) deployments: Vec<Arc<Deployment>>,
}

impl View {
    /// The deployment whose model or alias is `model`.
    pub(crate) fn find(&self, model: &str) -> Option<&Arc<Deployment>> {
        let named = |d: &&Arc<Deployment>| d.spec.model == model;
        let aliased = |d: &&Arc<Deployment>| d.spec.aliases.iter().any(|a| a == model);
        self.deployments.iter().find(named).or_else(|| self.deployments.iter().find(aliased))
    }

    /// The deployment with this resource name.
    pub(crate) fn deployment(&self, name: &str) -> Option<&Arc<Deployment>> {
        self.deployments.iter().find(|d| d.spec.name == name)
    }
}

/// One deployment as of the last state, and what outlives states.
pub(crate) struct Deployment {
    pub(crate) spec: FleetDeployment,
    pub(crate) members: Vec<Arc<Member>>,
    pub(crate) lasting: Arc<Lasting>,
}

/// What a deployment keeps for as long as it is in the fleet.
pub(crate) struct Lasting {
    pub(crate) stats: Arc<Stats>,
    turn: AtomicUsize,
    /// The card, by the numerics id it was fetched for.
    card: Mutex<Option<(String, Arc<ModelCard>)>>,
    /// Held while it is fetched, so that one request at a time asks for it.
    fetching: tokio::sync::Mutex<()>,
}

/// One replica as of the last state.
pub(crate) struct Member {
    pub(crate) spec: FleetReplica,
    pub(crate) owner: Arc<Owner>,
    /// Sequences of this router's clients that are on it or queued for it.
    pub(crate) sequences: Arc<AtomicUsize>,
    replica: Arc<dyn Replica>,
    stop: CancellationToken,
}

impl Member {
    /// What block hashes start from. Caches are shared by nothing that could compute other bits.
    fn revision(spec: &FleetReplica) -> Vec<u8> {
        format!("{}\n{}", spec.revision, spec.numerics).into_bytes()
    }

    fn load(&self) -> f64 {
        (self.owner.live() as f64 + 1.0) / f64::from(self.spec.weight.max(1))
    }
}

impl Deployment {
    /// The replica for a sequence: ready, taking new ones, and of the given numerics id where the sequence has begun.
    pub(crate) fn choose(&self, ids: &[TokenId], numerics: Option<&str>) -> Option<&Arc<Member>> {
        let fits =
            |m: &&Arc<Member>| !m.spec.draining && m.spec.weight > 0 && m.owner.ready() && numerics.is_none_or(|n| n == m.spec.numerics);
        let candidates: Vec<&Arc<Member>> = self.members.iter().filter(fits).collect();
        let (first, rest) = candidates.split_first()?;
        if rest.is_empty() {
            return Some(first);
        }
        match self.spec.serving.policy {
            RoutingPolicy::RoundRobin => Some(candidates[self.lasting.turn.fetch_add(1, Ordering::Relaxed) % candidates.len()]),
            RoutingPolicy::Random => {
                // A hash of a counter: evenly spread, and no state to seed.
                let turn = self.lasting.turn.fetch_add(1, Ordering::Relaxed) as u64;
                let draw = BlockHash::root(&turn.to_le_bytes(), 0, self.spec.name.as_bytes());
                Some(candidates[(draw.0 % candidates.len() as u128) as usize])
            }
            RoutingPolicy::LeastLoad => least(&candidates),
            RoutingPolicy::PrefixAware => {
                let loads = || candidates.iter().map(|m| m.owner.live());
                let (low, high) = (loads().min().unwrap_or(0), loads().max().unwrap_or(0));
                if high > low + IMBALANCE && high > 2 * low {
                    return least(&candidates);
                }
                let mut chains: HashMap<Vec<u8>, Vec<BlockHash>> = HashMap::new();
                let mut cached = |m: &Member| {
                    let revision = Member::revision(&m.spec);
                    let chain = chains.entry(revision).or_insert_with_key(|r| BlockHash::root(r, 0, b"").chain(ids));
                    m.owner.cached_blocks(chain)
                };
                let counts: Vec<usize> = candidates.iter().map(|m| cached(m)).collect();
                let most = counts.iter().copied().max().unwrap_or(0);
                let best: Vec<&Arc<Member>> = candidates.iter().zip(&counts).filter(|(_, n)| **n == most).map(|(m, _)| *m).collect();
                least(&best)
            }
        }
    }

    /// The card, where one of its replicas gave it before.
    pub(crate) fn known_card(&self) -> Option<Arc<ModelCard>> {
        let known = self.lasting.card.lock().unwrap_or_else(PoisonError::into_inner);
        let (numerics, card) = known.as_ref()?;
        self.members.iter().any(|m| m.spec.numerics == *numerics).then(|| card.clone())
    }

    /// Whether requests wait because there is no replica at all, rather than for one that is there.
    pub(crate) fn holds(&self) -> bool {
        self.members.is_empty() && self.spec.serving.hold.is_some()
    }

    /// The card, from the cache or from the first replica that gives it.
    ///
    /// # Errors
    /// The last replica's answer.
    pub(crate) async fn card(&self) -> Result<Arc<ModelCard>, String> {
        let _one = self.lasting.fetching.lock().await;
        if let Some(card) = self.known_card() {
            return Ok(card);
        }
        let mut last = "it has no replicas".to_owned();
        for member in &self.members {
            match member.replica.card().await {
                Ok(card) => {
                    *self.lasting.card.lock().unwrap_or_else(PoisonError::into_inner) = Some((member.spec.numerics.clone(), card.clone()));
                    return Ok(card);
                }
                Err(error) => last = error.to_string(),
            }
        }
        Err(last)
    }
}

fn least<'a>(members: &[&'a Arc<Member>]) -> Option<&'a Arc<Member>> {
    members.iter().min_by(|a, b| a.load().total_cmp(&b.load())).copied()
}

/// The task that follows the fleet: starts and stops owners, moves streams off draining replicas.
pub(crate) struct Supervisor {
    pub(crate) connector: Arc<dyn Connector>,
    pub(crate) view: watch::Sender<Arc<View>>,
    pub(crate) stop: CancellationToken,
    owners: JoinSet<()>,
    /// (term, number) of the state in force.
    taken: Option<(u64, u64)>,
}

impl Supervisor {
    pub(crate) fn new(connector: Arc<dyn Connector>, view: watch::Sender<Arc<View>>, stop: CancellationToken) -> Self {
        Self { connector, view, stop, owners: JoinSet::new(), taken: None }
    }

    /// Follows `fleet` until stopped, then waits for every owner to end.
    pub(crate) async fn run(mut self, mut fleet: watch::Receiver<FleetState>) {
        let mut view = self.view.subscribe();
        let mut open = true;
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                changed = fleet.changed(), if open => {
                    // Without a sender the last state stays in force.
                    open = changed.is_ok();
                    let state = fleet.borrow_and_update().clone();
                    self.apply(state);
                }
                // The sender is this task's own, so this never fails.
                _ = view.changed() => self.drain(),
                Some(_) = self.owners.join_next() => {}
            }
        }
        for deployment in &self.view.borrow().deployments {
            deployment.members.iter().for_each(|m| m.stop.cancel());
        }
        while self.owners.join_next().await.is_some() {}
        self.view.send_replace(Arc::default());
    }

    /// Puts a state in force, unless a later one is.
    pub(crate) fn apply(&mut self, state: FleetState) {
        let number = (state.term, state.number);
        if self.taken.is_some_and(|taken| number < taken) {
            info!(term = state.term, number = state.number, "ignored an old fleet state");
            return;
        }
        self.taken = Some(number);
        let before = self.view.borrow().clone();
        let mut kept = Vec::new();
        let deployments = state
            .deployments
            .into_iter()
            .map(|spec| {
                let old = before.deployment(&spec.name);
                let lasting = old.map_or_else(|| Arc::new(Lasting::new()), |d| d.lasting.clone());
                let member = |replica: &FleetReplica| {
                    let same = |m: &&Arc<Member>| {
                        let at = FleetReplica { weight: m.spec.weight, draining: m.spec.draining, ..replica.clone() };
                        at == m.spec
                    };
                    let found = old.and_then(|d| d.members.iter().find(same));
                    let member = match found {
                        Some(m) => Member {
                            spec: replica.clone(),
                            owner: m.owner.clone(),
                            sequences: m.sequences.clone(),
                            replica: m.replica.clone(),
                            stop: m.stop.clone(),
                        },
                        None => self.start(replica),
                    };
                    kept.push(Arc::as_ptr(&member.owner));
                    Arc::new(member)
                };
                let members = spec.replicas.iter().map(member).collect();
                Arc::new(Deployment { spec: spec.clone(), members, lasting })
            })
            .collect();
        for member in before.deployments.iter().flat_map(|d| &d.members) {
            if !kept.contains(&Arc::as_ptr(&member.owner)) {
                member.stop.cancel();
            }
        }
        self.view.send_replace(Arc::new(View { deployments }));
    }

    fn start(&mut self, replica: &FleetReplica) -> Member {
        let (owner, stop) = (Arc::new(Owner::new()), self.stop.child_token());
        let driver = self.connector.replica(replica);
        let view = self.view.clone();
        let drive = Drive {
            name: replica.name.clone(),
            owner: owner.clone(),
            replica: driver.clone(),
            limits: replica.limits.clone(),
            revision: Member::revision(replica),
            stop: stop.clone(),
            changed: Box::new(move || view.send_modify(|_| ())),
        };
        self.owners.spawn(drive.run());
        Member { spec: replica.clone(), owner, sequences: Arc::default(), replica: driver, stop }
    }

    /// Hands back the sequences of draining replicas where another one can go on with them.
    fn drain(&self) {
        let view = self.view.borrow().clone();
        for deployment in &view.deployments {
            for member in deployment.members.iter().filter(|m| m.spec.draining && m.owner.live() > 0) {
                if deployment.choose(&[], Some(&member.spec.numerics)).is_some() {
                    member.owner.release();
                }
            }
        }
    }
}

impl Lasting {
    fn new() -> Self {
        Self { stats: Arc::new(Stats::new()), turn: AtomicUsize::new(0), card: Mutex::new(None), fetching: tokio::sync::Mutex::new(()) }
    }
}
