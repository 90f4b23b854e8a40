//! Fourth step: writes what was built by server-side apply, and deletes what is no longer built.

use std::fmt::Debug;

use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ControllerRevision, StatefulSet},
        core::v1::{ConfigMap, Pod, Service},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
    },
};
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use crate::{
    build::{Object, Resources},
    lost::Named,
    names::MANAGER,
};

/// A write that the API server refused, or did not answer.
#[derive(Debug, thiserror::Error)]
#[error("failed to {action} {kind} {name}")]
pub struct ApplyError {
    /// What was tried.
    pub action: &'static str,
    /// Kind of the object.
    pub kind: String,
    /// Name of the object.
    pub name: String,
    /// Why not.
    pub source: Box<kube::Error>,
}

impl ApplyError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match &*self.source {
            kube::Error::Api(status) if status.code == 409 => "Conflict",
            kube::Error::Api(status) if status.code == 403 => "Forbidden",
            kube::Error::Api(status) if status.code == 422 => "Invalid",
            kube::Error::Api(_) => "ApiRefused",
            _ => "ApiUnreachable",
        }
    }
}

/// Writes down the revision, before anything is made of it.
///
/// # Errors
/// When the write fails.
pub async fn record(client: &Client, namespace: &str, built: &Resources) -> Result<(), ApplyError> {
    write::<ControllerRevision>(client, namespace, &built.revision, Conflicts::Ours).await.map(drop)
}

/// Applies everything else that was built, what others need first.
///
/// # Errors
/// The first write that fails; what was written before stays.
pub async fn apply(client: &Client, namespace: &str, built: &Resources) -> Result<(), ApplyError> {
    // The revision is written down already.
    let Resources { revision: _, config_maps, worker_service, network_policy, disruption_budget, service, stateful_sets } = built;
    for map in config_maps {
        write::<ConfigMap>(client, namespace, map, Conflicts::Ours).await?;
    }
    write::<Service>(client, namespace, worker_service, Conflicts::Theirs).await?;
    write::<NetworkPolicy>(client, namespace, network_policy, Conflicts::Ours).await?;
    write::<PodDisruptionBudget>(client, namespace, disruption_budget, Conflicts::Ours).await?;
    write::<Service>(client, namespace, service, Conflicts::Theirs).await?;
    for set in stateful_sets {
        write::<StatefulSet>(client, namespace, set, Conflicts::Ours).await?;
    }
    Ok(())
}

/// What is not wanted any more, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unwanted {
    /// Of replicas that are gone.
    pub stateful_sets: Vec<String>,
    /// Of revisions that have no replicas.
    pub config_maps: Vec<String>,
    /// That are not gone back to.
    pub revisions: Vec<String>,
}

/// Deletes what is not wanted any more. StatefulSets stay until their pods are gone, so that what still holds a node is seen.
///
/// # Errors
/// The first that is refused.
pub async fn remove(client: &Client, namespace: &str, unwanted: &Unwanted) -> Result<(), ApplyError> {
    for set in &unwanted.stateful_sets {
        delete::<StatefulSet>(client, namespace, set, &DeleteParams::foreground()).await?;
    }
    for map in &unwanted.config_maps {
        delete::<ConfigMap>(client, namespace, map, &DeleteParams::background()).await?;
    }
    for revision in &unwanted.revisions {
        delete::<ControllerRevision>(client, namespace, revision, &DeleteParams::background()).await?;
    }
    Ok(())
}

/// Whose value stands where another manager has set a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflicts {
    /// The operator's: the object's name is one that nobody else would choose.
    Ours,
    /// The other's, and the write fails: the object may be somebody else's.
    Theirs,
}

/// Applies one object.
///
/// # Errors
/// When the API server refuses, or does not answer.
pub async fn write<K>(client: &Client, namespace: &str, object: &Object, conflicts: Conflicts) -> Result<K, ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let mut params = PatchParams::apply(MANAGER);
    params.force = conflicts == Conflicts::Ours;
    let failed = |source| failed::<K>("apply", &object.name, source);
    api.patch(&object.name, &params, &Patch::Apply(&object.body)).await.map_err(failed)
}

/// Deletes pods without waiting for their nodes; one that was made anew meanwhile stays.
///
/// # Errors
/// The first that is refused.
pub async fn abandon(client: &Client, namespace: &str, pods: &[Named]) -> Result<(), ApplyError> {
    for (name, uid) in pods {
        warn!(namespace, name, "deleting by force a pod of a node that cannot be reached");
        let only = Preconditions { uid: Some(uid.clone()), ..Preconditions::default() };
        let how = DeleteParams::default().grace_period(0).preconditions(only);
        match Api::<Pod>::namespaced(client.clone(), namespace).delete(name, &how).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(source) => return Err(failed::<Pod>("delete", name, source)),
        }
    }
    Ok(())
}

async fn delete<K>(client: &Client, namespace: &str, name: &str, how: &DeleteParams) -> Result<(), ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    info!(namespace, name, kind = &*K::kind(&()), "deleting what is no longer wanted");
    match Api::<K>::namespaced(client.clone(), namespace).delete(name, how).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(source) => Err(failed::<K>("delete", name, source)),
    }
}

fn failed<K: Resource<DynamicType = ()>>(action: &'static str, name: &str, source: kube::Error) -> ApplyError {
    ApplyError { action, kind: K::kind(&()).into_owned(), name: name.to_owned(), source: Box::new(source) }
}
