//! The loop: which deployment is looked at when, and the five steps for one.

mod advance;
mod certify;

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use k8s_openapi::jiff::Timestamp;
use kube::{
    Client, Resource,
    runtime::{
        Controller, WatchStreamExt,
        controller::{Action, Config},
        events::{Recorder, Reporter},
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{debug, info, warn};

use self::advance::Step;
use crate::{
    apply::{ApplyError, Writer},
    build::{Settings, TooLarge},
    cache::{Cache, Changed, Owner, Patience, api, version},
    dereference::{Fetched, dereference},
    fleet::Hub,
    inspect::{Inspections, Inspector},
    issuer::{IssueError, Issuer},
    metrics::Metrics,
    models::{Models, chain},
    names::MANAGER,
    pool::{PoolReconciler, Pools},
    resource::{ModelDeployment, Status},
    revision::Revision,
    rollout::Memory,
    routers::{self, Served},
    scaling::Scaling,
    setbacks::{Bounds, Setbacks},
    status::{self, MODEL_RESOLVED},
    stop::Stops,
    validate::{Rejection, Until, validate},
};

/// Deployments reconciled at once.
const CONCURRENCY: u16 = 16;
/// How often a deployment is looked at when nothing happens.
const IDLE: Duration = Duration::from_secs(300);
/// How soon one is looked at again that is not ready, for what nobody tells of, such as routers that fall silent; later the longer it is not.
const STARTING: Duration = Duration::from_secs(15);
/// First and longest pause: after a failure of the API server, and of a source.
const API_BACKOFF: Bounds = (Duration::from_secs(1), Duration::from_secs(60));
const SOURCE_BACKOFF: Bounds = (Duration::from_secs(5), Duration::from_secs(120));
/// How often a refusal is looked at again that another object may turn around.
const ELSEWHERE: Duration = Duration::from_secs(30);

/// When a deployment is looked at again of which something was written that a watch has not told of yet; it does so at any moment.
const SOON: Duration = Duration::from_millis(200);

/// How long routers may take to find an operator that has just begun to lead.
const RETURN: Duration = Duration::from_secs(15);

/// What every reconcile needs.
pub struct Context {
    client: Client,
    settings: Settings,
    models: Models,
    hub: Arc<Hub>,
    pools: Arc<Pools>,
    deployments: Store<ModelDeployment>,
    /// What stands in the cluster.
    cache: Arc<Cache>,
    /// Versions of deployments whose status this process has written last, by unique id.
    written: Mutex<HashMap<String, u64>>,
    recorder: Recorder,
    metrics: Arc<Metrics>,
    scaling: Scaling,
    /// Who certifies processes, where they prove their names.
    issuer: Option<Arc<Issuer>>,
    setbacks: Setbacks,
    /// What is known of models on claims.
    inspections: Inspections,
    /// What rollouts remember, by unique id.
    rollouts: Mutex<HashMap<String, Memory>>,
    stops: Stops,
}

/// What runs the controller.
pub struct Options {
    /// For the API server.
    pub client: Client,
    /// What objects depend on.
    pub settings: Settings,
    /// The one namespace to look after; `None` for all.
    pub namespace: Option<String>,
    /// This process, for events.
    pub identity: String,
    /// Where routers' reports arrive.
    pub hub: Arc<Hub>,
    /// Deployments of which routers say something new.
    pub woken: mpsc::Receiver<ObjectRef<ModelDeployment>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Who certifies processes, where they prove their names.
    pub issuer: Option<Arc<Issuer>>,
    /// Where this process ends, for tests.
    pub stops: Stops,
}

/// Reconciles until `stop`; then ends what is under way.
pub async fn run(options: Options, stop: CancellationToken) {
    let Options { client, settings, namespace, identity, hub, woken, metrics, issuer, stops } = options;
    let (deployments, writer) = reflector::store();
    let pools = Arc::new(Pools::default());
    let counted = deployments.clone();
    metrics.count(move || census(&counted));
    let asked = (pools.clone(), hub.clone(), deployments.clone(), issuer.clone());
    let events = watcher(api::<ModelDeployment>(&client, namespace.as_deref()), watcher::Config::default()).backoff(Patience::default());
    let objects = events
        .modify(prune)
        .reflect(writer)
        .inspect(move |event| {
            let (pools, hub, store, issuer) = &asked;
            match event {
                Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => ask(pools, object),
                Ok(watcher::Event::Delete(object)) => {
                    pools.ask(object.namespace());
                    hub.forget_own(object.namespace(), object.name());
                    pools.ask_own(object.namespace(), object.name());
                    hub.space(object.namespace()).refresh(&expected(store, object.namespace()));
                    if let Some(issuer) = issuer {
                        issuer.note_expiry("worker", (object.namespace(), object.name()), None);
                    }
                }
                Ok(_) => {}
                Err(error) => warn!(error = chain(error), "the watch of deployments broke; it starts again"),
            }
        })
        .applied_objects();
    let cache = Arc::new(Cache::default());
    let following = AbortOnDropHandle::new(tokio::spawn(follow(client.clone(), namespace, cache.clone(), pools.clone(), hub.clone())));
    // What is not known yet must not be taken for what is not there.
    tokio::select! {
        () = cache.filled() => {}
        () = stop.cancelled() => return,
    }
    let pool = PoolReconciler {
        client: client.clone(),
        cache: cache.clone(),
        settings: settings.clone(),
        deployments: deployments.clone(),
        hub: hub.clone(),
        pools: pools.clone(),
        issuer: issuer.clone(),
    };
    let pool = tokio::spawn(pool.run(stop.clone()));
    let keeping =
        issuer.clone().map(|issuer| AbortOnDropHandle::new(tokio::spawn(keep(issuer, deployments.clone(), pools.clone(), hub.clone()))));
    let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(identity) };
    let context = Context {
        recorder: Recorder::new(client.clone(), reporter),
        models: Models::new(settings.hf_endpoint.clone()),
        deployments: deployments.clone(),
        client,
        cache,
        written: Mutex::default(),
        setbacks: Setbacks::default(),
        inspections: Inspections::default(),
        rollouts: Mutex::default(),
        stops,
        scaling: Scaling::default(),
        settings,
        hub,
        pools,
        metrics,
        issuer,
    };
    Controller::for_stream(objects, deployments)
        .with_config(Config::default().concurrency(CONCURRENCY).debounce(Duration::from_millis(50)))
        .reconcile_on(ReceiverStream::new(woken))
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(reconcile, |_, never, _| match *never {}, Arc::new(context))
        .for_each(|done| async move {
            match done {
                Ok((object, action)) => debug!(%object, ?action, "reconciled"),
                Err(error) => debug!(error = chain(&error), "not reconciled"),
            }
        })
        .await;
    drop((keeping, following));
    if let Err(error) = pool.await {
        warn!(%error, "the reconcile of pools broke");
    }
}

/// Keeps authorities current, and has everybody told of others that are to be trusted.
async fn keep(issuer: Arc<Issuer>, deployments: Store<ModelDeployment>, pools: Arc<Pools>, hub: Arc<Hub>) {
    loop {
        issuer.changed().await;
        for object in deployments.state() {
            ask(&pools, &object);
            hub.wake(object.namespace(), vec![object.name().to_owned()]).await;
        }
    }
}

/// Deployments by the reason of their condition `Ready`; those of which nothing is said yet have none.
fn census(deployments: &Store<ModelDeployment>) -> BTreeMap<String, i64> {
    let mut counts = BTreeMap::new();
    for object in deployments.state() {
        let reason = object.condition(status::READY).map(|condition| condition.reason.clone()).unwrap_or_default();
        *counts.entry(reason).or_default() += 1;
    }
    counts
}

/// Watches what was made, and has those looked at whose objects are news.
async fn follow(client: Client, namespace: Option<String>, cache: Arc<Cache>, pools: Arc<Pools>, hub: Arc<Hub>) {
    let changed = |Changed { owner: Owner { namespace, name, routers } }: Changed| {
        let (pools, hub) = (&pools, &hub);
        async move {
            if routers {
                pools.ask_own(&namespace, &name);
            } else if name.is_empty() {
                pools.ask(&namespace);
            } else {
                hub.wake(&namespace, vec![name]).await;
            }
        }
    };
    cache.follow(&client, namespace.as_deref(), changed).await;
}

/// Has the pools reconciled that serve a deployment, or did.
fn ask(pools: &Pools, object: &ModelDeployment) {
    pools.ask(object.namespace());
    if routers::wants_own(object) || object.status.as_ref().is_some_and(|s| s.routers.is_some()) {
        pools.ask_own(object.namespace(), object.name());
    }
}

/// Takes from a deployment what nobody here looks at, and what is larger than all the rest: who wrote which field, and the manifest once more.
fn prune(object: &mut ModelDeployment) {
    object.metadata.managed_fields = None;
    object.metadata.annotations = None;
}

/// Deployments of a namespace that routers are told of only together.
fn expected(store: &Store<ModelDeployment>, namespace: &str) -> Vec<String> {
    let here = |d: &Arc<ModelDeployment>| d.namespace() == namespace && !d.is_deleted();
    store.state().into_iter().filter(here).map(|d| d.name().to_owned()).collect()
}

/// How a reconcile ended well.
struct Done {
    result: &'static str,
    /// When to look again though nothing happens.
    again: Option<Duration>,
}

/// A reconcile that failed and is tried again.
#[derive(Debug, thiserror::Error)]
enum ReconcileError {
    #[error("the API server did not give what was asked for")]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Issue(#[from] IssueError),
}

impl ReconcileError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Api(_) => "ApiUnreachable",
            Self::Apply(error) => error.reason(),
            Self::Issue(_) => "NotCertified",
        }
    }
}

async fn reconcile(object: Arc<ModelDeployment>, context: Arc<Context>) -> Result<Action, Infallible> {
    if !context.is_current(&object) {
        return Ok(Action::requeue(SOON));
    }
    let began = Instant::now();
    let done = steps(&object, &context).await;
    let (result, action) = match done {
        Ok(Done { result, again }) => {
            if result == "Applied" {
                context.setbacks.end(object.uid());
            }
            (result, again.map_or_else(Action::await_change, Action::requeue))
        }
        Err(error) => {
            let pause = context.setbacks.pause(object.uid(), error.reason(), API_BACKOFF);
            let (namespace, name) = (object.namespace(), object.name());
            warn!(namespace, name, error = chain(&error), pause_seconds = pause.as_secs(), "reconcile failed");
            (error.reason(), Action::requeue(pause))
        }
    };
    context.metrics.reconciled(result, began.elapsed());
    Ok(action)
}

/// The five steps.
async fn steps(object: &Arc<ModelDeployment>, context: &Context) -> Result<Done, ReconcileError> {
    // As it will be read again once what is said of it is written.
    let object = &mut ModelDeployment::clone(object);
    if object.is_deleted() {
        // Owner references take everything along.
        context.scaling.forget(object);
        context.written.lock().unwrap_or_else(PoisonError::into_inner).remove(object.uid());
        return Ok(Done { result: "Deleted", again: None });
    }
    let served = Served::now(&context.hub, &context.cache, object, context.settings.pool_size, Timestamp::now().as_second());
    let others = context.deployments.state();
    // What is known already is not said to be read.
    if object.condition(MODEL_RESOLVED).is_none() && !object.spec["model"]["uri"].as_str().is_some_and(|uri| context.models.knows(uri)) {
        context.say(object, status::resolving(object)).await?;
    }
    let mut fetched =
        dereference((&context.client, &context.cache), (&context.models, &context.settings.folders), &served, &others, object).await?;
    context.inspector().inspect(object, &mut fetched).await?;
    let renew = context.renew(object, &fetched.standing).await;
    let done = advance(object, context, &served, &fetched).await?;
    Ok(Done { again: done.again.into_iter().chain(renew).min(), ..done })
}

/// What is left once everything is read.
async fn advance(object: &mut ModelDeployment, context: &Context, served: &Served, fetched: &Fetched) -> Result<Done, ReconcileError> {
    let mut valid = match validate(object, fetched) {
        Ok(valid) => valid,
        Err(rejection) => return context.reject(object, served, fetched, &rejection).await,
    };
    let now = Timestamp::now().as_second();
    let ready = fetched.standing.load.replicas.values().filter(|said| said.ready).count() as u32;
    let decision = context.scaling.decide(object, &mut valid.manifest, ready, &served.reports(object.name()), now);
    let revision = Revision::of(&valid, object, &context.settings, &fetched.standing.revisions, collisions(object));
    let (revision, collisions) = match revision {
        Ok(found) => found,
        Err(error) => return context.reject(object, served, fetched, &too_large(&error)).await,
    };
    // The plan stands in status before any pod exists.
    if object.status.as_ref().is_none_or(|s| s.update_revision.as_ref() != Some(&revision.name)) {
        context.say(object, status::planned(object, &valid, &revision, collisions)).await?;
    }
    ask(&context.pools, object);
    let step = match Step::new(object, &valid, &revision, &fetched.standing, (context, served)) {
        Ok(step) => step,
        Err(error) => return context.reject(object, served, fetched, &too_large(&error)).await,
    };
    let applied = step.take(object, context).await;
    if let Err(ReconcileError::Apply(error)) = &applied {
        let reason = (error.reason() == "Conflict" && error.kind == "Service").then_some("PortConflict");
        let planned = status::planned(object, &valid, &revision, collisions);
        context.say(object, status::failed(planned, object, reason, &chain(error))).await?;
    }
    applied?;
    let had_routers =
        object.condition(status::ROUTER_READY).is_some_and(|c| c.status == "True" && c.observed_generation == object.generation());
    if had_routers && fetched.standing.load.open == 0 && context.hub.age() < RETURN {
        // Routers are on their way back to an operator that has just started; until then nothing is known to be worse.
        return Ok(Done { result: "Applied", again: Some(RETURN) });
    }
    let again = step.again();
    let mut status = status::applied(object, &step.view(collisions));
    status::scaled(&mut status, object, &valid, decision.as_ref());
    let ready = status.ready_replicas == valid.replicas();
    context.say(object, status).await?;
    let idle = match ready {
        false => starting(object, now),
        // An adapter whose source fails is looked for again.
        true if valid.adapters.iter().any(|(_, source)| source.is_err()) => STARTING,
        true => IDLE,
    };
    // Nobody tells of a namespace that takes its permission back.
    let idle = if valid.node_folders().is_empty() { idle } else { idle.min(ELSEWHERE) };
    let looks = decision.and_then(|d| d.again).map(|at| Duration::from_secs(u64::try_from(at - now).unwrap_or(0)));
    let routers = served.routing.until.map(|at| Duration::from_secs(u64::try_from(at - now).unwrap_or(0).max(1)));
    Ok(Done { result: "Applied", again: Some(again.into_iter().chain(looks).chain(routers).fold(idle, Duration::min)) })
}

/// When a deployment that is not ready is looked at again though nothing happens: after a quarter of the time for which it has not been.
fn starting(object: &ModelDeployment, now: i64) -> Duration {
    let since = object.condition(status::READY).and_then(|ready| ready.last_transition_time.parse::<Timestamp>().ok());
    let waits = since.map_or(0, |since| (now - since.as_second()).max(0).unsigned_abs());
    Duration::from_secs(waits / 4).clamp(STARTING, IDLE)
}

fn too_large(error: &TooLarge) -> Rejection {
    Rejection { condition: status::ACCEPTED, reason: "PlanInfeasible", message: error.to_string(), until: Until::Changed }
}

/// Names of revisions that were passed over so far.
fn collisions(object: &ModelDeployment) -> u32 {
    object.status.as_ref().map_or(0, |s| s.collision_count)
}

impl Context {
    /// What writes objects.
    fn writer(&self) -> Writer<'_> {
        Writer { client: &self.client, cache: &self.cache }
    }

    /// What looks at models on claims.
    fn inspector(&self) -> Inspector<'_> {
        let Self { client, cache, settings, models, inspections, .. } = self;
        Inspector { client, cache, settings, models, inspections }
    }

    /// Notes the version of a deployment whose status was written.
    fn wrote(&self, object: &ModelDeployment, version: u64) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.insert(object.uid().to_owned(), version).is_none() {
            let all = self.deployments.state();
            written.retain(|uid, _| uid == object.uid() || all.iter().any(|d| d.uid() == uid));
        }
    }

    /// Whether watches have told of all that this process wrote of a deployment: one that goes by what was before would do it again.
    fn is_current(&self, object: &ModelDeployment) -> bool {
        let owner = Owner::new(object.namespace(), object.name());
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner).get(object.uid()).copied().unwrap_or(0);
        version(&object.metadata) >= written && !self.cache.stateful_sets.awaits(&owner) && !self.cache.revisions.awaits(&owner)
    }

    /// Refuses a deployment: says why, and when it is looked at again.
    async fn reject(
        &self,
        object: &mut ModelDeployment,
        served: &Served,
        fetched: &Fetched,
        rejection: &Rejection,
    ) -> Result<Done, ReconcileError> {
        // What runs goes on, whatever the spec says now; but one whose name is another's must not answer to it.
        if !served.knows(object.name()) {
            let entry = if rejection.reason == "NameTaken" { None } else { advance::standing(object, served, fetched) };
            served.settle(object.name(), entry, &expected(&self.deployments, object.namespace()));
        }
        ask(&self.pools, object);
        self.say(object, status::rejected(object, rejection)).await?;
        let again = match rejection.until {
            Until::Changed => None,
            Until::Elsewhere => Some(ELSEWHERE),
            Until::Source => {
                // What is wrong with credentials is put right in steps, and outside of the spec; other messages may differ each time.
                let said = if rejection.reason == "Unauthorized" { rejection.message.as_str() } else { "" };
                let what = format!("{} of generation {}: {said}", rejection.reason, object.metadata.generation.unwrap_or(0));
                // Who looks for a header on a claim keeps pauses of his own: each try is a pod.
                let own = self.inspections.pause(object.uid());
                Some(own.unwrap_or_else(|| self.setbacks.pause(object.uid(), &what, SOURCE_BACKOFF)))
            }
        };
        Ok(Done { result: rejection.reason, again })
    }

    /// Writes a status that is news, and its events.
    async fn say(&self, object: &mut ModelDeployment, status: Status) -> Result<(), ReconcileError> {
        let Some(version) = status::update_status(&self.client, object, &status).await? else { return Ok(()) };
        self.wrote(object, version);
        self.metrics.status_written();
        let reference = object.object_ref(&());
        let news = status::news(object.status.as_ref(), &status);
        object.status = Some(status);
        for event in news {
            info!(namespace = object.namespace(), name = object.name(), reason = event.reason, note = event.note, "event");
            // The status says the same: an event that is lost is no reason to start again.
            if let Err(error) = self.recorder.publish(&event, &reference).await {
                warn!(error = chain(&error), "an event was not written");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
