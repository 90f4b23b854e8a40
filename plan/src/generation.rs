//! What a model's own files say about generation: end tokens and sampling defaults.

use serde::Deserialize;
use serde_json::Value;

use crate::card::ModelCard;

/// Key under which a GGUF header carries a whole generation_config.json.
pub const GGUF_KEY: &str = "skein.generation_config";

/// Generation defaults. `generation_config.json` wins over `config.json`; a field that neither has is `None` or empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    /// Id put before every text.
    pub bos: Option<u32>,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    /// Whether the model's authors sample at all.
    pub do_sample: Option<bool>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Keep the k likeliest.
    pub top_k: Option<u32>,
    /// Keep the smallest set with this probability.
    pub top_p: Option<f32>,
    /// Keep tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f32>,
    /// Penalty of repeated ids.
    pub repetition_penalty: Option<f32>,
}

/// A file of generation settings that cannot be read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum DefaultsError {
    #[error("{file} cannot be read")]
    Json { file: &'static str, source: serde_json::Error },
    #[error("{field} in {file} is {got}, expected {expected}")]
    Field { file: &'static str, field: &'static str, expected: &'static str, got: String },
}

impl DefaultsError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        "generation_config_invalid"
    }
}

#[derive(Default, Deserialize)]
struct Raw {
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

impl Defaults {
    /// Reads `generation_config.json` and `config.json` of a card; a card without them (GGUF) has no defaults.
    ///
    /// # Errors
    /// When a file is not JSON or a field has the wrong type or range.
    pub fn from_card(card: &ModelCard) -> Result<Self, DefaultsError> {
        let model = read(card, "config.json")?;
        let own = read(card, "generation_config.json")?;
        let ids = |raw: &Raw, file| -> Result<(Option<u32>, Vec<u32>), DefaultsError> {
            let bos = token_ids(raw.bos_token_id.as_ref(), file, "bos_token_id")?;
            Ok((bos.first().copied(), token_ids(raw.eos_token_id.as_ref(), file, "eos_token_id")?))
        };
        let (model_bos, model_eos) = ids(&model, "config.json")?;
        let (bos, eos) = ids(&own, "generation_config.json")?;
        let defaults = Self {
            bos: bos.or(model_bos),
            eos: if eos.is_empty() { model_eos } else { eos },
            do_sample: own.do_sample,
            temperature: own.temperature,
            top_k: own.top_k,
            top_p: own.top_p,
            min_p: own.min_p,
            repetition_penalty: own.repetition_penalty,
        };
        defaults.check()?;
        Ok(defaults)
    }

    fn check(&self) -> Result<(), DefaultsError> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0, "a number from 0 to 100"),
            ("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1"),
            ("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, 100.0, "a positive number up to 100"),
        ];
        for (field, value, low, high, expected) in ranges {
            if let Some(value) = value.filter(|v| !(low..=high).contains(v)) {
                return Err(DefaultsError::Field { file: "generation_config.json", field, expected, got: value.to_string() });
            }
        }
        Ok(())
    }
}

fn read(card: &ModelCard, file: &'static str) -> Result<Raw, DefaultsError> {
    let Some(bytes) = card.file(file) else { return Ok(Raw::default()) };
    serde_json::from_slice(bytes).map_err(|source| DefaultsError::Json { file, source })
}

/// One id, a list of ids, or nothing.
fn token_ids(value: Option<&Value>, file: &'static str, field: &'static str) -> Result<Vec<u32>, DefaultsError> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    let ids = match value {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(one) => id(one).map(|id| vec![id]),
    };
    let got = || value.map_or_else(String::new, Value::to_string);
    ids.ok_or_else(|| DefaultsError::Field { file, field, expected: "a token id or a list of them", got: got() })
}
