//! A model's shape from Hugging Face's `config.json`, in its older and newer layouts.

use serde_json::{Map, Value};

use super::{Found, HeaderError, MAX_COUNT, MAX_LAYERS, assemble, roles};
use crate::{
    dtype::DType,
    model::{Activation, Architecture, Format, LayerConfig, ModelConfig, ModelFile, ModelHeader, Rope, RopeLayout, RopeScaling},
    safetensors::Header,
};

/// Name of the file, for messages.
const FILE: &str = "config.json";
/// Rotary base when the file gives none, as in transformers.
const DEFAULT_BASE: f64 = 10_000.0;
/// Rotary base of Gemma 3's global layers when the file gives none, as in transformers.
const GEMMA3_BASE: f64 = 1_000_000.0;
/// Gemma 3: of every 6 layers the first 5 are local, unless the file says otherwise.
const GEMMA3_PATTERN: u64 = 6;

/// `config.json`, parsed and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    /// The model's shape.
    pub config: ModelConfig,
    /// Query, key, value and output products have biases.
    pub attention_bias: bool,
    /// Gate, up and down products have biases.
    pub mlp_bias: bool,
}

/// Makes a model's header from `config.json` and the headers of its safetensors files.
///
/// # Errors
/// When the architecture, a setting, a tensor's name, type or shape is not what Skein supports.
pub fn from_safetensors(config_json: &[u8], parts: &[(ModelFile, Header)]) -> Result<ModelHeader, HeaderError> {
    let HfConfig { config, attention_bias, mlp_bias } = HfConfig::parse(config_json)?;
    let found = parts.iter().enumerate().flat_map(|(file, (_, header))| {
        header.tensors.iter().map(move |t| Found {
            name: t.name.clone(),
            file,
            entry_offset: t.entry_offset,
            dtype: dtype(&t.dtype).ok_or_else(|| t.dtype.clone()),
            shape: t.shape.clone(),
            offset: t.offset,
            bytes: t.bytes,
        })
    });
    let biases = roles::Biases::Given { attention: attention_bias, mlp: mlp_bias };
    let wanted = roles::wanted(&config, Format::Safetensors, biases);
    let (found, files) = (found.collect(), parts.iter().map(|p| p.0.clone()).collect());
    assemble(Format::Safetensors, config, files, found, wanted)
}

fn dtype(name: &str) -> Option<DType> {
    Some(match name {
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        _ => return None,
    })
}

impl HfConfig {
    /// Parses `config.json`.
    ///
    /// # Errors
    /// When it is not JSON, or a field is missing, has the wrong type or range, or asks for something unsupported.
    pub fn parse(json: &[u8]) -> Result<Self, HeaderError> {
        let map: Map<String, Value> = serde_json::from_slice(json).map_err(|source| HeaderError::Json { file: FILE.to_owned(), source })?;
        let fields = Fields { map: &map, path: String::new() };
        let architecture = architecture(&fields)?;
        if fields.present("quantization_config").is_some() {
            return Err(fields.unsupported("quantization_config", "unquantized weights", "quantized weights"));
        }
        for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(cap) = fields.present(name) {
                return Err(fields.unsupported(name, "models without logit soft-capping", &cap.to_string()));
            }
        }
        if fields.flag("use_bidirectional_attention")?.unwrap_or(false) {
            return Err(fields.unsupported("use_bidirectional_attention", "causal attention", "true"));
        }
        let config = config(&fields, architecture)?;
        let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
        Ok(Self { config, attention_bias, mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false) })
    }
}

fn architecture(fields: &Fields<'_>) -> Result<Architecture, HeaderError> {
    let named = match fields.present("architectures") {
        Some(Value::Array(names)) => names.first().and_then(Value::as_str),
        Some(other) => return Err(fields.wrong("architectures", "a list of names", other)),
        None => None,
    };
    let by_class = [("LlamaForCausalLM", Architecture::Llama), ("Gemma3ForCausalLM", Architecture::Gemma3)];
    let by_type = [("llama", Architecture::Llama), ("gemma3_text", Architecture::Gemma3)];
    let (field, got, found, expected) = match (named, fields.text("model_type")?) {
        (Some(name), _) => ("architectures", name, by_class, "LlamaForCausalLM or Gemma3ForCausalLM"),
        (None, Some(kind)) => ("model_type", kind, by_type, "llama or gemma3_text"),
        (None, None) => return Err(fields.missing("architectures", "a list of names")),
    };
    let unsupported =
        || HeaderError::UnsupportedArchitecture { file: FILE.to_owned(), field: field.to_owned(), got: got.to_owned(), expected };
    found.into_iter().find(|(name, _)| *name == got).map(|f| f.1).ok_or_else(unsupported)
}

fn config(fields: &Fields<'_>, architecture: Architecture) -> Result<ModelConfig, HeaderError> {
    let gemma = architecture == Architecture::Gemma3;
    let hidden = fields.required("hidden_size")?;
    let heads = fields.required("num_attention_heads")?;
    let kv_heads = fields.count("num_key_value_heads")?.unwrap_or(heads);
    let layers = fields.required("num_hidden_layers")?;
    if layers as u64 > MAX_LAYERS {
        return Err(fields.wrong("num_hidden_layers", &format!("at most {MAX_LAYERS} layers"), &layers.into()));
    }
    if kv_heads > heads || heads % kv_heads != 0 {
        return Err(fields.wrong("num_key_value_heads", &format!("a divisor of the {heads} heads"), &kv_heads.into()));
    }
    let head_dim = match fields.count("head_dim")? {
        Some(dim) => dim,
        None if hidden % heads == 0 => hidden / heads,
        None => return Err(fields.wrong("num_attention_heads", &format!("a divisor of the hidden size {hidden}"), &heads.into())),
    };
    let score_width = if gemma { fields.positive("query_pre_attn_scalar")?.unwrap_or(head_dim as f64) } else { head_dim as f64 };
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
        norm_weight_offset: if gemma { 1.0 } else { 0.0 },
        activation: activation(fields, gemma)?,
        embedding_scale: if gemma { (hidden as f64).sqrt() as f32 } else { 1.0 },
        attention_scale: (1.0 / score_width.sqrt()) as f32,
        // transformers' default is true for Gemma and false for Llama.
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(gemma),
        layers: layer_configs(fields, gemma, layers, head_dim)?,
    })
}

fn activation(fields: &Fields<'_>, gemma: bool) -> Result<Activation, HeaderError> {
    let (name, wanted, activation) = match gemma {
        true if fields.present("hidden_activation").is_some() => ("hidden_activation", "gelu_pytorch_tanh", Activation::GeluTanh),
        true => ("hidden_act", "gelu_pytorch_tanh", Activation::GeluTanh),
        false => ("hidden_act", "silu", Activation::Silu),
    };
    match fields.text(name)? {
        Some(got) if got != wanted => Err(fields.unsupported(name, wanted, got)),
        _ => Ok(activation),
    }
}

fn layer_configs(fields: &Fields<'_>, gemma: bool, layers: usize, head_dim: usize) -> Result<Vec<LayerConfig>, HeaderError> {
    if !gemma {
        let rope = rope(&rope_fields(fields, None)?, fields, DEFAULT_BASE, head_dim)?;
        return Ok(vec![LayerConfig { window: None, rope }; layers]);
    }
    let window = fields.required("sliding_window")?;
    let global = rope(&rope_fields(fields, Some("full_attention"))?, fields, GEMMA3_BASE, head_dim)?;
    let local = match rope_fields(fields, Some("sliding_attention"))? {
        RopeFields::New(new) => rope(&RopeFields::New(new), fields, DEFAULT_BASE, head_dim)?,
        RopeFields::Old => {
            let base = fields.positive("rope_local_base_freq")?.unwrap_or(DEFAULT_BASE);
            Rope { base, scaling: RopeScaling::None, ..global }
        }
    };
    let full = LayerConfig { window: None, rope: global };
    let windowed = LayerConfig { window: Some(window as u32), rope: local };
    let is_local = local_layers(fields, layers)?;
    Ok(is_local.into_iter().map(|l| if l { windowed } else { full }).collect())
}

/// Which of Gemma 3's layers are local; `layer_types` wins over any pattern.
fn local_layers(fields: &Fields<'_>, layers: usize) -> Result<Vec<bool>, HeaderError> {
    let Some(types) = fields.present("layer_types") else {
        let pattern = match fields.count("sliding_window_pattern")? {
            Some(pattern) => Some(pattern),
            None => fields.count("_sliding_window_pattern")?,
        };
        let pattern = pattern.map_or(GEMMA3_PATTERN, |p| p as u64);
        return Ok((1..=layers as u64).map(|l| l % pattern != 0).collect());
    };
    let kind = |v: &Value| match v.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let flags: Option<Vec<bool>> = types.as_array().and_then(|a| a.iter().map(kind).collect());
    flags
        .filter(|f| f.len() == layers)
        .ok_or_else(|| fields.wrong("layer_types", &format!("{layers} of sliding_attention and full_attention"), types))
}

/// Where a layer kind's rotary settings are.
enum RopeFields<'a> {
    /// `rope_parameters`.
    New(Fields<'a>),
    /// `rope_theta` and `rope_scaling`.
    Old,
}

fn rope_fields<'a>(fields: &Fields<'a>, kind: Option<&str>) -> Result<RopeFields<'a>, HeaderError> {
    let Some(parameters) = fields.object("rope_parameters")? else { return Ok(RopeFields::Old) };
    match kind {
        None => Ok(RopeFields::New(parameters)),
        Some(kind) => match parameters.object(kind)? {
            Some(own) => Ok(RopeFields::New(own)),
            None => Err(parameters.missing(kind, "an object")),
        },
    }
}

fn rope(place: &RopeFields<'_>, fields: &Fields<'_>, default_base: f64, head_dim: usize) -> Result<Rope, HeaderError> {
    let (base, scaling) = match place {
        RopeFields::New(own) => (own.positive("rope_theta")?, rope_scaling(own, fields)?),
        RopeFields::Old => {
            let scaling = match fields.object("rope_scaling")? {
                Some(own) => rope_scaling(&own, fields)?,
                None => RopeScaling::None,
            };
            (fields.positive("rope_theta")?, scaling)
        }
    };
    let partial = match place {
        RopeFields::New(own) if own.present("partial_rotary_factor").is_some() => own.positive("partial_rotary_factor")?,
        _ => fields.positive("partial_rotary_factor")?,
    };
    let dims = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    if dims == 0 || dims > head_dim || !dims.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", "an even number of rotated values", &dims.into()));
    }
    Ok(Rope { base: base.unwrap_or(default_base), dims, layout: RopeLayout::Halves, scaling })
}

fn rope_scaling(own: &Fields<'_>, fields: &Fields<'_>) -> Result<RopeScaling, HeaderError> {
    let kind = match own.text("rope_type")? {
        Some(kind) => Some(kind),
        None => own.text("type")?,
    };
    let number = |name: &str| own.positive(name)?.ok_or_else(|| own.missing(name, "a positive number"));
    match kind.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => {
            let original = match own.positive("original_max_position_embeddings")? {
                Some(original) => Some(original),
                None => fields.positive("original_max_position_embeddings")?,
            };
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if low >= high {
                return Err(own.wrong("low_freq_factor", &format!("less than high_freq_factor, {high}"), &low.into()));
            }
            Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original.ok_or_else(|| own.missing("original_max_position_embeddings", "a positive number"))?,
            })
        }
        got => Err(own.unsupported("rope_type", "default, linear or llama3", got)),
    }
}

/// Access to a JSON object's fields, with errors that name them.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// The field, unless it is absent or null.
    fn present(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn wrong(&self, name: &str, expected: &str, got: &Value) -> HeaderError {
        let mut got = got.to_string();
        if let Some((end, _)) = got.char_indices().nth(100) {
            got.truncate(end);
            got.push('…');
        }
        HeaderError::Field { file: FILE.to_owned(), field: self.name(name), expected: expected.to_owned(), got }
    }

    fn missing(&self, name: &str, expected: &str) -> HeaderError {
        HeaderError::Field { file: FILE.to_owned(), field: self.name(name), expected: expected.to_owned(), got: "missing".to_owned() }
    }

    fn unsupported(&self, name: &str, expected: &'static str, got: &str) -> HeaderError {
        HeaderError::UnsupportedFeature { file: FILE.to_owned(), field: self.name(name), expected, got: got.to_owned() }
    }

    fn object(&self, name: &str) -> Result<Option<Self>, HeaderError> {
        match self.present(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, path: format!("{}{name}.", self.path) })),
            Some(other) => Err(self.wrong(name, "an object", other)),
        }
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, "text", value))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(name, "true or false", value))
    }

    fn count(&self, name: &str) -> Result<Option<usize>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        let count = value.as_u64().filter(|n| (1..=MAX_COUNT).contains(n));
        count.map(|n| Some(n as usize)).ok_or_else(|| self.wrong(name, &format!("an integer from 1 to {MAX_COUNT}"), value))
    }

    fn required(&self, name: &str) -> Result<usize, HeaderError> {
        self.count(name)?.ok_or_else(|| self.missing(name, "an integer"))
    }

    fn positive(&self, name: &str) -> Result<Option<f64>, HeaderError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        let number = value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        number.map(Some).ok_or_else(|| self.wrong(name, "a positive number", value))
    }
}
