//! Ranges and rules of the resource's fields.

use super::{
    placement,
    rollout::RolloutStrategy,
    types::{AdapterSpec, CachePolicy, ModelDeployment, ModelSpec, PATH, REMOTE, VOLUME},
};
use crate::shard::BLOCK_TOKENS;

/// A field and what is wrong with it; the field's position is found by whoever has the document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) path: String,
    pub(super) message: String,
}

impl Problem {
    pub(super) fn new(path: &str, message: String) -> Self {
        Self { path: path.to_owned(), message }
    }
}

/// Longest URI, and longest name of a resource and of a model.
const MAX_URI: usize = 2048;
const MAX_NAME: usize = 45;
const MAX_MODEL_NAME: usize = 253;
/// Most aliases.
const MAX_ALIASES: usize = 16;
/// Most adapters, and the longest name of one.
const MAX_ADAPTERS: usize = 64;
const MAX_ADAPTER_NAME: usize = 64;
/// Most workers of a replica.
const MAX_WORKERS: u32 = 1024;
/// Upper bounds that only keep sizes within reason.
const MAX_CONTEXT: u32 = 1 << 27;
const MAX_BATCH: u32 = 1 << 16;
/// Most tokens drafted in a step.
const MAX_LOOKUP: u32 = 16;

/// Checks every field against its range.
pub(super) fn check(deployment: &ModelDeployment) -> Result<(), Problem> {
    let (metadata, spec) = (&deployment.metadata, &deployment.spec);
    if !is_label(&metadata.name, MAX_NAME) {
        let expected = format!("expected lower-case letters, digits and '-', at most {MAX_NAME}, got {:?}", metadata.name);
        return Err(Problem::new("metadata.name", expected));
    }
    if let Some(namespace) = metadata.namespace.as_ref().filter(|n| !is_label(n, 63)) {
        let expected = format!("expected lower-case letters, digits and '-', at most 63, got {namespace:?}");
        return Err(Problem::new("metadata.namespace", expected));
    }
    model(deployment)?;
    adapters(deployment)?;
    chat(deployment)?;
    let engine = &spec.engine;
    if engine.kv_cache.block_tokens as usize != BLOCK_TOKENS {
        return Err(Problem::new(
            "spec.engine.kvCache.blockTokens",
            format!("expected {BLOCK_TOKENS}, got {}", engine.kv_cache.block_tokens),
        ));
    }
    let parallelism = &spec.parallelism;
    for (path, value, low, high) in [
        ("spec.engine.maxContextTokens", engine.max_context_tokens, 1, MAX_CONTEXT),
        ("spec.engine.maxBatchSequences", engine.max_batch_sequences, 1, MAX_BATCH),
        ("spec.engine.maxBatchTokens", engine.max_batch_tokens, 1, MAX_BATCH),
        ("spec.engine.draft.promptLookup", Some(engine.draft.prompt_lookup), 0, MAX_LOOKUP),
        ("spec.parallelism.pipeline", Some(parallelism.pipeline), 1, 256),
        ("spec.parallelism.tensor", Some(parallelism.tensor), 1, 64),
        ("spec.replicas", Some(spec.replicas), 0, 1000),
        ("spec.router.replicas", spec.router.replicas, 1, 100),
        ("spec.router.queue.maxRequests", Some(spec.router.queue.max_requests), 1, 1_000_000),
        ("spec.router.queue.timeoutSeconds", Some(spec.router.queue.timeout_seconds), 1, 86_400),
        ("spec.rollout.progressDeadlineSeconds", Some(spec.rollout.progress_deadline_seconds), 1, 86_400),
        ("spec.rollout.revisionHistoryLimit", Some(spec.rollout.revision_history_limit), 0, 100),
        ("spec.recovery.drainSeconds", Some(spec.recovery.drain_seconds), 0, 86_400),
    ] {
        if let Some(value) = value.filter(|v| !(low..=high).contains(v)) {
            return Err(Problem::new(path, format!("expected {low} to {high}, got {value}")));
        }
    }
    if let Some(draft) = &engine.draft.model {
        check_uri("spec.engine.draft.model.uri", &draft.uri, false)?;
        check_digest("spec.engine.draft.model.digest", draft.digest.as_deref())?;
    }
    cache(deployment)?;
    if spec.router.replicas.is_some() && !spec.router.dedicated {
        return Err(Problem::new("spec.router.replicas", "expected dedicated: true beside it, got false".to_owned()));
    }
    spec.autoscaling.check()?;
    placement::check(&spec.workers)?;
    rollout(deployment)?;
    let workers = parallelism.pipeline * parallelism.tensor;
    if workers > MAX_WORKERS {
        let message = format!("expected pipeline × tensor of at most {MAX_WORKERS}, got {workers}");
        return Err(Problem::new("spec.parallelism", message));
    }
    if let Some(stages) = &parallelism.stages {
        if stages.len() != parallelism.pipeline as usize {
            let message = format!("expected one entry for each of {} stages, got {}", parallelism.pipeline, stages.len());
            return Err(Problem::new("spec.parallelism.stages", message));
        }
        if let Some(i) = stages.iter().position(|s| s.layers == 0) {
            return Err(Problem::new(&format!("spec.parallelism.stages[{i}].layers"), "expected at least 1, got 0".to_owned()));
        }
    }
    Ok(())
}

fn model(deployment: &ModelDeployment) -> Result<(), Problem> {
    let model = &deployment.spec.model;
    check_uri("spec.model.uri", &model.uri, true)?;
    if model.uri.starts_with(VOLUME) {
        volume(&model.uri)?;
    }
    if model.credentials_secret_ref.is_some()
        && let Some(scheme) = [VOLUME, PATH].into_iter().find(|scheme| model.uri.starts_with(scheme))
    {
        let message = format!("expected none beside a {scheme} uri, which is no server's");
        return Err(Problem::new("spec.model.credentialsSecretRef", message));
    }
    let is_name = |n: &str| !n.is_empty() && n.len() <= MAX_MODEL_NAME && !n.chars().any(char::is_control);
    let expected = |n: &str| format!("expected 1 to {MAX_MODEL_NAME} characters, got {n:?}");
    if let Some(name) = model.name.as_ref().filter(|n| !is_name(n)) {
        return Err(Problem::new("spec.model.name", expected(name)));
    }
    if model.aliases.len() > MAX_ALIASES {
        return Err(Problem::new("spec.model.aliases", format!("expected at most {MAX_ALIASES}, got {}", model.aliases.len())));
    }
    let own = model.name.as_ref().unwrap_or(&deployment.metadata.name);
    for (i, alias) in model.aliases.iter().enumerate() {
        let path = format!("spec.model.aliases[{i}]");
        if !is_name(alias) {
            return Err(Problem::new(&path, expected(alias)));
        }
        if alias == own || model.aliases[..i].contains(alias) {
            return Err(Problem::new(&path, format!("expected a name that is not taken, got {alias} again")));
        }
    }
    if let Some(secret) = model.credentials_secret_ref.as_ref().filter(|secret| !self::is_name(&secret.name)) {
        let expected = format!("expected lower-case letters, digits, '-' and '.', at most 253, got {:?}", secret.name);
        return Err(Problem::new("spec.model.credentialsSecretRef.name", expected));
    }
    check_digest("spec.model.digest", model.digest.as_deref())
}

/// A claim, and a path that stays on it.
fn volume(uri: &str) -> Result<(), Problem> {
    let stays = |path: &str| path.strip_suffix('/').unwrap_or(path).split('/').all(|part| !matches!(part, "" | "." | ".."));
    match ModelSpec::volume(uri) {
        Some((claim, path)) if is_name(claim) && stays(path) && !path.contains(char::is_control) => Ok(()),
        _ => Err(Problem::new("spec.model.uri", format!("expected pvc://CLAIM/PATH without empty parts, . and .., got {uri:?}"))),
    }
}

/// A source's scheme and length; `volumes`: it may be on a claim.
fn check_uri(path: &str, uri: &str, volumes: bool) -> Result<(), Problem> {
    if uri.len() > MAX_URI {
        return Err(Problem::new(path, format!("expected at most {MAX_URI} characters, got {}", uri.len())));
    }
    if uri.starts_with(VOLUME) {
        let message = "a model alone may be on a claim; expected hf://, s3://, gs://, oci://, http://, https:// or file:".to_owned();
        return if volumes { Ok(()) } else { Err(Problem::new(path, message)) };
    }
    let volume = if volumes { ", pvc://" } else { "" };
    // Models alone may be on a claim.
    if !REMOTE.iter().chain(&[PATH]).any(|s| uri.starts_with(s) && uri.len() > s.len()) {
        return Err(Problem::new(path, format!("expected hf://, s3://, gs://, oci://, http://, https://{volume} or file:, got {uri:?}")));
    }
    Ok(())
}

fn check_digest(path: &str, digest: Option<&str>) -> Result<(), Problem> {
    let is_digest =
        |d: &str| d.strip_prefix("sha256:").is_some_and(|h| h.len() == 64 && h.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
    match digest.filter(|d| !is_digest(d)) {
        Some(digest) => Err(Problem::new(path, format!("expected sha256: and 64 hexadecimal digits, got {digest:?}"))),
        None => Ok(()),
    }
}

/// A name that an adapter cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct AdapterNameError {
    /// Which adapter, from 0.
    pub index: usize,
    message: String,
}

/// Checks the names of adapters of a model that requests call `model`.
///
/// # Errors
/// The first name that is none, is the model's, or is taken.
pub fn check_adapter_names(adapters: &[AdapterSpec], model: &str) -> Result<(), AdapterNameError> {
    for (index, AdapterSpec { name, .. }) in adapters.iter().enumerate() {
        let wrong = |message: String| Err(AdapterNameError { index, message });
        let is_name = name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if !is_name || !(1..=MAX_ADAPTER_NAME).contains(&name.len()) {
            return wrong(format!("expected 1 to {MAX_ADAPTER_NAME} lower-case letters, digits and '-', got {name:?}"));
        }
        if name == model {
            return wrong(format!("expected another name than the model's, got {name}"));
        }
        if adapters[..index].iter().any(|other| other.name == *name) {
            return wrong(format!("expected a name that is not taken, got {name} again"));
        }
    }
    Ok(())
}

fn adapters(deployment: &ModelDeployment) -> Result<(), Problem> {
    let adapters = &deployment.spec.adapters;
    if adapters.len() > MAX_ADAPTERS {
        return Err(Problem::new("spec.adapters", format!("expected at most {MAX_ADAPTERS}, got {}", adapters.len())));
    }
    let own = deployment.spec.model.name.as_ref().unwrap_or(&deployment.metadata.name);
    check_adapter_names(adapters, own).map_err(|wrong| Problem::new(&format!("spec.adapters[{}].name", wrong.index), wrong.message))?;
    for (i, adapter) in adapters.iter().enumerate() {
        let path = |field: &str| format!("spec.adapters[{i}].{field}");
        check_uri(&path("uri"), &adapter.uri, false)?;
        check_digest(&path("digest"), adapter.digest.as_deref())?;
    }
    Ok(())
}

/// A claim has a name, and a limit of its own; so has a folder of a node.
fn cache(deployment: &ModelDeployment) -> Result<(), Problem> {
    let cache = &deployment.spec.cache;
    match (cache.policy, &cache.pvc_name) {
        (CachePolicy::PVC, None) => Err(Problem::new("spec.cache", "expected pvcName beside policy PVC, got none".to_owned())),
        (CachePolicy::EmptyDir | CachePolicy::NodeLocal, Some(_)) => {
            Err(Problem::new("spec.cache.pvcName", format!("expected policy PVC beside it, got {:?}", cache.policy)))
        }
        (CachePolicy::PVC, Some(_)) if cache.size_limit.is_some() => {
            Err(Problem::new("spec.cache.sizeLimit", "expected policy EmptyDir beside it, got PVC, whose claim has a size".to_owned()))
        }
        (CachePolicy::NodeLocal, None) if cache.size_limit.is_some() => {
            let message = "expected policy EmptyDir beside it, got NodeLocal, which all deployments of a namespace share".to_owned();
            Err(Problem::new("spec.cache.sizeLimit", message))
        }
        (_, Some(name)) if !is_name(name) => {
            Err(Problem::new("spec.cache.pvcName", format!("expected lower-case letters, digits, '-' and '.', at most 253, got {name:?}")))
        }
        _ => Ok(()),
    }
}

/// Bounds are those of `RollingUpdate`, and let something move.
fn rollout(deployment: &ModelDeployment) -> Result<(), Problem> {
    let rollout = &deployment.spec.rollout;
    let bounds = [("maxSurge", rollout.max_surge), ("maxUnavailable", rollout.max_unavailable)];
    if rollout.strategy != RolloutStrategy::RollingUpdate
        && let Some((field, _)) = bounds.iter().find(|(_, bound)| bound.is_some())
    {
        let message = format!("expected strategy RollingUpdate beside it, got {:?}", rollout.strategy);
        return Err(Problem::new(&format!("spec.rollout.{field}"), message));
    }
    let none = |bound: Option<super::Share>, default: bool| bound.map_or(default, super::Share::is_zero);
    if none(rollout.max_surge, false) && none(rollout.max_unavailable, true) {
        return Err(Problem::new("spec.rollout", "expected maxSurge or maxUnavailable above 0, got both 0".to_owned()));
    }
    Ok(())
}

fn chat(deployment: &ModelDeployment) -> Result<(), Problem> {
    let Some(template) = deployment.spec.chat.as_ref().and_then(|c| c.template.as_ref()) else { return Ok(()) };
    let given = [template.builtin.is_some(), template.inline.is_some(), template.config_map_key_ref.is_some()];
    match given.iter().filter(|g| **g).count() {
        1 => Ok(()),
        n => Err(Problem::new("spec.chat.template", format!("expected exactly one of builtin, inline and configMapKeyRef, got {n}"))),
    }
}

/// Whether `text` is a name that objects can have.
fn is_name(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(|label| is_label(label, 253))
}

/// Whether `text` is a DNS label of at most `limit` characters.
fn is_label(text: &str, limit: usize) -> bool {
    let inner = text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    !text.is_empty() && text.len() <= limit && inner && !text.starts_with('-') && !text.ends_with('-')
}
