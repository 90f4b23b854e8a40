//! Mistral: Jiang et al. 2023, arXiv:2310.06825. [Llama](super::llama) with a sliding window in every layer:
//! key `j` is visible to query `i` when `0 <= i - j < window`.
//!
//! In GGUF its files are those of `llama`.

use super::{Family, llama::LLAMA};
use crate::{
    header::{HeaderError, fields::Fields, hf, hf::HfConfig, tensors::Biases},
    model::Architecture,
};

pub(super) const MISTRAL: Family =
    Family { name: "mistral", class: "MistralForCausalLM", model_type: "mistral", from_hf, gguf: None, ..LLAMA };

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let mut config = hf::decoder(fields, Architecture::Mistral)?;
    hf::window_everywhere(fields, &mut config)?;
    Ok(HfConfig { config, biases: Biases::default() })
}
