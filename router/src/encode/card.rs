//! What a model card says beside its vocabulary: special tokens, chat templates, generation defaults.

use plan::card::ModelCard;
use plan::step::TokenId;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::TokenizerError;

/// Generation settings of the model's makers; absent ones are left to the API's own defaults.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
#[serde(default)]
pub struct GenerationDefaults {
    /// Draw at all; `false` means the likeliest token.
    pub do_sample: Option<bool>,
    /// Temperature.
    pub temperature: Option<f32>,
    /// Keep the k likeliest.
    pub top_k: Option<u32>,
    /// Keep the smallest set with this probability.
    pub top_p: Option<f32>,
    /// Keep tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f32>,
    /// Penalty of ids that occurred.
    pub repetition_penalty: Option<f32>,
    eos_token_id: Value,
}

impl GenerationDefaults {
    /// Reads generation_config.json; empty when the card has none.
    ///
    /// # Errors
    /// When it is not JSON or a setting has the wrong type.
    pub(super) fn read(card: &ModelCard) -> Result<Self, TokenizerError> {
        Ok(read(card, "generation_config.json")?.unwrap_or_default())
    }

    /// End tokens, a number or a list.
    pub(super) fn end_ids(&self) -> Vec<TokenId> {
        ids(&self.eos_token_id)
    }
}

/// The ids of an `eos_token_id`: a number or a list of numbers.
pub(super) fn ids(value: &Value) -> Vec<TokenId> {
    let one = |v: &Value| v.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// tokenizer_config.json.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenizerConfig {
    /// `tokenizer_class`.
    pub(super) class: Option<String>,
    /// Text of the first token.
    pub(super) bos: Option<String>,
    /// Text of the last token.
    pub(super) eos: Option<String>,
    /// `add_bos_token`.
    pub(super) add_bos: Option<bool>,
    /// `add_eos_token`.
    pub(super) add_eos: Option<bool>,
    /// The chat template, or the one called `default` of several.
    pub(super) template: Option<String>,
    /// The one called `tool_use`.
    pub(super) tool_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads tokenizer_config.json and chat_template.jinja, which wins.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(super) fn read(card: &ModelCard) -> Result<Self, TokenizerError> {
        let value: Value = read(card, "tokenizer_config.json")?.unwrap_or_default();
        let text = |key: &str| {
            let value = value.get(key)?;
            value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
        };
        let flag = |key: &str| value.get(key).and_then(Value::as_bool);
        let mut config = Self {
            class: text("tokenizer_class"),
            bos: text("bos_token"),
            eos: text("eos_token"),
            add_bos: flag("add_bos_token"),
            add_eos: flag("add_eos_token"),
            template: value.get("chat_template").and_then(Value::as_str).map(str::to_owned),
            tool_template: None,
        };
        for entry in value.get("chat_template").and_then(Value::as_array).into_iter().flatten() {
            let source = entry.get("template").and_then(Value::as_str).map(str::to_owned);
            match entry.get("name").and_then(Value::as_str) {
                Some("default") => config.template = source,
                Some("tool_use") => config.tool_template = source,
                _ => {}
            }
        }
        if let Some(bytes) = card.file("chat_template.jinja") {
            let text = std::str::from_utf8(bytes);
            let text = text.map_err(|e| TokenizerError::File { file: "chat_template.jinja", problem: e.to_string() })?;
            config.template = Some(text.to_owned());
        }
        Ok(config)
    }
}

fn read<T: DeserializeOwned>(card: &ModelCard, file: &'static str) -> Result<Option<T>, TokenizerError> {
    let Some(bytes) = card.file(file) else { return Ok(None) };
    serde_json::from_slice(bytes).map(Some).map_err(|e| TokenizerError::File { file, problem: e.to_string() })
}

/// `eos_token_id` of config.json, for models without generation_config.json.
///
/// # Errors
/// When config.json is not JSON.
pub(super) fn config_end_ids(card: &ModelCard) -> Result<Vec<TokenId>, TokenizerError> {
    let config: Value = read(card, "config.json")?.unwrap_or_default();
    Ok(config.get("eos_token_id").map(ids).unwrap_or_default())
}
