//! The resource as the API server holds it. Its spec stays JSON here, and is parsed by `plan` when it is reconciled.

use std::borrow::Cow;

use k8s_openapi::{
    NamespaceResourceScope,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
    jiff::Timestamp,
};
use kube::Resource;
use plan::manifest::{API_VERSION, KIND};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Group of the resource.
pub const GROUP: &str = "skein.dev";
/// Version of the resource.
pub const VERSION: &str = "v1alpha1";
/// Plural name of the resource.
pub const PLURAL: &str = "modeldeployments";

/// One `ModelDeployment`.
#[derive(Clone, Debug, Deserialize)]
pub struct ModelDeployment {
    /// Name, namespace, generation.
    pub metadata: ObjectMeta,
    /// Desired state, as `plan` parses it.
    #[serde(default)]
    pub spec: Value,
    /// What became of it. A status of another version that cannot be read counts as none: it is computed anew.
    #[serde(default, deserialize_with = "readable")]
    pub status: Option<Status>,
}

fn readable<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Status>, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(from)?).ok())
}

impl Resource for ModelDeployment {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        KIND.into()
    }

    fn group((): &()) -> Cow<'_, str> {
        GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        VERSION.into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl ModelDeployment {
    /// Its name.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// Its unique id.
    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    /// Generation of its spec.
    pub fn generation(&self) -> i64 {
        self.metadata.generation.unwrap_or_default()
    }

    /// Whether it is on its way out.
    pub fn is_deleted(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// Every name that requests can call it by, as far as the spec can be read.
    pub fn model_names(&self) -> impl Iterator<Item = &str> {
        let model = &self.spec["model"];
        let aliases = model["aliases"].as_array().into_iter().flatten().filter_map(Value::as_str);
        std::iter::once(model["name"].as_str().unwrap_or(self.name())).chain(aliases)
    }

    /// A reference that makes an object this one's, alone or with others.
    pub fn owner(&self, controller: bool) -> OwnerReference {
        OwnerReference {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            name: self.name().to_owned(),
            uid: self.uid().to_owned(),
            controller: controller.then_some(true),
            block_owner_deletion: None,
        }
    }

    /// Its condition of type `kind`.
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.status.as_ref()?.conditions.iter().find(|c| c.kind == kind)
    }
}

/// What became of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// Generation of the spec that this status is about.
    pub observed_generation: i64,
    /// Replicas wanted, whoever decides it.
    pub desired_replicas: u32,
    /// Replicas that exist, ready or not.
    pub replicas: u32,
    /// Replicas from which a token came out of the last stage.
    pub ready_replicas: u32,
    /// Replicas of the present revision.
    pub updated_replicas: u32,
    /// Ready replicas that take requests.
    pub available_replicas: u32,
    /// Selects one pod of each replica, for autoscalers.
    pub selector: String,
    /// Revision that was rolled out last; before any was, the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_revision: Option<String>,
    /// Revision of the spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_revision: Option<String>,
    /// The latest 10 revisions, latest first.
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub revisions: Vec<RevisionStatus>,
    /// Names of revisions that were passed over because another revision has them.
    pub collision_count: u32,
    /// The model, from its header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelStatus>,
    /// How a replica is laid out over workers; written before any pod exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,
    /// The first 64 replicas.
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub replica_states: Vec<ReplicaStatus>,
    /// What workers bring from servers, where they bring anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheStatus>,
    /// What built-in autoscaling decided, in its mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingStatus>,
    /// The adapters of the spec.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub adapters: Vec<AdapterStatus>,
    /// Which routers serve it, where they are its own, or were until a moment ago.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routers: Option<RoutersStatus>,
    /// Where requests go, inside the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Every address, by protocol.
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub addresses: Vec<Address>,
    /// Accepted, ModelResolved, Scheduled, WeightsReady, ReplicasReady, RouterReady, Available, Progressing, Degraded, ScalingActive, Ready.
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// The model, from its header.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelStatus {
    /// GGUF or Safetensors.
    pub format: String,
    /// Family of the model.
    pub architecture: String,
    /// Layers.
    pub layers: u32,
    /// Numbers in its tensors.
    pub parameters: u64,
    /// Bytes of its weight files.
    pub size_bytes: u64,
    /// Context it was trained for.
    pub context_tokens: u64,
    /// Digest that its weights are pinned to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// Which routers serve a deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RoutersStatus {
    /// Its own take its requests; else those of the namespace.
    pub dedicated: bool,
    /// Since when, where that has changed; those before finish what they have begun for recovery.drainSeconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
}

/// How a replica is laid out over workers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PlanStatus {
    /// Its stages.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["index"]))]
    pub stages: Vec<StageStatus>,
    /// The worker of the draft model of each replica.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft: Option<DraftPlanStatus>,
    /// Whether every worker fits into its memory.
    pub fits: bool,
    /// Why, with numbers.
    pub message: String,
}

/// The worker of a draft model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DraftPlanStatus {
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes of its KV cache.
    pub kv_bytes: u64,
    /// Longest sequence that it guesses for, in tokens.
    pub context_tokens: u64,
    /// What a token takes it, in thousandths of what one takes the model.
    pub cost: u32,
}

/// One stage of the plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StageStatus {
    /// Number of the stage, from 0.
    pub index: u32,
    /// Its first layer.
    pub first_layer: u32,
    /// Its last layer.
    pub last_layer: u32,
    /// Workers of the stage.
    pub ranks: u32,
    /// Bytes of weights on the fullest of its workers.
    pub weight_bytes: u64,
    /// Bytes of KV cache on the fullest of its workers.
    pub kv_bytes: u64,
}

/// One revision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RevisionStatus {
    /// Its name, which its replicas carry as a label.
    pub name: String,
    /// Its replicas.
    pub replicas: u32,
}

/// One replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReplicaStatus {
    /// Unique name.
    pub name: String,
    /// Revision it runs.
    pub revision: String,
    /// Pending: workers are missing. Starting: all run. Ready: a token came out. Recovering: it was ready. Draining: it is let go.
    pub phase: ReplicaPhase,
    /// Workers that run.
    pub ready_workers: u32,
    /// Workers of the replica.
    pub workers: u32,
    /// What went wrong last, as routers saw it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<String>,
    /// Its draft model, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft: Option<DraftStatus>,
}

/// The draft model of a replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DraftStatus {
    /// Ready: it guesses. Loading: it is on its way. Failed: the replica answers without it, as long as it cannot be asked.
    pub state: LoadPhase,
    /// How far it is, or why it cannot be asked.
    pub message: String,
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "ReplicaStatus says it")]
pub enum ReplicaPhase {
    #[default]
    Pending,
    Starting,
    Ready,
    Recovering,
    Draining,
}

/// One adapter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AdapterStatus {
    /// What requests name behind the model's name and a colon.
    pub name: String,
    /// Loading: some replica that answers does not have it yet. Ready: each has it. Failed: see the message.
    pub state: LoadPhase,
    /// Where it is, or why not.
    pub message: String,
}

/// How far an adapter is, or a draft model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[expect(missing_docs, reason = "AdapterStatus and DraftStatus say it")]
pub enum LoadPhase {
    #[default]
    Loading,
    Ready,
    Failed,
}

/// What the workers of all replicas bring from servers into their caches; what was there before is counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CacheStatus {
    /// Bytes that are there.
    pub bytes_downloaded: u64,
    /// All of them.
    pub bytes_total: u64,
    /// Seconds until all are there, at the present pace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
}

/// What built-in autoscaling decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AutoscalingStatus {
    /// Replicas it wants.
    pub desired_replicas: u32,
    /// When that changed last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub last_scale_time: Option<String>,
    /// Why it changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_reason: Option<String>,
    /// The last 10 changes, the latest first.
    #[schemars(length(max = 10))]
    pub history: Vec<ScaleRecord>,
}

/// One change of the number of replicas.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScaleRecord {
    /// When.
    #[schemars(extend("format" = "date-time"))]
    pub time: String,
    /// Replicas before.
    pub from: u32,
    /// Replicas after.
    pub to: u32,
    /// Why.
    #[schemars(length(max = 1024))]
    pub reason: String,
}

/// One address of the deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Address {
    /// http or grpc.
    pub name: String,
    /// The address.
    pub url: String,
}

/// One condition, as everywhere in Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// Which condition.
    #[serde(rename = "type")]
    #[schemars(length(max = 316))]
    pub kind: String,
    /// True, False or Unknown.
    #[schemars(length(max = 16))]
    pub status: String,
    /// Generation of the spec that it is about.
    pub observed_generation: i64,
    /// When its status changed last.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// Why, from a closed list.
    #[schemars(length(max = 1024))]
    pub reason: String,
    /// Why, for people, and what to do next.
    #[schemars(length(max = 32768))]
    pub message: String,
}

/// The present time as conditions write it.
pub fn now() -> String {
    let seconds = Timestamp::now().as_second();
    Timestamp::from_second(seconds).map(|t| t.to_string()).unwrap_or_default()
}
