//! Which tensors a model has, by what name and with what shape.

use crate::model::{Architecture, Format, ModelConfig, Role, TensorId};

/// A tensor that a model should have.
pub(super) struct Wanted {
    pub(super) id: TensorId,
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) optional: bool,
}

/// Which biases the layers have.
#[derive(Clone, Copy)]
pub(super) enum Biases {
    /// Those that are in the file (GGUF).
    IfPresent,
    /// As `config.json` says.
    Given { attention: bool, mlp: bool },
}

pub(super) const fn architecture_name(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama => "llama",
        Architecture::Gemma3 => "gemma3",
    }
}

/// Tensors that some files carry and no forward pass needs.
pub(super) fn ignorable(name: &str, tied: bool) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (tied && name == "lm_head.weight")
}

/// Every tensor of a model, in the order of [`Role`].
pub(super) fn wanted(config: &ModelConfig, format: Format, biases: Biases) -> Vec<Wanted> {
    let c = config;
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let matrix = |role, rows, columns| (role, vec![rows, columns], false);
    let vector = |role, len| (role, vec![len], false);
    let mut outer = vec![matrix(Role::Embedding, c.vocab, c.hidden), vector(Role::OutputNorm, c.hidden)];
    if !c.tied_embeddings {
        outer.push(matrix(Role::Output, c.vocab, c.hidden));
    }
    if format == Format::GGUF && c.layers.first().is_some_and(|l| l.rope.scaling == crate::model::RopeScaling::Tensor) {
        outer.push(vector(Role::RopeFactors, c.layers.first().map_or(0, |l| l.rope.dims / 2)));
    }
    let mut layer = vec![
        vector(Role::AttnNorm, c.hidden),
        matrix(Role::Q, q, c.hidden),
        matrix(Role::K, kv, c.hidden),
        matrix(Role::V, kv, c.hidden),
        matrix(Role::O, c.hidden, q),
        vector(Role::FfnNorm, c.hidden),
        matrix(Role::Gate, c.ffn, c.hidden),
        matrix(Role::Up, c.ffn, c.hidden),
        matrix(Role::Down, c.hidden, c.ffn),
    ];
    if c.architecture == Architecture::Gemma3 {
        layer.extend([vector(Role::QNorm, c.head_dim), vector(Role::KNorm, c.head_dim)]);
        layer.extend([vector(Role::PostAttnNorm, c.hidden), vector(Role::PostFfnNorm, c.hidden)]);
    }
    let attention = [(Role::QBias, q), (Role::KBias, kv), (Role::VBias, kv), (Role::OBias, c.hidden)];
    let mlp = [(Role::GateBias, c.ffn), (Role::UpBias, c.ffn), (Role::DownBias, c.hidden)];
    match biases {
        Biases::IfPresent => layer.extend(attention.into_iter().chain(mlp).map(|(role, len)| (role, vec![len], true))),
        Biases::Given { attention: with_attention, mlp: with_mlp } => {
            layer.extend(attention.into_iter().filter(|_| with_attention).map(|(role, len)| vector(role, len)));
            layer.extend(mlp.into_iter().filter(|_| with_mlp).map(|(role, len)| vector(role, len)));
        }
    }
    let make = |index: Option<u32>, (role, shape, optional): &(Role, Vec<usize>, bool)| {
        let name = match format {
            Format::GGUF => gguf_name(*role, index),
            Format::Safetensors => hf_name(c.architecture, *role, index),
        };
        Wanted { id: TensorId { layer: index, role: *role }, name, shape: shape.clone(), optional: *optional }
    };
    let layers = (0..c.layers.len() as u32).flat_map(|i| layer.iter().map(move |w| (Some(i), w)));
    outer.iter().map(|w| (None, w)).chain(layers).map(|(i, w)| make(i, w)).collect()
}

/// Name of a tensor in GGUF.
fn gguf_name(role: Role, layer: Option<u32>) -> String {
    let stem = match role {
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
    };
    layer.map_or_else(|| stem.to_owned(), |i| format!("blk.{i}.{stem}"))
}

/// Name of a tensor in Hugging Face's safetensors files.
fn hf_name(architecture: Architecture, role: Role, layer: Option<u32>) -> String {
    let gemma = architecture == Architecture::Gemma3;
    let stem = match role {
        Role::Embedding => "embed_tokens.weight",
        Role::RopeFactors => "rope_freqs.weight",
        Role::OutputNorm => "norm.weight",
        Role::Output => return "lm_head.weight".to_owned(),
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
        Role::FfnNorm if gemma => "pre_feedforward_layernorm.weight",
        Role::FfnNorm => "post_attention_layernorm.weight",
        Role::Gate => "mlp.gate_proj.weight",
        Role::GateBias => "mlp.gate_proj.bias",
        Role::Up => "mlp.up_proj.weight",
        Role::UpBias => "mlp.up_proj.bias",
        Role::Down => "mlp.down_proj.weight",
        Role::DownBias => "mlp.down_proj.bias",
        Role::PostFfnNorm => "post_feedforward_layernorm.weight",
    };
    layer.map_or_else(|| format!("model.{stem}"), |i| format!("model.layers.{i}.{stem}"))
}
