//! The task that follows the fleet and the pool: starts and stops owners, and moves streams off draining replicas.

use std::{collections::HashMap, sync::Arc};

use plan::fleet::{FleetReplica, FleetState};
use tokio::{
    sync::watch,
    task::{Id, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::{Deployment, Driver, Lasting, Member, View};
use crate::{
    edge::stats::Stats,
    pool::{Pool, Seat},
    replica::{
        Connector, Replica,
        owner::{Drive, Owner},
    },
};

/// Makes the view from the fleet state and, where there is a pool, from who drives what.
pub(crate) struct Supervisor {
    pub(crate) connector: Arc<dyn Connector>,
    pub(crate) view: watch::Sender<Arc<View>>,
    pub(crate) stop: CancellationToken,
    pub(crate) pool: Option<Arc<Pool>>,
    owners: JoinSet<()>,
    /// The replica of each task in `owners`.
    tasks: HashMap<Id, String>,
    /// What this router drives, by the replica's name.
    driven: HashMap<String, Driven>,
    /// The state in force.
    state: FleetState,
    taken: bool,
}

/// A replica that this router drives.
struct Driven {
    spec: FleetReplica,
    owner: Arc<Owner>,
    stop: CancellationToken,
}

impl Supervisor {
    pub(crate) fn new(
        connector: Arc<dyn Connector>,
        view: watch::Sender<Arc<View>>,
        stop: CancellationToken,
        pool: Option<Arc<Pool>>,
    ) -> Self {
        let (owners, tasks, driven) = (JoinSet::new(), HashMap::new(), HashMap::new());
        Self { connector, view, stop, pool, owners, tasks, driven, state: FleetState::default(), taken: false }
    }

    /// Follows `fleet` until stopped, then waits for every owner and the pool to end.
    pub(crate) async fn run(mut self, mut fleet: watch::Receiver<FleetState>) {
        let mut view = self.view.subscribe();
        let mut pool = self.pool.as_ref().map(|pool| pool.subscribe());
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
                Some(ended) = self.owners.join_next_with_id() => self.ended(ended),
                () = changed(&mut pool) => self.rebuild(),
                // The sender is this task's own, so this never fails.
                _ = view.changed() => self.drain(),
            }
        }
        self.driven.values().for_each(|d| d.stop.cancel());
        while self.owners.join_next().await.is_some() {}
        if let Some(pool) = &self.pool {
            pool.end().await;
        }
        self.view.send_replace(Arc::default());
    }

    /// Puts a state in force, unless a later one is.
    pub(crate) fn apply(&mut self, state: FleetState) {
        let number = (state.term, state.number);
        if self.taken && number < (self.state.term, self.state.number) {
            info!(term = state.term, number = state.number, "ignored an old fleet state");
            return;
        }
        self.taken = true;
        if let Some(pool) = &self.pool {
            pool.follow(&state.routers);
        }
        self.state = state;
        self.rebuild();
    }

    /// Makes the view anew: who drives what may have changed.
    fn rebuild(&mut self) {
        let mut state = self.state.clone();
        if let Some(pool) = &self.pool {
            pool.place_announced(&mut state);
        }
        let before = self.view.borrow().clone();
        let mut kept = Vec::new();
        let mut deployments = Vec::with_capacity(state.deployments.len());
        for spec in state.deployments {
            let old = before.deployment(&spec.name);
            let lasting = old.map_or_else(|| Arc::new(Lasting::new()), |d| d.lasting.clone());
            let members = spec.replicas.iter().map(|replica| {
                let member = self.member(replica, &spec.drivers, old.and_then(|d| d.members.iter().find(|m| m.spec.name == replica.name)));
                if let Driver::Here(owner) = &member.driver {
                    kept.push(replica.name.clone());
                    owner.set_prompt_lookup(spec.serving.prompt_lookup);
                    owner.set_draft(replica.draft.as_ref(), || self.connector.draft(replica));
                    owner.want(spec.adapters.iter().map(|adapter| adapter.source.clone()).collect());
                }
                Arc::new(member)
            });
            let members = members.collect();
            deployments.push(Arc::new(Deployment { spec, members, lasting }));
        }
        self.driven.retain(|name, driven| {
            let keep = kept.contains(name);
            if !keep {
                driven.stop.cancel();
            }
            keep
        });
        let ending = self.tasks.values().filter(|name| !self.driven.contains_key(*name)).cloned().collect();
        let moving = self.pool.as_ref().is_some_and(|pool| deployments.iter().any(|d: &Arc<Deployment>| d.spec.drivers != pool.own()));
        self.view.send_replace(Arc::new(View { deployments, ending, moving }));
    }

    /// A replica of the state, which routers of `drivers` drive; `old` is what it was before.
    fn member(&mut self, spec: &FleetReplica, drivers: &str, old: Option<&Arc<Member>>) -> Member {
        let replica = old.filter(|m| same(&m.spec, spec)).map_or_else(|| self.connector.replica(spec), |m| m.replica.clone());
        let sequences = old.map(|m| m.sequences.clone()).unwrap_or_default();
        let stats = old.map_or_else(|| Arc::new(Stats::new()), |m| m.stats.clone());
        let driven = self.driven.get(&spec.name).filter(|d| same(&d.spec, spec)).map(|d| d.owner.clone());
        let seat = self.pool.as_ref().map_or(Seat::Here, |pool| pool.seat(&spec.name, drivers, driven.is_some()));
        let driver = match (seat, driven) {
            (Seat::Here, Some(owner)) => Driver::Here(owner),
            // The owner before lets go first.
            (Seat::Here, None) if self.tasks.values().any(|name| *name == spec.name) => Driver::Nobody,
            (Seat::Here, None) => Driver::Here(self.start(spec, &replica)),
            (Seat::Peer(peer), _) => Driver::Peer(peer, spec.name.clone()),
            (Seat::Nobody, _) => Driver::Nobody,
        };
        Member { spec: spec.clone(), driver, sequences, stats, replica }
    }

    fn start(&mut self, spec: &FleetReplica, replica: &Arc<dyn Replica>) -> Arc<Owner> {
        let (owner, stop) = (Arc::new(Owner::new()), self.stop.child_token());
        let view = self.view.clone();
        let drive = Drive {
            name: spec.name.clone(),
            owner: owner.clone(),
            replica: replica.clone(),
            limits: spec.limits.clone(),
            revision: Member::revision(spec),
            stop: stop.clone(),
            changed: Box::new(move || view.send_modify(|_| ())),
            grammars: Arc::default(),
        };
        let task = self.owners.spawn(drive.run());
        self.tasks.insert(task.id(), spec.name.clone());
        self.driven.insert(spec.name.clone(), Driven { spec: spec.clone(), owner: owner.clone(), stop });
        owner
    }

    /// An owner's task ended: its replica may be driven again, here or elsewhere.
    fn ended(&mut self, ended: Result<(Id, ()), tokio::task::JoinError>) {
        let id = match ended {
            Ok((id, ())) => id,
            Err(broken) => {
                error!(error = %broken, "an owner's task broke");
                broken.id()
            }
        };
        if let Some(name) = self.tasks.remove(&id)
            && self.driven.get(&name).is_some_and(|d| !d.stop.is_cancelled())
        {
            // It was not told to end, so it is started again.
            self.driven.remove(&name);
        }
        self.rebuild();
    }

    /// Hands back the sequences of draining replicas where another one can go on with them.
    fn drain(&self) {
        let view = self.view.borrow().clone();
        for deployment in &view.deployments {
            for member in deployment.members.iter().filter(|m| m.spec.draining && m.live() > 0) {
                if deployment.choose(&[], "", Some(&member.spec.numerics)).is_some() {
                    member.driver.release();
                }
            }
        }
    }
}

/// Whether two records are of the same workers, which the same owner can go on with; the draft model is another's matter.
fn same(a: &FleetReplica, b: &FleetReplica) -> bool {
    FleetReplica { weight: a.weight, draining: a.draining, draft: a.draft.clone(), ..b.clone() } == *a
}

/// Completes when who drives what may have changed.
async fn changed(pool: &mut Option<watch::Receiver<()>>) {
    match pool {
        // The sender lives as long as the pool, which the supervisor holds.
        Some(pool) => pool.changed().await.unwrap_or_else(|_| unreachable!("the pool is gone")),
        None => std::future::pending().await,
    }
}
