//! GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
//!
//! ```text
//! x  = E[id] + P[position]
//! x += Wo · attention(Wq h, Wk h, Wv h)      h = layernorm(x)
//! x += Wdown · gelu(Wup h)                   h = layernorm(x)
//! logits = E · layernorm(x)
//! ```
//! Every product has a bias. Hugging Face stores matrices by columns, query, key and value side by side; GGUF stores them by rows, one below
//! the other.

use serde_json::{Map, Value, json};

use super::Family;
use crate::{
    header::{
        HeaderError,
        fields::Fields,
        gguf, hf,
        hf::HfConfig,
        metadata::Meta,
        target,
        tensors::{self, Biases, Name},
    },
    model::{Activation, Architecture, LayerConfig, ModelConfig, Role, Rope},
};

pub(super) const GPT2: Family = Family {
    name: "gpt2",
    class: "GPT2LMHeadModel",
    also: &[],
    model_type: "gpt2",
    from_hf,
    to_hf,
    hf_base: "transformer.",
    hf_layers: "transformer.h.",
    hf_name,
    gguf: Some("gpt2"),
    from_gguf,
    gguf_name,
};

const QKV: &[Role] = &[Role::Q, Role::K, Role::V];
const QKV_BIASES: &[Role] = &[Role::QBias, Role::KBias, Role::VBias];

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    for (name, wanted) in [("scale_attn_weights", true), ("scale_attn_by_inverse_layer_idx", false), ("add_cross_attention", false)] {
        if fields.flag(name)?.unwrap_or(wanted) != wanted {
            return Err(fields.unsupported(name, if wanted { "true" } else { "false" }, if wanted { "false" } else { "true" }));
        }
    }
    match fields.text("activation_function")? {
        None | Some("gelu_new" | "gelu_pytorch_tanh") => {}
        Some(got) => return Err(fields.unsupported("activation_function", "gelu_new", got)),
    }
    let (hidden, heads) = (fields.required("n_embd")?, fields.required("n_head")?);
    if hidden % heads != 0 {
        return Err(fields.wrong("n_head", &format!("a divisor of the hidden size {hidden}"), &heads.into()));
    }
    let eps = fields.positive("layer_norm_epsilon")?.unwrap_or(1e-5);
    let layers = hf::layers(fields, "n_layer")?;
    let config = ModelConfig {
        architecture: Architecture::Gpt2,
        hidden,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        ffn: fields.count("n_inner")?.unwrap_or(4 * hidden),
        vocab: fields.required("vocab_size")?,
        context: fields.required("n_positions")?,
        norm_eps: eps as f32,
        norm_weight_offset: 0.0,
        activation: Activation::GeluTanh,
        embedding_scale: 1.0,
        attention_scale: (1.0 / ((hidden / heads) as f64).sqrt()) as f32,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(true),
        head_norms: false,
        block_norms: false,
        layer_norms: true,
        gated: false,
        learned_positions: true,
        embedding_norm: false,
        post_norms: false,
        encoder: None,
        experts: None,
        latent: None,
        layers: vec![LayerConfig { window: None, rope: Rope::NONE, experts: false }; layers],
    };
    Ok(HfConfig { config, biases: Biases { qkv: true, o: true, mlp: true } })
}

fn to_hf(family: &Family, config: &ModelConfig, _: &Biases) -> Map<String, Value> {
    let fields = [
        ("architectures", json!([family.class])),
        ("model_type", json!(family.model_type)),
        ("activation_function", json!("gelu_new")),
        ("layer_norm_epsilon", target::number(config.norm_eps)),
        ("n_embd", json!(config.hidden)),
        ("n_head", json!(config.heads)),
        ("n_inner", json!(config.ffn)),
        ("n_layer", json!(config.layers.len())),
        ("n_positions", json!(config.context)),
        ("tie_word_embeddings", json!(config.tied_embeddings)),
        ("vocab_size", json!(config.vocab)),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn hf_name(role: Role) -> Name {
    match role {
        Role::Embedding => Name::own("transformer.wte.weight"),
        Role::Positions => Name::own("transformer.wpe.weight"),
        Role::OutputNorm => Name::own("transformer.ln_f.weight"),
        Role::OutputNormBias => Name::own("transformer.ln_f.bias"),
        Role::AttnNorm => Name::own("ln_1.weight"),
        Role::AttnNormBias => Name::own("ln_1.bias"),
        Role::Q | Role::K | Role::V => Name::columns("attn.c_attn.weight", QKV),
        Role::QBias | Role::KBias | Role::VBias => Name::fused("attn.c_attn.bias", QKV_BIASES),
        Role::O => Name::columns("attn.c_proj.weight", &[]),
        Role::OBias => Name::own("attn.c_proj.bias"),
        Role::FfnNorm => Name::own("ln_2.weight"),
        Role::FfnNormBias => Name::own("ln_2.bias"),
        Role::Up => Name::columns("mlp.c_fc.weight", &[]),
        Role::UpBias => Name::own("mlp.c_fc.bias"),
        Role::Down => Name::columns("mlp.c_proj.weight", &[]),
        Role::DownBias => Name::own("mlp.c_proj.bias"),
        role => tensors::hf_name(role),
    }
}

fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    let config = gguf::unrotated(meta, Architecture::Gpt2)?;
    Ok(ModelConfig { activation: Activation::GeluTanh, gated: false, learned_positions: true, ..config })
}

fn gguf_name(role: Role) -> Name {
    match role {
        Role::Q | Role::K | Role::V => Name::fused("attn_qkv.weight", QKV),
        Role::QBias | Role::KBias | Role::VBias => Name::fused("attn_qkv.bias", QKV_BIASES),
        role => tensors::gguf_name(role),
    }
}
