//! A model's shape from GGUF metadata: what most families share.

use super::{Found, HeaderError, MAX_COUNT, MAX_EXPERTS, MAX_LAYERS, assemble, families, metadata::Meta, rope::gguf_rope};
use crate::{
    gguf::{Header, Value},
    model::{Activation, Architecture, Experts, Format, LayerConfig, ModelConfig, ModelFile, ModelHeader, Rope, RopeLayout},
};

/// Makes a model's header from that of its one GGUF file.
///
/// # Errors
/// When the architecture, a setting, a tensor's name, type or shape is not what Skein supports.
pub fn from_gguf(file: ModelFile, header: &Header) -> Result<ModelHeader, HeaderError> {
    from_gguf_parts(&[(file, header.clone())])
}

/// Makes a model's header from those of all parts of its GGUF file; the first one carries the metadata.
///
/// # Errors
/// As [`from_gguf`], and when a part is missing or another one's.
pub fn from_gguf_parts(parts: &[(ModelFile, Header)]) -> Result<ModelHeader, HeaderError> {
    let Some((file, header)) = parts.first() else {
        return Err(HeaderError::MissingTensor {
            name: "token_embd.weight".into(),
            place: "a model without weight files".into(),
            shape: Vec::new(),
        });
    };
    // What depends on whether a tensor is there asks all parts.
    let tensors = parts.iter().flat_map(|(_, header)| header.tensors.iter().cloned()).collect();
    let whole = Header { tensors, ..header.clone() };
    let meta = Meta { header: &whole, file: &file.name, arch: "" };
    let arch = meta.text("general.architecture")?.ok_or_else(|| meta.missing("general.architecture", "the model's architecture"))?;
    let meta = Meta { arch, ..meta };
    let family = families::of_gguf(&meta)?;
    check_parts(parts)?;
    let config = (family.from_gguf)(&meta)?;
    refuse_features(&meta, config.encoder.is_none())?;
    refuse_experts(&meta, &config)?;
    let tensors = parts.iter().enumerate().flat_map(|(file, (_, header))| header.tensors.iter().map(move |t| (file, t)));
    let found = tensors.map(|(file, t)| Found {
        name: t.name.clone(),
        file,
        entry_offset: t.entry_offset,
        dtype: t.kind.dtype().ok_or_else(|| t.kind.name.to_owned()),
        shape: t.dims.iter().rev().copied().collect(),
        offset: t.offset,
        bytes: t.bytes,
    });
    let found = found.collect();
    let files = parts.iter().map(|(file, _)| file.clone()).collect();
    assemble(family, Format::GGUF, config, files, found, None)
}

/// Checks that the parts are those of one split file, in order and all of them.
fn check_parts(parts: &[(ModelFile, Header)]) -> Result<(), HeaderError> {
    let wrong = |(file, header): &(ModelFile, Header), key: &str, expected: u64, got: Option<u64>| {
        let meta = Meta { header, file: &file.name, arch: "" };
        meta.field(key.to_owned(), &expected.to_string(), &got.map_or_else(|| "missing".to_owned(), |n| n.to_string()))
    };
    let count = parts.len() as u64;
    for (index, part) in (0..).zip(parts) {
        let meta = Meta { header: &part.1, file: &part.0.name, arch: "" };
        let (number, all) = (meta.count("split.no")?, meta.count("split.count")?);
        if all.unwrap_or(u64::from(count == 1)).max(1) != count {
            return Err(wrong(part, "split.count", count, all));
        }
        if number.unwrap_or(0) != index {
            return Err(wrong(part, "split.no", index, number));
        }
        let tensors: u64 = parts.iter().map(|(_, header)| header.tensors.len() as u64).sum();
        let listed = meta.count("split.tensors.count")?;
        if listed.is_some_and(|n| n != tensors) {
            return Err(wrong(part, "split.tensors.count", tensors, listed));
        }
    }
    Ok(())
}

/// A decoder with the usual keys: RMS norms before its blocks, rotated heads, a feed-forward block gated by SiLU, full attention.
pub(super) fn decoder(meta: &Meta<'_>, architecture: Architecture, layout: RopeLayout) -> Result<ModelConfig, HeaderError> {
    let mut config = shape(meta, architecture, "attention.layer_norm_rms_epsilon")?;
    let rope = gguf_rope(meta, config.head_dim, layout)?;
    config.layers.iter_mut().for_each(|layer| layer.rope = rope.clone());
    Ok(config)
}

/// A decoder with layer norms, whose heads are not rotated.
pub(super) fn unrotated(meta: &Meta<'_>, architecture: Architecture) -> Result<ModelConfig, HeaderError> {
    let config = shape(meta, architecture, "attention.layer_norm_epsilon")?;
    Ok(ModelConfig { layer_norms: true, ..config })
}

/// The widths and counts of a decoder, its layers alike and not rotated; `eps` is the key of its norms' epsilon.
fn shape(meta: &Meta<'_>, architecture: Architecture, eps: &str) -> Result<ModelConfig, HeaderError> {
    let hidden = meta.required("embedding_length")?;
    let heads = meta.required("attention.head_count")?;
    let kv_heads = meta.arch_count("attention.head_count_kv")?.unwrap_or(heads);
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
    shape_with_heads(meta, architecture, eps, (kv_heads, head_dim))
}

/// As [`shape`], with heads of keys and of `head_dim` values as they are given.
pub(super) fn shape_with_heads(
    meta: &Meta<'_>,
    architecture: Architecture,
    eps: &str,
    (kv_heads, head_dim): (usize, usize),
) -> Result<ModelConfig, HeaderError> {
    let hidden = meta.required("embedding_length")?;
    let heads = meta.required("attention.head_count")?;
    let layers = meta.required("block_count")?;
    if layers as u64 > MAX_LAYERS {
        return Err(meta.wrong("block_count", &format!("at most {MAX_LAYERS} layers"), &layers.to_string()));
    }
    let eps = meta.positive(eps)?.ok_or_else(|| meta.wrong(eps, "a positive number", "missing"))?;
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
        activation: Activation::Silu,
        embedding_scale: 1.0,
        attention_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        tied_embeddings: !meta.header.tensors.iter().any(|t| t.name == "output.weight"),
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
        layers: vec![LayerConfig { window: None, rope: Rope::NONE, experts: false }; layers],
    })
}

/// Gives every layer the window of the file, where there is one.
pub(super) fn window_everywhere(meta: &Meta<'_>, config: &mut ModelConfig) -> Result<(), HeaderError> {
    if meta.header.get(&meta.key("attention.sliding_window_pattern")).is_some() {
        return Err(meta.unsupported("attention.sliding_window_pattern", "one window for all layers", "a pattern"));
    }
    // Some writers say 0 where there is none.
    let window = meta.count(&meta.key("attention.sliding_window"))?.filter(|&w| w > 0);
    if let Some(window) = window {
        config.layers.iter_mut().for_each(|layer| layer.window = Some(window as u32));
    }
    Ok(())
}

/// Refuses a window, of which this family's files do not say which layers have it.
pub(super) fn refuse_window(meta: &Meta<'_>) -> Result<(), HeaderError> {
    match meta.count(&meta.key("attention.sliding_window"))?.filter(|&w| w > 0) {
        Some(window) => Err(meta.unsupported("attention.sliding_window", "no sliding window", &window.to_string())),
        None => Ok(()),
    }
}

/// Makes the feed-forward block of every layer a mixture of experts of width `ffn`, where the file has experts.
pub(super) fn experts_everywhere(meta: &Meta<'_>, config: &mut ModelConfig, ffn: usize) -> Result<(), HeaderError> {
    let Some((count, used)) = expert_counts(meta)? else { return Ok(()) };
    for (name, expected) in [("expert_shared_count", "no shared experts"), ("leading_dense_block_count", "experts in every layer")] {
        let got = meta.arch_count_or_zero(name)?;
        if got > 0 {
            return Err(meta.unsupported(name, expected, &got.to_string()));
        }
    }
    if let Some(gating) = meta.count(&meta.key("expert_gating_func"))?.filter(|&g| g > 1) {
        return Err(meta.unsupported("expert_gating_func", "1, softmax", &gating.to_string()));
    }
    if let Some(scale) = meta.float("expert_weights_scale")?.filter(|&s| s != 0.0 && s != 1.0) {
        return Err(meta.unsupported("expert_weights_scale", "1", &scale.to_string()));
    }
    let normalize = weights_norm(meta)?.unwrap_or(true);
    config.experts = Some(Experts::softmax(count, used, ffn, normalize));
    config.layers.iter_mut().for_each(|layer| layer.experts = true);
    Ok(())
}

/// Number of experts, and how many of them a token goes to, where the file has experts.
pub(super) fn expert_counts(meta: &Meta<'_>) -> Result<Option<(usize, usize)>, HeaderError> {
    let count = meta.arch_count_or_zero("expert_count")?;
    if count == 0 {
        return Ok(None);
    }
    if count > MAX_EXPERTS {
        return Err(meta.wrong("expert_count", &format!("at most {MAX_EXPERTS} experts"), &count.to_string()));
    }
    let used = meta.required("expert_used_count")?;
    if used as u64 > count {
        return Err(meta.wrong("expert_used_count", &format!("at most the {count} experts"), &used.to_string()));
    }
    Ok(Some((count as usize, used)))
}

/// Whether the weights of chosen experts are divided by their sum, where the file says.
pub(super) fn weights_norm(meta: &Meta<'_>) -> Result<Option<bool>, HeaderError> {
    match meta.header.get(&meta.key("expert_weights_norm")) {
        None => Ok(None),
        Some(Value::Bool(normalize)) => Ok(Some(*normalize)),
        Some(other) => Err(meta.wrong("expert_weights_norm", "a bool", other.kind().name())),
    }
}

/// Refuses experts in a family that has none.
fn refuse_experts(meta: &Meta<'_>, config: &ModelConfig) -> Result<(), HeaderError> {
    match meta.arch_count_or_zero("expert_count")? {
        count if count > 0 && config.experts.is_none() => {
            Err(meta.unsupported("expert_count", "a dense model of this architecture", &format!("{count} experts")))
        }
        _ => Ok(()),
    }
}

/// Refuses what a file asks for and no forward pass here does.
fn refuse_features(meta: &Meta<'_>, causal: bool) -> Result<(), HeaderError> {
    for name in ["final_logit_softcapping", "attn_logit_softcapping"] {
        if let Some(cap) = meta.float(name)?.filter(|&c| c != 0.0) {
            return Err(meta.unsupported(name, "models without logit soft-capping", &cap.to_string()));
        }
    }
    match meta.header.get(&meta.key("attention.causal")) {
        None => Ok(()),
        Some(Value::Bool(got)) if *got == causal => Ok(()),
        Some(Value::Bool(false)) => Err(meta.unsupported("attention.causal", "causal attention", "false")),
        Some(Value::Bool(true)) => Err(meta.unsupported("attention.causal", "attention to whole sequences", "true")),
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
