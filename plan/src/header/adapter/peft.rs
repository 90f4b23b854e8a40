//! Adapters as PEFT saves them: `adapter_config.json` beside `adapter_model.safetensors` or `adapter_model.bin`.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value};

use super::{
    Collector, Expected, Halves, Module, modules,
    targets::{Exceptions, Targets},
    unsupported,
};
use crate::{
    adapter::AdapterHeader,
    header::{Found, HeaderError, families, fields::Fields, hf::dtype},
    model::{Format, ModelConfig, ModelFile, RopeLayout},
    safetensors::Header,
};

/// Name of the settings, for messages.
const FILE: &str = "adapter_config.json";
/// What PEFT puts before the names of the model's modules.
const PREFIX: &str = "base_model.model.";
/// Largest rank.
const MAX_RANK: usize = 1 << 16;

/// Fields that ask for another computation, and what is supported instead, for messages.
const REFUSED: [(&str, &str); 13] = [
    ("modules_to_save", "adapters without whole modules of their own"),
    ("use_dora", "adapters without DoRA"),
    ("lora_bias", "adapters without biases"),
    ("use_qalora", "adapters without QALoRA"),
    ("use_bdlora", "adapters without BD-LoRA"),
    ("alora_invocation_tokens", "adapters that are active from the first token"),
    ("layer_replication", "adapters of the model's own layers"),
    ("target_parameters", "adapters of modules"),
    ("trainable_token_indices", "adapters without token rows of their own"),
    ("arrow_config", "single adapters"),
    ("kasa_config", "adapters without KaSA"),
    ("monteclora_config", "adapters without MonteCLoRA"),
    ("velora_config", "adapters without VeLoRA"),
];

/// Makes an adapter's header from `adapter_config.json` and the headers of its weight files, for a model of shape `base`.
///
/// # Errors
/// When it is damaged, asks for something unsupported, or is not for such a model.
pub fn adapter_from_peft(config_json: &[u8], parts: &[(ModelFile, Header)], base: &ModelConfig) -> Result<AdapterHeader, HeaderError> {
    let map: Map<String, Value> =
        serde_json::from_slice(config_json).map_err(|source| HeaderError::Json { file: FILE.to_owned(), source })?;
    let fields = Fields { file: FILE, map: &map, path: String::new() };
    refuse_features(&fields)?;
    if base.encoder.is_some() {
        return Err(fields.unsupported("peft_type", "an adapter of a decoder", "one of an encoder"));
    }
    let settings = Settings::read(&fields)?;
    let found: Vec<Found> = parts
        .iter()
        .enumerate()
        .flat_map(|(file, (_, header))| {
            header.tensors.iter().map(move |t| Found {
                name: t.name.clone(),
                file,
                entry_offset: t.entry_offset,
                dtype: dtype(&t.dtype).ok_or_else(|| t.dtype.clone()),
                shape: t.shape.clone(),
                offset: t.offset,
                bytes: t.bytes,
            })
        })
        .collect();
    let family = families::of(base.architecture);
    let files = parts.iter().map(|(file, _)| file.clone()).collect();
    let mut collector = Collector { config: base, files, pairs: BTreeMap::new(), layout: RopeLayout::Halves };
    let modules = modules(family, base, Format::Safetensors);
    // The base model without its head has its names without the first part.
    let bare = !found.is_empty() && !found.iter().any(|f| f.name.strip_prefix(PREFIX).is_some_and(|name| name.starts_with(family.hf_base)));
    let named: HashMap<String, &Module> = modules
        .iter()
        .map(|module| {
            let name = if bare { module.name.strip_prefix(family.hf_base).unwrap_or(&module.name) } else { &module.name };
            (name.to_owned(), module)
        })
        .collect();
    let mut halves: BTreeMap<&str, Halves<'_>> = BTreeMap::new();
    for f in &found {
        let file = collector.place(f).file;
        let split = f.name.strip_prefix(PREFIX).and_then(|name| {
            let (module, half) = name.rsplit_once(".lora_")?;
            Some((module, half.strip_suffix(".weight").filter(|half| ["A", "B"].contains(half))?))
        });
        let Some((module, half)) = split else {
            return Err(unsupported(&file, &f.name, "what is neither the A nor the B of a module".to_owned()));
        };
        match named.get(module) {
            None => {
                return Err(HeaderError::UnexpectedTensor { name: f.name.clone(), place: collector.place(f), architecture: family.name });
            }
            Some(module) if module.parts.is_empty() => {
                return Err(unsupported(&file, &f.name, format!("a change of {}", module.name)));
            }
            Some(_) => {}
        }
        let halves = halves.entry(module).or_default();
        let place = if half == "A" { &mut halves.a } else { &mut halves.b };
        if let Some(first) = place.replace(f) {
            return Err(HeaderError::DuplicateTensor { name: f.name.clone(), place: collector.place(first), again: collector.place(f) });
        }
    }
    let mut names: Vec<_> = named.iter().filter(|(_, module)| !module.parts.is_empty()).collect();
    names.sort_by_key(|(name, _)| *name);
    for (name, module) in names {
        let wanted = settings.targets.have(module, name);
        match halves.get(name.as_str()) {
            None if !wanted => {}
            Some(found) if !wanted => {
                let field = found.a.or(found.b).map_or_else(String::new, |f| f.name.clone());
                let got = format!("tensor {field}, which is of none of them");
                return Err(HeaderError::Field {
                    file: FILE.to_owned(),
                    field: "target_modules".to_owned(),
                    expected: "every module that the weights change".to_owned(),
                    got,
                });
            }
            found => {
                let (rank, scale) = settings.of(&fields, name)?;
                let names = ["A", "B"].map(|half| format!("{PREFIX}{name}.lora_{half}.weight"));
                collector.take(module, found.unwrap_or(&Halves::default()), &Expected { rank, scale, names })?;
            }
        }
    }
    if collector.pairs.is_empty() {
        return Err(fields.wrong(
            "target_modules",
            &format!("modules of the {} family", family.name),
            map.get("target_modules").unwrap_or(&Value::Null),
        ));
    }
    Ok(collector.finish())
}

/// Refuses what asks for another computation.
fn refuse_features(fields: &Fields<'_>) -> Result<(), HeaderError> {
    match fields.text("peft_type")? {
        Some("LORA") => {}
        Some(got) => return Err(fields.unsupported("peft_type", "LORA", got)),
        None => return Err(fields.missing("peft_type", "LORA")),
    }
    for (name, supported) in REFUSED {
        let idle = |value: &Value| match value {
            Value::Bool(set) => !set,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if let Some(value) = fields.present(name).filter(|value| !idle(value)) {
            return Err(fields.unsupported(name, supported, &value.to_string()));
        }
    }
    match fields.text("bias")? {
        None | Some("none") => Ok(()),
        Some(got) => Err(fields.unsupported("bias", "none", got)),
    }
}

/// Ranks, factors and targets.
struct Settings {
    rank: usize,
    alpha: f64,
    /// The factor is alpha by the root of the rank.
    root: bool,
    ranks: Exceptions,
    alphas: Exceptions,
    targets: Targets,
}

impl Settings {
    fn read(fields: &Fields<'_>) -> Result<Self, HeaderError> {
        let rank = fields.required("r")?;
        let alpha = fields.positive("lora_alpha")?.ok_or_else(|| fields.missing("lora_alpha", "a positive number"))?;
        Ok(Self {
            rank,
            alpha,
            root: fields.flag("use_rslora")?.unwrap_or(false),
            ranks: Exceptions::read(fields, "rank_pattern")?,
            alphas: Exceptions::read(fields, "alpha_pattern")?,
            targets: Targets::read(fields)?,
        })
    }

    /// Rank and factor of a module.
    fn of(&self, fields: &Fields<'_>, module: &str) -> Result<(usize, f32), HeaderError> {
        let rank = match self.ranks.of(module) {
            None => self.rank,
            Some(value) => value.as_u64().map_or(0, |rank| rank as usize),
        };
        if !(1..=MAX_RANK).contains(&rank) {
            let got = self.ranks.of(module).cloned().unwrap_or_else(|| rank.into());
            return Err(fields.wrong(
                if self.ranks.of(module).is_some() { "rank_pattern" } else { "r" },
                &format!("ranks from 1 to {MAX_RANK}"),
                &got,
            ));
        }
        let alpha = match self.alphas.of(module) {
            None => self.alpha,
            Some(value) => value
                .as_f64()
                .filter(|alpha| alpha.is_finite() && *alpha > 0.0)
                .ok_or_else(|| fields.wrong("alpha_pattern", "positive numbers", value))?,
        };
        let by = if self.root { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank, (alpha / by) as f32))
    }
}
