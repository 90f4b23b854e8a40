//! What a model's files say of the vectors and labels that it gives: pooling, normalisation, prompts, names of labels.

mod gguf;

use plan::{
    card::{GGUF_HEADER, ModelCard},
    header::HfConfig,
    model::ModelConfig,
    step::Pooling,
};
use serde_json::{Map, Value};

use super::error::TokenizerError;
pub use gguf::{vector_entries, vector_files};

/// Settings of an encoder's answers.
#[derive(Clone, Debug, PartialEq)]
pub struct VectorSettings {
    /// Values of an embedding.
    pub width: usize,
    /// Of which tokens an embedding is made, and whether it has length 1. An error says what the files ask for that is not supported.
    pub embedding: Result<Embedding, String>,
    /// How the model classifies, if it does.
    pub classes: Option<Result<Classes, String>>,
}

/// How a text becomes a vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Of which tokens.
    pub pooling: Pooling,
    /// Divided by its length.
    pub normalize: bool,
    /// Put before every text.
    pub prompt: String,
}

impl Embedding {
    /// What is made where no file says it: of length 1.
    fn usual(pooling: Pooling) -> Self {
        Self { pooling, normalize: true, prompt: String::new() }
    }
}

/// What a classification head's values are.
#[derive(Clone, Debug, PartialEq)]
pub struct Classes {
    /// Names of the labels, in the order of values.
    pub labels: Vec<String>,
    /// How values become probabilities.
    pub activation: Activation,
    /// How the value of a head with one label becomes a score.
    pub score: Activation,
    /// The model tells the second text of a pair from the first.
    pub token_types: bool,
}

/// What is made of a head's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// They stay as they are.
    Identity,
    /// Each for itself: 1 / (1 + e^−x).
    Sigmoid,
    /// Shares of all: e^x / Σ e^x.
    Softmax,
}

impl Activation {
    /// Applies it; computed in 64 bits.
    pub fn apply(self, values: &mut [f32]) {
        match self {
            Self::Identity => {}
            Self::Sigmoid => values.iter_mut().for_each(|x| *x = (1.0 / (1.0 + (-f64::from(*x)).exp())) as f32),
            Self::Softmax => {
                let most = f64::from(values.iter().copied().fold(f32::MIN, f32::max));
                let parts: Vec<f64> = values.iter().map(|&x| (f64::from(x) - most).exp()).collect();
                let sum: f64 = parts.iter().sum();
                values.iter_mut().zip(parts).for_each(|(x, part)| *x = (part / sum) as f32);
            }
        }
    }
}

impl VectorSettings {
    /// Reads the files of a card: `modules.json` and what it names, `config.json`, or a GGUF header.
    ///
    /// Where nothing is said, an embedding is the mean over all tokens and has length 1.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn from_card(card: &ModelCard) -> Result<Self, TokenizerError> {
        if let Some(header) = card.file(GGUF_HEADER) {
            return gguf::settings(header);
        }
        const CONFIG: &str = "config.json";
        let json = card.file(CONFIG).ok_or_else(|| wrong(CONFIG, "it is missing".to_owned()))?;
        let config = HfConfig::parse(json).map_err(|e| wrong(CONFIG, e.to_string()))?.config;
        let embedding = match array(card, "modules.json")? {
            Some(modules) => from_modules(&modules, card)?,
            None => Ok(Embedding::usual(Pooling::Mean)),
        };
        let fields = object(card, CONFIG)?.unwrap_or_default();
        Ok(Self { width: config.hidden, embedding, classes: classes(&config, &fields) })
    }
}

fn wrong(file: &'static str, problem: String) -> TokenizerError {
    TokenizerError::File { file, problem }
}

fn value(card: &ModelCard, file: &'static str) -> Result<Option<Value>, TokenizerError> {
    card.file(file).map(|bytes| serde_json::from_slice(bytes).map_err(|e| wrong(file, e.to_string()))).transpose()
}

fn object(card: &ModelCard, file: &'static str) -> Result<Option<Map<String, Value>>, TokenizerError> {
    match value(card, file)? {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(_) => Err(wrong(file, "expected an object".to_owned())),
    }
}

fn array(card: &ModelCard, file: &'static str) -> Result<Option<Vec<Value>>, TokenizerError> {
    match value(card, file)? {
        None => Ok(None),
        Some(Value::Array(list)) => Ok(Some(list)),
        Some(_) => Err(wrong(file, "expected a list".to_owned())),
    }
}

/// The steps of a sentence model: a transformer, how its states are pooled, and whether the vector is normalised.
fn from_modules(modules: &[Value], card: &ModelCard) -> Result<Result<Embedding, String>, TokenizerError> {
    let (mut pooling, mut normalize) = (None, false);
    for (index, module) in modules.iter().enumerate() {
        let text = |key: &str| module.get(key).and_then(Value::as_str).unwrap_or_default();
        match (index, text("type").rsplit('.').next().unwrap_or_default()) {
            (0, "Transformer") if text("path").is_empty() => {}
            (_, "Pooling") if pooling.is_none() && !normalize => {
                if text("path") != "1_Pooling" {
                    return Ok(Err(format!("modules.json has its pooling in folder {:?}, expected \"1_Pooling\"", text("path"))));
                }
                match pooling_mode(card)? {
                    Ok(mode) => pooling = Some(mode),
                    Err(reason) => return Ok(Err(reason)),
                }
            }
            (_, "Normalize") if pooling.is_some() => normalize = true,
            _ => {
                let (kind, path) = (text("type"), text("path"));
                return Ok(Err(format!(
                    "module {index} of modules.json has type {kind:?} and path {path:?}, which is not supported there"
                )));
            }
        }
    }
    let Some(pooling) = pooling else { return Ok(Err("modules.json names no pooling".to_owned())) };
    let settings = object(card, "config_sentence_transformers.json")?.unwrap_or_default();
    let prompt = match settings.get("default_prompt_name").and_then(Value::as_str) {
        None => String::new(),
        Some(name) => match settings.get("prompts").and_then(|p| p.get(name)).and_then(Value::as_str) {
            Some(prompt) => prompt.to_owned(),
            None => return Ok(Err(format!("config_sentence_transformers.json has no prompt {name:?}, its default"))),
        },
    };
    Ok(Ok(Embedding { pooling, normalize, prompt }))
}

fn pooling_mode(card: &ModelCard) -> Result<Result<Pooling, String>, TokenizerError> {
    const FILE: &str = "1_Pooling/config.json";
    let Some(config) = object(card, FILE)? else { return Err(wrong(FILE, "modules.json names it, and it is missing".to_owned())) };
    let flagged = config.iter().filter(|(name, on)| name.starts_with("pooling_mode_") && on.as_bool() == Some(true));
    let mut modes: Vec<&str> = flagged.map(|(name, _)| name.as_str()).collect();
    modes.extend(config.get("pooling_mode").and_then(Value::as_str));
    Ok(match modes.as_slice() {
        ["pooling_mode_mean_tokens" | "mean"] => Ok(Pooling::Mean),
        ["pooling_mode_cls_token" | "cls"] => Ok(Pooling::First),
        other => Err(format!("{FILE} asks for {other:?}, expected pooling_mode_mean_tokens or pooling_mode_cls_token")),
    })
}

/// What becomes of a head's values where no file says it.
fn usual_activation(labels: usize) -> Activation {
    if labels == 1 { Activation::Sigmoid } else { Activation::Softmax }
}

/// How a model classifies; `fields` are those of its `config.json`.
fn classes(config: &ModelConfig, fields: &Map<String, Value>) -> Option<Result<Classes, String>> {
    let encoder = config.encoder?;
    let count = encoder.classifier?.labels;
    let text = |name: &str| fields.get(name).and_then(Value::as_str);
    let activation = match text("problem_type") {
        Some("multi_label_classification") => Activation::Sigmoid,
        Some("regression") => Activation::Identity,
        None => usual_activation(count),
        Some("single_label_classification") => Activation::Softmax,
        Some(other) => return Some(Err(format!("problem_type of config.json is {other:?}, which is not supported"))),
    };
    let nested = fields.get("sentence_transformers").and_then(|s| s.get("activation_fn")).and_then(Value::as_str);
    let score = match nested.or_else(|| text("sbert_ce_default_activation_function")).map(|name| (name, name.rsplit('.').next())) {
        None | Some((_, Some("Sigmoid"))) => Activation::Sigmoid,
        Some((_, Some("Identity"))) => Activation::Identity,
        Some((name, _)) => return Some(Err(format!("config.json asks for activation {name:?} of scores, expected Identity or Sigmoid"))),
    };
    let named = fields.get("id2label").and_then(Value::as_object);
    let name = |i: usize| named.and_then(|m| m.get(&i.to_string())).and_then(Value::as_str);
    let labels = (0..count).map(|i| name(i).map_or_else(|| format!("LABEL_{i}"), str::to_owned)).collect();
    Some(Ok(Classes { labels, activation, score, token_types: encoder.token_types > 1 }))
}

#[cfg(test)]
mod tests {
    use plan::card::CardFile;
    use serde_json::json;

    use super::*;

    /// A card of a fixture's config, changed, with more files.
    fn card(fixture: &str, change: impl FnOnce(&mut Value), more: &[(&str, Value)]) -> ModelCard {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(fixture);
        let mut config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        change(&mut config);
        let file = |(name, value): (&str, &Value)| CardFile { name: name.to_owned(), bytes: value.to_string().into_bytes() };
        ModelCard { files: more.iter().map(|(name, value)| (*name, value)).chain([("config.json", &config)]).map(file).collect() }
    }

    fn modules(types: &[(&str, &str)]) -> (&'static str, Value) {
        let module = |(index, (kind, path)): (usize, &(&str, &str))| json!({"idx": index, "path": path, "type": format!("sentence_transformers.models.{kind}")});
        ("modules.json", types.iter().enumerate().map(module).collect())
    }

    #[test]
    fn embeddings_are_made_as_the_files_say() {
        let of = |more: &[(&str, Value)]| VectorSettings::from_card(&card("bert", |_| (), more)).map(|s| s.embedding);
        assert_eq!(of(&[]).unwrap(), Ok(Embedding::usual(Pooling::Mean)));
        let mean = ("1_Pooling/config.json", json!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}));
        let first = ("1_Pooling/config.json", json!({"word_embedding_dimension": 128, "pooling_mode_cls_token": true}));
        let most = ("1_Pooling/config.json", json!({"pooling_mode_max_tokens": true}));
        let (two, three) = (
            modules(&[("Transformer", ""), ("Pooling", "1_Pooling")]),
            modules(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]),
        );
        assert_eq!(of(&[two.clone(), mean.clone()]).unwrap(), Ok(Embedding { normalize: false, ..Embedding::usual(Pooling::Mean) }));
        assert_eq!(of(&[three.clone(), first]).unwrap(), Ok(Embedding::usual(Pooling::First)));
        let prompts = ("config_sentence_transformers.json", json!({"prompts": {"query": "query: "}, "default_prompt_name": "query"}));
        assert_eq!(of(&[three.clone(), mean.clone(), prompts]).unwrap().unwrap().prompt, "query: ");
        // What is not there is refused by name.
        assert!(of(&[three.clone(), most]).unwrap().unwrap_err().contains("pooling_mode_max_tokens"));
        let dense = modules(&[("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]);
        assert!(of(&[dense, mean]).unwrap().unwrap_err().contains("models.Dense"));
        assert!(of(&[three]).unwrap_err().to_string().contains("1_Pooling/config.json"));
        assert!(of(&[("modules.json", json!({}))]).unwrap_err().to_string().contains("expected a list"));
    }

    #[test]
    fn labels_are_those_of_the_config() {
        let of = |change: &dyn Fn(&mut Value)| VectorSettings::from_card(&card("distilbert-sst2", change, &[])).unwrap().classes.unwrap();
        let usual = of(&|_| ()).unwrap();
        assert_eq!(
            (usual.labels, usual.activation, usual.token_types),
            (vec!["NEGATIVE".into(), "POSITIVE".into()], Activation::Softmax, false)
        );
        let one = of(&|c| c["id2label"] = json!({"0": "LABEL_0"})).unwrap();
        assert_eq!((one.labels.len(), one.activation, one.score), (1, Activation::Sigmoid, Activation::Sigmoid));
        let identity = of(&|c| c["sbert_ce_default_activation_function"] = json!("torch.nn.modules.linear.Identity")).unwrap();
        assert_eq!(identity.score, Activation::Identity);
        assert_eq!(of(&|c| c["problem_type"] = json!("multi_label_classification")).unwrap().activation, Activation::Sigmoid);
        assert!(of(&|c| c["problem_type"] = json!("ranking")).unwrap_err().contains("ranking"));
        assert_eq!(VectorSettings::from_card(&card("bert", |_| (), &[])).unwrap().classes, None);
    }

    #[test]
    fn values_become_probabilities() {
        let apply = |activation: Activation, mut values: Vec<f32>| {
            activation.apply(&mut values);
            values
        };
        assert_eq!(apply(Activation::Softmax, vec![1000.0, 1000.0, -1000.0]), [0.5, 0.5, 0.0]);
        assert_eq!(apply(Activation::Sigmoid, vec![0.0, 1000.0, -1000.0]), [0.5, 1.0, 0.0]);
        assert_eq!(apply(Activation::Identity, vec![-3.0]), [-3.0]);
        let [a, b] = apply(Activation::Softmax, vec![-0.564_754, 0.404_24])[..] else { panic!("two") };
        assert!((a - 0.275_081).abs() < 1e-5 && (b - 0.724_919).abs() < 1e-5, "{a} {b}");
    }
}
