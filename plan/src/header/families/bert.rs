//! BERT: Devlin et al. 2018, arXiv:1810.04805, and the sentence models made of it: Reimers & Gurevych 2019, arXiv:1908.10084.
//!
//! ```text
//! x = layernorm(E[id] + T[type] + P[position])
//! x = layernorm(x + Wo · attention(Wq x, Wk x, Wv x))      each token sees all
//! x = layernorm(x + Wdown · gelu(Wup x))
//! labels = Wclassifier · tanh(Wpooler x[0])                where it classifies
//! ```
//! Every product has a bias. GELU is the form with erf, from either kind of file: it is what the models were trained with.

use serde_json::{Map, Value, json};

use super::Family;
use crate::{
    header::{
        HeaderError, MAX_COUNT,
        fields::Fields,
        gguf, hf,
        hf::{EncoderFields, HfConfig},
        metadata::Meta,
        target,
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
    to_hf,
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

fn to_hf(family: &Family, config: &ModelConfig, _: &Biases) -> Map<String, Value> {
    let encoder = config.encoder;
    target::encoder(family, config, &FIELDS, CLASSIFIES)
        .chain([("layer_norm_eps", target::number(config.norm_eps)), ("type_vocab_size", json!(encoder.map_or(0, |e| e.token_types)))])
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
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
    let rows = |name: &str| meta.header.tensors.iter().find(|t| t.name == name).map(|t| t.dims.get(1).copied().unwrap_or(1));
    let types = rows("token_types.weight").unwrap_or(0).min(2) as usize;
    // DistilBERT, which has no token types, was trained with relu in its head; files do not say.
    let activation = if types == 0 { PoolerActivation::Relu } else { PoolerActivation::Tanh };
    let classifier = rows("cls.output.weight").map(|labels| Classifier { labels: labels.min(MAX_COUNT) as usize, activation });
    // 3, the last token, is for decoders; 4, a rank, is what a head gives.
    let kind = meta.count(&meta.key("pooling_type"))?.filter(|&kind| kind > 2 && !(kind == 4 && classifier.is_some()));
    if let Some(kind) = kind {
        let expected = "0 (none), 1 (mean) or 2 (first token); 4 (rank) with the tensor cls.output.weight";
        return Err(meta.unsupported("pooling_type", expected, &kind.to_string()));
    }
    let labels = meta.header.get(&meta.key("classifier.output_labels")).map(|value| (value, value.as_array().map(|a| a.len)));
    if let Some((value, got)) = labels.filter(|(_, got)| *got != Some(classifier.map_or(0, |c| c.labels as u64))) {
        let got = got.map_or_else(|| value.kind().name().to_owned(), |n| format!("a list of {n}"));
        let expected = format!("a name for each of the {} rows of cls.output.weight", classifier.map_or(0, |c| c.labels));
        return Err(meta.wrong("classifier.output_labels", &expected, &got));
    }
    Ok(ModelConfig {
        activation: Activation::Gelu,
        gated: false,
        learned_positions: true,
        embedding_norm: true,
        post_norms: true,
        encoder: Some(Encoder { token_types: types, classifier }),
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
