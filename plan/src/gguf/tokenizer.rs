//! The tokenizer stored in a GGUF header.

use std::collections::BTreeMap;

use super::{Array, GgufError, GgufProblem, Header, Keep, Kind, Value, read};

/// Arrays of the tokenizer that are kept.
const ARRAYS: [&str; 5] =
    ["tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", CHARSMAP];

/// How text is prepared: SentencePiece's table, byte by byte.
pub const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";

/// Key of a whole tokenizer.json, as `docs/gguf.md` of ggml names it.
pub const HUGGINGFACE_KEY: &str = "tokenizer.huggingface.json";

/// What kind of entry a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenType {
    /// Ordinary text.
    Normal,
    /// Stands for what the vocabulary cannot say.
    Unknown,
    /// Parsed from text only where special tokens are asked for.
    Control,
    /// Always parsed from text.
    UserDefined,
    /// Not in use.
    Unused,
    /// One raw byte, written `<0xHH>`.
    Byte,
}

/// A GGUF tokenizer: the vocabulary and its settings as stored, nothing derived.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokenizer {
    /// `tokenizer.ggml.model`: `llama`, `gpt2`, `bert`, …
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer of byte-level vocabularies.
    pub pre: Option<String>,
    /// Text of each token, by id.
    pub tokens: Vec<String>,
    /// Score of each token; empty when the file has none.
    pub scores: Vec<f32>,
    /// Kind of each token; empty when the file has none.
    pub types: Vec<TokenType>,
    /// `left right` pairs, best first; empty when the file has none.
    pub merges: Vec<String>,
    /// First token of a text.
    pub bos: Option<u32>,
    /// Last token of a text.
    pub eos: Option<u32>,
    /// End of a turn.
    pub eot: Option<u32>,
    /// End of a message.
    pub eom: Option<u32>,
    /// Unknown text.
    pub unknown: Option<u32>,
    /// Separator.
    pub separator: Option<u32>,
    /// Padding.
    pub padding: Option<u32>,
    /// Stands for a hidden word.
    pub mask: Option<u32>,
    /// Put the first token before a text.
    pub add_bos: Option<bool>,
    /// Put the last token after a text.
    pub add_eos: Option<bool>,
    /// Put a space before a text.
    pub add_space_prefix: Option<bool>,
    /// Drop spaces at both ends of a text, and all but one within.
    pub remove_extra_whitespaces: Option<bool>,
    /// How text is prepared: SentencePiece's table; empty where there is none.
    pub charsmap: Vec<u8>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.<name>`, by name.
    pub named_templates: BTreeMap<String, String>,
    /// A whole tokenizer.json, where the file carries one.
    pub huggingface: Option<String>,
    /// A whole generation_config.json, where the file carries one.
    pub generation: Option<String>,
}

impl Tokenizer {
    /// Parses the tokenizer out of `header`, the bytes of a GGUF file up to its tensor data (the card's `header.gguf`).
    ///
    /// # Errors
    /// When the header cannot be read or a tokenizer field has the wrong type, length or range.
    pub fn parse(header: &[u8]) -> Result<Self, GgufError> {
        let mut input = header;
        let parsed = read(&mut input, header.len() as u64, Keep::Keys(&ARRAYS), false)?;
        Self::from_header(&parsed)
    }

    /// Takes the tokenizer out of a header that was read with the arrays `tokens`, `scores`, `token_type` and `merges` kept.
    ///
    /// # Errors
    /// When a tokenizer field is missing or has the wrong type, length or range.
    pub fn from_header(header: &Header) -> Result<Self, GgufError> {
        let f = Fields { header };
        let model = f.text("tokenizer.ggml.model")?.ok_or_else(|| f.missing("tokenizer.ggml.model"))?;
        let tokens = f.list("tokenizer.ggml.tokens", Kind::String, |v| v.as_str().map(str::to_owned))?;
        let tokens = tokens.ok_or_else(|| f.missing("tokenizer.ggml.tokens"))?;
        let scores = f.list("tokenizer.ggml.scores", Kind::F32, |v| v.as_f64().map(|s| s as f32))?.unwrap_or_default();
        let types = f.list("tokenizer.ggml.token_type", Kind::I32, token_type)?.unwrap_or_default();
        f.same_length("tokenizer.ggml.scores", scores.len(), tokens.len())?;
        f.same_length("tokenizer.ggml.token_type", types.len(), tokens.len())?;
        let id = |name: &str| f.id(&format!("tokenizer.ggml.{name}_token_id"), tokens.len());
        let mut named_templates = BTreeMap::new();
        for entry in &header.metadata {
            if let Some(name) = entry.key.strip_prefix("tokenizer.chat_template.") {
                named_templates.insert(name.to_owned(), f.text(&entry.key)?.unwrap_or_default());
            }
        }
        Ok(Self {
            model,
            pre: f.text("tokenizer.ggml.pre")?,
            scores,
            types,
            merges: f.list("tokenizer.ggml.merges", Kind::String, |v| v.as_str().map(str::to_owned))?.unwrap_or_default(),
            bos: id("bos")?,
            eos: id("eos")?,
            eot: id("eot")?,
            eom: id("eom")?,
            unknown: id("unknown")?,
            separator: id("seperator")?,
            padding: id("padding")?,
            mask: id("mask")?,
            add_bos: f.flag("tokenizer.ggml.add_bos_token")?,
            add_eos: f.flag("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: f.flag("tokenizer.ggml.add_space_prefix")?,
            remove_extra_whitespaces: f.flag("tokenizer.ggml.remove_extra_whitespaces")?,
            charsmap: f.bytes(CHARSMAP)?,
            chat_template: f.text("tokenizer.chat_template")?,
            named_templates,
            huggingface: f.text(HUGGINGFACE_KEY)?,
            generation: f.text(crate::generation::GGUF_KEY)?,
            tokens,
        })
    }
}

fn token_type(value: &Value) -> Option<TokenType> {
    Some(match value {
        Value::I32(1) => TokenType::Normal,
        Value::I32(2) => TokenType::Unknown,
        Value::I32(3) => TokenType::Control,
        Value::I32(4) => TokenType::UserDefined,
        Value::I32(5) => TokenType::Unused,
        Value::I32(6) => TokenType::Byte,
        _ => return None,
    })
}

struct Fields<'a> {
    header: &'a Header,
}

impl Fields<'_> {
    fn missing(&self, key: &str) -> GgufError {
        let problem = GgufProblem::Invalid { expected: "a tokenizer", got: "no such key".to_owned() };
        GgufError { field: format!("metadata {key}"), offset: self.header.data_offset, problem, source: None }
    }

    fn wrong(&self, key: &str, expected: &'static str, got: String) -> GgufError {
        let offset = self.header.entry(key).map_or(0, |e| e.offset);
        GgufError { field: format!("metadata {key}"), offset, problem: GgufProblem::Invalid { expected, got }, source: None }
    }

    fn text(&self, key: &str) -> Result<Option<String>, GgufError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        let text = value.as_str().ok_or_else(|| self.wrong(key, "text", value.kind().name().to_owned()))?;
        Ok(Some(text.to_owned()))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, "a bool", value.kind().name().to_owned()))
    }

    /// A token id; some writers put −1 (or its unsigned form) for "none".
    fn id(&self, key: &str, tokens: usize) -> Result<Option<u32>, GgufError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        if matches!(value, Value::I32(-1) | Value::U32(u32::MAX)) {
            return Ok(None);
        }
        let id = value.as_u64().and_then(|v| u32::try_from(v).ok()).filter(|&v| (v as usize) < tokens);
        id.map(Some).ok_or_else(|| self.wrong(key, "the id of a token in the vocabulary", format!("{value:?} with {tokens} tokens")))
    }

    fn list<T>(&self, key: &str, kind: Kind, convert: impl Fn(&Value) -> Option<T>) -> Result<Option<Vec<T>>, GgufError> {
        let Some(value) = self.header.get(key) else { return Ok(None) };
        let Some(Array { kind: got, values: Some(values), .. }) = value.as_array().filter(|a| a.kind == kind) else {
            return Err(self.wrong(key, "an array of the tokenizer's type", value.kind().name().to_owned()));
        };
        let mut list = Vec::with_capacity(values.len());
        for value in values {
            list.push(convert(value).ok_or_else(|| self.wrong(key, "known values", format!("{value:?} in an array of {}", got.name())))?);
        }
        Ok(Some(list))
    }

    /// Bytes, in a list of them; some writers call them signed.
    fn bytes(&self, key: &str) -> Result<Vec<u8>, GgufError> {
        let kind = self.header.get(key).and_then(Value::as_array).map_or(Kind::U8, |array| array.kind);
        let byte = |value: &Value| match value {
            Value::U8(byte) => Some(*byte),
            Value::I8(byte) => Some(byte.cast_unsigned()),
            _ => None,
        };
        Ok(self.list(key, kind, byte)?.unwrap_or_default())
    }

    fn same_length(&self, key: &str, got: usize, tokens: usize) -> Result<(), GgufError> {
        if got == 0 || got == tokens { Ok(()) } else { Err(self.wrong(key, "one value per token", format!("{got} for {tokens} tokens"))) }
    }
}
