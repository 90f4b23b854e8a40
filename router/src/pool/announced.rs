//! Workers that said where they are, while whoever writes the fleet state has not.

use std::collections::BTreeMap;

use plan::fleet::{FleetDraft, FleetReplica, FleetState};

/// A worker says where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Announcement {
    pub(super) replica: String,
    pub(super) stage: usize,
    pub(super) rank: usize,
    /// Where the worker knows it.
    pub(super) revision: Option<String>,
    pub(super) address: String,
    pub(super) incarnation: u64,
}

/// Why an announcement is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AnnounceError {
    #[error("no replica {0} is known")]
    Replica(String),
    #[error("replica {replica} is of revision {expected}, and the worker of {got}")]
    Revision { replica: String, expected: String, got: String },
    #[error("replica {replica} has no stage {stage} with a rank {rank}")]
    Worker { replica: String, stage: usize, rank: usize },
    #[error("{0} is not an address HOST:PORT")]
    Address(String),
}

/// The announcements in force; at most one for each worker of the state.
#[derive(Debug, Default)]
pub(super) struct Announced {
    /// By replica, stage and rank.
    places: BTreeMap<(String, usize, usize), Place>,
}

#[derive(Debug)]
struct Place {
    announcement: Announcement,
    /// The address of the state then: a state that names another one knows better.
    instead_of: String,
}

impl Announced {
    /// Takes an announcement for a worker of `state`; whether it changes anything. `fresh`: it comes from the worker itself, and counts more than
    /// an earlier one.
    pub(super) fn take(&mut self, state: &FleetState, announcement: &Announcement, fresh: bool) -> Result<bool, AnnounceError> {
        let Announcement { replica, stage, rank, revision, address, .. } = announcement;
        let found = state.deployments.iter().flat_map(|d| &d.replicas).find(|r| is_of(r, replica));
        let found = found.ok_or_else(|| AnnounceError::Replica(replica.clone()))?;
        if let Some(got) = revision.clone().filter(|got| found.revision != *got) {
            return Err(AnnounceError::Revision { replica: replica.clone(), expected: found.revision.clone(), got });
        }
        let named = match &found.draft {
            Some(draft) if found.name != *replica => Some(&draft.worker).filter(|_| (*stage, *rank) == (0, 0)),
            _ => found.workers.get(*stage).and_then(|ranks| ranks.get(*rank)),
        };
        let named = named.ok_or_else(|| AnnounceError::Worker { replica: replica.clone(), stage: *stage, rank: *rank })?;
        if address.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
            return Err(AnnounceError::Address(address.clone()));
        }
        let key = (replica.clone(), *stage, *rank);
        match self.places.get(&key) {
            Some(place) if place.announcement == *announcement || !fresh => return Ok(false),
            None if named == address => return Ok(false),
            _ => {}
        }
        if named == address {
            self.places.remove(&key);
        } else {
            self.places.insert(key, Place { announcement: announcement.clone(), instead_of: named.clone() });
        }
        Ok(true)
    }

    /// Puts what was announced into `state`, and forgets what it overrules.
    pub(super) fn place(&mut self, state: &mut FleetState) {
        if self.places.is_empty() {
            return;
        }
        self.places.retain(|(name, stage, rank), place| {
            let found = state.deployments.iter_mut().flat_map(|d| &mut d.replicas).find(|r| is_of(r, name));
            let same = |r: &&mut FleetReplica| place.announcement.revision.as_ref().is_none_or(|revision| r.revision == *revision);
            let Some(replica) = found.filter(same) else { return false };
            let named = match &mut replica.draft {
                Some(draft) if replica.name != *name => Some(&mut draft.worker),
                _ => replica.workers.get_mut(*stage).and_then(|ranks| ranks.get_mut(*rank)),
            };
            match named {
                Some(named) if *named == place.instead_of => {
                    named.clone_from(&place.announcement.address);
                    true
                }
                _ => false,
            }
        });
    }

    pub(super) fn all(&self) -> Vec<Announcement> {
        self.places.values().map(|place| place.announcement.clone()).collect()
    }
}

/// Whether a worker that calls itself one of `name` is of this replica, or of its draft model.
fn is_of(replica: &FleetReplica, name: &str) -> bool {
    replica.name == name || replica.draft.is_some() && FleetDraft::name(&replica.name) == name
}

#[cfg(test)]
mod tests {
    use plan::{
        fleet::{FleetDeployment, ReplicaLimits, RoutingPolicy, ServingSettings},
        shard::{KvDType, KvGeometry},
    };

    use super::*;

    fn state(number: u64, revision: &str, address: &str) -> FleetState {
        let limits = ReplicaLimits {
            kv: KvGeometry { dtype: KvDType::F32, groups: Vec::new() },
            max_context: 8,
            max_batch_sequences: 1,
            max_batch_tokens: 1,
            prefix_caching: true,
        };
        let serving = ServingSettings {
            chat_template: None,
            system_prompt: None,
            policy: RoutingPolicy::default(),
            queue_requests: 1,
            queue_seconds: 1,
            prompt_lookup: 0,
            hold: None,
            stopped: None,
        };
        let replica = FleetReplica {
            name: "a-r0".into(),
            revision: revision.into(),
            numerics: "n".into(),
            weight: 1,
            draining: false,
            limits: limits.clone(),
            workers: vec![vec!["old:1".into()], vec![address.into()]],
            draft: None,
        };
        let deployment = FleetDeployment {
            name: "a".into(),
            model: "a".into(),
            aliases: Vec::new(),
            drivers: String::new(),
            limits,
            serving,
            replicas: vec![replica],
            adapters: Vec::new(),
        };
        FleetState { term: 1, number, deployments: vec![deployment], routers: Vec::new() }
    }

    fn announcement(address: &str) -> Announcement {
        Announcement { replica: "a-r0".into(), stage: 1, rank: 0, revision: Some("1".into()), address: address.into(), incarnation: 9 }
    }

    fn placed(announced: &mut Announced, mut state: FleetState) -> String {
        announced.place(&mut state);
        assert_eq!(state.deployments[0].replicas[0].workers[0][0], "old:1", "another worker's place is its own");
        state.deployments[0].replicas[0].workers[1][0].clone()
    }

    #[test]
    fn an_announced_address_is_in_force_until_a_state_names_another() {
        let mut announced = Announced::default();
        let (first, later) = (state(1, "1", "gone:1"), state(2, "1", "gone:1"));
        assert_eq!(announced.take(&first, &announcement("gone:1"), true), Ok(false), "the state says so already");
        assert_eq!(announced.take(&first, &announcement("here:1"), true), Ok(true));
        assert_eq!(announced.take(&first, &announcement("here:1"), true), Ok(false));
        assert_eq!(
            announced.take(&first, &announcement("stale:1"), false),
            Ok(false),
            "another router's word comes after the worker's own"
        );
        assert_eq!(placed(&mut announced, first.clone()), "here:1");
        assert_eq!(placed(&mut announced, later), "here:1", "a later state that has not heard of it");
        assert_eq!(placed(&mut announced, state(3, "1", "new:1")), "new:1");
        assert_eq!(placed(&mut announced, first.clone()), "gone:1", "and it is forgotten");
        // A worker that comes back where the state has it needs no place.
        assert_eq!(announced.take(&first, &announcement("here:1"), true), Ok(true));
        assert_eq!(announced.take(&first, &announcement("gone:1"), true), Ok(true));
        assert_eq!(placed(&mut announced, first.clone()), "gone:1");
        // Nor does one of a revision that is gone.
        assert_eq!(announced.take(&first, &announcement("here:1"), true), Ok(true));
        assert_eq!(placed(&mut announced, state(4, "2", "gone:1")), "gone:1");
        assert_eq!(announced.all(), []);
    }

    #[test]
    fn the_worker_of_a_draft_model_is_found_as_others_are() {
        let (mut announced, mut state) = (Announced::default(), state(1, "1", "gone:1"));
        let said = Announcement { replica: "a-r0-draft".into(), stage: 0, ..announcement("here:1") };
        assert_eq!(announced.take(&state, &said, true), Err(AnnounceError::Replica("a-r0-draft".into())), "it has none");
        let replica = &mut state.deployments[0].replicas[0];
        replica.draft = Some(FleetDraft { worker: String::new(), limits: replica.limits.clone(), cost: 90, compared: false });
        let wrong = Announcement { rank: 1, ..said.clone() };
        assert!(matches!(announced.take(&state, &wrong, true), Err(AnnounceError::Worker { .. })));
        assert_eq!(announced.take(&state, &said, true), Ok(true));
        let of_draft = |announced: &mut Announced, mut state: FleetState| {
            announced.place(&mut state);
            assert_eq!(state.deployments[0].replicas[0].workers, [["old:1"], ["gone:1"]], "the replica's own are as they were");
            state.deployments[0].replicas[0].draft.clone().map(|draft| draft.worker)
        };
        assert_eq!(of_draft(&mut announced, state.clone()).as_deref(), Some("here:1"));
        state.deployments[0].replicas[0].draft.as_mut().unwrap().worker = "new:1".into();
        assert_eq!(of_draft(&mut announced, state.clone()).as_deref(), Some("new:1"), "the state knows better");
        assert_eq!(announced.all(), []);
        state.deployments[0].replicas[0].draft = None;
        assert_eq!(of_draft(&mut announced, state), None);
    }

    #[test]
    fn only_workers_of_the_state_are_taken() {
        let (mut announced, state) = (Announced::default(), state(1, "1", "gone:1"));
        let mut refused = |change: fn(&mut Announcement)| {
            let mut announcement = announcement("here:1");
            change(&mut announcement);
            announced.take(&state, &announcement, true).expect_err("refused")
        };
        assert!(matches!(refused(|a| a.replica = "b".into()), AnnounceError::Replica(_)));
        assert!(matches!(refused(|a| a.revision = Some("2".into())), AnnounceError::Revision { .. }));
        assert!(matches!(refused(|a| a.stage = 2), AnnounceError::Worker { .. }));
        assert!(matches!(refused(|a| a.rank = 1), AnnounceError::Worker { .. }));
        let unsaid = Announcement { revision: None, ..announcement("here:1") };
        assert_eq!(announced.take(&state, &unsaid, true), Ok(true), "a name tells revisions apart");
        for address in ["", "here", ":1", "here:", "here:70000"] {
            assert_eq!(announced.take(&state, &announcement(address), true), Err(AnnounceError::Address(address.into())));
        }
    }
}
