//! What is kept of each revision: enough to keep its replicas running, and to tell routers of them, when the spec has moved on.
//!
//! A revision is everything that decides a worker: its specification and its pod, image and settings of the operator included. It is written down
//! before its first replica is made, as a `ControllerRevision` that belongs to the deployment. A spec that was there before gives the revision
//! it gave then, so going back is applying the old spec again.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::ObjectMeta, jiff::Timestamp};
use plan::{
    fleet::{FleetDraft, FleetReplica, ReplicaLimits},
    manifest::parse_quantity,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::warn;

use crate::{
    build::{self, Object, Settings},
    names::{self, DEPLOYMENT, REVISION},
    resource::ModelDeployment,
    rollout::Id,
    validate::ValidatedDeployment,
};

/// Hexadecimal digits of a revision's name.
const DIGITS: usize = 10;

/// What decides a revision's workers, and what routers are told of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The spec it came from, for people.
    pub spec: Value,
    /// What decides its bits.
    pub numerics: String,
    /// What a replica holds.
    pub limits: ReplicaLimits,
    /// Its stages.
    pub stages: Vec<StageRecord>,
    /// Its draft model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<DraftRecord>,
    /// Its workers prove no names. That they do is said nowhere, and how is no part of a revision: certificates change under pods that run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
}

/// One stage of a revision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StageRecord {
    /// Workers of the stage.
    pub ranks: usize,
    /// ConfigMaps that hold their specifications.
    pub config_maps: Vec<String>,
    /// The pod of each, but for its labels.
    pub pod: Value,
}

/// The draft model of a revision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DraftRecord {
    /// What its worker holds.
    pub limits: ReplicaLimits,
    /// What a step of it takes, in thousandths of one of the model.
    pub cost: u32,
    /// Its one worker.
    pub worker: StageRecord,
}

/// A revision.
#[derive(Clone, Debug, PartialEq)]
pub struct Revision {
    /// Its name, which replicas carry.
    pub name: String,
    /// Later revisions have higher numbers; one that is gone back to becomes the latest.
    pub number: i64,
    /// When it was first written down.
    pub created: Option<Timestamp>,
    /// What is kept of it.
    pub record: Record,
}

impl Record {
    /// Workers of a replica, that of its draft model not counted.
    pub fn workers(&self) -> usize {
        self.stages.iter().map(|s| s.ranks).sum()
    }

    /// Whether the room of a replica of this revision would do for one of `other`: as much in all, and as much for its largest worker.
    pub fn covers(&self, other: &Self) -> bool {
        let (own, wanted) = (self.needs(), other.needs());
        own.iter().zip(wanted).all(|(own, wanted)| own.0 >= wanted.0 && own.1 >= wanted.1)
    }

    /// What its StatefulSets are made of: its stages, and its draft model.
    fn sets(&self) -> impl Iterator<Item = &StageRecord> {
        self.stages.iter().chain(self.draft.as_ref().map(|draft| &draft.worker))
    }

    /// CPU and memory that a replica asks for: in all, and for its largest worker.
    fn needs(&self) -> [(f64, f64); 2] {
        ["cpu", "memory"].map(|resource| {
            let of = |stage: &StageRecord| {
                let asked = stage.pod["containers"][0]["resources"]["requests"][resource].as_str().and_then(parse_quantity).unwrap_or(0.0);
                (asked * stage.ranks as f64, asked)
            };
            self.sets().map(of).fold((0.0, 0.0), |(sum, most), (all, one)| (sum + all, f64::max(most, one)))
        })
    }
}

impl Revision {
    /// The revision of a deployment that is valid. `known` are those that are written down: one that says the same keeps its number unless it is
    /// gone back to, and one that says something else under the same name makes for another name, with `collisions` counted up.
    ///
    /// # Errors
    /// When a worker's specification is too large to be kept.
    pub fn of(
        valid: &ValidatedDeployment,
        object: &ModelDeployment,
        settings: &Settings,
        known: &[Self],
        mut collisions: u32,
    ) -> Result<(Self, u32), build::TooLarge> {
        let highest = known.iter().map(|r| r.number).max().unwrap_or(0);
        loop {
            let name = name(valid, settings, collisions)?;
            let stages = build::stages(valid, &name, settings)?;
            let record = Record {
                spec: object.spec.clone(),
                numerics: valid.numerics.clone(),
                limits: valid.limits(),
                stages,
                draft: build::draft(valid, &name, settings)?,
                plain: !settings.proven,
            };
            match known.iter().find(|r| r.name == name) {
                Some(found) if found.record.same_workers(&record) => {
                    let number = if found.number == highest { highest } else { highest + 1 };
                    // The spec that came first stays: data of a revision never changes.
                    return Ok((Self { number, ..found.clone() }, collisions));
                }
                Some(_) => collisions += 1,
                None => return Ok((Self { name, number: highest + 1, created: None, record }, collisions)),
            }
        }
    }

    /// A revision as it was read: the object that keeps it, and its data where that is a record.
    pub fn restore(metadata: &ObjectMeta, number: i64, record: serde_json::Result<Record>) -> Option<Self> {
        let name = metadata.labels.as_ref()?.get(REVISION)?.clone();
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                warn!(revision = metadata.name, %error, "a revision is not understood; its replicas are not told to routers");
                return None;
            }
        };
        Some(Self { name, number, created: metadata.creation_timestamp.as_ref().map(|t| t.0), record })
    }

    /// The object that keeps it.
    pub fn object(&self, deployment: &ModelDeployment) -> Object {
        let mut labels = names::labels("worker");
        labels[DEPLOYMENT] = deployment.name().into();
        labels[REVISION] = self.name.as_str().into();
        let data = serde_json::to_value(&self.record).unwrap_or_else(|error| unreachable!("a record is plain data: {error}"));
        let rest = json!({ "data": data, "revision": self.number });
        build::owned(("apps/v1", "ControllerRevision"), self.object_name(deployment), labels, &[deployment.owner(true)], rest)
    }

    /// Name of the object that keeps it.
    pub fn object_name(&self, deployment: &ModelDeployment) -> String {
        names::revision(deployment.name(), deployment.uid(), &self.name)
    }

    /// Names of its ConfigMaps.
    pub fn config_maps(&self) -> impl Iterator<Item = &str> {
        self.record.sets().flat_map(|s| s.config_maps.iter().map(String::as_str))
    }

    /// What routers are told of a replica; `address` finds a worker by stage and rank, `draft` that of its draft model; both are empty where it is
    /// not known yet.
    pub fn replica(
        &self,
        name: String,
        draining: bool,
        address: impl Fn(usize, usize) -> String,
        draft: impl FnOnce() -> String,
    ) -> FleetReplica {
        FleetReplica {
            name,
            revision: self.name.clone(),
            numerics: self.record.numerics.clone(),
            weight: 1,
            draining,
            limits: self.record.limits.clone(),
            workers: self
                .record
                .stages
                .iter()
                .enumerate()
                .map(|(stage, of)| (0..of.ranks).map(|rank| address(stage, rank)).collect())
                .collect(),
            draft: self.record.draft.as_ref().map(|of| FleetDraft {
                worker: draft(),
                limits: of.limits.clone(),
                cost: of.cost,
                // The operator reads no tokenizers.
                compared: false,
            }),
        }
    }
}

impl Record {
    /// Whether two records make the same workers; the specs they came from may differ in what is not the workers'.
    fn same_workers(&self, other: &Self) -> bool {
        let Self { spec: _, numerics, limits, stages, draft, plain } = self;
        (numerics, limits, stages, draft, *plain) == (&other.numerics, &other.limits, &other.stages, &other.draft, other.plain)
    }
}

/// Name of the revision of a deployment.
fn name(valid: &ValidatedDeployment, settings: &Settings, collisions: u32) -> Result<String, build::TooLarge> {
    // Names of ConfigMaps hold that of the revision, so they stay out of it; what is in them is in it.
    let stages = build::stages(valid, "", settings)?;
    let mut parts =
        json!({ "numerics": valid.numerics, "limits": valid.limits(), "stages": stages, "specifications": valid.worker_specs() });
    if let Some((draft, spec)) = build::draft(valid, "", settings)?.zip(valid.draft_spec()) {
        parts["draft"] = json!({ "record": draft, "specification": spec });
    }
    if !settings.proven {
        parts["plain"] = true.into();
    }
    let again = if collisions == 0 { String::new() } else { collisions.to_string() };
    Ok(names::digest(&[&parts.to_string(), &again], DIGITS))
}

/// Revisions that are to be forgotten: all but `limit` of those that have no replicas, are not the spec's, and are not what is gone back to.
pub fn forgotten<'a>(known: &'a [Revision], kept: &BTreeSet<&str>, limit: u32) -> Vec<&'a Revision> {
    let mut idle: Vec<&Revision> = known.iter().filter(|r| !kept.contains(r.name.as_str())).collect();
    idle.sort_by_key(|r| std::cmp::Reverse(r.number));
    idle.split_off((limit as usize).min(idle.len()))
}

/// Revisions by name.
pub fn by_name<'a>(known: &'a [Revision], present: &'a Revision) -> BTreeMap<&'a str, &'a Revision> {
    known.iter().chain([present]).map(|r| (r.name.as_str(), r)).collect()
}

/// Name of a replica of a deployment.
pub fn replica_name(deployment: &ModelDeployment, id: &Id) -> String {
    names::replica(deployment.name(), deployment.uid(), &id.revision, id.number)
}

#[cfg(test)]
mod tests;
