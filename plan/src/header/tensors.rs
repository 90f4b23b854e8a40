//! Which tensors a model has, by what name and with what shape.

use super::families::Family;
use crate::model::{Format, ModelConfig, Role, RopeScaling, TensorId};

/// Where the values of a role are stored.
#[derive(Clone, Copy)]
pub(super) struct Name {
    /// Name of the tensor, within its layer for layer tensors.
    pub(super) stem: &'static str,
    /// The roles whose rows follow each other in it; empty when it is one role's alone.
    pub(super) parts: &'static [Role],
}

impl Name {
    /// A tensor of its own.
    pub(super) const fn own(stem: &'static str) -> Self {
        Self { stem, parts: &[] }
    }

    /// Rows of a tensor that several roles share, in the order of `parts`.
    pub(super) const fn fused(stem: &'static str, parts: &'static [Role]) -> Self {
        Self { stem, parts }
    }
}

/// A tensor that a model should have.
pub(super) struct Wanted {
    pub(super) id: TensorId,
    /// Name of the tensor in the file.
    pub(super) name: String,
    /// Shape of that tensor.
    pub(super) stored: Vec<usize>,
    /// The row of it at which this one begins.
    pub(super) first_row: usize,
    /// Shape of this one.
    pub(super) shape: Vec<usize>,
    pub(super) optional: bool,
}

/// Which products of the layers have biases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Query, key and value.
    pub qkv: bool,
    /// Attention output.
    pub o: bool,
    /// The feed-forward block.
    pub mlp: bool,
}

const QKV_BIASES: [Role; 3] = [Role::QBias, Role::KBias, Role::VBias];
const MLP_BIASES: [Role; 3] = [Role::GateBias, Role::UpBias, Role::DownBias];

/// Tensors that some files carry and no forward pass needs.
pub(super) fn ignorable(name: &str, tied: bool) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (tied && name == "lm_head.weight")
}

/// Every tensor of a model, in the order of [`Role`]. Without `biases` those that the file has are taken (GGUF).
pub(super) fn wanted(family: &Family, config: &ModelConfig, format: Format, biases: Option<Biases>) -> Vec<Wanted> {
    let mut outer = vec![Role::Embedding, Role::OutputNorm];
    if !config.tied_embeddings {
        outer.push(Role::Output);
    }
    if config.layers.iter().any(|l| l.rope.scaling == RopeScaling::Tensor) {
        outer.push(Role::RopeFactors);
    }
    let biases = match biases {
        None => QKV_BIASES.into_iter().chain([Role::OBias]).chain(MLP_BIASES).map(|role| (role, true)).collect(),
        Some(b) => {
            let with = |roles: &[Role], wanted: bool| roles.iter().filter(|_| wanted).map(|&role| (role, false)).collect::<Vec<_>>();
            [with(&QKV_BIASES, b.qkv), with(&[Role::OBias], b.o), with(&MLP_BIASES, b.mlp)].concat()
        }
    };
    let make = |layer: Option<u32>, role: Role, optional: bool| {
        let name = match format {
            Format::GGUF => (family.gguf_name)(role),
            Format::Safetensors => (family.hf_name)(role),
        };
        let shape = config.shape(role);
        let rows = |role: Role| config.shape(role)[0];
        let (first_row, all_rows) = if name.parts.is_empty() {
            (0, shape[0])
        } else {
            (
                name.parts.iter().take_while(|&&part| part != role).map(|&part| rows(part)).sum(),
                name.parts.iter().map(|&part| rows(part)).sum(),
            )
        };
        let mut stored = shape.clone();
        stored[0] = all_rows;
        let name = match (layer, format) {
            (Some(layer), Format::GGUF) => format!("blk.{layer}.{}", name.stem),
            (Some(layer), Format::Safetensors) => format!("{}{layer}.{}", family.hf_layers, name.stem),
            (None, _) => name.stem.to_owned(),
        };
        Wanted { id: TensorId { layer, role }, name, stored, first_row, shape, optional }
    };
    let mut all: Vec<Wanted> = outer.into_iter().map(|role| make(None, role, false)).collect();
    for layer in 0..config.layers.len() as u32 {
        all.extend(layer_roles(config).into_iter().map(|role| make(Some(layer), role, false)));
        all.extend(biases.iter().map(|&(role, optional)| make(Some(layer), role, optional)));
    }
    all
}

/// The roles of a layer, biases aside.
fn layer_roles(config: &ModelConfig) -> Vec<Role> {
    let mut roles = vec![Role::AttnNorm, Role::Q, Role::K, Role::V, Role::O, Role::FfnNorm, Role::Gate, Role::Up, Role::Down];
    if config.head_norms {
        roles.extend([Role::QNorm, Role::KNorm]);
    }
    if config.block_norms {
        roles.extend([Role::PostAttnNorm, Role::PostFfnNorm]);
    }
    roles
}

/// Names in GGUF that most families share.
pub(super) const fn gguf_name(role: Role) -> Name {
    Name::own(match role {
        Role::Embedding => "token_embd.weight",
        Role::RopeFactors => "rope_freqs.weight",
        Role::OutputNorm => "output_norm.weight",
        Role::Output => "output.weight",
        Role::AttnNorm => "attn_norm.weight",
        Role::Q => "attn_q.weight",
        Role::QBias => "attn_q.bias",
        Role::K => "attn_k.weight",
        Role::KBias => "attn_k.bias",
        Role::V => "attn_v.weight",
        Role::VBias => "attn_v.bias",
        Role::QNorm => "attn_q_norm.weight",
        Role::KNorm => "attn_k_norm.weight",
        Role::O => "attn_output.weight",
        Role::OBias => "attn_output.bias",
        Role::PostAttnNorm => "post_attention_norm.weight",
        Role::FfnNorm => "ffn_norm.weight",
        Role::Gate => "ffn_gate.weight",
        Role::GateBias => "ffn_gate.bias",
        Role::Up => "ffn_up.weight",
        Role::UpBias => "ffn_up.bias",
        Role::Down => "ffn_down.weight",
        Role::DownBias => "ffn_down.bias",
        Role::PostFfnNorm => "post_ffw_norm.weight",
    })
}

/// Names in Hugging Face's files that most families share, those of Llama; layer tensors come behind `model.layers.N.`.
pub(super) const fn hf_name(role: Role) -> Name {
    Name::own(match role {
        Role::Embedding => "model.embed_tokens.weight",
        Role::RopeFactors => "rope_freqs.weight",
        Role::OutputNorm => "model.norm.weight",
        Role::Output => "lm_head.weight",
        Role::AttnNorm => "input_layernorm.weight",
        Role::Q => "self_attn.q_proj.weight",
        Role::QBias => "self_attn.q_proj.bias",
        Role::K => "self_attn.k_proj.weight",
        Role::KBias => "self_attn.k_proj.bias",
        Role::V => "self_attn.v_proj.weight",
        Role::VBias => "self_attn.v_proj.bias",
        Role::QNorm => "self_attn.q_norm.weight",
        Role::KNorm => "self_attn.k_norm.weight",
        Role::O => "self_attn.o_proj.weight",
        Role::OBias => "self_attn.o_proj.bias",
        Role::PostAttnNorm => "post_attention_layernorm.weight",
        Role::FfnNorm => "post_attention_layernorm.weight",
        Role::Gate => "mlp.gate_proj.weight",
        Role::GateBias => "mlp.gate_proj.bias",
        Role::Up => "mlp.up_proj.weight",
        Role::UpBias => "mlp.up_proj.bias",
        Role::Down => "mlp.down_proj.weight",
        Role::DownBias => "mlp.down_proj.bias",
        Role::PostFfnNorm => "post_feedforward_layernorm.weight",
    })
}
