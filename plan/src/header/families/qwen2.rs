//! Qwen 2 and 2.5: Yang et al. 2024, arXiv:2407.10671. [Llama](super::llama) with biases on query, key and value, and optionally a sliding
//! window in the later layers.

use super::{Family, llama::LLAMA};
use crate::{
    header::{HeaderError, fields::Fields, gguf, hf, hf::HfConfig, metadata::Meta, tensors::Biases},
    model::{Architecture, ModelConfig, RopeLayout},
};

pub(super) const QWEN2: Family =
    Family { name: "qwen2", class: "Qwen2ForCausalLM", model_type: "qwen2", from_hf, gguf: Some("qwen2"), from_gguf, ..LLAMA };

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let mut config = hf::decoder(fields, Architecture::Qwen2)?;
    hf::late_windows(fields, &mut config)?;
    Ok(HfConfig { config, biases: Biases { qkv: true, ..Biases::default() } })
}

fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    gguf::refuse_window(meta)?;
    gguf::decoder(meta, Architecture::Qwen2, RopeLayout::Halves)
}
