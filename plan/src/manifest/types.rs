//! The resource's types. Field names in YAML are camelCase; what the text says of a default is what an absent field means.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

#[cfg(feature = "schema")]
use super::placement;
use super::{
    autoscaling::AutoscalingSpec,
    placement::TolerationSpec,
    quantity::{Bytes, Memory},
    rollout::{RecoverySpec, RolloutSpec, SchedulingSpec},
};
use crate::{dtype::DType, fleet::RoutingPolicy};

/// A deployment of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelDeployment {
    /// `skein.dev/v1alpha1`.
    pub api_version: String,
    /// `ModelDeployment`.
    pub kind: String,
    /// Name and labels.
    pub metadata: Metadata,
    /// Desired state.
    pub spec: DeploymentSpec,
}

/// Kubernetes' metadata, as far as it means something here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// Name: a DNS label of at most 45 characters.
    pub name: String,
    /// Namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Desired state of a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeploymentSpec {
    /// Which model.
    pub model: ModelSpec,
    /// How chats become text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat: Option<ChatSpec>,
    /// How it is computed.
    #[serde(default)]
    pub engine: EngineSpec,
    /// Low-rank adapters (LoRA) beside the model, at most 64; a request names one behind the model's name and a colon. They come and go
    /// without a restart.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(
        feature = "schema",
        schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))
    )]
    pub adapters: Vec<AdapterSpec>,
    /// Over how many workers a replica is spread.
    #[serde(default)]
    pub parallelism: ParallelismSpec,
    /// Whole copies of the model, 0 to 1000; default 1.
    #[serde(default = "one")]
    #[cfg_attr(feature = "schema", schemars(range(max = 1000)))]
    pub replicas: u32,
    /// How the number of replicas follows the load; of meaning on a cluster.
    #[serde(default)]
    pub autoscaling: AutoscalingSpec,
    /// What its workers may use, and where they may run.
    #[serde(default)]
    pub workers: WorkersSpec,
    /// Where workers keep what they fetch; of meaning on a cluster.
    #[serde(default)]
    pub cache: CacheSpec,
    /// How requests reach it.
    #[serde(default)]
    pub router: RouterSpec,
    /// How replicas are replaced when the spec changes; of meaning on a cluster.
    #[serde(default)]
    pub rollout: RolloutSpec,
    /// How replicas are let go; of meaning on a cluster.
    #[serde(default)]
    pub recovery: RecoverySpec,
    /// How workers find nodes; of meaning on a cluster.
    #[serde(default)]
    pub scheduling: SchedulingSpec,
    /// No workers, and requests are refused, until it is false again; of meaning on a cluster. Default false.
    #[serde(default)]
    pub suspend: bool,
}

/// Which model, and what it is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSpec {
    /// `hf://`, `s3://BUCKET/KEY`, `gs://BUCKET/KEY`, `oci://REGISTRY/REPOSITORY:TAG`, `http(s)://`, `pvc://CLAIM/PATH` (a claim of the same namespace; on a cluster) or `file:/PATH`, at most 2048 characters. On a cluster the path is one of the nodes that workers run on: it must lie in a folder that the operator was told of (chart value `sources.hostPaths`), and the namespace must enforce Pod Security `privileged`; user 65532 must be able to read it.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 2048)))]
    pub uri: String,
    /// The `model` of requests; default: the resource's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 253)))]
    pub name: Option<String>,
    /// Other names it answers to, at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 16), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set")))]
    pub aliases: Vec<String>,
    /// `sha256:<hex>` of the single weight file.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = r"^sha256:[a-f0-9]{64}$")))]
    pub digest: Option<String>,
    /// Format of the weights; refused when the source has another.
    #[serde(default)]
    pub format: FormatChoice,
    /// Secret that lets this deployment in at the source, which is a server: its key `token` is a bearer token, or its key `authorization` the whole value of the header `Authorization`; for `s3://` and `gs://`, `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` sign the requests, and `AWS_SESSION_TOKEN`, `AWS_REGION` and `AWS_ENDPOINT_URL` may be beside them. For `oci://` it may be one of type `kubernetes.io/dockerconfigjson`, of which the registry is shown its own login.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<NameRef>,
}

impl ModelSpec {
    /// Claim and path that a source `pvc://CLAIM/PATH` names; `None` for sources of other kinds.
    pub fn volume(uri: &str) -> Option<(&str, &str)> {
        uri.strip_prefix(VOLUME)?.split_once('/')
    }

    /// Path that a source `file:PATH` or `file://PATH` names; `None` for sources of other kinds.
    pub fn path(uri: &str) -> Option<&str> {
        let path = uri.strip_prefix(PATH)?;
        Some(path.strip_prefix("//").unwrap_or(path))
    }

    /// Whether a source is where every machine finds it: neither a path of one, nor on a claim.
    pub fn is_remote(uri: &str) -> bool {
        REMOTE.iter().any(|scheme| uri.starts_with(scheme))
    }
}

/// What sources begin with that every machine finds.
pub(super) const REMOTE: [&str; 6] = ["hf://", "s3://", "gs://", "oci://", "http://", "https://"];

/// What sources on a claim begin with.
pub(super) const VOLUME: &str = "pvc://";

/// What paths of a machine begin with.
pub(super) const PATH: &str = "file:";

/// An object of the same namespace, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NameRef {
    /// Its name.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 253)))]
    pub name: String,
}

/// Where workers keep what they fetch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct CacheSpec {
    /// `EmptyDir`: each worker for itself, for as long as its pod lives. `PVC`: all of them on the claim `pvcName`, which stays. `NodeLocal`: those of a node and a namespace in a folder of the node, which stays; the operator names it (chart value `sources.nodeCache`), the namespace must enforce Pod Security `privileged`, and user 65532 must be able to write there.
    pub policy: CachePolicy,
    /// Name of the claim; it must let every node write that workers run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 253)))]
    pub pvc_name: Option<String>,
    /// Most bytes that a worker keeps (a quantity), with `EmptyDir`; Kubernetes ends a pod that has more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<Bytes>,
}

/// Kind of a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, clippy::upper_case_acronyms, reason = "CacheSpec says it; named as manifests write them")]
pub enum CachePolicy {
    #[default]
    EmptyDir,
    PVC,
    NodeLocal,
}

/// A low-rank adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AdapterSpec {
    /// Lower-case letters, digits and '-', at most 64.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z0-9-]+$")))]
    pub name: String,
    /// A folder of PEFT or a GGUF file: `hf://`, `s3://`, `gs://`, `oci://`, `http(s)://` or `file:`, at most 2048 characters.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 2048)))]
    pub uri: String,
    /// `sha256:<hex>` of its weight file.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = r"^sha256:[a-f0-9]{64}$")))]
    pub digest: Option<String>,
}

/// Format of the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, clippy::upper_case_acronyms, reason = "named after the formats, as manifests write them")]
pub enum FormatChoice {
    #[default]
    Auto,
    Safetensors,
    GGUF,
}

/// How chats become text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ChatSpec {
    /// Replaces the model's own template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateSpec>,
    /// Put before chats without a system message.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 131072)))]
    pub system_prompt: Option<String>,
}

/// A chat template: exactly one of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TemplateSpec {
    /// One of Skein's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub builtin: Option<BuiltinTemplate>,
    /// Jinja source.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 131072)))]
    pub inline: Option<String>,
    /// Jinja source in a `ConfigMap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyRef>,
}

/// Skein's own chat templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "named after the models they come from")]
pub enum BuiltinTemplate {
    Gemma,
    ChatML,
    Llama3,
}

/// A key of a named object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct KeyRef {
    /// The object.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 253)))]
    pub name: String,
    /// The key in its data.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 253)))]
    pub key: String,
}

/// How the model is computed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct EngineSpec {
    /// Type the weights are computed in.
    pub dtype: DTypeChoice,
    /// What computes.
    pub device: DeviceChoice,
    /// Longest sequence; default: the model's context.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 134217728)))]
    pub max_context_tokens: Option<u32>,
    /// Most sequences in a step; default 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 65536)))]
    pub max_batch_sequences: Option<u32>,
    /// Most tokens in a step; default 512.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 65536)))]
    pub max_batch_tokens: Option<u32>,
    /// Type that weights stored as floats are converted to as they are loaded.
    pub quantization: QuantizationChoice,
    /// Faster draws of greedy requests and of those with a `top_k` of at most 40 where few are answered at once: a copy of the vocabulary in
    /// 4 bits says which tokens may be the likeliest, and those alone are multiplied exactly. That the likeliest are among them is known from
    /// trials alone, so answers may differ, rarely, from those without. It takes the copy's memory.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub screening: bool,
    /// The KV cache.
    pub kv_cache: KvCacheSpec,
    /// Tokens that are guessed and verified several at a time. Which tokens come out does not depend on it.
    pub draft: DraftSpec,
}

/// How tokens are guessed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct DraftSpec {
    /// Most tokens of a sequence guessed in a step, from where its last ones stood before; 0, the default, guesses none. It helps where
    /// answers repeat the prompt or themselves (edits, summaries, code), and takes effect without a rollout.
    #[cfg_attr(feature = "schema", schemars(range(max = 16)))]
    pub prompt_lookup: u32,
    /// A smaller model of the same tokenizer that guesses what comes next, in a worker of its own beside each replica. On a
    /// cluster it comes from a server; another one is rolled out like another model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<DraftModelSpec>,
}

/// Where a draft model comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DraftModelSpec {
    /// A folder or file: `hf://`, `s3://`, `gs://`, `oci://`, `http(s)://` or `file:`, at most 2048 characters. It is shown no credentials.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 2048)))]
    pub uri: String,
    /// `sha256:<hex>` of its one weight file.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = r"^sha256:[a-f0-9]{64}$")))]
    pub digest: Option<String>,
}

/// Type that weights are converted to as they are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, non_camel_case_types, reason = "these are the format's own names")]
pub enum QuantizationChoice {
    #[default]
    None,
    Q8_0,
    Q6_K,
    Q5_K,
    Q5_1,
    Q5_0,
    Q4_K,
    Q4_1,
    Q4_0,
    IQ4_NL,
    Q3_K,
    Q2_K,
}

impl QuantizationChoice {
    /// The type.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::None => None,
            Self::Q8_0 => Some(DType::Q8_0),
            Self::Q6_K => Some(DType::Q6_K),
            Self::Q5_K => Some(DType::Q5_K),
            Self::Q5_1 => Some(DType::Q5_1),
            Self::Q5_0 => Some(DType::Q5_0),
            Self::Q4_K => Some(DType::Q4_K),
            Self::Q4_1 => Some(DType::Q4_1),
            Self::Q4_0 => Some(DType::Q4_0),
            Self::IQ4_NL => Some(DType::IQ4_NL),
            Self::Q3_K => Some(DType::Q3_K),
            Self::Q2_K => Some(DType::Q2_K),
        }
    }
}

/// Type the weights are computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "there is one yet: as stored")]
pub enum DTypeChoice {
    #[default]
    Auto,
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, clippy::upper_case_acronyms, reason = "named after the devices, as manifests write them")]
pub enum DeviceChoice {
    #[default]
    Auto,
    CPU,
}

/// The KV cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct KvCacheSpec {
    /// Tokens per block; 16.
    #[cfg_attr(feature = "schema", schemars(range(min = 16, max = 16)))]
    pub block_tokens: u32,
    /// Bytes on each worker (a quantity), or a fraction of its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Reuse blocks of equal prefixes; default true.
    pub prefix_caching: bool,
    /// Type of entries; `Auto` follows the weights: F32, or F16 where they are quantized. Q8 (8 bits and shared scales) halves F16 and changes results slightly.
    pub dtype: KvDTypeChoice,
}

impl Default for KvCacheSpec {
    fn default() -> Self {
        Self { block_tokens: crate::shard::BLOCK_TOKENS as u32, memory: None, prefix_caching: true, dtype: KvDTypeChoice::Auto }
    }
}

/// Type of KV entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "named after the types")]
pub enum KvDTypeChoice {
    #[default]
    Auto,
    F32,
    F16,
    Q8,
}

/// Over how many workers a replica is spread; at most 1024.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ParallelismSpec {
    /// Pipeline stages, 1 to 256; default 1.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 256)))]
    pub pipeline: u32,
    /// Tensor-parallel ranks of each stage, 1 to 64; default 1.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 64)))]
    pub tensor: u32,
    /// Layers of each stage; default: balanced by bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 256)))]
    pub stages: Option<Vec<StageSpec>>,
}

impl Default for ParallelismSpec {
    fn default() -> Self {
        Self { pipeline: 1, tensor: 1, stages: None }
    }
}

/// One stage, given by hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct StageSpec {
    /// Its layers.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 65536)))]
    pub layers: u32,
}

/// The worker processes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct WorkersSpec {
    /// What each worker may use.
    pub resources: ResourcesSpec,
    /// Labels that a node must have for workers to run on it, at most 64; of meaning on a cluster.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "placement::labels"))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes on which workers may run all the same, at most 64; of meaning on a cluster.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = 64)))]
    pub tolerations: Vec<TolerationSpec>,
}

/// What a worker may use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ResourcesSpec {
    /// Upper bounds.
    pub limits: LimitsSpec,
}

/// Upper bounds of a worker's resources.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct LimitsSpec {
    /// Memory of a worker (a quantity of bytes); the plan must fit into it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
}

/// How requests reach the replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RouterSpec {
    /// Routers of its own instead of those that all deployments of the namespace share; of meaning on a cluster. Default false.
    pub dedicated: bool,
    /// How many routers of its own, 1 to 100; default 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 100)))]
    pub replicas: Option<u32>,
    /// How a replica is chosen; default `PrefixAware`.
    pub policy: RoutingPolicy,
    /// Requests that wait.
    pub queue: QueueSpec,
}

impl RouterSpec {
    /// How many routers of its own.
    pub fn count(&self) -> u32 {
        self.replicas.unwrap_or(2)
    }
}

/// Requests that wait for a place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct QueueSpec {
    /// Most of them; default 1000.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1000000)))]
    pub max_requests: u32,
    /// Longest wait; default 60.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 86400)))]
    pub timeout_seconds: u32,
}

impl Default for QueueSpec {
    fn default() -> Self {
        Self { max_requests: 1000, timeout_seconds: 60 }
    }
}

fn one() -> u32 {
    1
}
