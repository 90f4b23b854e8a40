//! Vocabularies from tokenizer.json.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use plan::step::TokenId;
use serde::Deserialize;
use serde_json::Value;

use super::card::TokenizerConfig;
use super::error::TokenizerError;
use super::pieces::{Pieces, byte_level, named_byte};
use super::pipeline::{Pipeline, caught};
use super::specials::{Special, Specials};
use super::spm::BOUNDARY;
use super::vocabulary::{END_TEXTS, Encoder, Pair, Vocabulary};

/// The parts of tokenizer.json that the `tokenizers` crate does not give away.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    normalizer: Value,
}

#[derive(Deserialize)]
struct Added {
    id: TokenId,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

/// Where a normalizer's table stands, in base64: the length of a tree, the tree, texts.
const TABLE: &str = "precompiled_charsmap";

/// How a token's text becomes bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// The GPT-2 alphabet.
    ByteLevel,
    /// A boundary mark for spaces, `<0xHH>` for bytes.
    Boundary,
    /// Words without spaces; `##` continues one.
    WordPiece,
    /// As it is.
    Plain,
}

fn wrong(problem: String) -> TokenizerError {
    TokenizerError::File { file: "tokenizer.json", problem }
}

/// Builds the vocabulary of `bytes`, a tokenizer.json.
///
/// # Errors
/// When it cannot be read or has a decoder that is not known.
pub(super) fn vocabulary(bytes: &[u8], config: &TokenizerConfig) -> Result<Vocabulary, TokenizerError> {
    let Known { mut inner, file } = Known::read(bytes)?;
    inner.with_truncation(None).map_err(|e| wrong(e.to_string()))?.with_padding(None);
    let (form, strip_space) = decoder(&file.decoder)?;

    let added = |id: TokenId| file.added_tokens.iter().find(|a| a.id == id);
    let size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
    if size > MOST_TOKENS {
        return Err(wrong(format!("token id {} is past the limit of {MOST_TOKENS}", size - 1)));
    }
    let (mut pieces, mut control) = (Pieces::default(), vec![false; size]);
    let by_id: std::collections::HashMap<TokenId, &Added> = file.added_tokens.iter().map(|a| (a.id, a)).collect();
    for id in 0..size as TokenId {
        match (by_id.get(&id), inner.id_to_token(id)) {
            (Some(added), _) => {
                control[id as usize] = added.special;
                pieces.push(added.content.as_bytes());
            }
            (None, Some(token)) => pieces.push(&piece(form, &token)),
            (None, None) => pieces.push(&[]),
        }
    }
    let id_of = |text: &str| inner.token_to_id(text);
    let bos = config.bos.as_deref().and_then(id_of);
    let eos = config.eos.as_deref().and_then(id_of);
    let (mut prefix, mut suffix) = around(&file.post_processor, &id_of);
    // Classes of their own rebuild the post-processor from these flags; the generic class does not.
    if config.class.as_deref().is_some_and(|c| !c.starts_with("PreTrainedTokenizer")) {
        if let Some(add) = config.add_bos {
            prefix = bos.filter(|_| add).into_iter().collect();
        }
        if let Some(add) = config.add_eos {
            suffix = eos.filter(|_| add).into_iter().collect();
        }
    }
    let ends = END_TEXTS.iter().filter_map(|t| id_of(t)).filter(|&id| added(id).is_some_and(|a| a.special)).chain(eos).collect();
    let special = |normalized: bool| {
        let pick = file.added_tokens.iter().filter(move |a| a.normalized == normalized);
        pick.map(|a| Special {
            text: a.content.clone(),
            id: a.id,
            control: a.special,
            lstrip: a.lstrip,
            rstrip: a.rstrip,
            single_word: a.single_word,
        })
    };
    let raw = Specials::new(special(false).collect());
    let normalized = special(true).map(|s| Special { text: normalize(&inner, &s.text), ..s });
    let normalized = Specials::new(normalized.collect());
    let pair = pair(&file.post_processor, &id_of);
    let encoder = Encoder::Pipeline(Box::new(Pipeline::from_json(inner, raw, normalized)));
    Ok(Vocabulary { encoder, pieces, control, prefix, suffix, pair, bos, eos, ends, strip_space })
}

/// Builds the vocabulary of a tokenizer.json that a GGUF header carries; what that says of the tokens around a text counts.
///
/// # Errors
/// As [`vocabulary`].
pub(super) fn of_gguf(json: &str, stored: &plan::gguf::Tokenizer, config: TokenizerConfig) -> Result<Vocabulary, TokenizerError> {
    let text = |id: Option<TokenId>| id.and_then(|id| stored.tokens.get(id as usize)).cloned();
    let config = TokenizerConfig { bos: text(stored.bos), eos: text(stored.eos), ..config };
    let mut vocabulary = vocabulary(json.as_bytes(), &config)?;
    if let Some(add) = stored.add_bos {
        vocabulary.prefix = vocabulary.bos.filter(|_| add).into_iter().collect();
    }
    if let Some(add) = stored.add_eos {
        vocabulary.suffix = vocabulary.eos.filter(|_| add).into_iter().collect();
    }
    vocabulary.ends.extend([stored.eot, stored.eom].into_iter().flatten());
    Ok(vocabulary)
}

/// What a tokenizer.json lists, as it is written there.
pub(super) struct Known {
    inner: tokenizers::Tokenizer,
    file: File,
}

impl Known {
    /// Reads it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let file: File = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
        tables(&file.normalizer)?;
        Ok(Self { inner: caught(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(|e| wrong(e.to_string()))?, file })
    }

    /// The text of an added token, and whether it is special.
    pub(super) fn added(&self, id: TokenId) -> Option<(&str, bool)> {
        self.file.added_tokens.iter().find(|a| a.id == id).map(|a| (a.content.as_str(), a.special))
    }

    /// Texts of the added tokens.
    pub(super) fn added_texts(&self) -> impl Iterator<Item = &str> {
        self.file.added_tokens.iter().map(|a| a.content.as_str())
    }

    /// Whether added tokens are matched by their text alone.
    pub(super) fn plain_added(&self) -> bool {
        self.file.added_tokens.iter().all(|a| !a.lstrip && !a.rstrip && !a.single_word)
    }

    /// The text of a token.
    pub(super) fn text(&self, id: TokenId) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token.
    pub(super) fn id(&self, text: &str) -> Option<TokenId> {
        self.inner.token_to_id(text)
    }

    /// Whether it cuts words into pieces, the longest first.
    pub(super) fn is_word_pieces(&self) -> bool {
        matches!(self.inner.get_model(), tokenizers::ModelWrapper::WordPiece(_))
    }

    /// Whether it is of SentencePiece's kind, merged: boundaries for spaces, and bytes for what has no token.
    pub(super) fn is_score_merged(&self) -> bool {
        let bpe = matches!(self.inner.get_model(), tokenizers::ModelWrapper::BPE(model) if model.byte_fallback);
        bpe && decoder(&self.file.decoder).is_ok_and(|(form, _)| form == Form::Boundary)
    }
}

/// Checks tables of normalization, wherever they stand below `value`: the `tokenizers` crate makes room for as much as one says it has.
fn tables(value: &Value) -> Result<(), TokenizerError> {
    let below: Vec<&Value> = match value {
        Value::Array(list) => list.iter().collect(),
        Value::Object(map) => map.values().collect(),
        _ => return Ok(()),
    };
    if let Some(text) = value.get(TABLE).and_then(Value::as_str) {
        let table = BASE64_STANDARD.decode(text).map_err(|e| wrong(format!("{TABLE}: {e}")))?;
        let said = table.first_chunk().map_or(u32::MAX, |len| u32::from_le_bytes(*len)) as usize;
        if !said.is_multiple_of(4) || said > table.len().saturating_sub(4) {
            return Err(wrong(format!("{TABLE}: a tree of {said} bytes in a table of {}", table.len())));
        }
    }
    below.into_iter().try_for_each(tables)
}

/// Ids that the post-processor of `json` puts before and after a text.
pub(super) fn around_text(json: &Value, tokenizer: &super::Tokenizer) -> (Vec<TokenId>, Vec<TokenId>) {
    let id_of = |text: &str| (0..tokenizer.vocab() as TokenId).find(|&id| tokenizer.piece(id) == text.as_bytes());
    around(&json["post_processor"], &id_of)
}

/// Ids a tokenizer.json may name; far above any model's vocabulary, so that a wild id cannot ask for a table of gigabytes.
const MOST_TOKENS: usize = 1 << 22;

fn normalize(inner: &tokenizers::Tokenizer, text: &str) -> String {
    use tokenizers::Normalizer;
    let Some(normalizer) = inner.get_normalizer() else { return text.to_owned() };
    let mut normal = tokenizers::NormalizedString::from(text);
    if caught(|| normalizer.normalize(&mut normal)).is_ok() { normal.get().to_owned() } else { text.to_owned() }
}

fn piece(form: Form, token: &str) -> Vec<u8> {
    match form {
        Form::ByteLevel => byte_level(token),
        Form::Boundary => match named_byte(token) {
            Some(byte) => vec![byte],
            None => token.replace(BOUNDARY, " ").into_bytes(),
        },
        Form::WordPiece => token.strip_prefix("##").map_or_else(|| format!(" {token}"), str::to_owned).into_bytes(),
        Form::Plain => token.as_bytes().to_vec(),
    }
}

/// The form of tokens, and whether the first piece of a text loses a leading space.
fn decoder(decoder: &Value) -> Result<(Form, bool), TokenizerError> {
    let (mut form, mut strip) = (Form::Plain, false);
    let mut steps = vec![decoder];
    while let Some(step) = steps.pop() {
        match step.get("type").and_then(Value::as_str) {
            None => {}
            Some("Sequence") => steps.extend(step.get("decoders").and_then(Value::as_array).into_iter().flatten()),
            Some("ByteLevel") => form = Form::ByteLevel,
            Some("ByteFallback" | "Replace") => form = Form::Boundary,
            Some("Metaspace") => {
                form = Form::Boundary;
                strip |= step.get("prepend_scheme").and_then(Value::as_str) != Some("never")
                    && step.get("add_prefix_space").and_then(Value::as_bool) != Some(false);
            }
            Some("Strip") => strip |= step.get("start").and_then(Value::as_u64).is_some_and(|n| n > 0),
            Some("WordPiece") => (form, strip) = (Form::WordPiece, true),
            Some("Fuse") => {}
            Some(other) => return Err(TokenizerError::Decoder(other.to_owned())),
        }
    }
    Ok((form, strip))
}

/// Ids that the post-processor puts before and after a text.
fn around(processor: &Value, id_of: &impl Fn(&str) -> Option<TokenId>) -> (Vec<TokenId>, Vec<TokenId>) {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    match processor.get("type").and_then(Value::as_str) {
        Some("Sequence") => {
            for step in processor.get("processors").and_then(Value::as_array).into_iter().flatten() {
                let (b, a) = around(step, id_of);
                before.splice(0..0, b);
                after.extend(a);
            }
        }
        Some("TemplateProcessing") => {
            let mut passed = false;
            for item in processor.get("single").and_then(Value::as_array).into_iter().flatten() {
                passed |= item.get("Sequence").is_some();
                let Some(name) = item.pointer("/SpecialToken/id").and_then(Value::as_str) else { continue };
                let ids = template_ids(processor, name);
                if passed { after.extend(ids) } else { before.extend(ids) }
            }
        }
        Some("BertProcessing" | "RobertaProcessing") => {
            let id = |key: &str| processor.get(key).and_then(|v| v.get(0)).and_then(Value::as_str).and_then(id_of);
            before.extend(id("cls"));
            after.extend(id("sep"));
        }
        _ => {}
    }
    (before, after)
}

/// Ids that a template's processor has for a special token.
fn template_ids(processor: &Value, name: &str) -> Vec<TokenId> {
    let table = processor.pointer("/special_tokens").and_then(|t| t.get(name)).and_then(|t| t.get("ids"));
    table.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_u64).map(|id| id as TokenId).collect()
}

/// Ids that the post-processor puts around two texts, where it knows what to do with two.
fn pair(processor: &Value, id_of: &impl Fn(&str) -> Option<TokenId>) -> Option<Pair> {
    let kind = processor.get("type").and_then(Value::as_str)?;
    match kind {
        "Sequence" => processor.get("processors")?.as_array()?.iter().find_map(|step| pair(step, id_of)),
        "TemplateProcessing" => {
            let (mut pair, mut texts) = (Pair::default(), Vec::new());
            for item in processor.get("pair")?.as_array()? {
                if let Some(text) = item.pointer("/Sequence/id").and_then(Value::as_str) {
                    texts.push(text);
                    continue;
                }
                let ids = template_ids(processor, item.pointer("/SpecialToken/id").and_then(Value::as_str)?);
                [&mut pair.before, &mut pair.between, &mut pair.after].get_mut(texts.len())?.extend(ids);
            }
            (texts == ["A", "B"]).then_some(pair)
        }
        "BertProcessing" | "RobertaProcessing" => {
            let id = |key: &str| processor.get(key).and_then(|v| v.get(0)).and_then(Value::as_str).and_then(id_of);
            let (cls, sep) = (id("cls")?, id("sep")?);
            let between = if kind == "BertProcessing" { vec![sep] } else { vec![sep, sep] };
            Some(Pair { before: vec![cls], between, after: vec![sep] })
        }
        _ => None,
    }
}
