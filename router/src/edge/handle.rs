//! The edge's handle: what the API and the command line call.

use std::{
    sync::{
        Arc, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use plan::fleet::{FleetAdapter, FleetState};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    AdapterLoad, DeploymentLoad, DraftLoad, Generation, ModelStatus, ReplicaLoad, SubmitError, TokenStream,
    stream::{Course, Limits},
};
use crate::{
    control::FleetStore,
    fleet::{Deployment, Member, Presence, Supervisor, View},
    pool::{Pool, PoolOptions},
    replica::Connector,
    scheduler::Submission,
};

/// Settings of an edge.
#[derive(Clone)]
pub struct EdgeOptions {
    /// How replicas are reached.
    pub connector: Arc<dyn Connector>,
    /// Longest a stream that lost its replica waits for one that can go on with it.
    pub resume: Duration,
    /// Longest a stream may take in all; `None` sets no limit.
    pub deadline: Option<Duration>,
}

/// The edge: chooses replicas, keeps streams alive. A cheap clone; the last one dropped stops it.
#[derive(Clone)]
pub struct Edge {
    inner: Arc<Inner>,
}

struct Inner {
    view: watch::Receiver<Arc<View>>,
    options: EdgeOptions,
    stop: CancellationToken,
    pool: Option<Arc<Pool>>,
    supervisor: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Edge {
    /// Starts driving the replicas of `fleet` and of every state that follows it. Must be called in a tokio runtime.
    ///
    /// The state of the moment is in force when this returns.
    pub fn start(fleet: watch::Receiver<FleetState>, options: EdgeOptions) -> Self {
        Self::supervise(fleet, options, |_, _| None)
    }

    /// The same as one router of a pool: it drives its share of the replicas of `store`, and reaches the others through the routers that
    /// drive them.
    pub fn join(store: &FleetStore, options: EdgeOptions, pool: PoolOptions) -> Self {
        Self::supervise(store.subscribe(), options, |view, stop| Some(Pool::start(pool, store.clone(), view, stop)))
    }

    fn supervise(
        mut fleet: watch::Receiver<FleetState>,
        options: EdgeOptions,
        pool: impl FnOnce(watch::Receiver<Arc<View>>, CancellationToken) -> Option<Arc<Pool>>,
    ) -> Self {
        let stop = CancellationToken::new();
        let (sender, view) = watch::channel(Arc::default());
        let pool = pool(view.clone(), stop.clone());
        let mut supervisor = Supervisor::new(options.connector.clone(), sender, stop.clone(), pool.clone());
        let state = fleet.borrow_and_update().clone();
        supervisor.apply(state);
        let task = tokio::spawn(supervisor.run(fleet));
        Self { inner: Arc::new(Inner { view, options, stop, pool, supervisor: std::sync::Mutex::new(Some(task)) }) }
    }

    /// Hands the replicas that this router drives over to the others of its pool. Its own clients' streams go on.
    pub fn leave(&self) {
        if let Some(pool) = &self.inner.pool {
            pool.leave();
        }
    }

    /// Queues a generation. The stream waits for a replica when none is ready yet.
    ///
    /// # Errors
    /// When the model is unknown, the queue is full, the prompt does not fit the context, or the deployment has no replicas.
    pub fn submit(&self, model: &str, generation: Generation) -> Result<TokenStream, SubmitError> {
        let Generation { prompt, sampling, max_tokens, end_ids, score_prompt, constraint } = generation;
        let submission = Submission { score_prompt, constraint, ..Submission::generate(prompt, sampling, max_tokens, end_ids) };
        self.course(model, submission).map(TokenStream)
    }

    /// Admits a sequence to its deployment's queue.
    pub(super) fn course(&self, model: &str, mut submission: Submission) -> Result<Course, SubmitError> {
        let (deployment, adapter) = {
            let view = self.inner.view.borrow();
            let (deployment, adapter) = view.resolve(model)?;
            (deployment.clone(), adapter.cloned())
        };
        let adapter = adapter.map(|FleetAdapter { name, source }| {
            submission.adapter = source.numerics.into();
            name
        });
        let (spec, stats) = (&deployment.spec, &deployment.lasting.stats);
        let (prompt, context) = (submission.prompt.len(), spec.limits.max_context);
        if prompt > context || (prompt == context && submission.max_tokens > 0) {
            return Err(SubmitError::TooLong { prompt, context });
        }
        let (slot, queue) = deployment.admit()?;
        let limits = Limits { queue, resume: self.inner.options.resume, total: self.inner.options.deadline };
        let names = (spec.name.clone(), adapter.unwrap_or_default());
        Ok(Course::new(self.inner.view.clone(), names, stats.clone(), submission, slot, limits))
    }

    /// Whether routers of another pool drive `model`: this one is told of it for what it has begun, or is about to take over.
    pub(crate) fn is_driven_elsewhere(&self, model: &str) -> bool {
        let own = self.inner.pool.as_ref().map(|pool| pool.own());
        own.is_some_and(|own| self.find(model).is_ok_and(|d| d.spec.drivers != own))
    }

    /// Completes once some model is driven by routers of another pool.
    pub(crate) async fn moving(&self) {
        if self.watch().wait_for(|view| view.moving).await.is_err() {
            // Nothing changes any more.
            std::future::pending().await
        }
    }

    /// Every model served, in the order of the fleet state.
    pub fn models(&self) -> Vec<ModelStatus> {
        let status = |d: &Arc<Deployment>| ModelStatus {
            name: d.spec.model.clone(),
            aliases: d.spec.aliases.clone(),
            deployment: d.spec.name.clone(),
            limits: d.spec.limits.clone(),
            serving: d.spec.serving.clone(),
            adapters: d.spec.adapters.iter().map(|adapter| adapter.name.clone()).collect(),
            replicas: d.members.len(),
            ready_replicas: d.members.iter().filter(|m| m.driver.ready()).count(),
        };
        self.inner.view.borrow().deployments.iter().map(status).collect()
    }

    /// The deployment, by its resource name, and the adapter that requests name so.
    pub(crate) fn resolve(&self, name: &str) -> Result<(String, Option<String>), SubmitError> {
        let view = self.inner.view.borrow();
        view.resolve(name).map(|(deployment, adapter)| (deployment.spec.name.clone(), adapter.map(|a| a.name.clone())))
    }

    /// Whether a real token came out of the last stage of at least one replica of `model`.
    pub fn ready(&self, model: &str) -> bool {
        self.find(model).is_ok_and(|d| d.members.iter().any(|m| m.driver.ready()))
    }

    /// Waits until [`Edge::ready`], or until the edge stops (`false`).
    pub async fn wait_ready(&self, model: &str) -> bool {
        let mut view = self.inner.view.clone();
        let ready = |view: &Arc<View>| view.find(model).is_some_and(|d| d.members.iter().any(|m| m.driver.ready()));
        view.wait_for(ready).await.is_ok()
    }

    /// Waits until a real token came out of the last stage of every replica of `model`, and each of its adapters is on each of them or cannot
    /// be loaded, or until the edge stops (`false`).
    pub async fn wait_complete(&self, model: &str) -> bool {
        let mut view = self.inner.view.clone();
        let settled = |d: &Deployment, m: &Member| m.driver.ready() && m.adapters(&d.spec).iter().all(|(_, p)| *p != Presence::Loading);
        let complete =
            |view: &Arc<View>| view.find(model).is_some_and(|d| !d.members.is_empty() && d.members.iter().all(|m| settled(d, m)));
        view.wait_for(complete).await.is_ok()
    }

    /// Changes with the fleet, and with every replica that becomes ready or is lost.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.inner.view.clone()
    }

    /// Loads of all deployments.
    pub fn load(&self) -> Vec<DeploymentLoad> {
        let now = Instant::now();
        self.inner.view.borrow().deployments.iter().map(|d| deployment_load(d, now)).collect()
    }

    /// Stops all streams and sessions, and waits until every task has ended.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        let task = self.inner.supervisor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(error)) = match task {
            Some(task) => Some(task.await),
            None => None,
        } {
            tracing::error!(%error, "the fleet's task did not end well");
        }
    }

    pub(super) fn find(&self, model: &str) -> Result<Arc<Deployment>, SubmitError> {
        self.inner.view.borrow().resolve(model).map(|(deployment, _)| deployment.clone())
    }
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edge").finish_non_exhaustive()
    }
}

/// How the adapters of a deployment are doing on one of its replicas.
fn adapters(deployment: &Deployment, member: &Member) -> Vec<AdapterLoad> {
    let of = |(adapter, (numerics, presence)): (&FleetAdapter, (String, Presence))| {
        let (ready, failure) = presence.said();
        AdapterLoad { name: adapter.name.clone(), numerics, ready, failure }
    };
    deployment.spec.adapters.iter().zip(member.adapters(&deployment.spec)).map(of).collect()
}

fn draft(presence: Presence) -> DraftLoad {
    let (ready, failure) = presence.said();
    DraftLoad { ready, failure }
}

fn deployment_load(deployment: &Deployment, now: Instant) -> DeploymentLoad {
    let stats = &deployment.lasting.stats;
    let rates = stats.rates(now);
    let read = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let replicas: Vec<ReplicaLoad> = deployment
        .members
        .iter()
        .map(|m| {
            let (condition, (steps_total, failures_total, _)) = (m.driver.condition(), m.driver.totals());
            let rates = m.stats.rates(now);
            ReplicaLoad {
                name: m.spec.name.clone(),
                ready: m.driver.ready(),
                draining: m.spec.draining,
                drives: m.driver.is_here(),
                sequences: read(&m.sequences),
                queued: condition.queued,
                running: condition.running,
                kv_used: condition.kv_used,
                tokens_per_second: rates.tokens_per_second,
                ttft_p90_seconds: rates.ttft_p90,
                steps_total,
                failures_total,
                fetching: m.fetching(),
                last_failure: condition.last_failure,
                adapters: adapters(deployment, m),
                draft: m.driver.draft().map(draft),
            }
        })
        .collect();
    let ready = replicas.iter().filter(|r| r.ready).count().max(1);
    let mut load = DeploymentLoad {
        deployment: deployment.spec.name.clone(),
        model: deployment.spec.model.clone(),
        queued: read(&stats.waiting),
        held: read(&stats.held),
        running: replicas.iter().filter(|r| r.drives).map(|r| r.running).sum(),
        kv_used: replicas.iter().filter(|r| r.ready).map(|r| r.kv_used).sum::<f32>() / ready as f32,
        ttft_p90_seconds: rates.ttft_p90,
        itl_p90_seconds: rates.itl_p90,
        tokens_per_second: rates.tokens_per_second,
        tokens_total: rates.tokens,
        resumed_total: stats.resumed.load(Ordering::Relaxed),
        refused_total: stats.refused.load(Ordering::Relaxed),
        replicas,
        ..DeploymentLoad::default()
    };
    for member in &deployment.members {
        let (_, _, counters) = member.driver.totals();
        load.prompt_tokens_total += counters.prompt_tokens;
        load.prefix_query_tokens_total += counters.prefix_query_tokens;
        load.prefix_hit_tokens_total += counters.prefix_hit_tokens;
        load.preemptions_total += counters.preemptions;
        load.drafts_total += counters.drafts;
        load.draft_tokens_total += counters.draft_tokens;
        load.accepted_tokens_total += counters.accepted_tokens;
        load.draft_failures_total += member.driver.draft_failures();
        load.step_sizes = load.step_sizes + counters.sizes;
    }
    load
}

#[cfg(test)]
impl Edge {
    /// Waits until the state sent last is in force.
    pub(super) async fn inner_view_changed(&self) {
        let mut view = self.inner.view.clone();
        view.mark_unchanged();
        view.changed().await.expect("the supervisor runs");
    }

    /// Waits until a replica is ready.
    pub(super) async fn wait_replica(&self, name: &str) {
        let mut view = self.inner.view.clone();
        let ready = |v: &Arc<View>| v.deployments.iter().flat_map(|d| &d.members).any(|m| m.spec.name == name && m.driver.ready());
        view.wait_for(ready).await.expect("the supervisor runs");
    }
}
