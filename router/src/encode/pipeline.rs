//! Vocabularies that run through the `tokenizers` crate: tokenizer.json of any kind, and byte-level BPE from GGUF.

use std::panic::{AssertUnwindSafe, catch_unwind};

use plan::step::TokenId;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::{NormalizedString, Range as Span, SplitDelimiterBehavior};
use tokenizers::{Model, Normalizer, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Token};

use super::error::{EncodeError, TokenizerError};
use super::specials::{Found, Parse, Specials};

/// A vocabulary with its normalizer, splitting rule and merges.
pub(super) struct Pipeline {
    inner: tokenizers::Tokenizer,
    /// Matched in the text as it came.
    raw: Specials,
    /// Matched after normalizing.
    normalized: Specials,
    /// Match the longest special of the text first rather than the leftmost.
    longest_first: bool,
}

type Cut = Vec<(NormalizedString, Option<Vec<Token>>)>;

impl Pipeline {
    /// The pipeline of a tokenizer.json.
    pub(super) fn from_json(inner: tokenizers::Tokenizer, raw: Specials, normalized: Specials) -> Self {
        Self { inner, raw, normalized, longest_first: false }
    }

    /// Byte-level BPE as in GGUF: split by `patterns` in turn, then merged by rank. `vocabulary` holds what merging may
    /// produce, `whole_words` skips merging for a piece that is itself in it.
    pub(super) fn byte_level(
        vocabulary: impl Iterator<Item = (String, TokenId)>,
        merges: Vec<(String, String)>,
        patterns: &[&str],
        whole_words: bool,
        specials: Specials,
    ) -> Result<Self, TokenizerError> {
        let wrong = |e: tokenizers::Error| TokenizerError::Vocabulary(e.to_string());
        let vocabulary: ahash::AHashMap<String, u32> = vocabulary.collect();
        let model = BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(whole_words).build().map_err(wrong)?;
        let mut inner = tokenizers::Tokenizer::new(model);
        let mut steps = Vec::new();
        for pattern in patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            steps.push(PreTokenizerWrapper::Split(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(wrong)?));
        }
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)));
        inner.with_pre_tokenizer(Some(Sequence::new(steps)));
        Ok(Self { inner, raw: specials, normalized: Specials::new(Vec::new()), longest_first: true })
    }

    /// Appends the ids of `text`.
    pub(super) fn encode(&self, text: &str, parse: Parse<'_>, ids: &mut Vec<TokenId>) -> Result<(), EncodeError> {
        let encoding = caught(|| self.run(text, parse)).map_err(|e| EncodeError(e.to_string()))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    fn run(&self, text: &str, parse: Parse<'_>) -> tokenizers::Result<tokenizers::Encoding> {
        let mut pieces = PreTokenizedString::from(text);
        pieces.split(|_, s| {
            let found = match self.longest_first {
                true => self.raw.find_longest(s.get(), parse),
                false => self.raw.find_leftmost(s.get(), parse, Some),
            };
            cut(&s, &found)
        })?;
        pieces.split(|_, mut s| {
            if let Some(normalizer) = self.inner.get_normalizer() {
                normalizer.normalize(&mut s)?;
            }
            let base = s.offsets_original().0;
            let origin = |r: std::ops::Range<usize>| {
                let r = s.convert_offsets(Span::Normalized(r))?;
                Some(base + r.start..base + r.end)
            };
            let found = self.normalized.find_leftmost(s.get(), parse, origin);
            cut(&s, &found)
        })?;
        if let Some(pre) = self.inner.get_pre_tokenizer() {
            pre.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|s| self.model(s.get()))?;
        pieces.into_encoding(None, 0, OffsetType::None)
    }

    /// Ids of a piece of text. Control tokens were taken out before where they are allowed: if the model still finds
    /// one spelled out in the text, the piece is encoded character by character.
    fn model(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        let model = self.inner.get_model();
        let tokens = model.tokenize(text)?;
        let spelled = |t: &Token| {
            let mut all = self.raw.list().iter().chain(self.normalized.list());
            all.any(|s| s.control && s.id == t.id && text.contains(&s.text))
        };
        if !tokens.iter().any(spelled) {
            return Ok(tokens);
        }
        let mut split = Vec::new();
        for c in text.chars() {
            split.extend(model.tokenize(c.encode_utf8(&mut [0; 4]))?);
        }
        Ok(split)
    }
}

/// Does work of the `tokenizers` crate, which panics at some files that are damaged instead of refusing them.
pub(super) fn caught<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    // What it worked on is not used again when it fails half-way: a tokenizer being made, or an encoding.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("the tokenizers crate gave up on it: {}", said.unwrap_or("no reason")).into())
    })
}

fn cut(text: &NormalizedString, found: &[Found]) -> tokenizers::Result<Cut> {
    let slice = |from, to| text.slice(Span::Normalized(from..to)).ok_or("a special token does not lie on character borders");
    let (mut cut, mut at) = (Cut::with_capacity(2 * found.len() + 1), 0);
    for f in found {
        if at < f.range.start {
            cut.push((slice(at, f.range.start)?, None));
        }
        let len = f.range.len();
        cut.push((slice(f.range.start, f.range.end)?, Some(vec![Token::new(f.id, String::new(), (0, len))])));
        at = f.range.end;
    }
    if at < text.len() {
        cut.push((slice(at, text.len())?, None));
    }
    Ok(cut)
}

/// GPT-2's.
pub(super) const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Digits alone.
pub(super) const DIGIT: &str = r"\p{N}";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek V3's: numbers, Chinese and Japanese, the rest.
const DEEPSEEK3: &[&str] = &[
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"##,
        "\r\n",
        r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[",
        "\r\n",
        r"]*|\s*[",
        "\r\n",
        r"]+|\s+(?!\S)|\s+"
    ),
];

/// How a `tokenizer.ggml.pre` splits text.
pub(super) struct PreTokenization {
    /// Regular expressions applied in turn.
    pub(super) patterns: &'static [&'static str],
    /// A piece that is itself a token is not merged.
    pub(super) whole_words: bool,
    /// BOS goes before a text when the file does not say.
    pub(super) add_bos: bool,
}

/// The name of the rule with these patterns.
pub(super) fn name_of(patterns: &[&str]) -> Option<&'static str> {
    let names = ["llama-bpe", "qwen2", "qwen35", "gpt-2", "smollm", "deepseek-v3"];
    names.into_iter().find(|name| pre_tokenization(name).is_ok_and(|rule| rule.patterns == patterns))
}

/// The splitting rule called `pre`.
///
/// # Errors
/// When it is not known; llama.cpp's names, of which those that share a rule are listed together.
pub(super) fn pre_tokenization(pre: &str) -> Result<PreTokenization, TokenizerError> {
    let (patterns, llama): (&'static [&'static str], bool) = match pre {
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" => (&[LLAMA3], true),
        "qwen2" | "deepseek-r1-qwen" => (&[QWEN2], false),
        "qwen35" => (&[QWEN35], false),
        "deepseek-v3" => (DEEPSEEK3, false),
        "gpt-2" | "phi-2" | "olmo" | "mpt" | "jina-es" | "jina-de" => (&[WORDS], false),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => (&[DIGIT, WORDS], false),
        other => return Err(TokenizerError::PreTokenizer(other.to_owned())),
    };
    Ok(PreTokenization { patterns, whole_words: llama, add_bos: llama })
}
