//! Adapters as llama.cpp's `convert_lora_to_gguf.py` writes them: `general.type` is `adapter`, tensors `<name>.lora_a` and `<name>.lora_b`.

use std::collections::{BTreeMap, HashMap};

use super::{Collector, Expected, Halves, Module, modules, unsupported};
use crate::{
    adapter::AdapterHeader,
    gguf::Header,
    header::{Found, HeaderError, families, metadata::Meta},
    model::{Format, ModelConfig, ModelFile, RopeLayout},
};

/// Architecture of llama's files, and of those of mistral and mixtral; it alone permutes rows.
const LLAMA: &str = "llama";

/// Makes an adapter's header from that of its GGUF file, for a model of shape `base`.
///
/// # Errors
/// When it is no adapter, asks for something unsupported, or is not for such a model.
pub fn adapter_from_gguf(file: ModelFile, header: &Header, base: &ModelConfig) -> Result<AdapterHeader, HeaderError> {
    let meta = Meta { header, file: &file.name, arch: "" };
    if base.encoder.is_some() {
        return Err(HeaderError::UnsupportedFeature {
            file: file.name.clone(),
            field: meta.place("general.type".to_owned()),
            expected: "an adapter of a decoder",
            got: "one of an encoder".to_owned(),
        });
    }
    let family = families::of(base.architecture);
    let arch = family.gguf.unwrap_or(LLAMA);
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", arch)] {
        match meta.text(key)? {
            Some(got) if got == expected => {}
            Some(got) => return Err(meta.field(key.to_owned(), expected, got)),
            None => return Err(meta.missing(key, expected)),
        }
    }
    if header.get("adapter.alora.invocation_tokens").is_some() {
        return Err(HeaderError::UnsupportedFeature {
            file: file.name.clone(),
            field: meta.place("adapter.alora.invocation_tokens".to_owned()),
            expected: "adapters that are active from the first token",
            got: "tokens that make it active".to_owned(),
        });
    }
    let key = "adapter.lora.alpha";
    let alpha = match header.get(key) {
        None => return Err(meta.missing(key, "a number")),
        Some(value) => value.as_f64().filter(|a| a.is_finite() && *a >= 0.0),
    };
    let alpha = alpha.ok_or_else(|| meta.field(key.to_owned(), "a number of at least 0", &format!("{:?}", header.get(key))))?;
    let found: Vec<Found> = header
        .tensors
        .iter()
        .map(|t| Found {
            name: t.name.clone(),
            file: 0,
            entry_offset: t.entry_offset,
            dtype: t.kind.dtype().ok_or_else(|| t.kind.name.to_owned()),
            shape: t.dims.iter().rev().copied().collect(),
            offset: t.offset,
            bytes: t.bytes,
        })
        .collect();
    let layout = if arch == LLAMA { RopeLayout::Adjacent } else { RopeLayout::Halves };
    let mut collector = Collector { config: base, files: vec![file.clone()], pairs: BTreeMap::new(), layout };
    let modules = modules(family, base, Format::GGUF);
    let named: HashMap<&str, &Module> = modules.iter().map(|module| (module.name.as_str(), module)).collect();
    let mut halves: BTreeMap<&str, Halves<'_>> = BTreeMap::new();
    for f in &found {
        let split = f.name.rsplit_once(".lora_").filter(|(_, half)| ["a", "b"].contains(half));
        let split = split.and_then(|(tensor, half)| Some((tensor.strip_suffix(".weight")?, half)));
        let Some((module, half)) = split else {
            return Err(unsupported(&file.name, &f.name, "what is neither the A nor the B of a matrix".to_owned()));
        };
        match named.get(module) {
            None => {
                return Err(HeaderError::UnexpectedTensor { name: f.name.clone(), place: collector.place(f), architecture: family.name });
            }
            Some(module) if module.parts.is_empty() => {
                return Err(unsupported(&file.name, &f.name, format!("a change of {}", module.name)));
            }
            Some(_) => {}
        }
        let halves = halves.entry(module).or_default();
        let place = if half == "a" { &mut halves.a } else { &mut halves.b };
        if let Some(first) = place.replace(f) {
            return Err(HeaderError::DuplicateTensor { name: f.name.clone(), place: collector.place(first), again: collector.place(f) });
        }
    }
    for (name, found) in &halves {
        let rank =
            found.b.or(found.a).map_or(0, |f| if found.b.is_some() { f.shape.get(1) } else { f.shape.first() }.copied().unwrap_or(0));
        let Some(rank) = usize::try_from(rank).ok().filter(|rank| (1..=1 << 16).contains(rank)) else {
            let name = found.b.or(found.a).map_or_else(String::new, |f| f.name.clone());
            return Err(HeaderError::Field {
                file: file.name,
                field: name,
                expected: "a rank from 1 to 65536".to_owned(),
                got: rank.to_string(),
            });
        };
        // As llama.cpp: without an alpha the product counts as it is.
        let scale = if alpha > 0.0 { (alpha / rank as f64) as f32 } else { 1.0 };
        let names = ["a", "b"].map(|half| format!("{name}.weight.lora_{half}"));
        collector.take(named[name], found, &Expected { rank, scale, names })?;
    }
    if collector.pairs.is_empty() {
        return Err(HeaderError::MissingTensor { name: "blk.0.attn_q.weight.lora_a".to_owned(), place: file.name, shape: Vec::new() });
    }
    Ok(collector.finish())
}
