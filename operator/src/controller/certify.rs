//! The certificates of a deployment's workers: renewed for those that stand, whatever becomes of the spec, and made before pods that need them.

use std::time::Duration;

use k8s_openapi::{api::apps::v1::StatefulSet, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{
    Resource,
    runtime::events::{Event, EventType},
};
use plan::fleet::FleetDraft;
use tracing::warn;

use super::{API_BACKOFF, Context};
use crate::{
    dereference::Standing,
    issuer::{IssueError, Wanted},
    models::chain,
    names::{self, DEPLOYMENT, STAGE},
    observe,
    resource::ModelDeployment,
    revision::replica_name,
};

impl Context {
    /// Renews the certificates of what stands; when they are to be looked at again. A failure takes nothing from what runs, and is told.
    pub(super) async fn renew(&self, object: &ModelDeployment, standing: &Standing) -> Option<Duration> {
        let issuer = self.issuer.as_ref()?;
        let wanted = standing.stateful_sets.iter().filter_map(|set| of_set(object, set)).collect();
        match issuer.certify(object.namespace(), wanted).await {
            Ok(stand) => {
                issuer.note_expiry("worker", (object.namespace(), object.name()), stand.map(|s| s.expires));
                stand.map(|s| s.again)
            }
            Err(error) => {
                self.tell_of(object, &error).await;
                Some(API_BACKOFF.1)
            }
        }
    }

    /// Makes the certificates of stages of replicas of which nothing stands yet.
    ///
    /// # Errors
    /// When one cannot be made: pods would wait for it.
    pub(super) async fn certify(&self, object: &ModelDeployment, stages: &[(String, usize)]) -> Result<(), IssueError> {
        let Some(issuer) = &self.issuer else { return Ok(()) };
        // They go with their StatefulSet once there is one.
        let wanted = stages.iter().map(|(replica, stage)| wanted(object, replica, *stage, object.owner(false))).collect();
        let made = issuer.certify(object.namespace(), wanted).await;
        if let Err(error) = &made {
            self.tell_of(object, error).await;
        }
        made.map(drop)
    }

    async fn tell_of(&self, object: &ModelDeployment, error: &IssueError) {
        let (namespace, name, note) = (object.namespace(), object.name(), format!("certificates are not issued: {}", chain(error)));
        warn!(namespace, name, note, "reconcile failed");
        let (reason, action) = ("ReconcileError".to_owned(), "Issue".to_owned());
        let event = Event { type_: EventType::Warning, reason, note: Some(note.chars().take(1000).collect()), action, secondary: None };
        if let Err(error) = self.recorder.publish(&event, &object.object_ref(&())).await {
            warn!(error = chain(&error), "an event was not written");
        }
    }
}

/// The certificate of the workers of a StatefulSet, which it goes with; `None` where it is on its way out, or not understood.
fn of_set(object: &ModelDeployment, set: &StatefulSet) -> Option<Wanted> {
    let labels = set.metadata.labels.as_ref()?;
    let id = observe::id(Some(labels)).filter(|_| set.metadata.deletion_timestamp.is_none())?;
    let owner = OwnerReference {
        api_version: "apps/v1".to_owned(),
        kind: "StatefulSet".to_owned(),
        name: set.metadata.name.clone()?,
        uid: set.metadata.uid.clone()?,
        controller: None,
        block_owner_deletion: None,
    };
    let replica = replica_name(object, &id);
    if observe::is_draft(Some(labels)) {
        return Some(wanted(object, &FleetDraft::name(&replica), 0, owner));
    }
    Some(wanted(object, &replica, labels.get(STAGE)?.parse().ok()?, owner))
}

fn wanted(object: &ModelDeployment, replica: &str, stage: usize, owner: OwnerReference) -> Wanted {
    let mut labels = names::labels("worker");
    labels[DEPLOYMENT] = object.name().into();
    let name = identity::Name::Worker { namespace: object.namespace().to_owned(), replica: replica.to_owned(), stage };
    Wanted { secret: names::identity(replica, stage), name, labels, owners: vec![owner] }
}
