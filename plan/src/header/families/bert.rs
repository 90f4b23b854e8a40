//! BERT: Devlin et al. 2018, arXiv:1810.04805, and the sentence models made of it: Reimers & Gurevych 2019, arXiv:1908.10084.
//!
//! ```text
//! x = layernorm(E[id] + T[type] + P[position])
//! x = layernorm(x + Wo · attention(Wq x, Wk x, Wv x))      each token sees all
//! x = layernorm(x + Wdown · gelu(Wup x))
//! labels = Wclassifier · tanh(Wpooler x[0])                where it classifies
//! ```
//! Every product has a bias. GELU is the form with erf, from either kind of file: it is what the models were trained with.

use super::Family;
use crate::{
    header::{
        HeaderError,
        fields::Fields,
        gguf, hf,
        hf::{EncoderFields, HfConfig},
        metadata::Meta,
        tensors::{self, Biases, Name},
    },
    model::{Activation, Architecture, Classifier, Encoder, ModelConfig, PoolerActivation, Role},
};

/// The class with a classification head.
const CLASSIFIES: &str = "BertForSequenceClassification";

pub(super) const BERT: Family = Family {
    name: "bert",
    class: "BertModel",
    also: &[CLASSIFIES, "BertForMaskedLM"],
    model_type: "bert",
    from_hf,
    to_hf: None,
    hf_base: "bert.",
    hf_layers: "bert.encoder.layer.",
    hf_name,
    gguf: Some("bert"),
    from_gguf,
    gguf_name,
};

const FIELDS: EncoderFields = EncoderFields {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    ffn: "intermediate_size",
    activation: "hidden_act",
};

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    for name in ["is_decoder", "add_cross_attention"] {
        if fields.flag(name)?.unwrap_or(false) {
            return Err(fields.unsupported(name, "false", "true"));
        }
    }
    if let Some(other) = fields.text("position_embedding_type")?.filter(|&kind| kind != "absolute") {
        return Err(fields.unsupported("position_embedding_type", "absolute", other));
    }
    let eps = fields.positive("layer_norm_eps")?.unwrap_or(1e-12);
    let classifier = hf::labels(fields, CLASSIFIES)?.map(|labels| Classifier { labels, activation: PoolerActivation::Tanh });
    let encoder = Encoder { token_types: fields.count("type_vocab_size")?.unwrap_or(2), classifier };
    let config = hf::encoder(fields, &FIELDS, Architecture::Bert, eps as f32, encoder)?;
    Ok(HfConfig { config, biases: Biases { qkv: true, o: true, mlp: true } })
}

fn hf_name(role: Role) -> Name {
    Name::own(match role {
        Role::Embedding => "bert.embeddings.word_embeddings.weight",
        Role::Positions => "bert.embeddings.position_embeddings.weight",
        Role::TokenTypes => "bert.embeddings.token_type_embeddings.weight",
        Role::EmbeddingNorm => "bert.embeddings.LayerNorm.weight",
        Role::EmbeddingNormBias => "bert.embeddings.LayerNorm.bias",
        Role::Q => "attention.self.query.weight",
        Role::QBias => "attention.self.query.bias",
        Role::K => "attention.self.key.weight",
        Role::KBias => "attention.self.key.bias",
        Role::V => "attention.self.value.weight",
        Role::VBias => "attention.self.value.bias",
        Role::O => "attention.output.dense.weight",
        Role::OBias => "attention.output.dense.bias",
        Role::AttnNorm => "attention.output.LayerNorm.weight",
        Role::AttnNormBias => "attention.output.LayerNorm.bias",
        Role::Up => "intermediate.dense.weight",
        Role::UpBias => "intermediate.dense.bias",
        Role::Down => "output.dense.weight",
        Role::DownBias => "output.dense.bias",
        Role::FfnNorm => "output.LayerNorm.weight",
        Role::FfnNormBias => "output.LayerNorm.bias",
        Role::Pooler => "bert.pooler.dense.weight",
        Role::PoolerBias => "bert.pooler.dense.bias",
        role => return tensors::hf_name(role),
    })
}

fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    let config = gguf::unrotated(meta, Architecture::Bert)?;
    // 3, the last token, is for decoders; 4, a rank, needs a head that files name in several ways.
    if let Some(kind) = meta.count(&meta.key("pooling_type"))?.filter(|&kind| kind > 2) {
        return Err(meta.unsupported("pooling_type", "0 (none), 1 (mean) or 2 (first token)", &kind.to_string()));
    }
    let types = meta.header.tensors.iter().find(|t| t.name == "token_types.weight").and_then(|t| t.dims.get(1).copied());
    Ok(ModelConfig {
        activation: Activation::Gelu,
        gated: false,
        learned_positions: true,
        embedding_norm: true,
        post_norms: true,
        encoder: Some(Encoder { token_types: types.unwrap_or(0).min(2) as usize, classifier: None }),
        tied_embeddings: false,
        ..config
    })
}

fn gguf_name(role: Role) -> Name {
    Name::own(match role {
        Role::AttnNorm => "attn_output_norm.weight",
        Role::AttnNormBias => "attn_output_norm.bias",
        Role::FfnNorm => "layer_output_norm.weight",
        Role::FfnNormBias => "layer_output_norm.bias",
        role => return tensors::gguf_name(role),
    })
}
