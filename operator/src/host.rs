//! Folders of nodes: what the operator was told and a namespace says, and what a deployment may have by both.
//!
//! Two keys are needed, and whoever may create a deployment holds neither. The operator is told which folders there are for it, and the
//! namespace's label for Pod Security says that its pods may have host paths. What is mounted is the folder that the operator was told of,
//! never a path that a deployment names: a link in it that leads elsewhere leads nowhere in a pod.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};
use plan::manifest::{CachePolicy, ModelSpec};

use crate::{
    build::place::{Place, Volume},
    status::ACCEPTED,
    validate::{Rejection, Until},
};

/// Label of a namespace: the standard that its pods must meet.
pub const ENFORCE: &str = "pod-security.kubernetes.io/enforce";
/// The one standard that lets host paths through.
const PRIVILEGED: &str = "privileged";
/// Why a path of a node is refused.
const FORBIDDEN: &str = "HostPathForbidden";

/// Folders of nodes that the operator was told of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Folders {
    /// Those that models are read from.
    models: Vec<String>,
    /// The one that caches are in.
    cache: Option<String>,
}

/// A folder that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum FolderError {
    #[error("{flag} {folder:?}: expected an absolute path below / without .. and control characters")]
    Path { flag: &'static str, folder: String },
    /// Whoever may name a model would read what others have fetched.
    #[error("--node-cache {cache} and --host-path {models}: expected folders of which neither is in the other")]
    Nested { cache: String, models: String },
}

/// What a namespace says of host paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Enforced {
    /// Nobody has looked, since nothing depends on it.
    #[default]
    Unknown,
    /// The value of its label, where it has one.
    Level(Option<String>),
    /// This operator may not look.
    Hidden,
}

/// What a deployment may have of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Its namespace.
    pub namespace: String,
    /// The first key.
    pub folders: Folders,
    /// The second key.
    pub enforced: Enforced,
}

impl Folders {
    /// Folders as flags name them.
    ///
    /// # Errors
    /// When one is no absolute path, or a cache could be read as a model.
    pub fn new(models: &[String], cache: Option<&str>) -> Result<Self, FolderError> {
        let folder = |flag: &'static str, folder: &str| {
            let parts = parts(folder).filter(|parts| !parts.is_empty());
            parts.map(|parts| joined(&parts)).ok_or_else(|| FolderError::Path { flag, folder: folder.to_owned() })
        };
        let models = models.iter().map(|path| folder("--host-path", path)).collect::<Result<Vec<_>, _>>()?;
        let cache = cache.map(|path| folder("--node-cache", path)).transpose()?;
        let nested = |cache: &String| models.iter().find(|models| within(cache, models).is_some() || within(models, cache).is_some());
        if let Some((cache, models)) = cache.as_ref().and_then(|cache| Some((cache, nested(cache)?))) {
            return Err(FolderError::Nested { cache: cache.clone(), models: models.clone() });
        }
        Ok(Self { models, cache })
    }

    /// The smallest folder that a path is in, and the rest of the path.
    fn holding(&self, path: &str) -> Option<(&String, String)> {
        let found = self.models.iter().filter_map(|folder| Some((folder, within(path, folder)?)));
        found.min_by_key(|(_, rest)| rest.len())
    }
}

impl Access {
    /// Looks at the namespace, where it matters to a spec.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn of(client: &Client, folders: &Folders, namespace: &str, spec: &serde_json::Value) -> Result<Self, kube::Error> {
        let path = spec["model"]["uri"].as_str().and_then(ModelSpec::path).and_then(parts);
        let reads = path.is_some_and(|parts| folders.holding(&joined(&parts)).is_some());
        let caches = spec["cache"]["policy"] == "NodeLocal" && folders.cache.is_some();
        let enforced = if reads || caches { enforced(client, namespace).await? } else { Enforced::Unknown };
        Ok(Self { namespace: namespace.to_owned(), folders: folders.clone(), enforced })
    }

    /// Where pods find the model at `uri`, unless that is on a server.
    ///
    /// # Errors
    /// When it is on nodes, and they may not have it.
    pub fn place(&self, uri: &str) -> Result<Option<Place>, Rejection> {
        if let Some((claim, path)) = ModelSpec::volume(uri) {
            return Ok(Some(Place { volume: Volume::Claim(claim.to_owned()), path: path.to_owned() }));
        }
        let Some(path) = ModelSpec::path(uri) else { return Ok(None) };
        let Some(parts) = parts(path) else {
            let message = format!("spec.model.uri: expected file: and an absolute path without .. and control characters, got {uri:?}");
            return Err(Rejection { condition: ACCEPTED, reason: "InvalidSpec", message, until: Until::Changed });
        };
        let whole = joined(&parts);
        let Some((folder, path)) = self.folders.holding(&whole) else {
            let has = match self.folders.models.as_slice() {
                [] => "was told of none".to_owned(),
                folders => format!("was told of {} alone", folders.join(", ")),
            };
            let message = format!(
                "{whole} is a path of a node, and this operator {has}; add its folder to the chart's sources.hostPaths (the operator's \
                 --host-path), or name the model by hf://, s3://, gs://, oci://, http://, https:// or pvc://"
            );
            return Err(Rejection { condition: ACCEPTED, reason: FORBIDDEN, message, until: Until::Changed });
        };
        self.allowed(&whole)?;
        Ok(Some(Place { volume: Volume::Folder(folder.clone()), path }))
    }

    /// The folder of nodes that the cache is in, where the policy is that it is in one.
    ///
    /// # Errors
    /// When nodes may not be written to.
    pub fn cache(&self, policy: CachePolicy) -> Result<Option<String>, Rejection> {
        if policy != CachePolicy::NodeLocal {
            return Ok(None);
        }
        let Some(folder) = &self.folders.cache else {
            let message =
                "spec.cache.policy NodeLocal needs a folder of the nodes, and this operator was told of none; name it in the chart's \
                           sources.nodeCache (the operator's --node-cache), or use policy EmptyDir or PVC"
                    .to_owned();
            return Err(Rejection { condition: ACCEPTED, reason: FORBIDDEN, message, until: Until::Changed });
        };
        self.allowed(folder)?;
        Ok(Some(folder.clone()))
    }

    /// Whether the namespace lets host paths through.
    fn allowed(&self, path: &str) -> Result<(), Rejection> {
        let namespace = &self.namespace;
        let why = match &self.enforced {
            Enforced::Level(Some(level)) if level == PRIVILEGED => return Ok(()),
            Enforced::Level(Some(level)) => format!("is labelled {ENFORCE}={level}, which forbids host paths"),
            Enforced::Level(None) => format!("is not labelled {ENFORCE}, and so does not say that its pods may have host paths"),
            Enforced::Unknown | Enforced::Hidden => {
                let message = format!(
                    "{path} is a path of nodes, and this operator may not see whether the namespace {namespace} is labelled {ENFORCE}={PRIVILEGED}; \
                     let its service account get namespaces"
                );
                return Err(Rejection { condition: ACCEPTED, reason: FORBIDDEN, message, until: Until::Elsewhere });
            }
        };
        let message = format!(
            "{path} is a path of nodes, and the namespace {namespace} {why}; label it {ENFORCE}={PRIVILEGED}, deploy into one that is, or name a \
             source and a cache that are not on nodes"
        );
        Err(Rejection { condition: ACCEPTED, reason: FORBIDDEN, message, until: Until::Elsewhere })
    }
}

async fn enforced(client: &Client, namespace: &str) -> Result<Enforced, kube::Error> {
    match Api::<Namespace>::all(client.clone()).get(namespace).await {
        Ok(found) => Ok(Enforced::Level(label(found.metadata.labels.unwrap_or_default()))),
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(Enforced::Hidden),
        Err(error) => Err(error),
    }
}

fn label(mut labels: BTreeMap<String, String>) -> Option<String> {
    labels.remove(ENFORCE)
}

/// The components of an absolute path, none for one that is not, or that could lead out of a folder.
fn parts(path: &str) -> Option<Vec<&str>> {
    if !path.starts_with('/') || path.contains(char::is_control) {
        return None;
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    (!parts.contains(&"..")).then_some(parts)
}

fn joined(parts: &[&str]) -> String {
    format!("/{}", parts.join("/"))
}

/// What is left of a path below a folder, both as [`joined`] writes them; nothing where it is the folder.
fn within(path: &str, folder: &str) -> Option<String> {
    let rest = path.strip_prefix(folder)?;
    if rest.is_empty() { Some(String::new()) } else { rest.strip_prefix('/').map(str::to_owned) }
}

#[cfg(test)]
pub(crate) mod tests;
