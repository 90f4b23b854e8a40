//! WordPiece vocabularies from vocab.txt and from GGUF: Schuster & Nakajima 2012, as BERT cuts words with it.
//!
//! Both become the tokenizer.json that the same model would have, so that one code path makes ids.

use plan::{
    card::ModelCard,
    gguf::{TokenType, Tokenizer as Stored},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{card::TokenizerConfig, error::TokenizerError, json, vocabulary::Vocabulary};

/// Name of the file with one token a line.
pub(super) const FILE: &str = "vocab.txt";
/// Its value of `tokenizer.ggml.model`.
pub(super) const MODEL: &str = "bert";
/// Begins a word in GGUF, where a token that continues one has no mark.
const WORD: char = '\u{2581}';
/// Begins a token that continues a word.
const CONTINUES: &str = "##";
/// Classes of tokenizer_config.json whose vocab.txt is of this kind.
const CLASSES: [&str; 4] = ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast"];
/// Longest word in characters that is cut; longer ones are unknown.
const LONGEST_WORD: usize = 100;

/// How text is prepared, and which tokens have a meaning of their own.
#[derive(Deserialize)]
#[serde(default)]
struct Rules {
    do_lower_case: bool,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: bool,
    unk_token: Text,
    cls_token: Text,
    sep_token: Text,
    pad_token: Text,
    mask_token: Text,
}

/// A token's text, alone or as the content of an object.
#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Plain(String),
    Added { content: String },
}

impl Text {
    fn new(text: &str) -> Self {
        Self::Plain(text.to_owned())
    }

    fn get(&self) -> &str {
        match self {
            Self::Plain(text) | Self::Added { content: text } => text,
        }
    }
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            do_lower_case: true,
            strip_accents: None,
            tokenize_chinese_chars: true,
            unk_token: Text::new("[UNK]"),
            cls_token: Text::new("[CLS]"),
            sep_token: Text::new("[SEP]"),
            pad_token: Text::new("[PAD]"),
            mask_token: Text::new("[MASK]"),
        }
    }
}

/// Builds the vocabulary of `bytes`, the contents of a card's vocab.txt.
///
/// # Errors
/// When it, or tokenizer_config.json, cannot be read or is of another kind, or a special token is not in it.
pub(super) fn from_lines(bytes: &[u8], card: &ModelCard, config: &TokenizerConfig) -> Result<Vocabulary, TokenizerError> {
    json::vocabulary(&of_lines(bytes, card, config)?, config)
}

/// The tokenizer.json of `bytes`, the contents of a card's vocab.txt.
///
/// # Errors
/// As [`from_lines`].
pub(super) fn of_lines(bytes: &[u8], card: &ModelCard, config: &TokenizerConfig) -> Result<Vec<u8>, TokenizerError> {
    let wrong = |file, problem: String| TokenizerError::File { file, problem };
    if let Some(class) = config.class.as_deref().filter(|class| !CLASSES.contains(class)) {
        return Err(wrong(FILE, format!("tokenizer_class is {class:?}, expected {} or a tokenizer.json", CLASSES.join(", "))));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| wrong(FILE, e.to_string()))?;
    let rules = match card.file("tokenizer_config.json") {
        Some(bytes) => serde_json::from_slice(bytes).map_err(|e| wrong("tokenizer_config.json", e.to_string()))?,
        None => Rules::default(),
    };
    let file = file(&text.lines().map(str::to_owned).collect::<Vec<_>>(), &rules).map_err(|problem| wrong(FILE, problem))?;
    serde_json::to_vec(&file).map_err(|e| wrong(FILE, e.to_string()))
}

/// Builds the vocabulary that a GGUF header has. Its text is lower-cased, as the file cannot say otherwise.
///
/// # Errors
/// When a special token is not in it.
pub(super) fn from_gguf(stored: &Stored, config: &TokenizerConfig) -> Result<Vocabulary, TokenizerError> {
    let file = of_gguf(&stored.tokens, &stored.types)?;
    json::vocabulary(&serde_json::to_vec(&file).map_err(|e| TokenizerError::Vocabulary(e.to_string()))?, config)
}

/// A token as GGUF has it: what begins a word has a mark, what continues one has none, and what stands in brackets is as it is.
pub(super) fn to_gguf(token: &str) -> String {
    match token.strip_prefix(CONTINUES) {
        Some(more) => more.to_owned(),
        None if is_bracketed(token) => token.to_owned(),
        None => format!("{WORD}{token}"),
    }
}

fn is_bracketed(token: &str) -> bool {
    token.starts_with('[') && token.ends_with(']')
}

/// The tokenizer.json of the tokens of a GGUF header and their types.
///
/// # Errors
/// When a special token is not among them.
pub(super) fn of_gguf(tokens: &[String], types: &[TokenType]) -> Result<Value, TokenizerError> {
    let special = |id: usize, token: &str| {
        let kind = types.get(id).copied().unwrap_or(TokenType::Normal);
        matches!(kind, TokenType::Control | TokenType::Unknown) || is_bracketed(token)
    };
    let token = |(id, token): (usize, &String)| match token.strip_prefix(WORD) {
        Some(word) => word.to_owned(),
        None if special(id, token) => token.clone(),
        None => format!("{CONTINUES}{token}"),
    };
    let tokens: Vec<String> = tokens.iter().enumerate().map(token).collect();
    file(&tokens, &Rules::default()).map_err(TokenizerError::Vocabulary)
}

/// A tokenizer.json.
fn file(tokens: &[String], rules: &Rules) -> Result<Value, String> {
    let (cls, sep) = (find(tokens, &rules.cls_token)?, find(tokens, &rules.sep_token)?);
    let unknown = find(tokens, &rules.unk_token)?;
    // Padding and masks have no part in what is served; where they are, they are tokens of their own.
    let more = [&rules.pad_token, &rules.mask_token].into_iter().filter_map(|text| find(tokens, text).ok());
    let mut added: Vec<(usize, &str)> = [cls, sep, unknown].into_iter().chain(more).collect();
    added.sort_unstable();
    let plain = |(id, text): (usize, &str)| json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let added: Vec<Value> = added.into_iter().map(plain).collect();
    let special = |(id, text): (usize, &str)| json!({"id": text, "ids": [id], "tokens": [text]});
    let of = |(_, text): (usize, &str), kind: u32| json!({"SpecialToken": {"id": text, "type_id": kind}});
    let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let vocab: serde_json::Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": rules.tokenize_chinese_chars,
            "strip_accents": rules.strip_accents, "lowercase": rules.do_lower_case,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [of(cls, 0), sequence("A", 0), of(sep, 0)],
            "pair": [of(cls, 0), sequence("A", 0), of(sep, 0), sequence("B", 1), of(sep, 1)],
            "special_tokens": {cls.1: special(cls), sep.1: special(sep)},
        },
        "decoder": {"type": "WordPiece", "prefix": CONTINUES, "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": unknown.1, "continuing_subword_prefix": CONTINUES,
            "max_input_chars_per_word": LONGEST_WORD, "vocab": vocab,
        },
    }))
}

/// A token's id and text.
fn find<'a>(tokens: &[String], text: &'a Text) -> Result<(usize, &'a str), String> {
    let text = text.get();
    let found = tokens.iter().position(|token| token == text);
    found.map(|id| (id, text)).ok_or_else(|| format!("the vocabulary has no token {text:?}"))
}
