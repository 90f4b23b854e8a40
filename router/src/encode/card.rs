//! What a model card says beside its vocabulary: special tokens, chat templates, generation defaults.

use plan::card::ModelCard;
use plan::generation::{Defaults, DefaultsError};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::TokenizerError;

/// Reads the generation settings of the model's makers.
///
/// # Errors
/// When a file is not JSON or a setting has the wrong type or range.
pub(super) fn defaults(card: &ModelCard) -> Result<Defaults, TokenizerError> {
    Defaults::from_card(card).map_err(|error| match error {
        DefaultsError::Json { file, source } => TokenizerError::File { file, problem: source.to_string() },
        DefaultsError::Field { file, .. } => TokenizerError::File { file, problem: error.to_string() },
    })
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
    /// Text of the padding token.
    pub(super) pad: Option<String>,
    /// Text of the token that stands for a hidden word.
    pub(super) mask: Option<String>,
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
        let value: Map<String, Value> = read(card, "tokenizer_config.json")?.unwrap_or_default();
        let text = |key: &str| {
            let value = value.get(key)?;
            value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(str::to_owned)
        };
        let flag = |key: &str| value.get(key).and_then(Value::as_bool);
        let mut config = Self {
            class: text("tokenizer_class"),
            bos: text("bos_token"),
            eos: text("eos_token"),
            pad: text("pad_token"),
            mask: text("mask_token"),
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
