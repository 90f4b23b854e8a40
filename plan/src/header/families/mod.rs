//! The families: one file each, and the table that finds them.
//!
//! A family says what its layers compute, as a [`ModelConfig`] made from either kind of header, and under which names its tensors stand.
//! The engine reads the config alone, so that a family whose layers are made of parts it has is this file and a line in [`FAMILIES`].

mod bert;
mod deepseek_v2;
mod deepseek_v3;
mod distilbert;
mod gemma3;
mod gpt2;
mod llama;
mod mistral;
mod mixtral;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use serde_json::{Map, Value};

use super::{
    HeaderError,
    fields::{FILE, Fields},
    hf::HfConfig,
    metadata::Meta,
    tensors::{Biases, Name},
};
use crate::model::{Architecture, Format, ModelConfig, Role, Scoring};

/// Makes the fields of `config.json`.
pub(super) type ToHf = fn(&Family, &ModelConfig, &Biases) -> Map<String, Value>;

/// A family of models.
pub(super) struct Family {
    /// Its name in messages.
    pub(super) name: &'static str,
    /// Its class in `architectures` of `config.json`.
    pub(super) class: &'static str,
    /// Other classes of the same layers: with another head, or with none.
    pub(super) also: &'static [&'static str],
    /// Its `model_type` in `config.json`.
    pub(super) model_type: &'static str,
    /// Its shape from `config.json`.
    pub(super) from_hf: fn(&Fields<'_>) -> Result<HfConfig, HeaderError>,
    /// `config.json` of its models, its layers rotated as files of that kind have them.
    pub(super) to_hf: ToHf,
    /// What comes before the names of the model without its head; files of such a model may leave it out.
    pub(super) hf_base: &'static str,
    /// What comes before a layer's number in Hugging Face's names.
    pub(super) hf_layers: &'static str,
    /// Names in Hugging Face's files.
    pub(super) hf_name: fn(Role) -> Name,
    /// Its `general.architecture`, where GGUF has one for it.
    pub(super) gguf: Option<&'static str>,
    /// Its shape from GGUF metadata.
    pub(super) from_gguf: fn(&Meta<'_>) -> Result<ModelConfig, HeaderError>,
    /// Names in GGUF.
    pub(super) gguf_name: fn(Role) -> Name,
}

/// Every family.
const FAMILIES: [&Family; 13] = [
    &llama::LLAMA,
    &gemma3::GEMMA3,
    &mistral::MISTRAL,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &phi3::PHI3,
    &gpt2::GPT2,
    &mixtral::MIXTRAL,
    &qwen3_moe::QWEN3_MOE,
    &deepseek_v2::DEEPSEEK_V2,
    &deepseek_v3::DEEPSEEK_V3,
    &bert::BERT,
    &distilbert::DISTILBERT,
];

/// The family of an architecture.
pub(super) fn of(architecture: Architecture) -> &'static Family {
    match architecture {
        Architecture::Llama => &llama::LLAMA,
        Architecture::Gemma3 => &gemma3::GEMMA3,
        Architecture::Mistral => &mistral::MISTRAL,
        Architecture::Qwen2 => &qwen2::QWEN2,
        Architecture::Qwen3 => &qwen3::QWEN3,
        Architecture::Phi3 => &phi3::PHI3,
        Architecture::Gpt2 => &gpt2::GPT2,
        Architecture::Mixtral => &mixtral::MIXTRAL,
        Architecture::Qwen3Moe => &qwen3_moe::QWEN3_MOE,
        Architecture::DeepseekV2 => &deepseek_v2::DEEPSEEK_V2,
        Architecture::DeepseekV3 => &deepseek_v3::DEEPSEEK_V3,
        Architecture::Bert => &bert::BERT,
        Architecture::DistilBert => &distilbert::DISTILBERT,
    }
}

/// The family that `config.json` names: by its class, or by its type where it has no class.
pub(super) fn of_hf(fields: &Fields<'_>) -> Result<&'static Family, HeaderError> {
    let named = match fields.present("architectures") {
        Some(Value::Array(names)) => names.first().and_then(Value::as_str),
        Some(other) => return Err(fields.wrong("architectures", "a list of names", other)),
        None => None,
    };
    let (field, got, names): (_, _, fn(&Family) -> Vec<&'static str>) = match (named, fields.text("model_type")?) {
        (Some(class), _) => ("architectures", class, |f| [&[f.class], f.also].concat()),
        (None, Some(kind)) => ("model_type", kind, |f| vec![f.model_type]),
        (None, None) => return Err(fields.missing("architectures", "a list of names")),
    };
    FAMILIES.into_iter().find(|family| names(family).contains(&got)).ok_or_else(|| HeaderError::UnsupportedArchitecture {
        file: FILE.to_owned(),
        field: field.to_owned(),
        got: got.to_owned(),
        expected: one_of(FAMILIES.into_iter().flat_map(names)),
    })
}

/// The family with a `general.architecture`.
pub(super) fn of_gguf(meta: &Meta<'_>) -> Result<&'static Family, HeaderError> {
    FAMILIES.into_iter().find(|family| family.gguf == Some(meta.arch)).ok_or_else(|| HeaderError::UnsupportedArchitecture {
        file: meta.file.to_owned(),
        field: meta.place("general.architecture".to_owned()),
        got: meta.arch.to_owned(),
        expected: one_of(FAMILIES.into_iter().filter_map(|family| family.gguf)),
    })
}

/// The family whose files of a format hold a model: files of Mistral and Mixtral are Llama's in GGUF, those of DeepSeek V3 are V2's, and those
/// of DistilBERT are BERT's.
pub(super) fn in_format(config: &ModelConfig, format: Format) -> &'static Family {
    let own = of(config.architecture);
    let llama = config.architecture == Architecture::Llama;
    let untyped = config.encoder.is_some_and(|e| e.token_types == 0);
    let sigmoid = config.experts.is_some_and(|e| e.scoring == Scoring::Sigmoid);
    match format {
        Format::GGUF if config.encoder.is_some() => &bert::BERT,
        Format::Safetensors if untyped => &distilbert::DISTILBERT,
        Format::GGUF if config.latent.is_some() => &deepseek_v2::DEEPSEEK_V2,
        Format::GGUF if own.gguf.is_none() => &llama::LLAMA,
        Format::Safetensors if config.latent.is_some() && sigmoid => &deepseek_v3::DEEPSEEK_V3,
        Format::Safetensors if llama && config.experts.is_some() => &mixtral::MIXTRAL,
        Format::Safetensors if llama && config.layers.iter().any(|l| l.window.is_some()) => &mistral::MISTRAL,
        _ => own,
    }
}

/// A list of names in words.
fn one_of(names: impl Iterator<Item = &'static str>) -> String {
    let names: Vec<_> = names.collect();
    match names.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}
