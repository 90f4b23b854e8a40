//! The `ModelDeployment` resource (skein.dev/v1alpha1) and the YAML files that hold it.
//!
//! No field is accepted and ignored: what is not understood is refused with file, line, column, the field's path, and what was expected.

mod autoscaling;
mod placement;
mod quantity;
mod rollout;
#[cfg(test)]
mod tests;
mod tree;
mod types;
mod validate;

pub use autoscaling::{Amount, AutoscalingMode, AutoscalingSpec, BehaviorSpec, Builtin, ColdStartSpec, TargetKind, TargetSpec};
pub use placement::{TaintEffect, TolerationOperator, TolerationSpec};
pub use quantity::{Bytes, Memory, parse_quantity};
pub use rollout::{RecoverySpec, RolloutSpec, RolloutStrategy, SchedulingSpec, Share};
pub use types::{
    AdapterSpec, BuiltinTemplate, CachePolicy, CacheSpec, ChatSpec, DTypeChoice, DeploymentSpec, DeviceChoice, DraftModelSpec, DraftSpec,
    EngineSpec, FormatChoice, KeyRef, KvCacheSpec, KvDTypeChoice, LimitsSpec, Metadata, ModelDeployment, ModelSpec, NameRef,
    ParallelismSpec, QuantizationChoice, QueueSpec, ResourcesSpec, RouterSpec, StageSpec, TemplateSpec, WorkersSpec,
};
pub use validate::{AdapterNameError, check_adapter_names};

use std::{collections::BTreeMap, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;

use crate::{
    adapter::AdapterHeader,
    fleet::{ChatTemplate, ServingSettings, Stopped},
    model::{Format, ModelHeader},
    planner::{self, Capacity, KvMemory, PlanError},
    shard::{ExecutionPlan, KvDType},
};

/// The resource's group and version.
pub const API_VERSION: &str = "skein.dev/v1alpha1";
/// The resource's kind.
pub const KIND: &str = "ModelDeployment";

/// A manifest that is refused: where, which field, why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}:{column}: {}{}{message}", path, if path.is_empty() { "" } else { ": " })]
pub struct ManifestError {
    /// File as it was named.
    pub file: String,
    /// Line from 1.
    pub line: u64,
    /// Column from 1.
    pub column: u64,
    /// The field: `spec.engine.kvCache.memory`; empty when the file is not YAML.
    pub path: String,
    /// What is wrong and what was expected.
    pub message: String,
}

impl ManifestError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        "InvalidSpec"
    }
}

/// A checked deployment, with what its file's other documents give it.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// The resource.
    pub deployment: ModelDeployment,
    /// The chat template it names, read from its `ConfigMap` where it is a reference.
    pub chat_template: Option<ChatTemplate>,
    /// The data of the Secret with its credentials, where that is in the file.
    pub credentials: Option<SecretData>,
}

/// The data of a `Secret`, which is not printed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretData(pub BTreeMap<String, Vec<u8>>);

impl std::fmt::Debug for SecretData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// A `Secret` document.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Secret {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    #[serde(default, rename = "type")]
    _type: Option<String>,
    #[serde(default, rename = "immutable")]
    _immutable: bool,
    metadata: Metadata,
    #[serde(default)]
    data: BTreeMap<String, String>,
    #[serde(default)]
    string_data: BTreeMap<String, String>,
}

/// A `ConfigMap` document: its data is what matters here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ConfigMap {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: Metadata,
    #[serde(default)]
    data: BTreeMap<String, String>,
    #[serde(default, rename = "binaryData")]
    _binary_data: BTreeMap<String, String>,
    #[serde(default, rename = "immutable")]
    _immutable: bool,
}

impl Manifest {
    /// Parses a YAML file with one or more `ModelDeployment` documents; `ConfigMap` documents feed the references in it, `Secret` documents
    /// may stand beside them. `file` is its name for messages.
    ///
    /// # Errors
    /// Names file, line, column and field of the first thing that is wrong.
    pub fn parse_all(file: &str, yaml: &str) -> Result<Vec<Self>, ManifestError> {
        let documents = tree::parse(yaml).map_err(|e| e.in_file(file))?;
        let mut maps: Vec<(ConfigMap, &tree::Item)> = Vec::new();
        let (mut deployments, mut secrets) = (Vec::new(), Vec::new());
        for document in &documents {
            let version = document.text_of("apiVersion").map_err(|e| e.in_file(file))?;
            let kind = document.text_of("kind").map_err(|e| e.in_file(file))?;
            match (version, kind) {
                (API_VERSION, KIND) => deployments.push(document),
                ("v1", "ConfigMap") => maps.push((document.read().map_err(|e| e.in_file(file))?, document)),
                ("v1", "Secret") => secrets.push(document),
                (_, KIND) => return Err(document.fail("apiVersion", format!("expected {API_VERSION}, got {version}")).in_file(file)),
                _ => {
                    let message = format!("expected {KIND} ({API_VERSION}), ConfigMap or Secret (v1), got {kind} ({version})");
                    return Err(document.fail("kind", message).in_file(file));
                }
            }
        }
        if deployments.is_empty() {
            let message = format!("expected a document of kind {KIND}, got {} others", documents.len());
            return Err(ManifestError { file: file.to_owned(), line: 1, column: 1, path: String::new(), message });
        }
        let same = |a: &ConfigMap, b: &ConfigMap| a.metadata.name == b.metadata.name && a.metadata.namespace == b.metadata.namespace;
        if let Some(i) = (1..maps.len()).find(|&i| maps[..i].iter().any(|m| same(&m.0, &maps[i].0))) {
            let (map, document) = &maps[i];
            let message = format!("ConfigMap {} stands in the file twice", map.metadata.name);
            return Err(document.fail("metadata.name", message).in_file(file));
        }
        let maps: Vec<ConfigMap> = maps.into_iter().map(|m| m.0).collect();
        let one = |document: &tree::Item| {
            let deployment: ModelDeployment = document.read()?;
            validate::check(&deployment).map_err(|p| document.fail(&p.path, p.message))?;
            let chat_template = chat_template(&deployment, &maps).map_err(|p| document.fail(&p.path, p.message))?;
            let credentials = credentials(&deployment, &secrets)?;
            Ok(Self { deployment, chat_template, credentials })
        };
        let all: Vec<Self> = deployments.iter().map(|d| one(d)).collect::<Result<_, tree::Problem>>().map_err(|e| e.in_file(file))?;
        for (i, (manifest, document)) in all.iter().zip(&deployments).enumerate() {
            if let Some((path, message)) = all[..i].iter().find_map(|earlier| manifest.clash(earlier)) {
                return Err(document.fail(path, message).in_file(file));
            }
        }
        Ok(all)
    }

    /// The field and the words for a name that `earlier`, of the same namespace, has too.
    fn clash(&self, earlier: &Self) -> Option<(&'static str, String)> {
        if self.deployment.metadata.namespace != earlier.deployment.metadata.namespace {
            return None;
        }
        if self.name() == earlier.name() {
            return Some(("metadata.name", format!("{KIND} {} stands in the file twice", self.name())));
        }
        let taken = |name: &str| name == earlier.model_name() || earlier.spec().model.aliases.iter().any(|alias| alias == name);
        let words = |name: &str| format!("the model name {name} is taken by {} in the same file", earlier.name());
        if taken(self.model_name()) {
            return Some(("spec.model.name", words(self.model_name())));
        }
        let alias = self.spec().model.aliases.iter().find(|alias| taken(alias));
        alias.map(|alias| ("spec.model.aliases", words(alias)))
    }

    /// Parses a YAML file that holds one `ModelDeployment`.
    ///
    /// # Errors
    /// As [`Manifest::parse_all`], and when there are several.
    pub fn parse(file: &str, yaml: &str) -> Result<Self, ManifestError> {
        let mut all = Self::parse_all(file, yaml)?;
        match (all.pop(), all.len()) {
            (Some(one), 0) => Ok(one),
            (_, more) => {
                let message = format!("expected one {KIND}, got {}", more + 1);
                Err(ManifestError { file: file.to_owned(), line: 1, column: 1, path: String::new(), message })
            }
        }
    }

    /// Name of the resource.
    pub fn name(&self) -> &str {
        &self.deployment.metadata.name
    }

    /// Name in the `model` field of requests.
    pub fn model_name(&self) -> &str {
        self.deployment.spec.model.name.as_deref().unwrap_or(&self.deployment.metadata.name)
    }

    /// The desired state.
    pub fn spec(&self) -> &DeploymentSpec {
        &self.deployment.spec
    }

    /// What the plan depends on.
    pub fn planner_spec(&self) -> planner::Spec {
        let DeploymentSpec { engine, parallelism, workers, .. } = &self.deployment.spec;
        let size = |n: u32| n as usize;
        planner::Spec {
            pipeline: size(parallelism.pipeline),
            tensor: size(parallelism.tensor),
            // Draws from all logits, which clients ask for by default, would send half a megabyte a token between stages.
            vocabulary: planner::Vocabulary::default(),
            screening: engine.screening,
            stage_layers: parallelism.stages.as_ref().map(|s| s.iter().map(|s| size(s.layers)).collect()),
            max_context: engine.max_context_tokens.map(size),
            max_batch_sequences: engine.max_batch_sequences.map_or(planner::DEFAULT_BATCH_SEQUENCES, size),
            max_batch_tokens: engine.max_batch_tokens.map_or(planner::DEFAULT_BATCH_TOKENS, size),
            kv_memory: match engine.kv_cache.memory {
                None => KvMemory::Auto,
                Some(Memory::Bytes(bytes)) => KvMemory::Bytes(bytes),
                Some(Memory::Fraction(fraction)) => KvMemory::Fraction(fraction),
            },
            kv_dtype: match engine.kv_cache.dtype {
                KvDTypeChoice::Auto => None,
                KvDTypeChoice::F32 => Some(KvDType::F32),
                KvDTypeChoice::F16 => Some(KvDType::F16),
                KvDTypeChoice::Q8 => Some(KvDType::Q8),
            },
            worker_memory: workers.resources.limits.memory.map(|m| m.0),
            adapters: Vec::new(),
        }
    }

    /// The model as it is held: weights converted as `spec.engine.quantization` says.
    pub fn loaded(&self, header: &ModelHeader) -> ModelHeader {
        self.deployment.spec.engine.quantization.dtype().map_or_else(|| header.clone(), |to| header.loaded_as(to))
    }

    /// Checks that the model's files are of the format the manifest names.
    ///
    /// # Errors
    /// When they are not.
    pub fn check_format(&self, header: &ModelHeader) -> Result<(), PlanError> {
        let wanted = match self.deployment.spec.model.format {
            FormatChoice::Auto => header.format,
            FormatChoice::Safetensors => Format::Safetensors,
            FormatChoice::GGUF => Format::GGUF,
        };
        if wanted != header.format {
            return Err(PlanError::Format { got: header.format, expected: wanted });
        }
        Ok(())
    }

    /// Plans one replica.
    ///
    /// # Errors
    /// When the manifest contradicts the model.
    pub fn plan(&self, header: &ModelHeader, capacity: &Capacity) -> Result<ExecutionPlan, PlanError> {
        self.plan_with(header, capacity, Vec::new())
    }

    /// Plans one replica that has room for adapters.
    ///
    /// # Errors
    /// When the manifest contradicts the model.
    pub fn plan_with(
        &self,
        header: &ModelHeader,
        capacity: &Capacity,
        adapters: Vec<Arc<AdapterHeader>>,
    ) -> Result<ExecutionPlan, PlanError> {
        self.check_format(header)?;
        planner::plan(&planner::Spec { adapters, ..self.planner_spec() }, header, capacity)
    }

    /// Settings of its routers.
    pub fn serving(&self) -> ServingSettings {
        let DeploymentSpec { chat, engine, router, autoscaling, suspend, replicas, .. } = &self.deployment.spec;
        let stopped = match autoscaling.mode {
            _ if *suspend => Some(Stopped::Suspended),
            AutoscalingMode::Disabled if *replicas == 0 => Some(Stopped::ScaledToZero),
            _ => None,
        };
        ServingSettings {
            chat_template: self.chat_template.clone(),
            system_prompt: chat.as_ref().and_then(|c| c.system_prompt.clone()),
            policy: router.policy,
            queue_requests: router.queue.max_requests as usize,
            queue_seconds: router.queue.timeout_seconds.into(),
            prompt_lookup: engine.draft.prompt_lookup as usize,
            hold: autoscaling.hold().filter(|_| stopped.is_none()),
            stopped,
        }
    }
}

/// The data of the Secret that a deployment names, where it is in the file.
fn credentials(deployment: &ModelDeployment, secrets: &[&tree::Item]) -> Result<Option<SecretData>, tree::Problem> {
    let Some(wanted) = &deployment.spec.model.credentials_secret_ref else { return Ok(None) };
    let own = &deployment.metadata.namespace;
    for document in secrets {
        let secret: Secret = document.read()?;
        let namespace = &secret.metadata.namespace;
        if secret.metadata.name != wanted.name || !(namespace == own || namespace.is_none() || own.is_none()) {
            continue;
        }
        let mut data = BTreeMap::new();
        for (key, text) in &secret.data {
            // What was written is not said again: it is secret.
            let decoded = BASE64_STANDARD.decode(text.trim()).map_err(|_| document.fail("data", format!("{key} is not base64")))?;
            data.insert(key.clone(), decoded);
        }
        data.extend(secret.string_data.into_iter().map(|(key, text)| (key, text.into_bytes())));
        return Ok(Some(SecretData(data)));
    }
    Ok(None)
}

/// The chat template a deployment names.
fn chat_template(deployment: &ModelDeployment, maps: &[ConfigMap]) -> Result<Option<ChatTemplate>, validate::Problem> {
    let Some(template) = deployment.spec.chat.as_ref().and_then(|c| c.template.as_ref()) else { return Ok(None) };
    if let Some(builtin) = template.builtin {
        return Ok(Some(match builtin {
            BuiltinTemplate::Gemma => ChatTemplate::Gemma,
            BuiltinTemplate::ChatML => ChatTemplate::ChatML,
            BuiltinTemplate::Llama3 => ChatTemplate::Llama3,
        }));
    }
    if let Some(KeyRef { name, key }) = &template.config_map_key_ref {
        let own = &deployment.metadata.namespace;
        let map = maps
            .iter()
            .find(|m| m.metadata.name == *name && (m.metadata.namespace == *own || m.metadata.namespace.is_none() || own.is_none()));
        let path = "spec.chat.template.configMapKeyRef";
        let map = map.ok_or_else(|| validate::Problem::new(path, format!("ConfigMap {name} is not in the file")))?;
        let keys = || map.data.keys().cloned().collect::<Vec<_>>().join(", ");
        let text = map
            .data
            .get(key)
            .ok_or_else(|| validate::Problem::new(path, format!("ConfigMap {name} has no key {key}, it has {}", keys())))?;
        return Ok(Some(ChatTemplate::Inline(text.clone())));
    }
    Ok(template.inline.clone().map(ChatTemplate::Inline))
}
