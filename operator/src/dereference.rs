//! First step: reads what a deployment refers to, and what stands in the cluster for it. Writes nothing.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::future::join_all;
use k8s_openapi::{
    api::{
        apps::v1::StatefulSet,
        core::v1::{ConfigMap, Node, Pod, Secret},
    },
    jiff::Timestamp,
};
use kube::{Api, Client};
use plan::{manifest::ModelSpec, model::ModelHeader};
use source::Credentials;

use crate::{
    cache::{Cache, Owner},
    fleet::Load,
    host::{Access, Folders},
    inspect,
    lost::{self, Named},
    models::{Models, Opened, Unresolved},
    names,
    resource::ModelDeployment,
    revision::Revision,
    routers::Served,
};

/// Most adapters of a deployment.
const ADAPTERS: usize = 64;

/// Everything a reconcile knows beside the resource itself.
#[derive(Debug)]
pub struct Fetched {
    /// What it may have of nodes.
    pub access: Access,
    /// The header of the model; `None` where the spec names a source that this process cannot read.
    pub header: Option<Result<Arc<ModelHeader>, Unresolved>>,
    /// The header of the draft model; `None` where the spec names none, or one that is on no server.
    pub draft: Option<Result<Arc<ModelHeader>, Unresolved>>,
    /// The adapters that the spec names, where the header of the model is known.
    pub adapters: Vec<Opened>,
    /// The ConfigMap that the chat template is in, by name, where one is named and exists.
    pub template: Option<(String, BTreeMap<String, String>)>,
    /// An older deployment of the namespace that has one of the model's names: the name, and whose it is.
    pub taken: Option<(String, String)>,
    /// What stands in the cluster.
    pub standing: Standing,
}

/// A deployment's objects as they are.
#[derive(Debug, Default)]
pub struct Standing {
    /// Its revisions that are written down, and that this process understands.
    pub revisions: Vec<Revision>,
    /// Its StatefulSets.
    pub stateful_sets: Vec<StatefulSet>,
    /// Names of its ConfigMaps.
    pub config_maps: Vec<String>,
    /// Its workers.
    pub pods: Vec<Pod>,
    /// Names of its pods that read headers.
    pub inspectors: Vec<String>,
    /// Pods of nodes that cannot be reached.
    pub lost: Vec<Named>,
    /// What routers say of its replicas.
    pub load: Load,
}

impl Standing {
    /// The pod of this name, unless it is on its way out.
    pub fn pod(&self, name: &str) -> Option<&Pod> {
        self.pods.iter().find(|p| p.metadata.name.as_deref() == Some(name) && p.metadata.deletion_timestamp.is_none())
    }

    /// Where the worker in the pod of this name listens, once that is known.
    pub fn address(&self, pod: &str) -> Option<String> {
        let ip = self.pod(pod)?.status.as_ref()?.pod_ip.as_deref()?;
        ip.parse().ok().map(names::worker_address)
    }
}

/// Reads everything: what stands from what is kept of it.
///
/// # Errors
/// When the API server does not answer. That a model or a ConfigMap is not there is no error here.
pub async fn dereference(
    (client, cache): (&Client, &Cache),
    (models, folders): (&Models, &Folders),
    served: &Served,
    others: &[Arc<ModelDeployment>],
    object: &ModelDeployment,
) -> Result<Fetched, kube::Error> {
    let (namespace, name) = (object.namespace(), object.name());
    // Paths are those of a node, and never opened here.
    let uri = object.spec["model"]["uri"].as_str().filter(|uri| ModelSpec::is_remote(uri));
    let header = async {
        let Some(uri) = uri else { return Ok::<_, kube::Error>((None, Vec::new())) };
        let header = match credentials(client, object).await? {
            Ok(shown) => models.header(uri, shown).await,
            Err(unresolved) => Err(unresolved),
        };
        let adapters = match &header {
            Ok(header) => adapters(models, object, (uri, header)).await,
            Err(_) => Vec::new(),
        };
        Ok((Some(header), adapters))
    };
    let draft = async {
        // What the model's source is shown is not for others.
        let uri = object.spec["engine"]["draft"]["model"]["uri"].as_str().filter(|uri| ModelSpec::is_remote(uri))?;
        Some(models.header(uri, None).await)
    };
    let template = async {
        match object.spec["chat"]["template"]["configMapKeyRef"]["name"].as_str() {
            Some(map) => Api::<ConfigMap>::namespaced(client.clone(), namespace).get_opt(map).await,
            None => Ok(None),
        }
    };
    let standing = async {
        let owner = Owner::new(namespace, name);
        let (pods, load) = (cache.pods.of(&owner), served.load(name));
        let (inspectors, pods): (Vec<Pod>, Vec<Pod>) = pods.iter().map(|pod| Pod::clone(pod)).partition(inspect::is_inspector);
        let revisions = cache.revisions.of(&owner);
        Ok::<_, kube::Error>(Standing {
            lost: lost(client, &pods, &load).await?,
            revisions: revisions.iter().filter(|revision| revision.is_of(object.uid())).filter_map(|revision| revision.read()).collect(),
            stateful_sets: cache.stateful_sets.of(&owner).iter().map(|set| StatefulSet::clone(set)).collect(),
            config_maps: cache.config_maps.names(&owner),
            pods,
            inspectors: inspectors.into_iter().filter_map(|pod| pod.metadata.name).collect(),
            load,
        })
    };
    let access = Access::of(client, folders, namespace, &object.spec);
    let (model, draft, template, standing, access) = tokio::join!(header, draft, template, standing, access);
    let (header, adapters) = model?;
    Ok(Fetched {
        access: access?,
        header,
        draft,
        adapters,
        template: template?.and_then(|map| Some((map.metadata.name?, map.data.unwrap_or_default()))),
        taken: taken(object, others),
        standing: standing?,
    })
}

/// What the source of a deployment's model is shown, by the Secret that it names.
async fn credentials(client: &Client, object: &ModelDeployment) -> Result<Result<Option<Credentials>, Unresolved>, kube::Error> {
    let Some(name) = object.spec["model"]["credentialsSecretRef"]["name"].as_str() else { return Ok(Ok(None)) };
    let secret = Api::<Secret>::namespaced(client.clone(), object.namespace()).get_opt(name).await?;
    let refuse = |why: String| Ok(Err(Unresolved { reason: "Unauthorized", message: format!("Secret {name} {why}") }));
    let Some(secret) = secret else { return refuse("does not exist".to_owned()) };
    // Those of Kubernetes itself hold keys of these names for other purposes.
    match secret.type_.as_deref() {
        None | Some("" | "Opaque" | "kubernetes.io/dockerconfigjson") => {}
        Some(other) => return refuse(format!("is of type {other}, expected Opaque or kubernetes.io/dockerconfigjson")),
    }
    let uri = object.spec["model"]["uri"].as_str().unwrap_or_default();
    let data = secret.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect();
    match Credentials::from_data(&data, uri) {
        Ok(credentials) => Ok(Ok(Some(credentials))),
        Err(error) => refuse(format!("does not let anybody in: {error}")),
    }
}

/// Pods of nodes that cannot be reached; nodes are looked at only where pods give a reason.
async fn lost(client: &Client, pods: &[Pod], load: &Load) -> Result<Vec<Named>, kube::Error> {
    let now = Timestamp::now();
    let mut nodes = BTreeMap::new();
    for name in lost::nodes(pods, load, now) {
        match Api::<Node>::all(client.clone()).get_opt(&name).await {
            Ok(node) => drop(nodes.insert(name, node)),
            // An operator of one namespace may not look at nodes, and leaves such pods to those who may.
            Err(kube::Error::Api(status)) if status.code == 403 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(lost::pods(pods, load, &nodes, now))
}

/// The adapters that a spec names; what is wrong with how it names them, its validation says.
pub(crate) async fn adapters(models: &Models, object: &ModelDeployment, model: (&str, &Arc<ModelHeader>)) -> Vec<Opened> {
    let named = object.spec["adapters"].as_array().into_iter().flatten().take(ADAPTERS).filter_map(|adapter| {
        let text = |field: &str| adapter[field].as_str().map(str::to_owned);
        Some((text("name")?, text("uri")?, text("digest")))
    });
    let open = |(name, uri, digest): (String, String, Option<String>)| async move {
        let header = if ModelSpec::is_remote(&uri) {
            models.adapter(&uri, model).await
        } else {
            let message = format!(
                "{uri} is a path of a node, and adapters are not read from nodes, whatever the namespace allows; name it by hf://, s3://, gs://, oci://, http:// or https://"
            );
            Err(Unresolved { reason: "HostPathForbidden", message })
        };
        Opened { name, uri, digest, header }
    };
    join_all(named.map(open)).await
}

/// The first name of `object` that an older deployment of its namespace has.
pub fn taken(object: &ModelDeployment, others: &[Arc<ModelDeployment>]) -> Option<(String, String)> {
    fn age(d: &ModelDeployment) -> (Option<Timestamp>, &str) {
        (d.metadata.creation_timestamp.as_ref().map(|t| t.0), d.uid())
    }
    let names: Vec<&str> = object.model_names().collect();
    let clash = |other: &Arc<ModelDeployment>| {
        // Names first: hardly any are the same.
        let name = other.model_names().find(|name| names.contains(name))?;
        let rival =
            other.namespace() == object.namespace() && other.uid() != object.uid() && !other.is_deleted() && age(other) < age(object);
        rival.then(|| (name.to_owned(), other.name().to_owned()))
    };
    others.iter().find_map(clash)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(name: &str, created: &str, model: serde_json::Value) -> Arc<ModelDeployment> {
        let metadata = json!({ "name": name, "namespace": "n", "uid": name, "creationTimestamp": created });
        Arc::new(serde_json::from_value(json!({ "metadata": metadata, "spec": { "model": model } })).expect("an object"))
    }

    #[test]
    fn the_younger_of_two_claims_loses() {
        let old = object("old", "2026-01-01T00:00:00Z", json!({ "name": "m" }));
        let young = object("young", "2026-01-02T00:00:00Z", json!({ "aliases": ["m"] }));
        let all = [old.clone(), young.clone(), object("other", "2026-01-01T00:00:00Z", json!({}))];
        assert_eq!(taken(&young, &all), Some(("m".into(), "old".into())));
        assert_eq!(taken(&old, &all), None);
    }

    #[tokio::test]
    async fn adapters_are_not_read_from_nodes() {
        let adapters = json!([{ "name": "a", "uri": "file:/srv/models/a" }]);
        let object: ModelDeployment =
            serde_json::from_value(json!({ "metadata": {}, "spec": { "adapters": adapters } })).expect("an object");
        let header = crate::validate::tests::header();
        let opened = super::adapters(&Models::new(None), &object, ("file:/srv/models/llama", &header)).await;
        let [Opened { header: Err(why), .. }] = &opened[..] else { panic!("one that is refused: {opened:?}") };
        assert_eq!(why.reason, "HostPathForbidden");
        assert!(why.message.contains("file:/srv/models/a is a path of a node, and adapters are not read from nodes"), "{}", why.message);
    }

    #[test]
    fn paths_are_not_for_the_operator_to_open() {
        assert!(ModelSpec::is_remote("hf://a/b") && ModelSpec::is_remote("https://a/b"));
        assert!(!ModelSpec::is_remote("file:/etc/passwd") && !ModelSpec::is_remote("/etc/passwd"));
    }
}
