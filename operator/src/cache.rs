//! What stands in the cluster of what the operator made, kept from watches, so that a reconcile asks the API server for nothing.
//!
//! Objects are kept by the deployment they are of, and of each only what is looked at. Of those that are only written, the [`Ledger`] keeps what
//! was written last. A process that writes an object sees it here before it goes on by what is here: [`Index::awaits`] tells what has not come yet.

mod index;
mod kept;
mod ledger;

use std::{fmt::Debug, time::Duration};

use futures_util::{Stream, StreamExt, pin_mut};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ControllerRevision, Deployment, StatefulSet},
        core::v1::{ConfigMap, Pod, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::warn;

pub use self::{
    index::{Index, Owner},
    kept::KeptRevision,
    ledger::Ledger,
};
use crate::{
    models::chain,
    names::{DEPLOYMENT, MANAGER, REPLICA_NAME, ROUTER_OF},
};

/// Objects of a first list that are read at once: what a list takes is held in memory whole.
const PAGE: u32 = 100;
/// First and longest pause before a watch that broke is begun again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// Everything that is kept.
#[derive(Debug, Default)]
pub struct Cache {
    /// Pods of workers and routers.
    pub pods: Index<Pod>,
    /// StatefulSets of workers.
    pub stateful_sets: Index<StatefulSet>,
    /// Revisions.
    pub revisions: Index<KeptRevision>,
    /// ConfigMaps: that they are there.
    pub config_maps: Index<()>,
    /// What was written.
    pub ledger: Ledger,
    /// Kinds that were listed.
    listed: watch::Sender<usize>,
}

/// Kinds that are watched.
const KINDS: usize = 9;

/// What became of an object: what is kept of it has changed, or somebody else has changed what this process wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The deployment it is of; without a name where it is the namespace's.
    pub owner: Owner,
}

/// Namespace and labels say whose an object is.
fn owner(metadata: &ObjectMeta) -> Owner {
    let label = |key| metadata.labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str);
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    match label(ROUTER_OF) {
        Some(deployment) => Owner::routers_of(namespace, deployment),
        None => Owner::new(namespace, label(DEPLOYMENT).unwrap_or_default()),
    }
}

/// The version of an object, which grows with every change in the cluster. One that cannot be read is older than every other.
pub fn version(metadata: &ObjectMeta) -> u64 {
    metadata.resource_version.as_ref().and_then(|text| text.parse().ok()).unwrap_or(0)
}

impl Cache {
    /// Watches until it is dropped; `changed` is called with whose objects are news.
    pub async fn follow<F, R>(&self, client: &Client, namespace: Option<&str>, changed: F)
    where
        F: Fn(Changed) -> R,
        R: Future<Output = ()>,
    {
        let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={MANAGER}")).page_size(PAGE);
        let changed = &changed;
        let pods = watcher(api::<Pod>(client, namespace), ours.clone());
        let sets = watcher(api::<StatefulSet>(client, namespace), ours.clone());
        // StatefulSets have revisions of their own, with the labels of their pods.
        let not_of_pods = format!("app.kubernetes.io/managed-by={MANAGER},!{REPLICA_NAME}");
        let revisions = watcher(api::<ControllerRevision>(client, namespace), ours.clone().labels(&not_of_pods));
        let maps = watcher(api::<PartialObjectMeta<ConfigMap>>(client, namespace), ours.clone());
        tokio::join!(
            self.keep(pods, Some(&self.pods), kept::pod, changed),
            self.keep(sets, Some(&self.stateful_sets), kept::stateful_set, changed),
            self.keep(revisions, Some(&self.revisions), KeptRevision::of, changed),
            self.keep(maps, Some(&self.config_maps), |_| (), changed),
            self.note::<Service, _, _>(client, namespace, &ours, changed),
            self.note::<NetworkPolicy, _, _>(client, namespace, &ours, changed),
            self.note::<PodDisruptionBudget, _, _>(client, namespace, &ours, changed),
            self.note::<Deployment, _, _>(client, namespace, &ours, changed),
            self.note::<ServiceAccount, _, _>(client, namespace, &ours, changed),
        );
    }

    /// Completes when everything was listed once.
    pub async fn filled(&self) {
        let mut listed = self.listed.subscribe();
        // Its sender is this cache's own.
        let _ = listed.wait_for(|kinds| *kinds >= KINDS).await;
    }

    /// Of objects that are only written, it is noted alone that they are as they were.
    async fn note<K, F, R>(&self, client: &Client, namespace: Option<&str>, ours: &watcher::Config, changed: &F)
    where
        K: Watched,
        F: Fn(Changed) -> R,
        R: Future<Output = ()>,
    {
        let events = watcher(api::<PartialObjectMeta<K>>(client, namespace), ours.clone());
        self.keep(events, None::<&Index<()>>, |_: PartialObjectMeta<K>| (), changed).await;
    }

    async fn keep<K, V, F, R>(
        &self,
        events: impl Stream<Item = watcher::Result<Event<K>>>,
        index: Option<&Index<V>>,
        keep: impl Fn(K) -> V,
        changed: &F,
    ) where
        K: Resource<DynamicType = ()>,
        V: PartialEq,
        F: Fn(Changed) -> R,
        R: Future<Output = ()>,
    {
        let events = events.backoff(Patience(BACKOFF.0));
        pin_mut!(events);
        let mut first = true;
        while let Some(event) = events.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    warn!(kind = &*K::kind(&()), error = chain(&error), "a watch broke; it starts again");
                    continue;
                }
            };
            let done = matches!(event, Event::InitDone);
            let news = self.take(event, index, &keep);
            if first {
                // Everything is looked at once what there was is known: until then nothing is news.
                if done {
                    first = false;
                    self.listed.send_modify(|kinds| *kinds += 1);
                }
                continue;
            }
            for owner in news {
                changed(Changed { owner }).await;
            }
        }
    }

    /// Takes one event; whose objects are news.
    pub(crate) fn take<K, V>(&self, event: Event<K>, index: Option<&Index<V>>, keep: &impl Fn(K) -> V) -> Vec<Owner>
    where
        K: Resource<DynamicType = ()>,
        V: PartialEq,
    {
        let kind = K::kind(&());
        match event {
            Event::Init => {
                self.ledger.begin(&kind);
                if let Some(index) = index {
                    index.begin();
                }
                Vec::new()
            }
            Event::InitDone => {
                let mut news = self.ledger.end(&kind);
                news.extend(index.map(Index::end).unwrap_or_default());
                news
            }
            Event::InitApply(object) | Event::Apply(object) => {
                let meta = object.meta();
                let (owner, name, version) = (owner(meta), meta.name.clone().unwrap_or_default(), version(meta));
                let drifted = self.ledger.saw(&kind, &owner, meta);
                let news = index.is_some_and(|index| index.put(&owner, name, version, keep(object)));
                if drifted || news { vec![owner] } else { Vec::new() }
            }
            Event::Delete(object) => {
                let meta = object.meta();
                let owner = owner(meta);
                let missed = self.ledger.gone(&kind, &owner, meta);
                let news = index.is_some_and(|index| index.remove(&owner, meta.name.as_deref().unwrap_or_default()));
                if missed || news { vec![owner] } else { Vec::new() }
            }
        }
    }
}

/// A kind whose objects are watched.
pub trait Watched: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static {}
impl<K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static> Watched for K {}

/// The kind's objects in `namespace`, or in all.
pub fn api<K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>>(client: &Client, namespace: Option<&str>) -> Api<K> {
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Pauses that grow: an API server that is back is heard of within two seconds.
#[derive(Debug)]
pub struct Patience(Duration);

impl Default for Patience {
    fn default() -> Self {
        Self(BACKOFF.0)
    }
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0;
        self.0 = (pause * 2).min(BACKOFF.1);
        Some(pause)
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {
        self.0 = BACKOFF.0;
    }
}

#[cfg(test)]
impl Cache {
    /// Takes `objects` for everything that stands.
    pub(crate) fn relist(&self, objects: &[serde_json::Value]) {
        self.list(objects, Some(&self.pods), kept::pod);
        self.list(objects, Some(&self.stateful_sets), kept::stateful_set);
        self.list(objects, Some(&self.revisions), KeptRevision::of);
        self.list(objects, Some(&self.config_maps), |_: ConfigMap| ());
        self.list(objects, None::<&Index<()>>, |_: Service| ());
        self.list(objects, None::<&Index<()>>, |_: NetworkPolicy| ());
        self.list(objects, None::<&Index<()>>, |_: PodDisruptionBudget| ());
    }

    fn list<K: Watched, V: PartialEq>(&self, objects: &[serde_json::Value], index: Option<&Index<V>>, keep: impl Fn(K) -> V) {
        let kind = K::kind(&());
        let of_kind = objects.iter().filter(|object| object["kind"] == *kind);
        let applied = of_kind.map(|object| Event::InitApply(serde_json::from_value(object.clone()).expect("an object of its kind")));
        for event in [Event::Init].into_iter().chain(applied).chain([Event::InitDone]) {
            self.take(event, index, &keep);
        }
    }
}
