//! Fourth step: writes what was built by server-side apply, and deletes what is no longer built.

use std::fmt::Debug;

use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ControllerRevision, StatefulSet},
        core::v1::{ConfigMap, Pod, Service, ServiceAccount},
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
    cache::{self, Cache, Owner},
    lost::Named,
    names::{self, MANAGER},
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

    /// Whether nothing new may be made since the namespace is being deleted.
    pub fn is_of_a_namespace_that_goes(&self) -> bool {
        let kube::Error::Api(status) = &*self.source else { return false };
        status.details.iter().flat_map(|details| &details.causes).any(|cause| cause.reason == "NamespaceTerminating")
    }
}

/// Writes objects, and remembers what it wrote: what stands as it should is not written again.
#[derive(Clone, Copy)]
pub struct Writer<'a> {
    /// For the API server.
    pub client: &'a Client,
    /// Where it remembers.
    pub cache: &'a Cache,
}

/// A kind of objects that are written.
pub trait Kind: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned {}
impl<K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned> Kind for K {}

impl Writer<'_> {
    /// Applies an object of `owner`, unless it stands already; its version where it was written.
    ///
    /// # Errors
    /// When the API server refuses, or does not answer.
    pub async fn write<K: Kind>(&self, owner: &Owner, object: &Object, conflicts: Conflicts) -> Result<Option<u64>, ApplyError> {
        let (kind, namespace) = (K::kind(&()), owner.namespace.as_str());
        if self.cache.ledger.stands(&kind, namespace, &object.name, &object.body) {
            return Ok(None);
        }
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let patched = api.patch_metadata(&object.name, &conflicts.params(), &Patch::Apply(&object.body)).await;
        let made = patched.map_err(|source| failed::<K>("apply", &object.name, source))?.metadata;
        self.cache.ledger.wrote((&kind, owner.clone(), &object.name), &object.body, &made);
        Ok(Some(cache::version(&made)))
    }

    /// Deletes an object; the version of one that ends by and by.
    ///
    /// # Errors
    /// When the API server refuses, or does not answer.
    async fn delete<K: Kind>(&self, owner: &Owner, name: &str, how: &DeleteParams) -> Result<Option<u64>, ApplyError> {
        let (kind, namespace) = (K::kind(&()), owner.namespace.as_str());
        info!(namespace, name, kind = &*kind, "deleting what is no longer wanted");
        let deleted = Api::<K>::namespaced(self.client.clone(), namespace).delete(name, how).await;
        self.cache.ledger.forget(&kind, namespace, name);
        match deleted {
            // Nothing comes back of what is gone at once.
            Ok(ending) => Ok(ending.left().map(|object| cache::version(object.meta()))),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(source) => Err(failed::<K>("delete", name, source)),
        }
    }

    /// Writes down the revision, before anything is made of it.
    ///
    /// # Errors
    /// When the write fails.
    pub async fn record(&self, owner: &Owner, built: &Resources) -> Result<(), ApplyError> {
        if let Some(version) = self.write::<ControllerRevision>(owner, &built.revision, Conflicts::Ours).await? {
            self.cache.revisions.wrote(owner, &built.revision.name, version);
        }
        Ok(())
    }

    /// Applies everything else that was built, what others need first.
    ///
    /// # Errors
    /// The first write that fails; what was written before stays.
    pub async fn apply(&self, owner: &Owner, built: &Resources) -> Result<(), ApplyError> {
        // The revision is written down already.
        let Resources { revision: _, config_maps, worker_service, network_policy, disruption_budget, service, stateful_sets } = built;
        for map in config_maps {
            self.write::<ConfigMap>(owner, map, Conflicts::Ours).await?;
        }
        self.write::<Service>(owner, worker_service, Conflicts::Theirs).await?;
        self.write::<NetworkPolicy>(owner, network_policy, Conflicts::Ours).await?;
        self.write::<PodDisruptionBudget>(owner, disruption_budget, Conflicts::Ours).await?;
        self.write::<Service>(owner, service, Conflicts::Theirs).await?;
        for set in stateful_sets {
            if let Some(version) = self.write::<StatefulSet>(owner, set, Conflicts::Ours).await? {
                self.cache.stateful_sets.wrote(owner, &set.name, version);
            }
        }
        Ok(())
    }

    /// Deletes what is not wanted any more. StatefulSets stay until their pods are gone, so that what still holds a node is seen.
    ///
    /// # Errors
    /// The first that is refused.
    pub async fn remove(&self, owner: &Owner, unwanted: &Unwanted) -> Result<(), ApplyError> {
        for set in &unwanted.stateful_sets {
            if let Some(version) = self.delete::<StatefulSet>(owner, set, &DeleteParams::foreground()).await? {
                self.cache.stateful_sets.wrote(owner, set, version);
            }
        }
        for map in &unwanted.config_maps {
            self.delete::<ConfigMap>(owner, map, &DeleteParams::background()).await?;
        }
        for revision in &unwanted.revisions {
            self.delete::<ControllerRevision>(owner, revision, &DeleteParams::background()).await?;
        }
        Ok(())
    }

    /// Deletes a deployment's own routers, by their account, which everything of theirs goes with.
    ///
    /// # Errors
    /// When the API server refuses, or does not answer.
    pub async fn remove_routers(&self, owner: &Owner) -> Result<(), ApplyError> {
        self.delete::<ServiceAccount>(owner, &names::own_router(&owner.name), &DeleteParams::background()).await?;
        Ok(())
    }
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

/// Whose value stands where another manager has set a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflicts {
    /// The operator's: the object's name is one that nobody else would choose.
    Ours,
    /// The other's, and the write fails: the object may be somebody else's.
    Theirs,
}

impl Conflicts {
    fn params(self) -> PatchParams {
        let params = PatchParams::apply(MANAGER);
        if self == Self::Ours { params.force() } else { params }
    }
}

/// Applies one object, and returns it whole.
///
/// # Errors
/// When the API server refuses, or does not answer.
pub async fn write<K: Kind>(client: &Client, namespace: &str, object: &Object, conflicts: Conflicts) -> Result<K, ApplyError> {
    let api = Api::<K>::namespaced(client.clone(), namespace);
    let failed = |source| failed::<K>("apply", &object.name, source);
    api.patch(&object.name, &conflicts.params(), &Patch::Apply(&object.body)).await.map_err(failed)
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

fn failed<K: Resource<DynamicType = ()>>(action: &'static str, name: &str, source: kube::Error) -> ApplyError {
    ApplyError { action, kind: K::kind(&()).into_owned(), name: name.to_owned(), source: Box::new(source) }
}
