//! Phi 3, 3.5 and 4 mini: Abdin et al. 2024, arXiv:2404.14219. [Llama](super::llama) with a sliding window in every layer, heads of which
//! only a part may be rotated, and its products stored together: query, key and value in one tensor, gate and up in another.

use super::{Family, llama::LLAMA};
use crate::{
    header::{
        HeaderError,
        fields::Fields,
        gguf, hf,
        hf::HfConfig,
        metadata::Meta,
        tensors::{self, Biases, Name},
    },
    model::{Architecture, ModelConfig, Role, RopeLayout},
};

pub(super) const PHI3: Family = Family {
    name: "phi3",
    class: "Phi3ForCausalLM",
    model_type: "phi3",
    from_hf,
    hf_name,
    gguf: Some("phi3"),
    from_gguf,
    gguf_name,
    ..LLAMA
};

const QKV: &[Role] = &[Role::Q, Role::K, Role::V];
const GATE_UP: &[Role] = &[Role::Gate, Role::Up];

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let mut config = hf::decoder(fields, Architecture::Phi3)?;
    hf::window_everywhere(fields, &mut config)?;
    Ok(HfConfig { config, biases: Biases::default() })
}

fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    let mut config = gguf::decoder(meta, Architecture::Phi3, RopeLayout::Halves)?;
    gguf::window_everywhere(meta, &mut config)?;
    Ok(config)
}

fn hf_name(role: Role) -> Name {
    match role {
        Role::Q | Role::K | Role::V => Name::fused("self_attn.qkv_proj.weight", QKV),
        Role::Gate | Role::Up => Name::fused("mlp.gate_up_proj.weight", GATE_UP),
        role => tensors::hf_name(role),
    }
}

fn gguf_name(role: Role) -> Name {
    match role {
        Role::Q | Role::K | Role::V => Name::fused("attn_qkv.weight", QKV),
        Role::Gate | Role::Up => Name::fused("ffn_up.weight", GATE_UP),
        role => tensors::gguf_name(role),
    }
}
