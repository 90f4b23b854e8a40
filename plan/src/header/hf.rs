//! A model's shape from Hugging Face's `config.json`, in its older and newer layouts: what most families share.

use serde_json::{Map, Value};

use super::{
    Found, HeaderError, MAX_EXPERTS, MAX_LAYERS, assemble,
    families::{self, Family},
    fields::{FILE, Fields},
    packed::Scheme,
    rope::{DEFAULT_BASE, hf_context, hf_rope, rope_fields},
    tensors::Biases,
};
use crate::{
    dtype::DType,
    model::{Activation, Architecture, Encoder, Format, LayerConfig, ModelConfig, ModelFile, ModelHeader, Rope},
    safetensors::Header,
};

/// `config.json`, parsed and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    /// The model's shape.
    pub config: ModelConfig,
    /// The biases its files have.
    pub biases: Biases,
}

/// Makes a model's header from `config.json` and the headers of its safetensors files.
///
/// # Errors
/// When the architecture, a setting, a tensor's name, type or shape is not what Skein supports.
pub fn from_safetensors(config_json: &[u8], parts: &[(ModelFile, Header)]) -> Result<ModelHeader, HeaderError> {
    let (family, HfConfig { config, biases }, scheme) = parse(config_json)?;
    let listed = || parts.iter().flat_map(|(_, header)| &header.tensors);
    if scheme.is_some() && !listed().any(|t| block(&t.dtype).is_some()) {
        return Err(HeaderError::UnsupportedFeature {
            file: FILE.to_owned(),
            field: "quantization_config".to_owned(),
            expected: "packed matrices in safetensors files",
            got: "others, or none".to_owned(),
        });
    }
    let found = parts.iter().enumerate().flat_map(|(file, (_, header))| {
        header.tensors.iter().map(move |t| Found {
            name: t.name.clone(),
            file,
            entry_offset: t.entry_offset,
            dtype: dtype(&t.dtype).or(block(&t.dtype)).ok_or_else(|| t.dtype.clone()),
            shape: t.shape.clone(),
            offset: t.offset,
            bytes: t.bytes,
        })
    });
    let files = parts.iter().map(|p| p.0.clone()).collect();
    assemble(family, Format::Safetensors, config, files, found.collect(), Some(biases))
}

pub(super) fn dtype(name: &str) -> Option<DType> {
    Some(match name {
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        _ => return None,
    })
}

/// Block types that packed matrices are listed with.
fn block(name: &str) -> Option<DType> {
    [DType::Q4_0, DType::Q5_0, DType::Q8_0].into_iter().find(|dtype| format!("{dtype:?}") == name)
}

impl HfConfig {
    /// Parses `config.json`.
    ///
    /// # Errors
    /// When it is not JSON, or a field is missing, has the wrong type or range, or asks for something unsupported.
    pub fn parse(json: &[u8]) -> Result<Self, HeaderError> {
        Ok(parse(json)?.1)
    }
}

fn parse(json: &[u8]) -> Result<(&'static Family, HfConfig, Option<Scheme>), HeaderError> {
    let map: Map<String, Value> = serde_json::from_slice(json).map_err(|source| HeaderError::Json { file: FILE.to_owned(), source })?;
    let fields = Fields { file: FILE, map: &map, path: String::new() };
    let family = families::of_hf(&fields)?;
    let scheme = Scheme::read(&fields)?;
    for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = fields.present(name) {
            return Err(fields.unsupported(name, "models without logit soft-capping", &cap.to_string()));
        }
    }
    if fields.flag("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(fields.unsupported("use_bidirectional_attention", "causal attention", "true"));
    }
    Ok((family, (family.from_hf)(&fields)?, scheme))
}

/// A decoder with the usual fields: RMS norms before its blocks, rotated heads, a gated feed-forward block. Its layers, all of them full
/// attention, are rotated alike.
pub(super) fn decoder(fields: &Fields<'_>, architecture: Architecture) -> Result<ModelConfig, HeaderError> {
    let mut config = shape(fields, architecture)?;
    config.activation = activation(fields, "hidden_act", Activation::Silu)?;
    let rope = hf_rope(&rope_fields(fields, None)?, fields, DEFAULT_BASE, config.head_dim)?;
    config.context = hf_context(config.context, &rope);
    config.layers = vec![LayerConfig { window: None, rope, experts: false }; layers(fields, "num_hidden_layers")?];
    Ok(config)
}

/// The widths and counts of a decoder, without layers.
pub(super) fn shape(fields: &Fields<'_>, architecture: Architecture) -> Result<ModelConfig, HeaderError> {
    let (hidden, heads) = (fields.required("hidden_size")?, fields.required("num_attention_heads")?);
    let head_dim = match fields.count("head_dim")? {
        Some(dim) => dim,
        None if hidden % heads == 0 => hidden / heads,
        None => return Err(fields.wrong("num_attention_heads", &format!("a divisor of the hidden size {hidden}"), &heads.into())),
    };
    shape_with_heads(fields, architecture, head_dim)
}

/// As [`shape`], of heads of `head_dim` values.
pub(super) fn shape_with_heads(fields: &Fields<'_>, architecture: Architecture, head_dim: usize) -> Result<ModelConfig, HeaderError> {
    let (hidden, heads) = (fields.required("hidden_size")?, fields.required("num_attention_heads")?);
    let kv_heads = fields.count("num_key_value_heads")?.unwrap_or(heads);
    if kv_heads > heads || heads % kv_heads != 0 {
        return Err(fields.wrong("num_key_value_heads", &format!("a divisor of the {heads} heads"), &kv_heads.into()));
    }
    let eps = fields.positive("rms_norm_eps")?.ok_or_else(|| fields.missing("rms_norm_eps", "a positive number"))?;
    Ok(ModelConfig {
        architecture,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn: fields.required("intermediate_size")?,
        vocab: fields.required("vocab_size")?,
        context: fields.required("max_position_embeddings")?,
        norm_eps: eps as f32,
        norm_weight_offset: 0.0,
        activation: Activation::Silu,
        embedding_scale: 1.0,
        attention_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        head_norms: false,
        block_norms: false,
        layer_norms: false,
        gated: true,
        learned_positions: false,
        embedding_norm: false,
        post_norms: false,
        encoder: None,
        experts: None,
        latent: None,
        layers: Vec::new(),
    })
}

/// How an encoder's `config.json` names its widths and counts.
pub(super) struct EncoderFields {
    pub(super) hidden: &'static str,
    pub(super) layers: &'static str,
    pub(super) heads: &'static str,
    pub(super) ffn: &'static str,
    pub(super) activation: &'static str,
}

/// An encoder after BERT's plan: learned positions, layer norms behind every block, attention to whole sequences.
pub(super) fn encoder(
    fields: &Fields<'_>,
    names: &EncoderFields,
    architecture: Architecture,
    norm_eps: f32,
    encoder: Encoder,
) -> Result<ModelConfig, HeaderError> {
    let (hidden, heads) = (fields.required(names.hidden)?, fields.required(names.heads)?);
    if hidden % heads != 0 {
        return Err(fields.wrong(names.heads, &format!("a divisor of the hidden size {hidden}"), &heads.into()));
    }
    let activation = match fields.text(names.activation)? {
        None | Some("gelu") => Activation::Gelu,
        Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
        Some(other) => return Err(fields.unsupported(names.activation, "gelu, gelu_new or gelu_pytorch_tanh", other)),
    };
    Ok(ModelConfig {
        architecture,
        hidden,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        ffn: fields.required(names.ffn)?,
        vocab: fields.required("vocab_size")?,
        context: fields.required("max_position_embeddings")?,
        norm_eps,
        norm_weight_offset: 0.0,
        activation,
        embedding_scale: 1.0,
        attention_scale: (1.0 / ((hidden / heads) as f64).sqrt()) as f32,
        tied_embeddings: false,
        head_norms: false,
        block_norms: false,
        layer_norms: true,
        gated: false,
        learned_positions: true,
        embedding_norm: true,
        post_norms: true,
        encoder: Some(encoder),
        experts: None,
        latent: None,
        layers: vec![LayerConfig { window: None, rope: Rope::NONE, experts: false }; layers(fields, names.layers)?],
    })
}

/// Number of labels, where the file is of the class that classifies: as many as `id2label` names, else `num_labels`, else 2.
pub(super) fn labels(fields: &Fields<'_>, class: &str) -> Result<Option<usize>, HeaderError> {
    /// As transformers has it.
    const UNSAID: usize = 2;
    if fields.present("architectures").and_then(|a| a.get(0)).and_then(Value::as_str) != Some(class) {
        return Ok(None);
    }
    match fields.object("id2label")? {
        Some(names) if !names.map.is_empty() => Ok(Some(names.map.len())),
        _ => Ok(Some(fields.count("num_labels")?.unwrap_or(UNSAID))),
    }
}

/// Number of layers, in field `name`.
pub(super) fn layers(fields: &Fields<'_>, name: &str) -> Result<usize, HeaderError> {
    let layers = fields.required(name)?;
    if layers as u64 > MAX_LAYERS {
        return Err(fields.wrong(name, &format!("at most {MAX_LAYERS} layers"), &layers.into()));
    }
    Ok(layers)
}

/// Number of experts, by the first of `names` that is there, and how many of them a token goes to.
pub(super) fn experts(fields: &Fields<'_>, names: &[&str]) -> Result<(usize, usize), HeaderError> {
    let name = names.iter().find(|name| fields.present(name).is_some()).unwrap_or(&names[0]);
    let (count, used) = (fields.required(name)?, fields.required("num_experts_per_tok")?);
    if count as u64 > MAX_EXPERTS {
        return Err(fields.wrong(name, &format!("at most {MAX_EXPERTS} experts"), &count.into()));
    }
    if used > count {
        return Err(fields.wrong("num_experts_per_tok", &format!("at most the {count} experts"), &used.into()));
    }
    Ok((count, used))
}

/// The activation that field `name` gives, which must be `wanted`, the only one of its family.
pub(super) fn activation(fields: &Fields<'_>, name: &str, wanted: Activation) -> Result<Activation, HeaderError> {
    let known = match wanted {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::Gelu => "gelu",
    };
    match fields.text(name)? {
        Some(got) if got != known => Err(fields.unsupported(name, known, got)),
        _ => Ok(wanted),
    }
}

/// Which layers are local, by `layer_types`, if it is there.
pub(super) fn layer_types(fields: &Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>, HeaderError> {
    let Some(types) = fields.present("layer_types") else { return Ok(None) };
    let kind = |v: &Value| match v.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let flags: Option<Vec<bool>> = types.as_array().and_then(|a| a.iter().map(kind).collect());
    let wrong = || fields.wrong("layer_types", &format!("{layers} of sliding_attention and full_attention"), types);
    flags.filter(|f| f.len() == layers).ok_or_else(wrong).map(Some)
}

/// Gives every layer the window `sliding_window`, where there is one.
pub(super) fn window_everywhere(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<(), HeaderError> {
    if let Some(window) = fields.count("sliding_window")? {
        config.layers.iter_mut().for_each(|layer| layer.window = Some(window as u32));
    }
    Ok(())
}

/// Qwen's windows: with `use_sliding_window` the layers of `layer_types`, else those from `max_window_layers` on.
pub(super) fn late_windows(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<(), HeaderError> {
    /// `max_window_layers` where the file gives none, as in transformers.
    const FULL_LAYERS: usize = 28;
    let count = config.layers.len();
    let local = layer_types(fields, count)?;
    if !fields.flag("use_sliding_window")?.unwrap_or(false) {
        return match local {
            Some(local) if local.contains(&true) => {
                Err(fields.unsupported("layer_types", "full_attention where use_sliding_window is false", "sliding_attention"))
            }
            _ => Ok(()),
        };
    }
    let full = fields.number("max_window_layers")?.unwrap_or(FULL_LAYERS);
    let local = local.unwrap_or_else(|| (0..count).map(|layer| layer >= full).collect());
    if local.contains(&true) {
        let window = fields.required("sliding_window")? as u32;
        for (layer, _) in config.layers.iter_mut().zip(local).filter(|(_, local)| *local) {
            layer.window = Some(window);
        }
    }
    Ok(())
}
