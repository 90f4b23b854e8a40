//! DistilBERT: Sanh et al. 2019, arXiv:1910.01108. [BERT](super::bert) without token types, whose classification head is
//! `Wclassifier · relu(Wpooler x[0])`.
//!
//! GGUF has no architecture of its own for it: it is BERT's without a table of token types.

use serde_json::{Map, Value};

use super::{Family, bert::BERT};
use crate::{
    header::{
        HeaderError,
        fields::Fields,
        hf,
        hf::{EncoderFields, HfConfig},
        target,
        tensors::{self, Biases, Name},
    },
    model::{Architecture, Classifier, Encoder, ModelConfig, PoolerActivation, Role},
};

/// The class with a classification head.
const CLASSIFIES: &str = "DistilBertForSequenceClassification";
/// Epsilon of its norms, which no file states.
const EPS: f32 = 1e-12;

pub(super) const DISTILBERT: Family = Family {
    name: "distilbert",
    class: "DistilBertModel",
    also: &[CLASSIFIES, "DistilBertForMaskedLM"],
    model_type: "distilbert",
    from_hf,
    to_hf,
    hf_base: "distilbert.",
    hf_layers: "distilbert.transformer.layer.",
    hf_name,
    gguf: None,
    ..BERT
};

const FIELDS: EncoderFields =
    EncoderFields { hidden: "dim", layers: "n_layers", heads: "n_heads", ffn: "hidden_dim", activation: "activation" };

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let classifier = hf::labels(fields, CLASSIFIES)?.map(|labels| Classifier { labels, activation: PoolerActivation::Relu });
    let encoder = Encoder { token_types: 0, classifier };
    let config = hf::encoder(fields, &FIELDS, Architecture::DistilBert, EPS, encoder)?;
    Ok(HfConfig { config, biases: Biases { qkv: true, o: true, mlp: true } })
}

fn to_hf(family: &Family, config: &ModelConfig, _: &Biases) -> Map<String, Value> {
    target::encoder(family, config, &FIELDS, CLASSIFIES).map(|(name, value)| (name.to_owned(), value)).collect()
}

fn hf_name(role: Role) -> Name {
    Name::own(match role {
        Role::Embedding => "distilbert.embeddings.word_embeddings.weight",
        Role::Positions => "distilbert.embeddings.position_embeddings.weight",
        Role::EmbeddingNorm => "distilbert.embeddings.LayerNorm.weight",
        Role::EmbeddingNormBias => "distilbert.embeddings.LayerNorm.bias",
        Role::Q => "attention.q_lin.weight",
        Role::QBias => "attention.q_lin.bias",
        Role::K => "attention.k_lin.weight",
        Role::KBias => "attention.k_lin.bias",
        Role::V => "attention.v_lin.weight",
        Role::VBias => "attention.v_lin.bias",
        Role::O => "attention.out_lin.weight",
        Role::OBias => "attention.out_lin.bias",
        Role::AttnNorm => "sa_layer_norm.weight",
        Role::AttnNormBias => "sa_layer_norm.bias",
        Role::Up => "ffn.lin1.weight",
        Role::UpBias => "ffn.lin1.bias",
        Role::Down => "ffn.lin2.weight",
        Role::DownBias => "ffn.lin2.bias",
        Role::FfnNorm => "output_layer_norm.weight",
        Role::FfnNormBias => "output_layer_norm.bias",
        Role::Pooler => "pre_classifier.weight",
        Role::PoolerBias => "pre_classifier.bias",
        role => return tensors::hf_name(role),
    })
}
