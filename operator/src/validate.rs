//! Second step: a deployment and what was read for it become a plan, or a refusal with a reason. Pure.

use std::{borrow::Cow, sync::Arc};

use plan::{
    adapter::AdapterSource,
    fleet::{FleetDraft, ReplicaLimits},
    manifest::{API_VERSION, AdapterSpec, DraftModelSpec, KIND, Manifest, ModelSpec},
    model::ModelHeader,
    planner::{self, Capacity, DraftError, Origin},
    shard::ExecutionPlan,
    worker::{CollectiveKind, WorkerSpec},
};
use serde_json::{Value, json};

use crate::{
    build::place::{Place, Volume},
    dereference::Fetched,
    models::{Opened, Unresolved, chain},
    names,
    resource::ModelDeployment,
    status::{ACCEPTED, MODEL_RESOLVED},
};

/// A deployment that can be built.
#[derive(Clone, Debug)]
pub struct ValidatedDeployment {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its unique id.
    pub uid: String,
    /// Its spec, parsed, with the chat template it names.
    pub manifest: Manifest,
    /// Its model.
    pub header: Arc<ModelHeader>,
    /// Where its pods find the model, unless that is on a server.
    pub place: Option<Place>,
    /// The folder of nodes that its workers keep in what they fetch, where it is one.
    pub node_cache: Option<String>,
    /// How a replica is laid out.
    pub plan: ExecutionPlan,
    /// What decides the bits of its replicas.
    pub numerics: String,
    /// What guesses for it.
    pub draft: Option<Draft>,
    /// Its adapters, or why one is none. They are no part of a revision: they come and go while its workers run.
    pub adapters: Vec<Adapter>,
}

/// A draft model beside each replica.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Where it comes from.
    pub source: DraftModelSpec,
    /// How its worker is laid out.
    pub plan: ExecutionPlan,
    /// What routers are told of it, but for its worker.
    pub fleet: FleetDraft,
}

/// An adapter by its name, and what workers are told, or why nothing.
pub type Adapter = (String, Result<AdapterSource, String>);

/// Why a deployment is not built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The condition that says so.
    pub condition: &'static str,
    /// Why, from the condition's closed list.
    pub reason: &'static str,
    /// Why, for people, and what to do next.
    pub message: String,
    /// What may change it.
    pub until: Until,
}

/// What may turn a refusal around.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Another spec alone; nothing is tried before.
    Changed,
    /// Another object of the namespace; looked at again now and then.
    Elsewhere,
    /// The source; tried again with growing pauses.
    Source,
}

impl ValidatedDeployment {
    /// Replicas wanted: none while the deployment is suspended.
    pub fn replicas(&self) -> u32 {
        let spec = self.manifest.spec();
        if spec.suspend { 0 } else { spec.replicas }
    }

    /// What each worker is told, stage by stage and rank by rank; replicas share it.
    pub fn worker_specs(&self) -> Vec<WorkerSpec> {
        let model = &self.manifest.spec().model;
        let uri = self.place.as_ref().map_or(Cow::Borrowed(model.uri.as_str()), |place| Cow::Owned(format!("file:{}", place.inside())));
        let origin = Origin { replica: &self.name, uri: &uri, digest: model.digest.as_deref() };
        planner::worker_specs(&self.plan, &origin, 1, CollectiveKind::Tcp)
    }

    /// What the worker of its draft model is told; replicas share it.
    pub fn draft_spec(&self) -> Option<WorkerSpec> {
        let Draft { source, plan, .. } = self.draft.as_ref()?;
        let name = FleetDraft::name(&self.name);
        let origin = Origin { replica: &name, uri: &source.uri, digest: source.digest.as_deref() };
        planner::worker_specs(plan, &origin, 1, CollectiveKind::Tcp).into_iter().next()
    }

    /// Folders of nodes that its pods have.
    pub fn node_folders(&self) -> Vec<&str> {
        let model = self.place.as_ref().and_then(|place| match &place.volume {
            Volume::Claim(_) => None,
            Volume::Folder(folder) => Some(folder.as_str()),
        });
        model.into_iter().chain(self.node_cache.as_deref()).collect()
    }

    /// What a replica holds.
    pub fn limits(&self) -> ReplicaLimits {
        planner::limits(&self.plan, self.manifest.spec().engine.kv_cache.prefix_caching)
    }
}

/// Checks a deployment and plans it.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn validate(object: &ModelDeployment, fetched: &Fetched) -> Result<ValidatedDeployment, Rejection> {
    let manifest = read(object, &object.spec, fetched)?;
    let model = &manifest.spec().model;
    if let Some((name, whose)) = &fetched.taken {
        let message =
            format!("model name {name} is that of the older deployment {whose}; choose another in spec.model.name or spec.model.aliases");
        return Err(refuse(ACCEPTED, "NameTaken", message, Until::Elsewhere));
    }
    let (place, node_cache) = (fetched.access.place(&model.uri)?, fetched.access.cache(manifest.spec().cache.policy)?);
    let header = match &fetched.header {
        Some(Ok(header)) => Arc::new(manifest.loaded(header)),
        Some(Err(unresolved)) => return Err(unresolvable(unresolved, MODEL)),
        None => {
            let message = format!("nobody has read the header of {} yet", model.uri);
            return Err(unresolvable(&Unresolved { reason: "Resolving", message }, MODEL));
        }
    };
    // A worker may take what its limit says; where there is none, the scheduler finds a node for what the plan needs.
    let room = fetched.adapters.iter().filter_map(|opened| opened.header.clone().ok()).collect();
    let plan = manifest
        .plan_with(&header, &Capacity { memory_bytes: None }, room)
        .map_err(|error| refuse(ACCEPTED, "PlanInfeasible", format!("{error}; change spec.parallelism or spec.engine"), Until::Changed))?;
    if !plan.fits {
        let message = format!("{}; raise spec.workers.resources.limits.memory, or spread the model over more workers", plan.message);
        let message = if plan.adapter_bytes > 0 { format!("{message}, or take adapters away") } else { message };
        return Err(refuse(ACCEPTED, "PlanInfeasible", message, Until::Changed));
    }
    let numerics = planner::numerics(&header, model.digest.as_deref().unwrap_or(&model.uri), &plan);
    Ok(ValidatedDeployment {
        name: object.name().to_owned(),
        namespace: object.namespace().to_owned(),
        uid: object.uid().to_owned(),
        draft: draft(&manifest, fetched, (&header, &plan))?,
        adapters: adapters(&manifest, fetched),
        manifest,
        header,
        place,
        node_cache,
        plan,
        numerics,
    })
}

/// The draft model of a manifest, laid out beside its model.
fn draft(manifest: &Manifest, fetched: &Fetched, (header, plan): (&ModelHeader, &ExecutionPlan)) -> Result<Option<Draft>, Rejection> {
    let Some(source) = manifest.spec().engine.draft.model.clone() else { return Ok(None) };
    let own = match &fetched.draft {
        Some(Ok(header)) => header,
        Some(Err(unresolved)) => return Err(unresolvable(unresolved, DRAFT)),
        None => {
            let message = format!("nobody has read the header of {} yet", source.uri);
            return Err(unresolvable(&Unresolved { reason: "Resolving", message }, DRAFT));
        }
    };
    let capacity = Capacity { memory_bytes: manifest.spec().workers.resources.limits.memory.map(|m| m.0) };
    let laid_out = planner::check_draft(header, own).and_then(|()| {
        let draft = planner::plan_draft(own, plan.max_context, &capacity)?;
        Ok((FleetDraft::of(&draft, plan)?, draft))
    });
    match laid_out {
        Ok((fleet, plan)) => Ok(Some(Draft { source, plan, fleet })),
        Err(error) => {
            let next = match error {
                DraftError::Memory { .. } => "raise spec.workers.resources.limits.memory, or name a smaller one",
                _ => "name another",
            };
            let message = format!("{DRAFT}: {} cannot guess for this model: {}; {next}", source.uri, chain(&error));
            Err(refuse(ACCEPTED, "PlanInfeasible", message, Until::Changed))
        }
    }
}

/// The adapters of a manifest, as far as they were read.
pub fn adapters(manifest: &Manifest, fetched: &Fetched) -> Vec<Adapter> {
    let read = |spec: &AdapterSpec| {
        let found = fetched.adapters.iter().find(|o| (&o.name, &o.uri, &o.digest) == (&spec.name, &spec.uri, &spec.digest));
        let source = found.map_or_else(|| Err("it was not read".to_owned()), Opened::source);
        (spec.name.clone(), source)
    };
    manifest.spec().adapters.iter().map(read).collect()
}

/// A spec of a deployment, its own or one that it had, through the parser of manifests, which knows rules, ranges and paths. JSON is YAML.
///
/// # Errors
/// When it is not valid.
pub fn read(object: &ModelDeployment, spec: &Value, fetched: &Fetched) -> Result<Manifest, Rejection> {
    let metadata = json!({ "name": object.name(), "namespace": object.namespace() });
    let mut text = json!({ "apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec }).to_string();
    if let Some((name, data)) = &fetched.template {
        let metadata = json!({ "name": name, "namespace": object.namespace() });
        let map = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data });
        text = format!("{text}\n---\n{map}");
    }
    let invalid = |path: &str, message: &str| {
        // A ConfigMap may come; nothing else but the spec can make an invalid spec valid.
        let until = if path.ends_with("configMapKeyRef") { Until::Elsewhere } else { Until::Changed };
        refuse(ACCEPTED, "InvalidSpec", format!("{path}: {}", message.replace("is not in the file", "does not exist")), until)
    };
    let manifest = Manifest::parse(object.name(), &text).map_err(|e| invalid(&e.path, &e.message))?;
    if object.name() == names::POOL {
        return Err(invalid("metadata.name", "this is the name of the namespace's router pool, expected another"));
    }
    if let Some(draft) = manifest.spec().engine.draft.model.as_ref().filter(|draft| !ModelSpec::is_remote(&draft.uri)) {
        let message = format!(
            "{DRAFT}: {} is a path of a node, and draft models are not read from nodes, whatever the namespace allows; name it by hf://, s3://, \
             gs://, oci://, http:// or https://",
            draft.uri
        );
        return Err(refuse(ACCEPTED, "HostPathForbidden", message, Until::Changed));
    }
    Ok(manifest)
}

fn refuse(condition: &'static str, reason: &'static str, message: String, until: Until) -> Rejection {
    Rejection { condition, reason, message, until }
}

/// Fields that name a model.
const MODEL: &str = "spec.model";
const DRAFT: &str = "spec.engine.draft.model";

/// What a source's failure means; `field` names the model.
fn unresolvable(unresolved: &Unresolved, field: &str) -> Rejection {
    let (condition, reason, next, until) = match unresolved.reason {
        "InvalidSpec" => (ACCEPTED, "InvalidSpec", "correct spec.model.uri", Until::Changed),
        "Resolving" => (MODEL_RESOLVED, "Resolving", "the model is planned when it has ended", Until::Elsewhere),
        "InspectionWaits" => (MODEL_RESOLVED, "SourceUnreachable", "it is looked at again", Until::Elsewhere),
        "NotFound" => (MODEL_RESOLVED, "NotFound", "check spec.model.uri; it is looked for again", Until::Source),
        "Unauthorized" => (MODEL_RESOLVED, "Unauthorized", unauthorized(field), Until::Source),
        "DigestMismatch" => (MODEL_RESOLVED, "DigestMismatch", "correct spec.model.digest", Until::Source),
        "SourceUnreachable" | "DownloadFailed" => (MODEL_RESOLVED, "SourceUnreachable", "it is tried again", Until::Source),
        // What is left are the reasons of headers: there are bytes, and they are no model that can be run.
        _ => (ACCEPTED, "UnsupportedArchitecture", "deploy a model of a supported architecture and type", Until::Source),
    };
    refuse(condition, reason, format!("{}; {}", unresolved.message, next.replace(MODEL, field)), until)
}

/// What to do where a source lets nobody in.
fn unauthorized(field: &str) -> &'static str {
    match field {
        DRAFT => "the source of a draft model is shown no credentials, so name one in spec.model.uri that asks for none; it is tried again",
        _ => "correct the Secret that spec.model.credentialsSecretRef names, or name one; it is tried again",
    }
}

#[cfg(test)]
pub(crate) mod tests;
