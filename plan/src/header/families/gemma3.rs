//! Gemma 3, text: Gemma Team 2025, arXiv:2503.19786.
//!
//! ```text
//! x  = E[id] · sqrt(hidden)
//! x += rms(Wo · attention(rope(rms(Wq h)), rope(rms(Wk h)), Wv h))      h = rms(x)
//! x += rms(Wdown · (gelu(Wgate h) ⊙ Wup h))                             h = rms(x)
//! logits = E · rms(x)
//! ```
//! Most layers are local: a sliding window, and a rotary base of their own. Stored norms `w` mean `1 + w` in safetensors; GGUF has the 1 added.

use serde_json::{Map, Value as Json, json};

use super::{Family, llama::LLAMA};
use crate::{
    gguf::Value,
    header::{
        HeaderError,
        fields::Fields,
        gguf, hf,
        hf::HfConfig,
        metadata::Meta,
        rope::{DEFAULT_BASE, RopeFields, hf_rope, rope_fields},
        target,
        tensors::{self, Biases, Name},
    },
    model::{Activation, Architecture, LayerConfig, ModelConfig, Role, Rope, RopeLayout, RopeScaling},
};

pub(super) const GEMMA3: Family = Family {
    name: "gemma3",
    class: "Gemma3ForCausalLM",
    also: &[],
    model_type: "gemma3_text",
    from_hf,
    to_hf,
    hf_name,
    gguf: Some("gemma3"),
    from_gguf,
    ..LLAMA
};

/// Of every 6 layers the first 5 are local, unless the file says otherwise.
const PATTERN: u64 = 6;
/// Rotary base of global layers where `config.json` gives none, as in transformers.
const GLOBAL_BASE: f64 = 1_000_000.0;
/// Layers of the 27B model, whose score scale is `1 / sqrt(hidden / heads)`.
const LAYERS_OF_27B: usize = 62;

/// What neither kind of header says.
fn gemma(config: ModelConfig) -> ModelConfig {
    ModelConfig {
        activation: Activation::GeluTanh,
        embedding_scale: (config.hidden as f64).sqrt() as f32,
        head_norms: true,
        block_norms: true,
        ..config
    }
}

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let mut config = gemma(hf::shape(fields, Architecture::Gemma3)?);
    let field = if fields.present("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    hf::activation(fields, field, Activation::GeluTanh)?;
    config.norm_weight_offset = 1.0;
    let score_width = fields.positive("query_pre_attn_scalar")?.unwrap_or(config.head_dim as f64);
    config.attention_scale = (1.0 / score_width.sqrt()) as f32;
    config.tied_embeddings = fields.flag("tie_word_embeddings")?.unwrap_or(true);

    let global = hf_rope(&rope_fields(fields, Some("full_attention"))?, fields, GLOBAL_BASE, config.head_dim)?;
    let local = match rope_fields(fields, Some("sliding_attention"))? {
        RopeFields::New(new) => hf_rope(&RopeFields::New(new), fields, DEFAULT_BASE, config.head_dim)?,
        RopeFields::Old => {
            let base = fields.positive("rope_local_base_freq")?.unwrap_or(DEFAULT_BASE);
            Rope { base, scaling: RopeScaling::None, amplitude: 1.0, ..global.clone() }
        }
    };
    let full = LayerConfig { window: None, rope: global, experts: false };
    let windowed = LayerConfig { window: Some(fields.required("sliding_window")? as u32), rope: local, experts: false };
    let is_local = hf_local(fields, hf::layers(fields, "num_hidden_layers")?)?;
    config.layers = is_local.into_iter().map(|local| if local { windowed.clone() } else { full.clone() }).collect();
    let attention = fields.flag("attention_bias")?.unwrap_or(false);
    Ok(HfConfig { config, biases: Biases { qkv: attention, o: attention, mlp: false } })
}

fn to_hf(family: &Family, config: &ModelConfig, biases: &Biases) -> Map<String, Json> {
    let mut map = target::decoder(family, config, biases);
    map.remove("hidden_act");
    map.remove("mlp_bias");
    let kind = |layer: &LayerConfig| if layer.window.is_some() { "sliding_attention" } else { "full_attention" };
    let local = config.layers.iter().find(|layer| layer.window.is_some()).map_or(DEFAULT_BASE, |layer| layer.rope.base);
    // The scalar whose root the scores are divided by; a whole number in every file.
    let scalar = (1.0 / f64::from(config.attention_scale)).powi(2).round();
    for (name, value) in [
        ("hidden_activation", json!("gelu_pytorch_tanh")),
        ("layer_types", config.layers.iter().map(kind).collect()),
        ("query_pre_attn_scalar", json!(scalar as u64)),
        ("rope_local_base_freq", json!(local)),
        ("attn_logit_softcapping", Json::Null),
        ("final_logit_softcapping", Json::Null),
    ] {
        map.insert(name.to_owned(), value);
    }
    map
}

/// Which layers are local; `layer_types` wins over any pattern.
fn hf_local(fields: &Fields<'_>, layers: usize) -> Result<Vec<bool>, HeaderError> {
    if let Some(local) = hf::layer_types(fields, layers)? {
        return Ok(local);
    }
    let pattern = match fields.count("sliding_window_pattern")? {
        Some(pattern) => Some(pattern),
        None => fields.count("_sliding_window_pattern")?,
    };
    let pattern = pattern.map_or(PATTERN, |p| p as u64);
    Ok((1..=layers as u64).map(|l| l % pattern != 0).collect())
}

fn hf_name(role: Role) -> Name {
    match role {
        Role::FfnNorm => Name::own("pre_feedforward_layernorm.weight"),
        role => tensors::hf_name(role),
    }
}

fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    let mut config = gemma(gguf::decoder(meta, Architecture::Gemma3, RopeLayout::Halves)?);
    if config.layers.len() == LAYERS_OF_27B {
        config.attention_scale = (1.0 / ((config.hidden / config.heads) as f64).sqrt()) as f32;
    }
    let window = meta.required("attention.sliding_window")?;
    let base = meta.positive("rope.freq_base_swa")?.unwrap_or(DEFAULT_BASE);
    let is_local = gguf_local(meta, config.layers.len())?;
    for layer in config.layers.iter_mut().zip(is_local).filter(|(_, local)| *local).map(|(layer, _)| layer) {
        if layer.rope.scaling == RopeScaling::Tensor {
            return Err(meta.unsupported("rope_freqs.weight", "gemma3 without rotary divisors", "divisors per pair"));
        }
        layer.window = Some(window as u32);
        layer.rope = Rope { base, scaling: RopeScaling::None, amplitude: 1.0, ..layer.rope.clone() };
    }
    Ok(config)
}

/// Which layers are local.
fn gguf_local(meta: &Meta<'_>, layers: usize) -> Result<Vec<bool>, HeaderError> {
    let key = "attention.sliding_window_pattern";
    let pattern = match meta.header.get(&meta.key(key)) {
        None => PATTERN,
        Some(Value::Array(array)) => {
            let flags =
                array.values.iter().flatten().map(|v| v.as_bool().or_else(|| v.as_u64().map(|n| n != 0))).collect::<Option<Vec<_>>>();
            return flags.filter(|f| f.len() == layers).ok_or_else(|| {
                meta.wrong(key, &format!("one flag for each of {layers} layers"), &format!("{} of {}", array.len, array.kind.name()))
            });
        }
        Some(value) => value.as_u64().filter(|&n| n > 0).ok_or_else(|| meta.wrong(key, "a positive integer", &format!("{value:?}")))?,
    };
    Ok((1..=layers as u64).map(|l| l % pattern != 0).collect())
}
