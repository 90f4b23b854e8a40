//! A model's shape from GGUF metadata.

use super::{Found, HeaderError, MAX_COUNT, MAX_LAYERS, assemble, roles};
use crate::{
    gguf::{Header, Value},
    model::{Activation, Architecture, Format, LayerConfig, ModelConfig, ModelFile, ModelHeader, Rope, RopeLayout, RopeScaling},
};

/// Gemma 3: of every 6 layers the first 5 are local, unless the file says otherwise.
const GEMMA3_PATTERN: u64 = 6;
/// Rotary base of Gemma 3's local layers.
const GEMMA3_LOCAL_BASE: f64 = 10_000.0;
/// Rotary base when the file gives none, as in llama.cpp.
const DEFAULT_BASE: f64 = 10_000.0;
/// Layers of Gemma 3 27B, whose score scale is `1 / sqrt(hidden / heads)`.
const GEMMA3_27B_LAYERS: usize = 62;

/// Makes a model's header from that of its one GGUF file.
///
/// # Errors
/// When the architecture, a setting, a tensor's name, type or shape is not what Skein supports.
pub fn from_gguf(file: ModelFile, header: &Header) -> Result<ModelHeader, HeaderError> {
    let meta = Meta { header, file: &file.name, arch: "" };
    let arch = meta.text("general.architecture")?.ok_or_else(|| meta.missing("general.architecture", "the model's architecture"))?;
    let meta = Meta { arch, ..meta };
    let architecture = match arch {
        "llama" => Architecture::Llama,
        "gemma3" => Architecture::Gemma3,
        got => {
            let (file, field) = (file.name.clone(), meta.place("general.architecture".to_owned()));
            return Err(HeaderError::UnsupportedArchitecture { file, field, got: got.to_owned(), expected: "llama or gemma3" });
        }
    };
    if let Some(parts) = meta.count("split.count")?.filter(|&n| n > 1) {
        return Err(HeaderError::UnsupportedFeature {
            file: file.name.clone(),
            field: meta.place("split.count".to_owned()),
            expected: "a model in one file",
            got: format!("{parts} files"),
        });
    }
    let config = config(&meta, architecture)?;
    let found = header.tensors.iter().map(|t| Found {
        name: t.name.clone(),
        file: 0,
        entry_offset: t.entry_offset,
        dtype: t.kind.dtype().ok_or_else(|| t.kind.name.to_owned()),
        shape: t.dims.iter().rev().copied().collect(),
        offset: t.offset,
        bytes: t.bytes,
    });
    let wanted = roles::wanted(&config, Format::GGUF, roles::Biases::IfPresent);
    let found = found.collect();
    assemble(Format::GGUF, config, vec![file], found, wanted)
}

fn config(meta: &Meta<'_>, architecture: Architecture) -> Result<ModelConfig, HeaderError> {
    let hidden = meta.required("embedding_length")?;
    let heads = meta.required("attention.head_count")?;
    let kv_heads = meta.arch_count("attention.head_count_kv")?.unwrap_or(heads);
    let layers = meta.required("block_count")?;
    let head_dim = match meta.arch_count("attention.key_length")? {
        Some(dim) => dim,
        None if hidden % heads == 0 => hidden / heads,
        None => return Err(meta.wrong("attention.head_count", "a divisor of the embedding length", &heads.to_string())),
    };
    if let Some(value) = meta.arch_count("attention.value_length")?.filter(|&v| v != head_dim) {
        return Err(meta.wrong("attention.value_length", &format!("the key length, {head_dim}"), &value.to_string()));
    }
    if kv_heads > heads || heads % kv_heads != 0 {
        return Err(meta.wrong("attention.head_count_kv", &format!("a divisor of the {heads} heads"), &kv_heads.to_string()));
    }
    if layers as u64 > MAX_LAYERS {
        return Err(meta.wrong("block_count", &format!("at most {MAX_LAYERS} layers"), &layers.to_string()));
    }
    refuse_features(meta)?;
    let eps = meta.positive("attention.layer_norm_rms_epsilon")?;
    let eps = eps.ok_or_else(|| meta.wrong("attention.layer_norm_rms_epsilon", "a positive number", "missing"))?;
    let tied = !meta.header.tensors.iter().any(|t| t.name == "output.weight");
    let gemma = architecture == Architecture::Gemma3;
    let score_width = if gemma && layers == GEMMA3_27B_LAYERS { hidden / heads } else { head_dim };
    Ok(ModelConfig {
        architecture,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn: meta.required("feed_forward_length")?,
        vocab: vocab(meta)?,
        context: meta.required("context_length")?,
        norm_eps: eps as f32,
        norm_weight_offset: 0.0,
        activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
        embedding_scale: if gemma { (hidden as f64).sqrt() as f32 } else { 1.0 },
        attention_scale: (1.0 / (score_width as f64).sqrt()) as f32,
        tied_embeddings: tied,
        layers: layer_configs(meta, architecture, layers, head_dim)?,
    })
}

/// Refuses what a file asks for and no forward pass here does.
fn refuse_features(meta: &Meta<'_>) -> Result<(), HeaderError> {
    let experts = meta.arch_count_or_zero("expert_count")?;
    if experts > 0 {
        return Err(meta.unsupported("expert_count", "dense models", &format!("{experts} experts")));
    }
    for name in ["final_logit_softcapping", "attn_logit_softcapping"] {
        if let Some(cap) = meta.float(name)?.filter(|&c| c != 0.0) {
            return Err(meta.unsupported(name, "models without logit soft-capping", &cap.to_string()));
        }
    }
    if let Some(factor) = meta.float("rope.scaling.attn_factor")?.filter(|&f| f != 1.0) {
        return Err(meta.unsupported("rope.scaling.attn_factor", "1", &factor.to_string()));
    }
    match meta.header.get(&meta.key("attention.causal")) {
        None | Some(Value::Bool(true)) => Ok(()),
        Some(Value::Bool(false)) => Err(meta.unsupported("attention.causal", "causal attention", "false")),
        Some(other) => Err(meta.wrong("attention.causal", "a bool", other.kind().name())),
    }
}

fn vocab(meta: &Meta<'_>) -> Result<usize, HeaderError> {
    let tokens = meta.header.get("tokenizer.ggml.tokens").and_then(Value::as_array).map(|a| a.len);
    if let Some(vocab) = meta.arch_count("vocab_size")? {
        // An id without a row in the table could otherwise come out of the tokenizer.
        return match tokens.filter(|&n| n > vocab as u64) {
            Some(n) => Err(meta.wrong("vocab_size", &format!("at least the {n} tokens of the tokenizer"), &vocab.to_string())),
            None => Ok(vocab),
        };
    }
    let rows = || meta.header.tensors.iter().find(|t| t.name == "token_embd.weight").and_then(|t| t.dims.get(1).copied());
    let vocab = tokens.or_else(rows).filter(|&v| v > 0 && v <= MAX_COUNT);
    vocab.map(|v| v as usize).ok_or_else(|| meta.missing("tokenizer.ggml.tokens", "the vocabulary"))
}

fn layer_configs(meta: &Meta<'_>, architecture: Architecture, layers: usize, head_dim: usize) -> Result<Vec<LayerConfig>, HeaderError> {
    let dims = meta.arch_count("rope.dimension_count")?.unwrap_or(head_dim);
    if dims > head_dim || !dims.is_multiple_of(2) {
        return Err(meta.wrong("rope.dimension_count", &format!("an even number up to the head's {head_dim}"), &dims.to_string()));
    }
    let base = meta.positive("rope.freq_base")?.unwrap_or(DEFAULT_BASE);
    let layout = if architecture == Architecture::Llama { RopeLayout::Adjacent } else { RopeLayout::Halves };
    let scaling = rope_scaling(meta)?;
    let full = LayerConfig { window: None, rope: Rope { base, dims, layout, scaling } };
    if architecture == Architecture::Llama {
        if let Some(window) = meta.arch_count("attention.sliding_window")? {
            return Err(meta.unsupported("attention.sliding_window", "llama without a sliding window", &window.to_string()));
        }
        return Ok(vec![full; layers]);
    }
    if scaling == RopeScaling::Tensor {
        return Err(meta.unsupported("rope_freqs.weight", "gemma3 without rotary divisors", "divisors per pair"));
    }
    let window = meta.required("attention.sliding_window")?;
    let local_base = meta.positive("rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_BASE);
    let rope = Rope { base: local_base, dims, layout, scaling: RopeScaling::None };
    let local = LayerConfig { window: Some(window as u32), rope };
    let is_local = local_layers(meta, layers)?;
    Ok(is_local.into_iter().map(|l| if l { local } else { full }).collect())
}

/// Which of Gemma 3's layers are local.
fn local_layers(meta: &Meta<'_>, layers: usize) -> Result<Vec<bool>, HeaderError> {
    let key = "attention.sliding_window_pattern";
    let pattern = match meta.header.get(&meta.key(key)) {
        None => GEMMA3_PATTERN,
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

fn rope_scaling(meta: &Meta<'_>) -> Result<RopeScaling, HeaderError> {
    if meta.header.tensors.iter().any(|t| t.name == "rope_freqs.weight") {
        return Ok(RopeScaling::Tensor);
    }
    let factor = match meta.positive("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => meta.positive("rope.scale_linear")?,
    };
    match (meta.text(&meta.key("rope.scaling.type"))?, factor) {
        (Some("none"), _) | (None, None) => Ok(RopeScaling::None),
        (Some("linear") | None, Some(factor)) => Ok(if factor == 1.0 { RopeScaling::None } else { RopeScaling::Linear { factor } }),
        (Some("linear"), None) => Err(meta.wrong("rope.scaling.factor", "a positive number", "missing")),
        (Some(got), _) => Err(meta.unsupported("rope.scaling.type", "none or linear", got)),
    }
}

/// Access to the metadata of one file, with errors that name key and file.
struct Meta<'a> {
    header: &'a Header,
    file: &'a str,
    arch: &'a str,
}

impl<'a> Meta<'a> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    /// A key with the place of its value, or the place where it would be.
    fn place(&self, key: String) -> String {
        match self.header.entry(&key) {
            Some(entry) => format!("{key} at byte {}", entry.offset),
            None => format!("{key} before byte {}", self.header.data_offset),
        }
    }

    fn field(&self, key: String, expected: &str, got: &str) -> HeaderError {
        let field = self.place(key);
        HeaderError::Field { file: self.file.to_owned(), field, expected: expected.to_owned(), got: got.to_owned() }
    }

    fn wrong(&self, name: &str, expected: &str, got: &str) -> HeaderError {
        self.field(self.key(name), expected, got)
    }

    fn missing(&self, key: &str, expected: &str) -> HeaderError {
        self.field(key.to_owned(), expected, "missing")
    }

    fn unsupported(&self, name: &str, expected: &'static str, got: &str) -> HeaderError {
        HeaderError::UnsupportedFeature { file: self.file.to_owned(), field: self.place(self.key(name)), expected, got: got.to_owned() }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, HeaderError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.field(key.to_owned(), "text", value.kind().name()))
    }

    /// A count; an array of equal counts, one per layer, is the same.
    fn count(&self, key: &str) -> Result<Option<u64>, HeaderError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        let count = match value {
            Value::Array(array) => {
                let values = array.values.as_deref().unwrap_or_default();
                match values.split_first() {
                    Some((first, rest)) if rest.iter().all(|v| v == first) => first.as_u64(),
                    Some(_) => return Err(self.field(key.to_owned(), "the same in every layer", "different values")),
                    None => None,
                }
            }
            value => value.as_u64(),
        };
        let count = count.filter(|&n| n <= MAX_COUNT);
        count.map(Some).ok_or_else(|| self.field(key.to_owned(), &format!("an integer from 0 to {MAX_COUNT}"), &format!("{value:?}")))
    }

    fn arch_count_or_zero(&self, name: &str) -> Result<u64, HeaderError> {
        Ok(self.count(&self.key(name))?.unwrap_or(0))
    }

    /// A count of at least 1.
    fn arch_count(&self, name: &str) -> Result<Option<usize>, HeaderError> {
        match self.count(&self.key(name))? {
            Some(0) => Err(self.wrong(name, "at least 1", "0")),
            count => Ok(count.map(|n| n as usize)),
        }
    }

    fn required(&self, name: &str) -> Result<usize, HeaderError> {
        self.arch_count(name)?.ok_or_else(|| self.wrong(name, "an integer", "missing"))
    }

    fn float(&self, name: &str) -> Result<Option<f64>, HeaderError> {
        let Some(value) = self.header.get(&self.key(name)) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(name, "a float", value.kind().name()))
    }

    fn positive(&self, name: &str) -> Result<Option<f64>, HeaderError> {
        match self.float(name)? {
            Some(v) if v.is_finite() && v > 0.0 => Ok(Some(v)),
            Some(v) => Err(self.wrong(name, "a positive number", &v.to_string())),
            None => Ok(None),
        }
    }
}
