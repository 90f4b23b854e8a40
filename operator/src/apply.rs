//! Fourth step: writes what was built by server-side apply, and deletes what is no longer built.

use std::fmt::Debug;

use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::StatefulSet,
        core::v1::{ConfigMap, Service},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde::de::DeserializeOwned;
use tracing::info;

use crate::{
    build::{Object, Resources},
    dereference::Standing,
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

/// What was applied, as the API server answered.
#[derive(Debug)]
pub struct Applied {
    /// One for each replica and stage, in that order.
    pub stateful_sets: Vec<StatefulSet>,
}

/// Applies everything that was built, what others need first.
///
/// # Errors
/// The first write that fails; what was written before stays.
pub async fn apply(client: &Client, namespace: &str, built: Resources, standing: &Standing) -> Result<Applied, ApplyError> {
    let Resources { config_maps, worker_service, network_policy, disruption_budget, service, stateful_sets } = built;
    for map in &config_maps {
        write::<ConfigMap>(client, namespace, map, Conflicts::Ours).await?;
    }
    write::<Service>(client, namespace, &worker_service, Conflicts::Theirs).await?;
    write::<NetworkPolicy>(client, namespace, &network_policy, Conflicts::Ours).await?;
    write::<PodDisruptionBudget>(client, namespace, &disruption_budget, Conflicts::Ours).await?;
    write::<Service>(client, namespace, &service, Conflicts::Theirs).await?;
    let mut applied = Vec::with_capacity(stateful_sets.len());
    for set in &stateful_sets {
        applied.push(write::<StatefulSet>(client, namespace, set, Conflicts::Ours).await?);
    }
    for set in standing.stateful_sets.iter().filter(|s| s.metadata.deletion_timestamp.is_none()).map(ResourceExt::name_any) {
        if !stateful_sets.iter().any(|s| s.name == set) {
            delete::<StatefulSet>(client, namespace, &set).await?;
        }
    }
    for map in &standing.config_maps {
        if !config_maps.iter().any(|m| m.name == *map) {
            delete::<ConfigMap>(client, namespace, map).await?;
        }
    }
    Ok(Applied { stateful_sets: applied })
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

async fn delete<K>(client: &Client, namespace: &str, name: &str) -> Result<(), ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    info!(namespace, name, kind = &*K::kind(&()), "deleting what is no longer wanted");
    match Api::<K>::namespaced(client.clone(), namespace).delete(name, &DeleteParams::background()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(source) => Err(failed::<K>("delete", name, source)),
    }
}

fn failed<K: Resource<DynamicType = ()>>(action: &'static str, name: &str, source: kube::Error) -> ApplyError {
    ApplyError { action, kind: K::kind(&()).into_owned(), name: name.to_owned(), source: Box::new(source) }
}
