//! Vocabularies from GGUF headers.

use plan::gguf::{TokenType, Tokenizer as Stored};
use plan::step::TokenId;

use super::error::TokenizerError;
use super::pieces::{Pieces, byte_level, named_byte};
use super::pipeline::{Pipeline, pre_tokenization};
use super::sentencepiece;
use super::specials::{Special, Specials};
use super::spm::{BOUNDARY, Rules, Spm};
use super::vocabulary::{END_TEXTS, Encoder, Vocabulary};

/// Builds the vocabulary that `stored` describes.
///
/// # Errors
/// When its kind or pre-tokenizer is not known, or its parts contradict each other.
pub(super) fn vocabulary(stored: Stored) -> Result<Vocabulary, TokenizerError> {
    let likeliest = stored.model == sentencepiece::LIKELIEST;
    let boundaries = match stored.model.as_str() {
        "llama" => true,
        "gpt2" => false,
        _ if likeliest => true,
        other => return Err(TokenizerError::Model(other.to_owned())),
    };
    let kind = |id: usize| {
        let kind = stored.types.get(id).copied().unwrap_or(TokenType::Normal);
        // Text that ends a turn is never text of its own, whatever the file calls it.
        if END_TEXTS.contains(&stored.tokens[id].as_str()) { TokenType::Control } else { kind }
    };
    let mut pieces = Pieces::default();
    let (mut specials, mut control) = (Vec::new(), vec![false; stored.tokens.len()]);
    for (id, token) in stored.tokens.iter().enumerate() {
        let kind = kind(id);
        control[id] = matches!(kind, TokenType::Control | TokenType::Unknown);
        match kind {
            TokenType::Control | TokenType::Unknown | TokenType::UserDefined => {
                let (control, text) = (control[id], token.clone());
                specials.push(Special { text, id: id as TokenId, control, lstrip: false, rstrip: false, single_word: false });
                pieces.push(token.as_bytes());
            }
            TokenType::Byte if named_byte(token).is_some() => pieces.push(&[named_byte(token).unwrap_or(b'?')]),
            _ if boundaries => pieces.push(token.replace(BOUNDARY, " ").as_bytes()),
            _ => pieces.push(&byte_level(token)),
        }
    }
    let mut ends: Vec<TokenId> = [stored.eos, stored.eot, stored.eom].into_iter().flatten().collect();
    ends.extend(specials.iter().filter(|s| END_TEXTS.contains(&s.text.as_str())).map(|s| s.id));
    let specials = Specials::new(specials);
    // What llama.cpp takes where a file does not say.
    let (add_eos, usual) = if likeliest { (true, (None, None)) } else { (false, (Some(1), Some(2))) };
    let (encoder, add_bos, bos, eos) = if boundaries {
        let spm = score_merged_encoder(&stored, kind, specials)?;
        (Encoder::Spm(Box::new(spm)), !likeliest, stored.bos.or(usual.0), stored.eos.or(usual.1))
    } else {
        let pre = stored.pre.as_deref().unwrap_or("(absent)");
        let rule = pre_tokenization(pre)?;
        let add_bos = rule.add_bos;
        let words = (0..stored.tokens.len()).filter(|&id| !matches!(kind(id), TokenType::Control | TokenType::Unknown));
        let words = words.map(|id| (stored.tokens[id].clone(), id as TokenId));
        let pipeline = Pipeline::byte_level(words, merges(&stored)?, rule.patterns, rule.whole_words, specials)?;
        (Encoder::Pipeline(Box::new(pipeline)), add_bos, stored.bos, stored.eos)
    };
    let in_vocabulary = |id: Option<TokenId>| id.filter(|&id| (id as usize) < stored.tokens.len());
    let (bos, eos) = (in_vocabulary(bos), in_vocabulary(eos));
    ends.extend(eos);
    let strip_space = matches!(&encoder, Encoder::Spm(spm) if spm.space_prefix);
    Ok(Vocabulary {
        encoder,
        pieces,
        control,
        prefix: bos.filter(|_| stored.add_bos.unwrap_or(add_bos)).into_iter().collect(),
        suffix: eos.filter(|_| stored.add_eos.unwrap_or(add_eos)).into_iter().collect(),
        pair: None,
        bos,
        eos,
        ends,
        strip_space,
    })
}

fn score_merged_encoder(stored: &Stored, kind: impl Fn(usize) -> TokenType, specials: Specials) -> Result<Spm, TokenizerError> {
    if stored.scores.len() != stored.tokens.len() {
        let problem = format!("expected a score for each of {} tokens, got {}", stored.tokens.len(), stored.scores.len());
        return Err(TokenizerError::Vocabulary(problem));
    }
    let mut ids = ahash::AHashMap::with_capacity(stored.tokens.len());
    let (mut bytes, mut longest) = (Box::new([None; 256]), 0);
    for (id, token) in stored.tokens.iter().enumerate() {
        match kind(id) {
            TokenType::Byte => {
                let byte = named_byte(token);
                let byte = byte.ok_or_else(|| TokenizerError::Vocabulary(format!("byte token {id} is {token:?}, expected <0xHH>")))?;
                bytes[usize::from(byte)] = Some(id as TokenId);
            }
            TokenType::Control | TokenType::Unknown => {}
            // Text has no plain spaces once it is escaped.
            _ if token.contains(' ') || token.is_empty() => {}
            _ => {
                let text = token.replace(BOUNDARY, " ");
                longest = longest.max(text.len());
                ids.entry(text.into_boxed_str()).or_insert(id as TokenId);
            }
        }
    }
    // Adding 0 makes −0 and 0 equal; a score that is not a number loses against all others.
    let scores = stored.scores.iter().map(|&s| if s.is_nan() { f32::NEG_INFINITY } else { s + 0.0 }).collect();
    let space_prefix = stored.add_space_prefix.unwrap_or(true);
    Ok(Spm { ids, scores, bytes, unknown: stored.unknown, specials, space_prefix, longest, rules: Rules::LlamaCpp })
}

/// The pairs that are merged, best first.
pub(super) fn merges(stored: &Stored) -> Result<Vec<(String, String)>, TokenizerError> {
    let pair = |line: &String| {
        // The left half may itself begin with a space.
        let at = line.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
        let at = at.ok_or_else(|| TokenizerError::Vocabulary(format!("merge {line:?} is not two tokens")))?;
        Ok((line[..at].to_owned(), line[at + 1..].to_owned()))
    };
    stored.merges.iter().map(pair).collect()
}
