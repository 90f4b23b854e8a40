//! The fleet of each namespace as routers are told it, and what they report.
//!
//! A state is pushed only once every deployment of the namespace that has replicas is known: a process that has just started must not tell
//! routers to drop what it has not looked at yet.

mod service;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use identity::{Name, Peer};
use kube::runtime::reflector::ObjectRef;
use plan::fleet::{FleetDeployment, FleetRouter, FleetState};
use proto::{bearer::Bearer, fleet as wire};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tracing::info;

pub use self::service::FleetService;
use crate::{autoscale::Report, cache::Owner, observe::one_line, resource::ModelDeployment};

/// A router that has not reported for this long counts as gone.
const SILENCE: Duration = Duration::from_secs(5);

/// One that has been silent for this long, and whose stream did not end, is not coming back with what it knew.
const GONE: Duration = Duration::from_secs(60);

/// So many times a deployment is looked at while its bytes are fetched, whatever else happens.
const FETCH_PARTS: u64 = 20;

/// All namespaces.
#[derive(Debug)]
pub struct Hub {
    term: u64,
    began: Instant,
    /// By namespace, and by deployment where it is that of its own routers.
    spaces: Mutex<HashMap<(String, String), Arc<Space>>>,
    wake: mpsc::Sender<ObjectRef<ModelDeployment>>,
}

/// What the routers of one pool are told: those of a namespace, or a deployment's own.
#[derive(Debug)]
pub struct Space {
    namespace: String,
    /// The deployment whose own routers they are, or nothing.
    own_of: String,
    term: u64,
    inner: Mutex<Inner>,
    /// What routers are told; `None` until it is whole.
    state: watch::Sender<Option<Arc<Told>>>,
    /// Its routers are not to follow it any more.
    closed: CancellationToken,
}

/// A state as it is kept: deployments that do not change are shared with the state before.
#[derive(Debug, PartialEq)]
struct Told {
    term: u64,
    number: u64,
    deployments: Vec<Arc<FleetDeployment>>,
    routers: Vec<FleetRouter>,
}

impl Told {
    fn whole(&self) -> FleetState {
        let deployments = self.deployments.iter().map(|deployment| FleetDeployment::clone(deployment)).collect();
        FleetState { term: self.term, number: self.number, deployments, routers: self.routers.clone() }
    }

    fn says(&self, deployments: &[Arc<FleetDeployment>], routers: &[FleetRouter]) -> bool {
        let same = |(a, b): (&Arc<FleetDeployment>, &Arc<FleetDeployment>)| Arc::ptr_eq(a, b) || a == b;
        self.routers == routers && self.deployments.len() == deployments.len() && self.deployments.iter().zip(deployments).all(same)
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// What routers must carry; `None` until the pool was reconciled, and then nobody gets in.
    token: Option<String>,
    /// Deployments that are known: what routers are told of each, if anything.
    known: BTreeMap<String, Option<Arc<FleetDeployment>>>,
    /// Replicas that drain, and the number of the first state that said so.
    drains: HashMap<String, u64>,
    routers: HashMap<String, Router>,
    /// The routers of the pool, connected or not; `None` until it was looked at, and then nobody is told anything.
    pool: Option<Vec<FleetRouter>>,
    /// When replicas were first seen to fetch, and how many bytes were there.
    paces: HashMap<String, (Instant, u64)>,
    /// Routers of other pools while a deployment changes from one to the other, by that deployment.
    guests: BTreeMap<String, Vec<FleetRouter>>,
    /// Routers of the pool to which services lead, by name.
    open: BTreeSet<String>,
    /// Where any of them is reached by those that know none, as http://HOST:PORT.
    meeting: Option<String>,
}

/// A router that is connected.
#[derive(Debug)]
struct Router {
    stream: u64,
    seen: Instant,
    /// Number of the state of this term that was in force when it reported before. Its last report is of a time when that was in force for long.
    before: u64,
    /// Number of the state of this term that is in force.
    number: u64,
    /// By deployment and replica.
    replicas: HashMap<String, HashMap<String, Said>>,
    /// What autoscaling goes by, by deployment.
    measured: HashMap<String, Report>,
}

/// What a router says of a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// A token came out of its last stage.
    pub ready: bool,
    /// What went wrong last.
    pub last_failure: Option<String>,
    /// Bytes that its workers bring from servers, and how many of them are there.
    pub fetch: u64,
    /// Those that are there.
    pub fetched: u64,
    /// Seconds until all are, at the present pace.
    pub fetch_seconds: Option<u64>,
    /// Sequences on it, summed over routers; `None` while one of a replica that drains may not know so.
    pub sequences: Option<u32>,
    /// Its adapters, by numerics id.
    pub adapters: BTreeMap<String, Presence>,
    /// Its draft model, where it has one.
    pub draft: Option<Presence>,
}

/// What routers say of an adapter on a replica, or of its draft model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// Every worker has it.
    pub ready: bool,
    /// Why it cannot be loaded, or was lost.
    pub failure: Option<String>,
}

impl Said {
    /// Whether a deployment is to be looked at because this is said of a replica, and `other` was.
    fn differs(&self, other: &Self) -> bool {
        let part = |said: &Self| (said.fetch, (said.fetched * FETCH_PARTS).checked_div(said.fetch));
        // A failure that is only how far a worker is would have a deployment looked at with every report.
        let failure = |said: &Self| said.last_failure.clone().filter(|_| said.fetched == said.fetch);
        let all = |said: &Self| (said.ready, failure(said), part(said));
        all(self) != all(other) || (&self.adapters, &self.draft) != (&other.adapters, &other.draft)
    }
}

/// What the routers of a namespace say of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Routers that report.
    pub routers: usize,
    /// Those among them to which services lead.
    pub open: usize,
    /// By replica: ready where any router says so.
    pub replicas: HashMap<String, Said>,
}

impl Load {
    /// What routers say that serve a deployment, and what `others` say, which are told of it too.
    #[must_use]
    pub fn with(mut self, others: Self) -> Self {
        let reporting = others.routers > 0;
        for (name, known) in &mut self.replicas {
            let said = others.replicas.get(name);
            known.ready |= said.is_some_and(|s| s.ready);
            known.sequences = match (known.sequences, said) {
                (Some(own), Some(said)) => said.sequences.map(|more| own + more),
                // They may have some, and have not said so yet.
                (Some(_), None) if reporting => None,
                (own, _) => own,
            };
        }
        for (name, said) in others.replicas {
            self.replicas.entry(name).or_insert(said);
        }
        self
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    /// States carry `term`. Deployments of which routers say something new are sent to `wake`.
    pub fn new(term: u64, wake: mpsc::Sender<ObjectRef<ModelDeployment>>) -> Self {
        Self { term, began: Instant::now(), spaces: Mutex::default(), wake }
    }

    /// How long this process has led.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// The routers of the namespace `name`.
    pub fn space(&self, name: &str) -> Arc<Space> {
        self.own_space(name, "")
    }

    /// A deployment's own routers.
    pub fn own_space(&self, namespace: &str, deployment: &str) -> Arc<Space> {
        let (namespace, own_of) = (namespace.to_owned(), deployment.to_owned());
        let make = || Space {
            namespace: namespace.clone(),
            own_of: own_of.clone(),
            term: self.term,
            inner: Mutex::default(),
            state: watch::Sender::new(None),
            closed: CancellationToken::new(),
        };
        lock(&self.spaces).entry((namespace.clone(), own_of.clone())).or_insert_with(|| Arc::new(make())).clone()
    }

    /// Those whose objects are of `owner`.
    pub(crate) fn pool(&self, owner: &Owner) -> Arc<Space> {
        self.own_space(&owner.namespace, &owner.name)
    }

    /// A deployment has no routers of its own any more: those that are still there are told nothing more.
    pub fn forget_own(&self, namespace: &str, deployment: &str) {
        if let Some(space) = lock(&self.spaces).remove(&(namespace.to_owned(), deployment.to_owned())) {
            space.closed.cancel();
        }
    }

    /// What the router that calls is to be told. Its namespace is that whose router it has proven to be, or, where names are not proven, whose
    /// token it carries; within a namespace it says itself whose it is.
    fn admit<T>(&self, request: &Request<T>) -> Option<Arc<Space>> {
        let namespace = match request.extensions().get::<Peer>()? {
            Peer(Some(Name::Router { namespace })) => namespace.clone(),
            Peer(Some(_)) => return None,
            Peer(None) => {
                let carries = |space: &&Arc<Space>| {
                    let token = lock(&space.inner).token.clone();
                    token.is_some_and(|token| Bearer::new(Some(token)).check(request).is_ok())
                };
                lock(&self.spaces).values().find(carries)?.namespace.clone()
            }
        };
        match request.metadata().get(wire::POOL_HEADER).map(|value| value.to_str().unwrap_or_default()) {
            None | Some("") => Some(self.space(&namespace)),
            // Only what stands: a router must not make up deployments.
            Some(deployment) => lock(&self.spaces).get(&(namespace, deployment.to_owned())).cloned(),
        }
    }

    /// Routers connected, in all namespaces.
    pub fn routers(&self) -> usize {
        lock(&self.spaces).values().map(|space| lock(&space.inner).routers.len()).sum()
    }

    /// Has deployments reconciled.
    pub(crate) async fn wake(&self, namespace: &str, deployments: Vec<String>) {
        for name in deployments {
            // Closed when the controller has stopped: nothing is reconciled any more.
            if self.wake.send(ObjectRef::new(&name).within(namespace)).await.is_err() {
                return;
            }
        }
    }
}

impl Space {
    /// Lets routers in that carry `token`.
    pub fn let_in(&self, token: String) {
        lock(&self.inner).token = Some(token);
    }

    /// Sets the routers of the pool, who are told of each other, and the names of those to which services lead; the deployments that this
    /// concerns. `expected` as in [`Space::settle`].
    pub fn meet(&self, routers: Vec<FleetRouter>, open: BTreeSet<String>, expected: &[String]) -> Vec<String> {
        let mut inner = lock(&self.inner);
        // Routers that come and go concern a deployment that changes to them, or away from them.
        let changes = !inner.guests.is_empty() || !self.own_of.is_empty();
        let same = inner.open == open && (!changes || inner.pool.as_ref() == Some(&routers));
        inner.pool = Some(routers);
        let concerned = if same { Vec::new() } else { expected.to_vec() };
        inner.open = open;
        drop(inner);
        self.refresh(expected);
        concerned
    }

    /// The routers of the pool, once it was looked at.
    pub(crate) fn routers(&self) -> Option<Vec<FleetRouter>> {
        lock(&self.inner).pool.clone()
    }

    /// Has the pool's routers know those of another pool while `deployment` changes from one to the other; none when it does not any more.
    /// Routers are told with the next state.
    pub(crate) fn host(&self, deployment: &str, guests: Vec<FleetRouter>) {
        let mut inner = lock(&self.inner);
        if guests.is_empty() {
            inner.guests.remove(deployment);
        } else {
            inner.guests.insert(deployment.to_owned(), guests);
        }
    }

    /// Notes where any router of the pool is reached.
    pub fn meet_at(&self, url: String) {
        lock(&self.inner).meeting = Some(url);
    }

    /// Where any router of the pool is reached, once that is known: never anywhere else while the namespace has deployments.
    pub fn meeting(&self) -> Option<String> {
        lock(&self.inner).meeting.clone()
    }

    /// Whether this process knows what routers are to be told of a deployment.
    pub fn knows(&self, deployment: &str) -> bool {
        lock(&self.inner).known.contains_key(deployment)
    }

    /// What routers are told of a deployment.
    pub fn told(&self, deployment: &str) -> Option<FleetDeployment> {
        lock(&self.inner).known.get(deployment)?.as_deref().cloned()
    }

    /// Sets what routers are told of a deployment, `None` for nothing. `expected` are the deployments of the namespace that must be known
    /// before routers are told anything.
    pub fn settle(&self, deployment: &str, entry: Option<FleetDeployment>, expected: &[String]) {
        let mut inner = lock(&self.inner);
        if inner.known.get(deployment).is_none_or(|known| known.as_deref() != entry.as_ref()) {
            inner.known.insert(deployment.to_owned(), entry.map(Arc::new));
        }
        drop(inner);
        self.refresh(expected);
    }

    /// Forgets deployments that are not among `expected`, and tells routers if that is news.
    pub fn refresh(&self, expected: &[String]) {
        let mut inner = lock(&self.inner);
        let names: HashSet<&str> = expected.iter().map(String::as_str).collect();
        inner.known.retain(|name, _| names.contains(name.as_str()));
        if self.own_of.is_empty() {
            inner.guests.retain(|name, _| names.contains(name.as_str()));
        }
        if inner.known.len() < expected.len() {
            return;
        }
        let Some(mut routers) = inner.pool.clone() else { return };
        routers.extend(inner.guests.values().flatten().cloned());
        let deployments: Vec<Arc<FleetDeployment>> = inner.known.values().flatten().cloned().collect();
        let mut sent = 0;
        self.state.send_if_modified(|state| {
            let number = match state {
                Some(state) if state.says(&deployments, &routers) => return false,
                Some(state) => state.number + 1,
                None => 1,
            };
            info!(
                namespace = self.namespace,
                own_of = self.own_of,
                term = self.term,
                number,
                deployments = deployments.len(),
                "new fleet state"
            );
            sent = number;
            *state = Some(Arc::new(Told { term: self.term, number, deployments, routers }));
            true
        });
        if sent > 0 {
            let draining = inner.known.values().flatten().flat_map(|d| &d.replicas).filter(|r| r.draining);
            let since = |name: &String| inner.drains.get(name).copied().unwrap_or(sent);
            inner.drains = draining.map(|r| (r.name.clone(), since(&r.name))).collect();
        }
    }

    /// Term and number of the state that routers are told, once there is one.
    pub fn number(&self) -> Option<(u64, u64)> {
        self.state.borrow().as_ref().map(|state| (state.term, state.number))
    }

    /// What routers say of a deployment.
    pub fn load(&self, deployment: &str) -> Load {
        let inner = lock(&self.inner);
        let mut load = Load::default();
        let reports = || inner.routers.iter().filter(|(_, r)| r.seen.elapsed() < SILENCE);
        load.open = reports().filter(|(name, _)| inner.open.contains(*name)).count();
        let reporting: Vec<&Router> = reports().map(|(_, router)| router).collect();
        load.routers = reporting.len();
        for (name, said) in reporting.iter().flat_map(|r| r.replicas.get(deployment).into_iter().flatten()) {
            let known = load.replicas.entry(name.clone()).or_default();
            known.ready |= said.ready;
            known.last_failure = known.last_failure.take().or_else(|| said.last_failure.clone());
            if said.fetch > 0 {
                (known.fetch, known.fetched) = (said.fetch, said.fetched);
                known.fetch_seconds = inner.paces.get(name).and_then(|pace| seconds_left(*pace, said));
            }
            known.sequences = Some(known.sequences.unwrap_or(0) + said.sequences.unwrap_or(0));
            known.draft = known.draft.take().or_else(|| said.draft.clone());
            for (numerics, said) in &said.adapters {
                let adapter = known.adapters.entry(numerics.clone()).or_default();
                adapter.ready |= said.ready;
                adapter.failure = adapter.failure.take().or_else(|| said.failure.clone());
            }
        }
        for (name, since) in &inner.drains {
            if let Some(said) = load.replicas.get_mut(name).filter(|_| reporting.iter().any(|r| r.before < *since)) {
                said.sequences = None;
            }
        }
        load
    }

    /// What each router of the namespace measures of a deployment, and how long ago; a silent one's last report is among them for a while.
    pub fn reports(&self, deployment: &str) -> Vec<Report> {
        let routers = &lock(&self.inner).routers;
        let known = routers.values().map(|router| (router.seen.elapsed(), router.measured.get(deployment)));
        let known = known.filter(|(age, _)| *age < GONE);
        known.map(|(age, measured)| Report { age: age.as_secs().cast_signed(), ..measured.copied().unwrap_or_default() }).collect()
    }

    /// Takes a router's report; the deployments of which it says something new.
    pub(crate) fn report(&self, stream: u64, report: wire::RouterReport) -> Vec<String> {
        let mut inner = lock(&self.inner);
        let said = |r: wire::ReplicaState| {
            let last_failure = Some(one_line(&r.last_failure)).filter(|f| !f.is_empty());
            let presence = |ready, failure: &str| Presence { ready, failure: Some(one_line(failure)).filter(|f| !f.is_empty()) };
            let adapters = r.adapters.into_iter().map(|a| (a.numerics, presence(a.ready, &a.failure))).collect();
            let draft = r.draft.map(|d| presence(d.ready, &d.failure));
            let (fetch, fetched) = (r.fetch_bytes, r.fetched_bytes.min(r.fetch_bytes));
            let said =
                Said { ready: r.ready, last_failure, fetch, fetched, fetch_seconds: None, sequences: Some(r.sequences), adapters, draft };
            (r.name, said)
        };
        let measured = report.loads.iter().map(|load| (load.deployment.clone(), measured(load))).collect();
        let loads = report.loads.into_iter().map(|load| (load.deployment, load.replicas.into_iter().map(said).collect()));
        let number = if report.term == self.term { report.number } else { 0 };
        let last = inner.routers.get(&report.router).filter(|r| r.stream == stream && r.seen.elapsed() < SILENCE);
        let before = last.map_or(0, |r| r.number);
        let new = Router { stream, seen: Instant::now(), before, number, replicas: loads.collect(), measured };
        inner.pace(&new);
        let changed = match inner.routers.get(&report.router) {
            Some(old) if old.seen.elapsed() < SILENCE => {
                let draining = |name: &String| {
                    let told = inner.known.get(name).and_then(Option::as_ref);
                    told.is_some_and(|d| d.replicas.iter().any(|r| r.draining))
                };
                let turned = |name: &String| is_busy(old.measured.get(name)) != is_busy(new.measured.get(name));
                let differs = |name: &&String| draining(name) || turned(name) || differ(old.replicas.get(*name), new.replicas.get(*name));
                let names: BTreeSet<&String> = old.replicas.keys().chain(new.replicas.keys()).filter(differs).collect();
                names.into_iter().cloned().collect()
            }
            _ => inner.known.keys().cloned().collect(),
        };
        inner.routers.insert(report.router, new);
        changed
    }

    /// Notes that a router's stream has ended; the deployments concerned, unless it has come back on another.
    fn leave(&self, stream: u64) -> Vec<String> {
        let mut inner = lock(&self.inner);
        let before = inner.routers.len();
        inner.routers.retain(|_, router| router.stream != stream);
        if inner.routers.len() == before { Vec::new() } else { inner.known.keys().cloned().collect() }
    }
}

impl Inner {
    /// Notes since when replicas fetch, of those that a router drives.
    fn pace(&mut self, router: &Router) {
        let told = self.known.values().flatten().flat_map(|d| &d.replicas).map(|r| r.name.as_str()).collect::<BTreeSet<_>>();
        self.paces.retain(|name, _| told.contains(name.as_str()));
        for (name, said) in router.replicas.values().flatten().filter(|(_, said)| said.fetch > 0) {
            // One that has less than before has begun anew.
            if said.fetched == said.fetch || self.paces.get(name).is_some_and(|(_, first)| said.fetched < *first) {
                self.paces.remove(name);
            }
            if said.fetched < said.fetch {
                self.paces.entry(name.clone()).or_insert((Instant::now(), said.fetched));
            }
        }
    }
}

/// How long the rest takes a replica that had `first` bytes at `since`.
fn seconds_left((since, first): (Instant, u64), said: &Said) -> Option<u64> {
    let (passed, got) = (since.elapsed().as_secs_f64(), said.fetched.saturating_sub(first));
    (passed >= 1.0 && got > 0).then(|| ((said.fetch - said.fetched) as f64 * passed / got as f64).ceil() as u64)
}

/// Whether two reports of a deployment's replicas differ in what matters.
fn differ(old: Option<&HashMap<String, Said>>, new: Option<&HashMap<String, Said>>) -> bool {
    match (old, new) {
        (Some(old), Some(new)) => old.len() != new.len() || new.iter().any(|(name, said)| old.get(name).is_none_or(|o| said.differs(o))),
        _ => true,
    }
}

/// What a router measures, for autoscaling. Nothing measured is sent as 0.
fn measured(load: &wire::DeploymentLoad) -> Report {
    let latency = |seconds: f32| (seconds > 0.0).then_some(f64::from(seconds));
    Report {
        age: 0,
        queued: load.queued,
        running: load.running,
        held: load.held,
        kv_used: f64::from(load.kv_used).clamp(0.0, 1.0),
        ttft_p90: latency(load.ttft_p90_seconds),
        itl_p90: latency(load.itl_p90_seconds),
        tokens_per_second: f64::from(load.tokens_per_second).max(0.0),
    }
}

/// Whether a router has requests of a deployment.
fn is_busy(report: Option<&Report>) -> bool {
    report.is_some_and(|r| r.queued > 0 || r.running > 0 || r.held > 0)
}
