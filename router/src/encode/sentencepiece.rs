//! Vocabularies from SentencePiece's tokenizer.model, and from GGUF keys of a model that takes the likeliest pieces.

use plan::card::ModelCard;
use plan::gguf::{TokenType, Tokenizer as Stored};
use plan::step::TokenId;
use serde_json::Value;

use super::card::TokenizerConfig;
use super::error::TokenizerError;
use super::normalizer::{Charsmap, Normalizer};
use super::specials::{Special, Specials};
use super::spm::{BOUNDARY, Cut, Rules};
use super::unigram::Unigram;
use super::vocabulary::{Encoder, Vocabulary};

/// Name of the file.
pub(super) const FILE: &str = "tokenizer.model";
/// Value of `tokenizer.ggml.model` of a vocabulary whose likeliest pieces are taken.
pub(super) const LIKELIEST: &str = "t5";
/// Most tokens that are added behind the pieces; far above any model's.
const MOST_ADDED: usize = 1 << 16;

/// What the file says, with the tokens that tokenizer_config.json adds.
///
/// # Errors
/// When a file cannot be read, or the model is of a kind that is not supported.
pub(super) fn stored(bytes: &[u8], card: &ModelCard, config: &TokenizerConfig) -> Result<Stored, TokenizerError> {
    let mut stored = read(bytes)?;
    add(&mut stored, card)?;
    let id = |text: &Option<String>| text.as_ref().and_then(|text| stored.tokens.iter().position(|t| t == text)).map(|id| id as TokenId);
    let (bos, eos, padding) = (id(&config.bos), id(&config.eos), id(&config.pad));
    (stored.bos, stored.eos, stored.padding) = (bos.or(stored.bos), eos.or(stored.eos), padding.or(stored.padding));
    (stored.add_bos, stored.add_eos) = (config.add_bos, config.add_eos);
    // Where its files do not say, T5's class ends texts and begins none, and others begin them alone.
    if stored.model == LIKELIEST && !config.class.as_deref().is_some_and(|class| class.starts_with("T5")) {
        (stored.add_bos, stored.add_eos) = (stored.add_bos.or(Some(true)), stored.add_eos.or(Some(false)));
    }
    Ok(stored)
}

fn read(bytes: &[u8]) -> Result<Stored, TokenizerError> {
    plan::sentencepiece::read(bytes).map_err(|e| TokenizerError::File { file: FILE, problem: e.to_string() })
}

/// Builds the vocabulary.
///
/// # Errors
/// As [`stored`].
pub(super) fn vocabulary(bytes: &[u8], card: &ModelCard, config: &TokenizerConfig) -> Result<Vocabulary, TokenizerError> {
    // What tokenizer_config.json adds behind the pieces is no part of the model: it is taken out of the text first.
    let pieces = read(bytes)?.tokens.len();
    of_pieces(stored(bytes, card, config)?, pieces)
}

/// Builds the vocabulary of a header whose likeliest pieces are taken.
///
/// # Errors
/// When its parts contradict each other.
pub(super) fn from_gguf(stored: Stored) -> Result<Vocabulary, TokenizerError> {
    let pieces = stored.tokens.len();
    of_pieces(stored, pieces)
}

/// Builds a vocabulary, the first `pieces` tokens of which are those of the model.
fn of_pieces(mut stored: Stored, pieces: usize) -> Result<Vocabulary, TokenizerError> {
    let fallback = stored.types.contains(&TokenType::Byte);
    let defined = |spelled: fn(&str) -> String| {
        let special = |(id, kind): (usize, &TokenType)| {
            let text = spelled(&stored.tokens[id]);
            let special = Special { text, id: id as TokenId, control: false, lstrip: false, rstrip: false, single_word: false };
            (*kind == TokenType::UserDefined).then_some(special)
        };
        Specials::new(stored.types.iter().enumerate().take(pieces).filter_map(special).collect())
    };
    let normalizer = Normalizer {
        table: Charsmap::read(&stored.charsmap)?,
        kept: defined(str::to_owned),
        space_prefix: stored.add_space_prefix.unwrap_or(true),
        single_spaces: stored.remove_extra_whitespaces.unwrap_or(false),
    };
    if stored.scores.len() != stored.tokens.len() {
        let problem = format!("expected a score for each of {} tokens, got {}", stored.tokens.len(), stored.scores.len());
        return Err(TokenizerError::Vocabulary(problem));
    }
    let cut = match stored.model == LIKELIEST {
        true => Cut::Likeliest(Box::new(Unigram::new(&stored, pieces))),
        false => Cut::Merged(Box::new(defined(|text| text.replace(BOUNDARY, " ")))),
    };
    // They are not matched before the space is put there.
    stored.types.iter_mut().take(pieces).filter(|kind| **kind == TokenType::UserDefined).for_each(|kind| *kind = TokenType::Normal);
    let mut vocabulary = super::gguf::vocabulary(stored)?;
    if let Encoder::Spm(spm) = &mut vocabulary.encoder {
        spm.rules = Rules::SentencePiece { normalizer: Box::new(normalizer), cut, bytes: fallback };
    }
    Ok(vocabulary)
}

/// Adds the tokens of `added_tokens_decoder`: `{"32000": {"content": …, "special": …}}`.
fn add(stored: &mut Stored, card: &ModelCard) -> Result<(), TokenizerError> {
    let wrong = |problem: String| TokenizerError::File { file: "tokenizer_config.json", problem };
    let Some(bytes) = card.file("tokenizer_config.json") else { return Ok(()) };
    let config: Value = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
    let most = stored.tokens.len() + MOST_ADDED;
    for (key, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let id = key.parse::<usize>().ok().filter(|&id| id < most);
        let id = id.ok_or_else(|| wrong(format!("added_tokens_decoder has id {key}, expected one below {most}")))?;
        let Some(text) = token["content"].as_str() else { return Err(wrong(format!("added token {id} has no content"))) };
        for gap in stored.tokens.len()..=id {
            stored.tokens.push(format!("[PAD{gap}]"));
            stored.scores.push(f32::MIN);
            stored.types.push(TokenType::Unused);
        }
        stored.tokens[id] = text.to_owned();
        if stored.types[id] != TokenType::Unknown {
            stored.types[id] = if token["special"] == true { TokenType::Control } else { TokenType::UserDefined };
        }
    }
    Ok(())
}
