//! What this machine's deployments look like to the router, and to the workers themselves.

use plan::{
    fleet::{FleetAdapter, FleetDeployment, FleetDraft, FleetReplica, FleetState},
    planner::{self, Origin},
    shard::ExecutionPlan,
    worker::{CollectiveKind, WorkerSpec},
};

use super::{
    deployment::{Draft, Planned},
    threads,
};
use crate::output;

/// Where a worker stands in the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) deployment: usize,
    pub(crate) replica: usize,
    pub(crate) stage: usize,
    pub(crate) rank: usize,
    /// It is the only worker of the replica's draft model.
    pub(crate) draft: bool,
}

/// Workers of one replica.
pub(crate) fn workers(plan: &ExecutionPlan) -> usize {
    plan.stages.iter().map(|stage| stage.shards.len()).sum()
}

/// Workers of all replicas of all deployments, those of draft models not counted.
pub(crate) fn all_workers(planned: &[Planned]) -> usize {
    planned.iter().map(|deployment| deployment.replicas * workers(&deployment.plan)).sum()
}

/// What starts, for a person: `gemma3-270m: 4 workers (2 stages of 2 ranks), 241.4 MiB, context 32768`.
pub(crate) fn summary(planned: &Planned) -> String {
    let plan = &planned.plan;
    let ranks = plan.stages.first().map_or(0, |stage| stage.shards.len());
    let shape = match (plan.stages.len(), ranks) {
        (1, 1) => "in this process".to_owned(),
        (1, ranks) => format!("{ranks} workers ({ranks} ranks)"),
        (stages, 1) => format!("{stages} workers ({stages} stages)"),
        (stages, ranks) => format!("{} workers ({stages} stages of {ranks} ranks)", stages * ranks),
    };
    let copies = if planned.replicas == 1 { String::new() } else { format!("{} replicas of ", planned.replicas) };
    let draft = planned
        .draft
        .as_ref()
        .map_or_else(String::new, |draft| format!(", draft model {} of {}", draft.model.name, output::bytes(draft.plan.tensor_bytes)));
    format!("{}: {copies}{shape}, weights {}, context {} tokens{draft}", planned.name, output::bytes(plan.tensor_bytes), plan.max_context)
}

/// The fleet before any worker has said where it listens: every address is empty.
pub(crate) fn state(planned: &[Planned]) -> FleetState {
    FleetState { term: 1, number: 1, deployments: planned.iter().map(deployment).collect(), routers: Vec::new() }
}

fn deployment(planned: &Planned) -> FleetDeployment {
    let addresses: Vec<Vec<String>> = planned.plan.stages.iter().map(|stage| vec![String::new(); stage.shards.len()]).collect();
    let limits = planner::limits(&planned.plan, planned.prefix_caching);
    let replica = |number: usize| FleetReplica {
        name: replica_name(planned, number),
        revision: planned.numerics.clone(),
        numerics: planned.numerics.clone(),
        weight: 1,
        draining: false,
        limits: limits.clone(),
        workers: addresses.clone(),
        draft: planned.draft.as_ref().map(|draft| draft.fleet.clone()),
    };
    FleetDeployment {
        name: planned.name.clone(),
        model: planned.served.clone(),
        aliases: planned.aliases.clone(),
        drivers: String::new(),
        replicas: (0..planned.replicas).map(replica).collect(),
        limits,
        serving: planned.serving.clone(),
        adapters: planned.adapters.iter().map(|a| FleetAdapter { name: a.name.clone(), source: a.source.clone() }).collect(),
    }
}

fn replica_name(planned: &Planned, number: usize) -> String {
    format!("{}-{number}", planned.name)
}

/// Puts a worker's new address into the fleet.
pub(crate) fn seat(state: &mut FleetState, at: Seat, address: String) {
    let replica = state.deployments.get_mut(at.deployment).and_then(|deployment| deployment.replicas.get_mut(at.replica));
    let slot = replica.and_then(|replica| match &mut replica.draft {
        Some(draft) if at.draft => Some(&mut draft.worker),
        _ if at.draft => None,
        _ => replica.workers.get_mut(at.stage)?.get_mut(at.rank),
    });
    if let Some(slot) = slot {
        *slot = address;
        state.number += 1;
    }
}

/// Whether every worker has said where it listens.
pub(crate) fn complete(state: &FleetState) -> bool {
    addresses(state).all(|address| !address.is_empty())
}

/// Addresses of all workers, deployment by deployment, replica by replica, stage by stage, a replica's draft model last.
pub(crate) fn addresses(state: &FleetState) -> impl Iterator<Item = &String> {
    let of = |replica| {
        let FleetReplica { workers, draft, .. }: &FleetReplica = replica;
        workers.iter().flatten().chain(draft.iter().map(|draft| &draft.worker))
    };
    state.deployments.iter().flat_map(|deployment| &deployment.replicas).flat_map(of)
}

/// What each worker is told, in the order of [`addresses`]; `threads` are divided among all of them but those of draft models, each of which has
/// them all: a replica waits while it is guessed for.
pub(crate) fn specs(planned: &[Planned], threads: usize, collective: CollectiveKind) -> Vec<(Seat, WorkerSpec)> {
    let mut all = Vec::with_capacity(all_workers(planned));
    for (deployment, of) in planned.iter().enumerate() {
        for replica in 0..of.replicas {
            let name = replica_name(of, replica);
            let origin = Origin { replica: &name, uri: &of.model.uri, digest: of.model.digest.as_deref() };
            for spec in planner::worker_specs(&of.plan, &origin, 1, collective) {
                all.push((Seat { deployment, replica, stage: spec.shard.stage, rank: spec.shard.rank, draft: false }, spec));
            }
            if let Some(Draft { model, plan, .. }) = &of.draft {
                let name = FleetDraft::name(&name);
                let origin = Origin { replica: &name, uri: &model.uri, digest: model.digest.as_deref() };
                for spec in planner::worker_specs(plan, &origin, threads, collective) {
                    all.push((Seat { deployment, replica, stage: 0, rank: 0, draft: true }, spec));
                }
            }
        }
    }
    let sharing: Vec<&mut WorkerSpec> = all.iter_mut().filter(|(seat, _)| !seat.draft).map(|(_, spec)| spec).collect();
    let shares = threads::share(threads, sharing.len());
    for (spec, share) in sharing.into_iter().zip(shares) {
        spec.threads = share;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet() -> FleetState {
        let limits = plan::fleet::ReplicaLimits {
            kv: plan::shard::KvGeometry { dtype: plan::shard::KvDType::F32, groups: Vec::new() },
            max_context: 1,
            max_batch_sequences: 1,
            max_batch_tokens: 1,
            prefix_caching: true,
        };
        let replica = |name: &str| FleetReplica {
            name: name.into(),
            revision: String::new(),
            numerics: String::new(),
            weight: 1,
            draining: false,
            limits: limits.clone(),
            workers: vec![vec![String::new(); 2]; 2],
            draft: None,
        };
        let deployment = FleetDeployment {
            name: "a".into(),
            model: "a".into(),
            aliases: Vec::new(),
            drivers: String::new(),
            replicas: vec![replica("a-0"), replica("a-1")],
            limits,
            serving: crate::local::deployment::serving(),
            adapters: Vec::new(),
        };
        FleetState { term: 1, number: 1, deployments: vec![deployment], routers: Vec::new() }
    }

    #[test]
    fn a_new_address_makes_a_new_state() {
        let mut state = fleet();
        for (index, replica, stage, rank) in (0..8).map(|i| (i, i / 4, i / 2 % 2, i % 2)) {
            assert!(!complete(&state));
            seat(&mut state, Seat { deployment: 0, replica, stage, rank, draft: false }, format!("host:{index}"));
        }
        assert!(complete(&state));
        assert_eq!(state.number, 9);
        let expected: Vec<String> = (0..8).map(|index| format!("host:{index}")).collect();
        assert!(addresses(&state).eq(&expected));
    }

    #[test]
    fn a_draft_model_has_a_seat_of_its_own() {
        let mut state = fleet();
        let replica = &mut state.deployments[0].replicas[1];
        replica.draft = Some(FleetDraft { worker: String::new(), limits: replica.limits.clone(), cost: 100, compared: true });
        let at = Seat { deployment: 0, replica: 1, stage: 0, rank: 0, draft: true };
        seat(&mut state, at, "host:9".into());
        seat(&mut state, Seat { replica: 0, ..at }, "nobody's".into());
        assert_eq!(addresses(&state).filter(|address| !address.is_empty()).collect::<Vec<_>>(), ["host:9"]);
        assert!(!complete(&state));
        assert_eq!(addresses(&state).last().unwrap(), "host:9");
    }

    #[test]
    fn a_seat_that_does_not_exist_changes_nothing() {
        let mut state = fleet();
        seat(&mut state, Seat { deployment: 0, replica: 2, stage: 0, rank: 0, draft: false }, "host:1".into());
        assert_eq!(state, fleet());
    }
}
