//! From a manifest, or a model alone, to deployments that this machine can run.

use std::{fs, io, num::NonZeroUsize, path::Path, sync::Arc};

use anyhow::Context;
use plan::{
    adapter::AdapterHeader,
    fleet::{RoutingPolicy, ServingSettings},
    manifest::{AdapterSpec, AutoscalingMode, DraftModelSpec, Manifest, ModelSpec, check_adapter_names},
    planner,
    shard::ExecutionPlan,
};

use source::Credentials;

pub(crate) use super::draft::Draft;
use super::{draft::Opened, loaded, memory};
use crate::{
    args::{Global, Placement, Target},
    exit::{BadInput, Outcome, bad_input},
    model::{Adapter, Model},
};

/// Most requests waiting, where no manifest says.
const QUEUE_REQUESTS: usize = 1000;
/// Longest wait in seconds, where no manifest says.
const QUEUE_SECONDS: u64 = 60;
/// Context of a model given without a manifest, unless it has less.
const CONTEXT: usize = 8192;

/// A deployment with its model opened and its plan made.
#[derive(Debug)]
pub(crate) struct Planned {
    /// Name of the deployment.
    pub(crate) name: String,
    /// Name in requests.
    pub(crate) served: String,
    pub(crate) aliases: Vec<String>,
    pub(crate) model: Model,
    pub(crate) adapters: Vec<Adapter>,
    pub(crate) plan: ExecutionPlan,
    /// What guesses for it.
    pub(crate) draft: Option<Draft>,
    /// Copies of the model.
    pub(crate) replicas: usize,
    pub(crate) prefix_caching: bool,
    pub(crate) serving: ServingSettings,
    /// Digests and settings that decide its bits.
    pub(crate) numerics: String,
}

impl Planned {
    /// Drafts as the command line says, where it says anything.
    pub(crate) fn look_up(&mut self, most: Option<u32>) {
        self.serving.prompt_lookup = most.map_or(self.serving.prompt_lookup, |most| most as usize);
    }
}

/// Opens and plans what `target` names; `adapters` are those of a model that no manifest describes, `draft` is the source of a draft model, which
/// wins over a manifest's. A plan that does not fit is not an error yet.
///
/// # Errors
/// Bad input when a file, a manifest or a model is not usable, or no plan exists.
pub(crate) async fn plans(
    global: &Global,
    target: &Target,
    adapters: &[AdapterSpec],
    draft: Option<&str>,
    placement: &Placement,
    context: Option<usize>,
) -> Outcome<Vec<Planned>> {
    let draft = draft.map(|uri| DraftModelSpec { uri: uri.to_owned(), digest: None });
    match (&target.model, &target.file) {
        (Some(model), None) => Ok(vec![model_alone(global, model, (adapters, draft.as_ref()), placement, context).await?]),
        (None, Some(file)) => manifests(global, file, draft.as_ref(), placement, context).await,
        _ => Err(bad_input!("expected either a MODEL or a manifest with -f")),
    }
}

/// Plans every deployment of a manifest; the command line's placement wins over its.
async fn manifests(
    global: &Global,
    file: &Path,
    draft: Option<&DraftModelSpec>,
    placement: &Placement,
    context: Option<usize>,
) -> Outcome<Vec<Planned>> {
    let parsed = read_manifests(file)?;
    for manifest in &parsed {
        let mode = manifest.spec().autoscaling.mode;
        if mode != AutoscalingMode::Disabled {
            return Err(bad_input!(
                "{}: deployment {}: spec.autoscaling.mode: {mode:?} needs a cluster, expected Disabled here",
                file.display(),
                manifest.name()
            ));
        }
    }
    let size = |manifest: &Manifest| -> Outcome<usize> {
        let spec = overridden(manifest.planner_spec(), placement, context)?;
        Ok(manifest.spec().replicas as usize * spec.pipeline * spec.tensor)
    };
    let workers = parsed.iter().map(size).sum::<Outcome<usize>>()?;
    let (mut all, mut taken) = (Vec::with_capacity(parsed.len()), 0);
    for manifest in parsed {
        let ModelSpec { uri, digest, .. } = &manifest.spec().model;
        let model = Model::pinned(global, uri, digest.as_deref(), credentials(global, file, &manifest)?).await?;
        let model = model.loaded_as(placement.load_in().or(manifest.spec().engine.quantization.dtype()));
        manifest.check_format(&model.header).bad_input()?;
        let adapters = opened(global, &model, &manifest.spec().adapters).await?;
        let mut spec = overridden(manifest.planner_spec(), placement, context)?;
        spec.adapters = headers(&adapters);
        let replicas = manifest.spec().replicas as usize;
        let draft = guessing(global, draft.or(manifest.spec().engine.draft.model.as_ref()), (&model, &spec), replicas).await?;
        taken += draft.as_ref().map_or(0, Opened::bytes) * replicas as u64;
        all.push((manifest, model, adapters, spec, draft));
    }
    let mut planned = Vec::with_capacity(all.len());
    for (manifest, model, adapters, spec, draft) in all {
        let plan = planner::plan(&spec, &model.header, &memory::of_each(workers, taken))
            .with_context(|| format!("deployment {} cannot be planned", manifest.name()))
            .bad_input()?;
        planned.push(Planned {
            name: manifest.name().to_owned(),
            served: manifest.model_name().to_owned(),
            aliases: manifest.spec().model.aliases.clone(),
            numerics: planner::numerics(&model.header, model.digest.as_deref().unwrap_or(&model.uri), &plan),
            model,
            adapters,
            draft: draft.map(|draft| draft.beside(&plan)).transpose()?,
            plan,
            replicas: manifest.spec().replicas as usize,
            prefix_caching: manifest.spec().engine.kv_cache.prefix_caching,
            serving: manifest.serving(),
        });
    }
    Ok(planned)
}

/// The draft model of each replica of a model, if it is to have one.
async fn guessing(
    global: &Global,
    draft: Option<&DraftModelSpec>,
    (model, spec): (&Model, &planner::Spec),
    replicas: usize,
) -> Outcome<Option<Opened>> {
    let Some(draft) = draft else { return Ok(None) };
    let context = spec.max_context.unwrap_or(model.header.config.context);
    Opened::open(global, draft, model, context, replicas).await.map(Some)
}

/// The adapters of a model.
async fn opened(global: &Global, model: &Model, specs: &[AdapterSpec]) -> Outcome<Vec<Adapter>> {
    let mut adapters = Vec::with_capacity(specs.len());
    for spec in specs {
        adapters.push(model.adapter(global, spec).await?);
    }
    Ok(adapters)
}

fn headers(adapters: &[Adapter]) -> Vec<Arc<AdapterHeader>> {
    adapters.iter().map(|adapter| adapter.header.clone()).collect()
}

/// What the manifest's source is shown: by the Secret that it names, which stands in the same file, or, a hub, by the token in the environment.
fn credentials(global: &Global, file: &Path, manifest: &Manifest) -> Outcome<Option<Credentials>> {
    let Some(secret) = &manifest.spec().model.credentials_secret_ref else { return Ok(None) };
    let place = || format!("{}: deployment {}: spec.model.credentialsSecretRef", file.display(), manifest.name());
    match &manifest.credentials {
        Some(data) => {
            let shown = Credentials::from_data(&data.0, &manifest.spec().model.uri);
            shown.with_context(|| format!("{}: Secret {}", place(), secret.name)).bad_input().map(Some)
        }
        None if global.cache.hf_token.is_some() && manifest.spec().model.uri.starts_with("hf://") => Ok(None),
        None => Err(bad_input!(
            "{}: Secret {} is not in the file; expected it there, or for hf:// HF_TOKEN in the environment",
            place(),
            secret.name
        )),
    }
}

/// The deployments of a manifest; `-` is standard input.
fn read_manifests(file: &Path) -> Outcome<Vec<Manifest>> {
    let text = if file == Path::new("-") {
        io::read_to_string(io::stdin()).context("failed to read the manifest from standard input").bad_input()?
    } else {
        fs::read_to_string(file).with_context(|| format!("failed to read manifest {}", file.display())).bad_input()?
    };
    Manifest::parse_all(&file.display().to_string(), &text).bad_input()
}

/// A manifest's spec with what the command line says instead.
fn overridden(mut spec: planner::Spec, placement: &Placement, context: Option<usize>) -> Outcome<planner::Spec> {
    if let Some(pipeline) = placement.pp {
        spec.pipeline = pipeline.get();
        spec.stage_layers = None;
    }
    spec.tensor = placement.tp.map_or(spec.tensor, NonZeroUsize::get);
    spec.max_batch_tokens = placement.chunk.map_or(spec.max_batch_tokens, NonZeroUsize::get);
    spec.kv_dtype = placement.kv.map(loaded::kv_dtype).or(spec.kv_dtype);
    spec.vocabulary = placement.vocabulary.planned();
    spec.screening |= placement.screening;
    spec.max_context = context.or(spec.max_context);
    Ok(spec)
}

/// Plans a model by the command line alone.
async fn model_alone(
    global: &Global,
    uri: &str,
    (adapters, draft): (&[AdapterSpec], Option<&DraftModelSpec>),
    placement: &Placement,
    context: Option<usize>,
) -> Outcome<Planned> {
    check_adapter_names(adapters, &short_name(uri)).context("--adapter").bad_input()?;
    let model = Model::open(global, uri).await?.loaded_as(placement.load_in());
    let adapters = opened(global, &model, adapters).await?;
    let context = context.unwrap_or(model.header.config.context.min(CONTEXT));
    let mut spec = overridden(planner::Spec::default(), placement, Some(context))?;
    spec.adapters = headers(&adapters);
    let draft = guessing(global, draft, (&model, &spec), 1).await?;
    let capacity = memory::of_each(spec.pipeline * spec.tensor, draft.as_ref().map_or(0, Opened::bytes));
    let plan = planner::plan(&spec, &model.header, &capacity).bad_input()?;
    let draft = draft.map(|draft| draft.beside(&plan)).transpose()?;
    Ok(Planned { adapters, draft, ..alone(model, plan) })
}

/// One replica of a model that no manifest describes.
pub(crate) fn alone(model: Model, plan: ExecutionPlan) -> Planned {
    let name = short_name(&model.name);
    Planned {
        served: name.clone(),
        name,
        aliases: Vec::new(),
        numerics: planner::numerics(&model.header, model.digest.as_deref().unwrap_or(&model.uri), &plan),
        model,
        adapters: Vec::new(),
        plan,
        draft: None,
        replicas: 1,
        prefix_caching: true,
        serving: serving(),
    }
}

/// Settings of the API where no manifest says.
pub(crate) fn serving() -> ServingSettings {
    ServingSettings {
        chat_template: None,
        system_prompt: None,
        policy: RoutingPolicy::default(),
        queue_requests: QUEUE_REQUESTS,
        queue_seconds: QUEUE_SECONDS,
        prompt_lookup: 0,
        hold: None,
        stopped: None,
    }
}

/// The last part of a path or source, without revision and file ending: what requests call the model.
fn short_name(uri: &str) -> String {
    let path = uri.split(['?', '#']).next().unwrap_or(uri).trim_end_matches('/');
    let last = path.rsplit('/').next().unwrap_or(path).trim_start_matches("file:");
    let stem = [".gguf", ".safetensors"].iter().find_map(|ending| last.strip_suffix(ending)).unwrap_or(last);
    let stem = stem.split('@').next().unwrap_or(stem);
    if stem.is_empty() || stem.chars().all(|c| c == '.') { "model".into() } else { stem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::short_name;

    #[test]
    fn a_model_is_called_by_the_last_part_of_its_source() {
        for (uri, name) in [
            ("/a/b/gemma3.gguf", "gemma3"),
            ("models/llama/", "llama"),
            ("hf://org/repo@rev", "repo"),
            ("hf://org/repo@rev/file.gguf", "file"),
            ("https://host/a.gguf?x=1", "a"),
            ("file:x", "x"),
            (".", "model"),
        ] {
            assert_eq!(short_name(uri), name);
        }
    }
}
