//! Qwen 3, dense: Yang et al. 2025, arXiv:2505.09388. [Llama](super::llama) whose query and key heads are normed before they are rotated,
//! `q = rope(rms(Wq h))`, and whose head width is a setting of its own.

use super::{Family, llama::LLAMA};
use crate::{
    header::{HeaderError, fields::Fields, gguf, hf, hf::HfConfig, metadata::Meta, tensors::Biases},
    model::{Architecture, ModelConfig, RopeLayout},
};

pub(super) const QWEN3: Family =
    Family { name: "qwen3", class: "Qwen3ForCausalLM", model_type: "qwen3", from_hf, gguf: Some("qwen3"), from_gguf, ..LLAMA };

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let mut config = hf::decoder(fields, Architecture::Qwen3)?;
    config.head_norms = true;
    hf::late_windows(fields, &mut config)?;
    let attention = fields.flag("attention_bias")?.unwrap_or(false);
    Ok(HfConfig { config, biases: Biases { qkv: attention, o: attention, mlp: false } })
}

fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    gguf::refuse_window(meta)?;
    let config = gguf::decoder(meta, Architecture::Qwen3, RopeLayout::Halves)?;
    Ok(ModelConfig { head_norms: true, ..config })
}
