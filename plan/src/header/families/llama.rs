//! Llama 2 and 3, TinyLlama, SmolLM2 and what else is shaped like them: Touvron et al. 2023, arXiv:2302.13971; Dubey et al. 2024, arXiv:2407.21783.
//!
//! ```text
//! x  = E[id]
//! x += Wo · attention(rope(Wq h), rope(Wk h), Wv h)      h = rms(x)
//! x += Wdown · (silu(Wgate h) ⊙ Wup h)                   h = rms(x)
//! logits = Wout · rms(x)
//! ```
//! GGUF permutes the rows of `Wq` and `Wk` so that rotated pairs are neighbours.

use super::Family;
use crate::{
    header::{HeaderError, fields::Fields, gguf, hf, hf::HfConfig, metadata::Meta, target, tensors, tensors::Biases},
    model::{Architecture, ModelConfig, RopeLayout},
};

pub(super) const LLAMA: Family = Family {
    name: "llama",
    class: "LlamaForCausalLM",
    also: &[],
    model_type: "llama",
    from_hf,
    to_hf: target::decoder,
    hf_base: "model.",
    hf_layers: "model.layers.",
    hf_name: tensors::hf_name,
    gguf: Some("llama"),
    from_gguf,
    gguf_name: tensors::gguf_name,
};

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let config = hf::decoder(fields, Architecture::Llama)?;
    let attention = fields.flag("attention_bias")?.unwrap_or(false);
    let mlp = fields.flag("mlp_bias")?.unwrap_or(false);
    Ok(HfConfig { config, biases: Biases { qkv: attention, o: attention, mlp } })
}

/// Files of Mistral and Mixtral are of this architecture too: with a window in every layer, with experts in every layer.
fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    let mut config = gguf::decoder(meta, Architecture::Llama, RopeLayout::Adjacent)?;
    gguf::window_everywhere(meta, &mut config)?;
    let ffn = meta.arch_count("expert_feed_forward_length")?.unwrap_or(config.ffn);
    gguf::experts_everywhere(meta, &mut config, ffn)?;
    Ok(config)
}
