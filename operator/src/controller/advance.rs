//! One step of a deployment towards what is wanted: what is planned is written, routers are told, and what nobody needs is deleted, in this
//! order. Wherever a process ends in between, the next one finds in the cluster what it has to go on from.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::PoisonError,
    time::Duration,
};

use k8s_openapi::{api::apps::v1::StatefulSet, jiff::Timestamp};
use kube::ResourceExt;
use plan::{
    fleet::{FleetAdapter, FleetDeployment, FleetDraft},
    manifest::{Manifest, RolloutStrategy},
};
use tracing::{info, warn};

use super::{Context, ReconcileError, expected};
use crate::{
    apply::{self, Unwanted},
    build::{self, Reach, Resources, TooLarge},
    cache::Owner,
    dereference::{Fetched, Standing},
    inspect, names, observe,
    resource::ModelDeployment,
    revision::{self, Record, Revision, replica_name},
    rollout::{self, Goal, Id, Memory, Plan, Seen, Slot, Strategy},
    routers::Served,
    status::{self, View},
    stop::Place,
    validate::{self, Adapter, ValidatedDeployment},
};

/// One step, planned and built.
pub(super) struct Step<'a> {
    valid: &'a ValidatedDeployment,
    revision: &'a Revision,
    revisions: BTreeMap<&'a str, &'a Revision>,
    standing: &'a Standing,
    served: &'a Served,
    goal: Goal,
    seen: Vec<Seen>,
    plan: Plan,
    built: Resources,
    shortage: Option<(String, String)>,
    now: i64,
}

impl<'a> Step<'a> {
    /// Plans and builds it.
    ///
    /// # Errors
    /// When a worker's specification is too large to be kept.
    pub(super) fn new(
        object: &ModelDeployment,
        valid: &'a ValidatedDeployment,
        revision: &'a Revision,
        standing: &'a Standing,
        (context, served): (&Context, &'a Served),
    ) -> Result<Self, TooLarge> {
        let revisions = revision::by_name(&standing.revisions, revision);
        let seen = observe::replicas(object, standing, &revisions, &revision.record);
        let goal = goal(object, valid, revision, &revisions);
        let now = Timestamp::now().as_second();
        let mut rollouts = context.rollouts.lock().unwrap_or_else(PoisonError::into_inner);
        if !rollouts.contains_key(object.uid()) {
            let all = context.deployments.state();
            rollouts.retain(|uid, _| all.iter().any(|d| d.uid() == uid));
        }
        let memory = rollouts.entry(object.uid().to_owned()).or_insert_with(|| recall(object, revision, standing));
        let plan = rollout::plan(&goal, &seen, standing.load.routers > 0, memory, now);
        let shortage = memory.shortage().map(|(id, message)| (replica_name(object, id), message.to_owned()));
        // A process that has just started may not know yet what stands already.
        let meeting = served.meeting().or_else(|| observe::meeting(&standing.stateful_sets));
        let built =
            build::build(valid, object, revision, &revisions, &plan.exist, Reach { own: served.routing.own, meeting: meeting.as_deref() })?;
        Ok(Self { valid, revision, revisions, standing, served, goal, seen, plan, built, shortage, now })
    }

    /// Takes it.
    pub(super) async fn take(&self, object: &ModelDeployment, context: &Context) -> Result<(), ReconcileError> {
        let (namespace, stops) = (object.namespace(), &context.stops);
        let (owner, writer) = (Owner::new(namespace, object.name()), context.writer());
        let (name, plan) = (object.name(), &self.plan);
        for (id, message) in &plan.taken_back {
            info!(namespace, name, replica = replica_name(object, id), message, "a replica without room is taken back");
        }
        apply::abandon(&context.client, namespace, &self.standing.lost).await?;
        let recorded = self.standing.revisions.iter().any(|r| r.name == self.revision.name);
        writer.record(&owner, &self.built).await?;
        if !recorded {
            stops.pass(Place::RevisionRecorded).await;
        }
        context.certify(object, &self.new_stages(object)).await?;
        writer.apply(&owner, &self.built).await?;
        let made = plan.exist.iter().filter(|slot| !self.seen.iter().any(|r| r.id == slot.id)).count();
        if made > 0 {
            stops.pass(Place::SetsWritten).await;
        }
        if !plan.drained.is_empty() {
            stops.pass(Place::DrainDecided).await;
        }
        let (served, last) = (self.served, self.served.told(name));
        let about = (&self.valid.manifest, self.valid.adapters.as_slice());
        let entry = entry(object, about, &self.revision.record, (&self.revisions, &plan.exist), (self.standing, served, last.as_ref()));
        served.settle(name, Some(entry), &expected(&context.deployments, namespace));
        if made > 0 || !plan.drained.is_empty() {
            info!(namespace, name, revision = self.revision.name, made, drained = plan.drained.len(), "a rollout takes a step");
            stops.pass(Place::StatePushed).await;
        }
        let unwanted = self.unwanted(object);
        let replicas = !unwanted.stateful_sets.is_empty();
        if replicas {
            stops.pass(Place::BeforeDeletion).await;
        }
        writer.remove(&owner, &unwanted).await?;
        if replicas {
            stops.pass(Place::AfterDeletion).await;
        }
        Ok(())
    }

    /// Replica and stage of what is made.
    fn new_stages(&self, object: &ModelDeployment) -> Vec<(String, usize)> {
        let stands = |name: &str| self.standing.stateful_sets.iter().any(|s| s.metadata.name.as_deref() == Some(name));
        let stages = |slot: &Slot| {
            let record = self.revisions.get(slot.id.revision.as_str()).map(|r| &r.record);
            let replica = replica_name(object, &slot.id);
            let draft = record.and_then(|r| r.draft.as_ref()).map(|_| (FleetDraft::name(&replica), 0));
            (0..record.map_or(0, |r| r.stages.len())).map(move |stage| (replica.clone(), stage)).chain(draft)
        };
        self.plan.exist.iter().flat_map(stages).filter(|(replica, stage)| !stands(&names::stateful_set(replica, *stage))).collect()
    }

    /// What nobody needs any more.
    fn unwanted(&self, object: &ModelDeployment) -> Unwanted {
        let sets = self.standing.stateful_sets.iter().filter(|s| s.metadata.deletion_timestamp.is_none());
        let wanted = |id: Option<Id>| id.is_some_and(|id| self.plan.exist.iter().any(|slot| slot.id == id));
        let stateful_sets = sets.filter(|s| !wanted(observe::id(s.metadata.labels.as_ref()))).map(ResourceExt::name_any).collect();
        let mut used: BTreeSet<&str> = self.seen.iter().map(|r| r.id.revision.as_str()).collect();
        used.extend(self.plan.exist.iter().map(|slot| slot.id.revision.as_str()));
        used.insert(&self.revision.name);
        let header = inspect::kept_in(object);
        let revisions = self.revisions.values().filter(|r| used.contains(r.name.as_str()));
        let maps: BTreeSet<&str> = revisions.flat_map(|r| r.config_maps()).chain(header.as_deref()).collect();
        let config_maps = self.standing.config_maps.iter().filter(|name| !maps.contains(name.as_str())).cloned().collect();
        used.extend(self.goal.current.as_deref());
        let limit = self.valid.manifest.spec().rollout.revision_history_limit;
        let forgotten = revision::forgotten(&self.standing.revisions, &used, limit);
        Unwanted { stateful_sets, config_maps, revisions: forgotten.into_iter().map(|r| r.object_name(object)).collect() }
    }

    /// When to look again though nothing happens.
    pub(super) fn again(&self) -> Option<Duration> {
        self.plan.again.map(|at| Duration::from_secs((at - self.now).max(1).unsigned_abs()))
    }

    /// What the status is computed from.
    pub(super) fn view(&self, collisions: u32) -> View<'_> {
        View {
            valid: self.valid,
            revision: self.revision,
            collisions,
            revisions: &self.revisions,
            goal: &self.goal,
            plan: &self.plan,
            standing: self.standing,
            routers: self.served.status(),
            shortage: self.shortage.clone(),
        }
    }
}

/// What a deployment wants of its rollout.
fn goal(object: &ModelDeployment, valid: &ValidatedDeployment, revision: &Revision, revisions: &BTreeMap<&str, &Revision>) -> Goal {
    let spec = valid.manifest.spec();
    let replicas = valid.replicas();
    let current = object.status.as_ref().and_then(|s| s.current_revision.clone());
    Goal {
        revision: revision.name.clone(),
        current: current.filter(|name| revisions.contains_key(name.as_str())),
        replicas,
        strategy: match spec.rollout.strategy {
            RolloutStrategy::Auto => Strategy::Auto,
            RolloutStrategy::Recreate => Strategy::Recreate,
            RolloutStrategy::RollingUpdate => {
                let (surge, unavailable) = spec.rollout.bounds(replicas);
                Strategy::Rolling { surge, unavailable }
            }
        },
        paused: spec.rollout.paused,
        gang: spec.scheduling.gang,
        deadline: spec.rollout.progress_deadline_seconds.into(),
        drain: spec.recovery.drain_seconds.into(),
    }
}

/// What this process can know of a rollout that another began.
fn recall(object: &ModelDeployment, revision: &Revision, standing: &Standing) -> Memory {
    let complete = object.condition(status::PROGRESSING).is_some_and(|c| c.reason == "RolloutComplete");
    let completed = object.status.as_ref().and_then(|s| s.current_revision.clone()).filter(|_| complete);
    let of = |set: &&StatefulSet| observe::id(set.metadata.labels.as_ref()).is_some_and(|id| id.revision == revision.name);
    let made = standing.stateful_sets.iter().filter(of).filter_map(|s| s.metadata.creation_timestamp.as_ref().map(|t| t.0)).max();
    Memory::recall(completed, made.or(revision.created).map_or(0, Timestamp::as_second))
}

/// What routers are told of a deployment whose spec is refused: what stands goes on under the names it has, as far as they can be known.
pub(super) fn standing(object: &ModelDeployment, served: &Served, fetched: &Fetched) -> Option<FleetDeployment> {
    let standing = &fetched.standing;
    let revisions: BTreeMap<&str, &Revision> = standing.revisions.iter().map(|r| (r.name.as_str(), r)).collect();
    let newest = standing.revisions.iter().max_by_key(|r| r.number)?;
    let seen = observe::replicas(object, standing, &revisions, &newest.record);
    let slots: Vec<Slot> = seen.into_iter().filter(|r| !r.leaving).map(|r| Slot { id: r.id, draining: r.draining }).collect();
    if slots.is_empty() {
        return None;
    }
    let read = validate::read(object, &object.spec, fetched).or_else(|_| validate::read(object, &newest.record.spec, fetched));
    match read {
        Ok(manifest) => {
            let adapters = validate::adapters(&manifest, fetched);
            Some(entry(object, (&manifest, &adapters), &newest.record, (&revisions, &slots), (standing, served, None)))
        }
        Err(rejection) => {
            warn!(namespace = object.namespace(), name = object.name(), rejection.message, "what stands cannot be told to routers");
            None
        }
    }
}

/// What routers are told. A worker whose address is not known now keeps the last one: it may be on its way back.
fn entry(
    object: &ModelDeployment,
    (manifest, adapters): (&Manifest, &[Adapter]),
    present: &Record,
    (revisions, slots): (&BTreeMap<&str, &Revision>, &[Slot]),
    (standing, served, last): (&Standing, &Served, Option<&FleetDeployment>),
) -> FleetDeployment {
    let replica = |slot: &Slot| {
        let revision = revisions.get(slot.id.revision.as_str())?;
        let name = replica_name(object, &slot.id);
        let before = last.and_then(|d| d.replicas.iter().find(|r| r.name == name));
        let address = |stage: usize, rank: usize| {
            let known = standing.address(&names::pod(&name, stage, rank));
            known.or_else(|| before?.workers.get(stage)?.get(rank).cloned()).unwrap_or_default()
        };
        let draft = || {
            let known = standing.address(&names::pod(&FleetDraft::name(&name), 0, 0));
            known.or_else(|| Some(before?.draft.as_ref()?.worker.clone())).unwrap_or_default()
        };
        Some(revision.replica(name.clone(), slot.draining.is_some(), address, draft))
    };
    let adapter = |(name, source): &Adapter| Some(FleetAdapter { name: name.clone(), source: source.clone().ok()? });
    // Requests are checked against what answers them; against what is being made only where nothing else does.
    let answers = |slot: &&Slot| {
        slot.draining.is_none() && standing.load.replicas.get(&replica_name(object, &slot.id)).is_some_and(|said| said.ready)
    };
    let answering = slots.iter().filter(answers).filter_map(|slot| revisions.get(slot.id.revision.as_str())).max_by_key(|r| r.number);
    FleetDeployment {
        name: object.name().to_owned(),
        model: manifest.model_name().to_owned(),
        aliases: manifest.spec().model.aliases.clone(),
        limits: answering.map_or(present, |r| &r.record).limits.clone(),
        serving: manifest.serving(),
        drivers: if served.routing.own { object.name().to_owned() } else { String::new() },
        replicas: slots.iter().filter_map(replica).collect(),
        adapters: adapters.iter().filter_map(adapter).collect(),
    }
}
