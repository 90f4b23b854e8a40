//! Headers of models on claims and on nodes, which nodes alone can read: a short-lived pod mounts the volume, reads the headers and says them
//! in its log.
//!
//! What the pod says is trusted as little as a file. It is kept in a `ConfigMap`, so that another process of the operator needs no pod.

mod pod;
mod record;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaim, Pod},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{DeleteParams, LogParams, PostParams},
};
use plan::{manifest::ModelSpec, model::ModelHeader};
use source::{Inspection, InspectionError};
use tokio::time::Instant;
use tracing::{info, warn};

pub use self::pod::is_inspector;
use self::pod::{State, state};
use crate::{
    apply::Writer,
    build::{
        Object, Settings,
        place::{Place, Volume},
    },
    cache::Cache,
    dereference::{self, Fetched},
    models::{Models, Unresolved, chain},
    names,
    resource::ModelDeployment,
    validate,
};

/// Most headers kept by this process; beyond that all are read again.
const KEPT: usize = 1024;
/// First and longest pause after a pod that brought nothing.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));
/// Bytes of a log that are read: the line, and what may stand before it.
const LOG: i64 = Inspection::MOST_BYTES as i64 + (64 << 10);

/// What this process knows of models that it cannot read itself.
#[derive(Debug, Default)]
pub struct Inspections(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By namespace and the name of the object that keeps them.
    headers: HashMap<String, Arc<ModelHeader>>,
    /// By the deployment's unique id.
    failures: HashMap<String, Failure>,
}

/// Why there is no header, and until when none is looked for.
#[derive(Debug)]
struct Failure {
    pod: String,
    count: u32,
    until: Instant,
    why: Unresolved,
}

impl Inspections {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long nothing is looked for, for the deployment of this unique id.
    pub fn pause(&self, uid: &str) -> Option<Duration> {
        let pause = self.lock().failures.get(uid)?.until.saturating_duration_since(Instant::now());
        Some(pause).filter(|pause| !pause.is_zero())
    }

    /// Why the last pod of this name brought nothing, while no other is made.
    fn failed(&self, uid: &str, pod: &str) -> Option<Unresolved> {
        let inner = self.lock();
        let failure = inner.failures.get(uid)?;
        (failure.pod == pod && failure.until > Instant::now()).then(|| failure.why.clone())
    }

    /// Notes that a pod brought nothing; why.
    fn fail(&self, uid: &str, pod: &str, why: Unresolved) -> Unresolved {
        let (mut inner, now) = (self.lock(), Instant::now());
        // Those of deployments that are gone.
        inner.failures.retain(|_, failure| failure.until + BACKOFF.1 > now);
        let count = inner.failures.get(uid).filter(|failure| failure.pod == pod).map_or(0, |failure| failure.count + 1);
        let until = now + BACKOFF.0.saturating_mul(1 << count.min(16)).min(BACKOFF.1);
        inner.failures.insert(uid.to_owned(), Failure { pod: pod.to_owned(), count, until, why: why.clone() });
        why
    }

    fn known(&self, key: &str) -> Option<Arc<ModelHeader>> {
        self.lock().headers.get(key).cloned()
    }

    fn knows(&self, key: &str) -> bool {
        self.lock().headers.contains_key(key)
    }

    /// Nothing is looked for any more.
    fn forget(&self, uid: &str) {
        self.lock().failures.remove(uid);
    }

    fn keep(&self, wanted: &Wanted<'_>, header: ModelHeader) -> Arc<ModelHeader> {
        let (mut inner, header) = (self.lock(), Arc::new(header));
        inner.failures.remove(wanted.object.uid());
        if inner.headers.len() >= KEPT {
            inner.headers.clear();
        }
        inner.headers.insert(wanted.key(), header.clone());
        header
    }
}

/// Name of the object that keeps the header of a deployment's model, where nodes alone can read it.
pub fn kept_in(object: &ModelDeployment) -> Option<String> {
    let uri = object.spec["model"]["uri"].as_str().filter(|uri| !ModelSpec::is_remote(uri))?;
    Some(names::header(object.name(), object.uid(), uri))
}

/// A model that nodes alone can read.
struct Wanted<'a> {
    object: &'a ModelDeployment,
    uri: String,
    place: Place,
    /// Name of the object that keeps its header.
    name: String,
    pod: Object,
}

impl Wanted<'_> {
    /// What its header is known by.
    fn key(&self) -> String {
        format!("{}/{}", self.object.namespace(), self.name)
    }
}

/// Looks for headers.
pub struct Inspector<'a> {
    /// For the API server.
    pub client: &'a Client,
    /// What stands, and what was written.
    pub cache: &'a Cache,
    /// What pods depend on.
    pub settings: &'a Settings,
    /// For adapters beside the model.
    pub models: &'a Models,
    /// What is known.
    pub inspections: &'a Inspections,
}

impl Inspector<'_> {
    /// Fills in the header of a model that nodes alone can read, or why there is none yet, and then its adapters. Other models, and specs that
    /// are refused whatever their model is, stay as they are.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn inspect(&self, object: &ModelDeployment, fetched: &mut Fetched) -> Result<(), kube::Error> {
        let wanted = self.wanted(object, fetched);
        // Those that were made for what the spec said before, or that an earlier process has left.
        let stale = |pod: &&String| wanted.as_ref().is_none_or(|wanted| wanted.pod.name != **pod || self.inspections.knows(&wanted.key()));
        for pod in fetched.standing.inspectors.iter().filter(stale) {
            self.delete(object.namespace(), pod).await?;
        }
        let Some(wanted) = wanted else {
            self.inspections.forget(object.uid());
            return Ok(());
        };
        let header = self.header(&wanted, &fetched.standing.config_maps).await?;
        if let Ok(header) = &header {
            fetched.adapters = dereference::adapters(self.models, object, (&wanted.key(), header)).await;
        }
        fetched.header = Some(header);
        Ok(())
    }

    /// What is to be looked at. A spec that is refused whatever its model is needs no pod.
    fn wanted<'a>(&self, object: &'a ModelDeployment, fetched: &Fetched) -> Option<Wanted<'a>> {
        let name = kept_in(object).filter(|_| fetched.taken.is_none())?;
        let manifest = validate::read(object, &object.spec, fetched).ok()?;
        let uri = manifest.spec().model.uri.clone();
        fetched.access.cache(manifest.spec().cache.policy).ok()?;
        let place = fetched.access.place(&uri).ok()??;
        let pod = pod::build(self.settings, object, &manifest.spec().workers, &place);
        Some(Wanted { object, place, uri, name, pod })
    }

    async fn header(&self, wanted: &Wanted<'_>, kept: &[String]) -> Result<Result<Arc<ModelHeader>, Unresolved>, kube::Error> {
        let Wanted { object, uri, name, pod, .. } = wanted;
        if let Some(header) = self.inspections.known(&wanted.key()) {
            return Ok(Ok(header));
        }
        if kept.contains(name)
            && let Some(header) = record::read(self.client, object, name).await?
        {
            return Ok(Ok(self.inspections.keep(wanted, header)));
        }
        if let Some(why) = self.inspections.failed(object.uid(), &pod.name) {
            return Ok(Err(why));
        }
        let pods = Api::<Pod>::namespaced(self.client.clone(), object.namespace());
        let Some(found) = pods.get_opt(&pod.name).await? else { return self.begin(wanted).await.map(Err) };
        if !found.metadata.owner_references.iter().flatten().any(|owner| owner.uid == object.uid()) {
            let message = format!("the pod {} is not this deployment's, which would make one of this name; delete it", pod.name);
            return Ok(Err(self.fail(wanted, "SourceUnreachable", message)));
        }
        match state(&found, Timestamp::now()) {
            State::Runs(how) => Ok(Err(resolving(wanted, &how))),
            State::Waits(why) => {
                let message = format!("the pod {}, which is to read the headers of {uri}, waits: {why}", pod.name);
                Ok(Err(Unresolved { reason: "InspectionWaits", message }))
            }
            State::Late => {
                self.delete(object.namespace(), &pod.name).await?;
                let message = format!("the pod {}, which reads the headers of {uri}, does not end; its node may be lost", pod.name);
                Ok(Err(self.fail(wanted, "SourceUnreachable", message)))
            }
            State::Ended(how) => self.end(wanted, &how).await,
        }
    }

    /// Makes the pod; what is said of that.
    async fn begin(&self, wanted: &Wanted<'_>) -> Result<Unresolved, kube::Error> {
        let (namespace, name) = (wanted.object.namespace(), &wanted.pod.name);
        if let Volume::Claim(claim) = &wanted.place.volume
            && Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), namespace).get_opt(claim).await?.is_none()
        {
            let message = format!("there is no PersistentVolumeClaim {claim} in the namespace {namespace}");
            return Ok(self.fail(wanted, "NotFound", message));
        }
        let pod = serde_json::from_value(wanted.pod.body.clone()).map_err(kube::Error::SerdeError)?;
        match Api::<Pod>::namespaced(self.client.clone(), namespace).create(&PostParams::default(), &pod).await {
            Ok(_) => info!(namespace, name, uri = wanted.uri, "a pod is made to read the headers of a model"),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(kube::Error::Api(status)) if (400..500).contains(&status.code) => {
                let message = format!("the pod {name}, which is to read the headers of {}, is refused: {}", wanted.uri, status.message);
                return Ok(self.fail(wanted, "SourceUnreachable", message));
            }
            Err(error) => return Err(error),
        }
        Ok(resolving(wanted, "it was just made"))
    }

    /// Hears what a pod that has ended says, and deletes it.
    async fn end(&self, wanted: &Wanted<'_>, how: &str) -> Result<Result<Arc<ModelHeader>, Unresolved>, kube::Error> {
        let (object, pod, name) = (wanted.object, &wanted.pod.name, &wanted.name);
        let limits = LogParams { limit_bytes: Some(LOG), ..LogParams::default() };
        let said = Api::<Pod>::namespaced(self.client.clone(), object.namespace()).logs(pod, &limits).await;
        let said = match said {
            Ok(log) => Ok(log),
            // Of one that never ran, or whose node does not answer.
            Err(kube::Error::Api(status)) => Err(status.message.clone()),
            Err(error) => return Err(error),
        };
        let line = said.as_ref().ok().and_then(|log| log.lines().rev().find(|line| line.starts_with('{'))).map(str::to_owned);
        let Some(line) = line else {
            self.delete(object.namespace(), pod).await?;
            let why = said.err().map(|why| format!("; its log cannot be read: {why}")).unwrap_or_default();
            let next = format!("its events tell more (kubectl get events --field-selector involvedObject.name={pod})");
            let message = format!("the pod {pod}, which reads the headers of {}, ended without them: {how}{why}; {next}", wanted.uri);
            return Ok(Err(self.fail(wanted, "SourceUnreachable", message)));
        };
        let understood = tokio::task::spawn_blocking(move || (Inspection::understand(&line), line)).await;
        let read = match understood {
            Ok((Ok(header), line)) => {
                let writer = Writer { client: self.client, cache: self.cache };
                if let Err(error) = record::write(writer, object, (name, &wanted.uri), &line).await {
                    warn!(namespace = object.namespace(), name, error = chain(&error), "a header is not kept for other processes");
                }
                Ok(self.inspections.keep(wanted, header))
            }
            Ok((Err(error), _)) => {
                let (reason, message) = refusal(wanted, &error);
                Err(self.fail(wanted, reason, message))
            }
            Err(error) => Err(self.fail(wanted, "SourceUnreachable", format!("hearing the pod {pod} was cut off: {error}"))),
        };
        self.delete(object.namespace(), pod).await?;
        Ok(read)
    }

    /// Deletes a pod at once: one that only reads is missed by nobody.
    async fn delete(&self, namespace: &str, pod: &str) -> Result<(), kube::Error> {
        let now = DeleteParams::default().grace_period(0);
        match Api::<Pod>::namespaced(self.client.clone(), namespace).delete(pod, &now).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn fail(&self, wanted: &Wanted<'_>, reason: &'static str, message: String) -> Unresolved {
        self.inspections.fail(wanted.object.uid(), &wanted.pod.name, Unresolved { reason, message })
    }
}

fn resolving(wanted: &Wanted<'_>, how: &str) -> Unresolved {
    let place = match &wanted.place.volume {
        Volume::Claim(_) => String::new(),
        Volume::Folder(folder) => format!(" on a node, which must have the folder {folder}"),
    };
    Unresolved { reason: "Resolving", message: format!("the pod {} reads the headers of {}{place}: {how}", wanted.pod.name, wanted.uri) }
}

/// What is wrong with what a pod said: from the closed list of `source`, and for people, who know the model by its claim or the node's folder.
fn refusal(wanted: &Wanted<'_>, error: &InspectionError) -> (&'static str, String) {
    const KNOWN: [&str; 4] = ["InvalidSpec", "NotFound", "DownloadFailed", "DigestMismatch"];
    match error {
        InspectionError::Refused { reason, message } => {
            // What is left are the reasons of headers.
            (KNOWN.into_iter().find(|known| known == reason).unwrap_or("header_invalid"), wanted.place.explain(message))
        }
        InspectionError::Header { source } => (source.reason(), format!("{}: {}", wanted.uri, chain(error))),
        InspectionError::Unknown { .. } | InspectionError::Outside => {
            ("SourceUnreachable", format!("the pod {}, which reads {}: {}", wanted.pod.name, wanted.uri, chain(error)))
        }
    }
}
