//! The fleet as this router sees it: who drives each replica, and the choice of one for each sequence.

mod driver;
mod supervisor;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use plan::{
    card::ModelCard,
    fleet::{FleetAdapter, FleetDeployment, FleetReplica, RoutingPolicy, Stopped},
    step::TokenId,
};

pub(crate) use self::{
    driver::{Condition, Driver, Presence, Ticket},
    supervisor::Supervisor,
};
use crate::{
    edge::{SubmitError, stats::Stats},
    replica::{Fetching, Replica},
    scheduler::BlockHash,
};

/// A replica that holds this many sequences more than another, and twice as many, gets no further ones for its cache.
const IMBALANCE: usize = 8;

/// What is served at the moment. Replaced as a whole when the fleet changes.
#[derive(Default)]
pub(crate) struct View {
    pub(crate) deployments: Vec<Arc<Deployment>>,
    /// Replicas that this router was told to let go of, and has not yet.
    pub(crate) ending: Vec<String>,
    /// Some deployment is driven by routers of another pool, which are about to serve it, or do: this one is told of it for a while.
    pub(crate) moving: bool,
}

impl View {
    /// The replica called `name`, wherever it belongs.
    pub(crate) fn member(&self, name: &str) -> Option<&Arc<Member>> {
        self.deployments.iter().flat_map(|d| &d.members).find(|m| m.spec.name == name)
    }

    /// The deployment whose model or alias is `model`.
    pub(crate) fn find(&self, model: &str) -> Option<&Arc<Deployment>> {
        let named = |d: &&Arc<Deployment>| d.spec.model == model;
        let aliased = |d: &&Arc<Deployment>| d.spec.aliases.iter().any(|a| a == model);
        self.deployments.iter().find(named).or_else(|| self.deployments.iter().find(aliased))
    }

    /// The deployment, and the adapter of it, that a request names: `model`, or `model:adapter`.
    ///
    /// # Errors
    /// When there is no such model, or it has no such adapter.
    pub(crate) fn resolve(&self, name: &str) -> Result<(&Arc<Deployment>, Option<&FleetAdapter>), SubmitError> {
        if let Some(deployment) = self.find(name) {
            return Ok((deployment, None));
        }
        let unknown = || SubmitError::UnknownModel(name.to_owned());
        let (model, adapter) = name.rsplit_once(':').ok_or_else(unknown)?;
        let deployment = self.find(model).ok_or_else(unknown)?;
        let adapters = &deployment.spec.adapters;
        let found = adapters.iter().find(|a| a.name == adapter).ok_or_else(|| SubmitError::UnknownAdapter {
            model: model.to_owned(),
            adapter: adapter.to_owned(),
            known: adapters.iter().map(|a| format!("{model}:{}", a.name)).collect(),
        })?;
        Ok((deployment, Some(found)))
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
    pub(crate) driver: Driver,
    /// Sequences of this router's clients that are on it or queued for it.
    pub(crate) sequences: Arc<AtomicUsize>,
    /// What those sequences bring.
    pub(crate) stats: Arc<Stats>,
    replica: Arc<dyn Replica>,
}

impl Member {
    /// What block hashes start from. Caches are shared by nothing that could compute other bits.
    fn revision(spec: &FleetReplica) -> Vec<u8> {
        format!("{}\n{}", spec.revision, spec.numerics).into_bytes()
    }

    /// Sequences submitted to it and not ended, of all routers.
    pub(crate) fn live(&self) -> usize {
        self.driver.live(self.sequences.load(Ordering::Relaxed))
    }

    /// How each adapter of its deployment is doing on it, by numerics id.
    pub(crate) fn adapters(&self, deployment: &FleetDeployment) -> Vec<(String, Presence)> {
        deployment.adapters.iter().map(|a| (a.source.numerics.clone(), self.driver.adapter(&a.source.numerics))).collect()
    }

    /// What its workers bring from servers, if it is driven here.
    pub(crate) fn fetching(&self) -> Fetching {
        if self.driver.is_here() { self.replica.fetching() } else { Fetching::default() }
    }

    fn load(&self) -> f64 {
        (self.live() as f64 + 1.0) / f64::from(self.spec.weight.max(1))
    }
}

impl Deployment {
    /// The replica for a sequence: ready, taking new ones, with its adapter, and of the given numerics id where the sequence has begun.
    pub(crate) fn choose(&self, ids: &[TokenId], adapter: &str, numerics: Option<&str>) -> Option<&Arc<Member>> {
        let fits = |m: &&Arc<Member>| {
            !m.spec.draining
                && m.spec.weight > 0
                && m.driver.ready()
                && numerics.is_none_or(|n| n == m.spec.numerics)
                && (adapter.is_empty() || m.driver.adapter(adapter) == Presence::Ready)
        };
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
                let draw = BlockHash::root(&turn.to_le_bytes(), "", self.spec.name.as_bytes());
                Some(candidates[(draw.0 % candidates.len() as u128) as usize])
            }
            RoutingPolicy::LeastLoad => least(&candidates),
            RoutingPolicy::PrefixAware => {
                let loads = || candidates.iter().map(|m| m.live());
                let (low, high) = (loads().min().unwrap_or(0), loads().max().unwrap_or(0));
                if high > low + IMBALANCE && high > 2 * low {
                    return least(&candidates);
                }
                let mut chains: HashMap<Vec<u8>, Vec<BlockHash>> = HashMap::new();
                let mut cached = |m: &Member| {
                    let revision = Member::revision(&m.spec);
                    let chain = chains.entry(revision).or_insert_with_key(|r| BlockHash::root(r, adapter, b"").chain(ids));
                    m.driver.cached_blocks(chain)
                };
                let counts: Vec<usize> = candidates.iter().map(|m| cached(m)).collect();
                let most = counts.iter().copied().max().unwrap_or(0);
                let best: Vec<&Arc<Member>> = candidates.iter().zip(&counts).filter(|(_, n)| **n == most).map(|(m, _)| *m).collect();
                least(&best)
            }
        }
    }

    /// Whether an adapter, by its numerics id, is one of its own.
    pub(crate) fn has_adapter(&self, adapter: &str) -> bool {
        self.spec.adapters.iter().any(|a| a.source.numerics == adapter)
    }

    /// Why an adapter, by its numerics id, is on none of the replicas and will not come by itself; `None` where there is hope.
    pub(crate) fn adapter_failure(&self, adapter: &str) -> Option<String> {
        let mut failure = None;
        for member in self.members.iter().filter(|m| m.driver.ready()) {
            match member.driver.adapter(adapter) {
                Presence::Failed(why) => failure = Some(why),
                Presence::Ready | Presence::Loading => return None,
            }
        }
        failure
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

    /// Why requests are refused: no replica is wanted, and those that may still be there only finish what they have begun.
    pub(crate) fn stopped(&self) -> Option<Stopped> {
        self.spec.serving.stopped.filter(|_| self.members.iter().all(|m| m.spec.draining))
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

impl Lasting {
    fn new() -> Self {
        Self { stats: Arc::new(Stats::new()), turn: AtomicUsize::new(0), card: Mutex::new(None), fetching: tokio::sync::Mutex::new(()) }
    }
}
