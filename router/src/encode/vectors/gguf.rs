//! What a GGUF header says of vectors and labels: read, written from a folder's files, and turned into such files again.
//!
//! llama.cpp has keys for the pooling and for names of labels. What it leaves to whoever asks stands under keys of our own, where it is not
//! the usual.

use plan::{
    card::{CardFile, GGUF_HEADER, ModelCard},
    gguf::{Array, Header, Keep, Kind, Value as Gguf, read},
    step::Pooling,
};
use serde_json::{Map, Value, json};

use super::{Activation, Classes, Embedding, VectorSettings, usual_activation, wrong};
use crate::encode::error::TokenizerError;

/// The architecture of every encoder, and the keys below it.
const LABELS: &str = "bert.classifier.output_labels";
const POOLING: &str = "bert.pooling_type";
/// An embedding has length 1.
const NORMALIZE: &str = "skein.embedding.normalize";
/// What comes before every text.
const PROMPT: &str = "skein.embedding.prompt";
/// How a head's values become probabilities.
const PROBABILITIES: &str = "skein.classifier.activation";
/// How the value of a head with one label becomes a score.
const SCORE: &str = "skein.score.activation";

/// Numbers of `pooling_type`.
const NONE: u64 = 0;
const MEAN: u64 = 1;
const FIRST: u64 = 2;
const RANK: u64 = 4;

impl Activation {
    fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Sigmoid => "sigmoid",
            Self::Softmax => "softmax",
        }
    }

    /// As `problem_type` of `config.json` has it.
    fn problem(self) -> &'static str {
        match self {
            Self::Identity => "regression",
            Self::Sigmoid => "multi_label_classification",
            Self::Softmax => "single_label_classification",
        }
    }
}

/// Access to a header, with errors that name the key.
struct Keys(Header);

impl Keys {
    fn read(header: &[u8]) -> Result<Self, TokenizerError> {
        let parsed = read(&mut &*header, header.len() as u64, Keep::Keys(&[LABELS]), false);
        parsed.map(Self).map_err(|e| wrong(GGUF_HEADER, e.to_string()))
    }

    fn get<'a, T>(&'a self, key: &str, expected: &str, convert: impl Fn(&'a Gguf) -> Option<T>) -> Result<Option<T>, TokenizerError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let problem = || format!("{key} is {}, expected {expected}", value.as_str().unwrap_or(value.kind().name()));
        convert(value).map(Some).ok_or_else(|| wrong(GGUF_HEADER, problem()))
    }

    fn activation(&self, key: &str) -> Result<Option<Activation>, TokenizerError> {
        let known = [Activation::Identity, Activation::Sigmoid, Activation::Softmax];
        self.get(key, "identity, sigmoid or softmax", |v| known.into_iter().find(|a| v.as_str() == Some(a.name())))
    }

    /// Rows of a tensor.
    fn rows(&self, tensor: &str) -> Option<u64> {
        self.0.tensors.iter().find(|t| t.name == tensor).map(|t| t.dims.get(1).copied().unwrap_or(1))
    }

    fn pooling(&self) -> Result<Option<u64>, TokenizerError> {
        self.get(POOLING, "a number", Gguf::as_u64)
    }

    fn classes(&self) -> Result<Option<Classes>, TokenizerError> {
        let text = |value: &Gguf| value.as_str().map(str::to_owned);
        let named = self.get(LABELS, "a list of names", |v| v.as_array()?.values.as_ref()?.iter().map(text).collect::<Option<Vec<_>>>())?;
        let labels = match (named, self.rows("cls.output.weight")) {
            (Some(labels), _) => labels,
            (None, Some(count)) => (0..count.min(u64::from(u16::MAX))).map(|i| format!("LABEL_{i}")).collect(),
            (None, None) => return Ok(None),
        };
        let activation = self.activation(PROBABILITIES)?.unwrap_or(usual_activation(labels.len()));
        let score = self.activation(SCORE)?.unwrap_or(Activation::Sigmoid);
        let token_types = self.rows("token_types.weight").is_some_and(|rows| rows > 1);
        Ok(Some(Classes { labels, activation, score, token_types }))
    }
}

/// Reads a header.
pub(super) fn settings(header: &[u8]) -> Result<VectorSettings, TokenizerError> {
    let keys = Keys::read(header)?;
    let width = keys.0.metadata.iter().find(|e| e.key.ends_with(".embedding_length")).and_then(|e| e.value.as_u64());
    let width = width.ok_or_else(|| wrong(GGUF_HEADER, "it tells no embedding_length".to_owned()))? as usize;
    let normalize = keys.get(NORMALIZE, "a bool", Gguf::as_bool)?.unwrap_or(true);
    let prompt = keys.get(PROMPT, "text", |v| v.as_str().map(str::to_owned))?.unwrap_or_default();
    let embedding = match keys.pooling()? {
        None | Some(NONE | MEAN | RANK) => Ok(Embedding { pooling: Pooling::Mean, normalize, prompt }),
        Some(FIRST) => Ok(Embedding { pooling: Pooling::First, normalize, prompt }),
        Some(other) => Err(format!("pooling_type {other} of the GGUF file is not supported, expected 1 (mean) or 2 (first token)")),
    };
    Ok(VectorSettings { width, embedding, classes: keys.classes()?.map(Ok) })
}

/// The entries of a GGUF header that say what vectors and labels an encoder's files give.
///
/// # Errors
/// When a file cannot be read, or asks for what is not supported.
pub fn vector_entries(card: &ModelCard) -> Result<Vec<(String, Gguf)>, TokenizerError> {
    let VectorSettings { embedding, classes, width: _ } = VectorSettings::from_card(card)?;
    let embedding = embedding.map_err(|problem| wrong("modules.json", problem))?;
    let classes = classes.transpose().map_err(|problem| wrong("config.json", problem))?;
    let mut entries = Vec::new();
    let mut put = |key: &str, value: Gguf| entries.push((key.to_owned(), value));
    let text = |text: &str| Gguf::String(text.to_owned());
    let pooling = match embedding.pooling {
        Pooling::First => Some(FIRST),
        // A head is what such a model is for; embeddings are the mean beside it.
        _ if classes.is_some() => Some(RANK),
        // Where a folder does not say, a file does not.
        _ => card.file("modules.json").map(|_| MEAN),
    };
    if let Some(pooling) = pooling {
        put(POOLING, Gguf::U32(pooling as u32));
    }
    if !embedding.normalize {
        put(NORMALIZE, Gguf::Bool(false));
    }
    if !embedding.prompt.is_empty() {
        put(PROMPT, text(&embedding.prompt));
    }
    let Some(Classes { labels, activation, score, token_types: _ }) = classes else { return Ok(entries) };
    if activation != usual_activation(labels.len()) {
        put(PROBABILITIES, text(activation.name()));
    }
    if score != Activation::Sigmoid {
        put(SCORE, text(score.name()));
    }
    let values = labels.iter().map(|label| text(label)).collect();
    put(LABELS, Gguf::Array(Box::new(Array { kind: Kind::String, len: labels.len() as u64, values: Some(values) })));
    Ok(entries)
}

/// What a folder says of the vectors and labels of an encoder's GGUF header: files beside the weights, and fields of `config.json`.
///
/// # Errors
/// When the header cannot be read, or asks for what is not supported.
pub fn vector_files(card: &ModelCard) -> Result<(Vec<CardFile>, Map<String, Value>), TokenizerError> {
    let header = card.file(GGUF_HEADER).ok_or_else(|| TokenizerError::Missing("no GGUF header".to_owned()))?;
    let VectorSettings { embedding, classes, width } = settings(header)?;
    let embedding = embedding.map_err(|problem| wrong(GGUF_HEADER, problem))?;
    let mut files = Vec::new();
    let mut file = |name: &str, json: Value| files.push(CardFile { name: name.to_owned(), bytes: json.to_string().into_bytes() });
    let said = matches!(Keys::read(header)?.pooling()?, Some(MEAN | FIRST));
    if said || embedding != Embedding::usual(Pooling::Mean) {
        let module = |index: usize, kind: &str, path: &str| json!({"idx": index, "name": index.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}")});
        let mut modules = vec![module(0, "Transformer", ""), module(1, "Pooling", "1_Pooling")];
        modules.extend(embedding.normalize.then(|| module(2, "Normalize", "2_Normalize")));
        file("modules.json", modules.into());
        let first = embedding.pooling == Pooling::First;
        let pooling = json!({"word_embedding_dimension": width, "pooling_mode_cls_token": first, "pooling_mode_mean_tokens": !first});
        file("1_Pooling/config.json", pooling);
    }
    if !embedding.prompt.is_empty() {
        file("config_sentence_transformers.json", json!({"prompts": {"default": embedding.prompt}, "default_prompt_name": "default"}));
    }
    let mut fields = Map::new();
    if let Some(Ok(classes)) = classes {
        let by_id: Map<String, Value> = classes.labels.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
        let by_name: Map<String, Value> = classes.labels.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
        fields.insert("id2label".to_owned(), json!(by_id));
        fields.insert("label2id".to_owned(), json!(by_name));
        if classes.activation != usual_activation(classes.labels.len()) {
            fields.insert("problem_type".to_owned(), json!(classes.activation.problem()));
        }
        if classes.score == Activation::Identity {
            fields.insert("sbert_ce_default_activation_function".to_owned(), json!("torch.nn.modules.linear.Identity"));
        }
    }
    Ok((files, fields))
}
