//! How SentencePiece prepares a text before it is cut: `Normalize` of its `normalizer.cc`, with the table that a model carries for it.
//!
//! The table is a double array (Yata et al. 2007) of texts to be replaced, in the layout of Darts-clone, and the texts in their place.

use super::error::TokenizerError;
use super::specials::Specials;
use super::spm::BOUNDARY;

/// Most matches that are looked at for one place of a text.
const MOST_MATCHES: usize = 32;

/// A table of texts and what stands in their place.
pub(super) struct Charsmap {
    units: Vec<u32>,
    /// Texts, each with a zero behind it.
    texts: Box<str>,
}

impl Charsmap {
    /// Reads `precompiled_charsmap`: the bytes of the double array, the array, the texts. Nothing where there are no bytes.
    ///
    /// # Errors
    /// When the parts do not fit.
    pub(super) fn read(bytes: &[u8]) -> Result<Option<Self>, TokenizerError> {
        let wrong = |problem: String| TokenizerError::Vocabulary(format!("precompiled_charsmap: {problem}"));
        if bytes.is_empty() {
            return Ok(None);
        }
        let (said, rest) = bytes.split_first_chunk().ok_or_else(|| wrong(format!("{} bytes, expected at least 4", bytes.len())))?;
        let said = u32::from_le_bytes(*said) as usize;
        if said == 0 || !said.is_multiple_of(4) || said >= rest.len() {
            return Err(wrong(format!("a tree of {said} bytes in a table of {}", bytes.len())));
        }
        let (units, texts) = rest.split_at(said);
        let texts = std::str::from_utf8(texts).map_err(|e| wrong(format!("its texts are not UTF-8: {e}")))?;
        if !texts.ends_with('\0') {
            return Err(wrong("its last text has no end".to_owned()));
        }
        let units = units.chunks_exact(4).map(|unit| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]])).collect();
        Ok(Some(Self { units, texts: texts.into() }))
    }

    /// What stands in place of the longest beginning of `text` that the table has, and the bytes of that beginning.
    pub(super) fn longest(&self, text: &str) -> Option<(&str, usize)> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize;
        let mut at = offset(*self.units.first()?);
        let (mut best, mut matches) = (None, 0);
        for (index, &byte) in text.as_bytes().iter().enumerate() {
            at ^= usize::from(byte);
            let Some(&unit) = self.units.get(at) else { break };
            if unit & (1 << 31 | 0xff) != u32::from(byte) {
                break;
            }
            at ^= offset(unit);
            if unit & 1 << 8 != 0 {
                let Some(value) = self.units.get(at).map(|unit| (unit & !(1 << 31)) as usize) else { break };
                best = Some((value, index + 1));
                matches += 1;
                if matches == MOST_MATCHES {
                    break;
                }
            }
        }
        let (value, len) = best?;
        // A damaged table may point into the middle of things.
        let text = self.texts.get(value..).filter(|_| text.is_char_boundary(len))?;
        Some((text.split('\0').next().unwrap_or_default(), len))
    }
}

/// How a text is prepared.
pub(super) struct Normalizer {
    pub(super) table: Option<Charsmap>,
    /// Pieces that are always matched: what the text spells of them is left as it is.
    pub(super) kept: Specials,
    /// Put a space before the text.
    pub(super) space_prefix: bool,
    /// Drop spaces at both ends, and all but one within.
    pub(super) single_spaces: bool,
}

impl Normalizer {
    /// The text to be cut, a space for each boundary.
    pub(super) fn normalize(&self, text: &str) -> String {
        let (mut out, mut at) = (String::with_capacity(text.len() + 1), 0);
        let mut begun = !self.single_spaces;
        if begun && !text.is_empty() && self.space_prefix {
            out.push(' ');
        }
        let mut after_space = self.single_spaces;
        while at < text.len() {
            let rest = &text[at..];
            let character = rest.chars().next().map_or(1, char::len_utf8);
            let (mut piece, len) = match self.kept.longest_at(text.as_bytes(), at, usize::MAX, |_, _| true) {
                Some(kept) => (&rest[..kept.text.len()], kept.text.len()),
                None => self.table.as_ref().and_then(|table| table.longest(rest)).unwrap_or((&rest[..character], character)),
            };
            at += len;
            if !begun {
                if piece == " " {
                    continue;
                }
                begun = true;
                if self.space_prefix {
                    out.push(' ');
                }
            }
            if after_space {
                piece = piece.trim_start_matches(' ');
            }
            if !piece.is_empty() {
                out.extend(piece.chars().map(|c| if c == BOUNDARY { ' ' } else { c }));
                after_space = self.single_spaces && piece.ends_with(' ');
            }
        }
        if self.single_spaces {
            out.truncate(out.trim_end_matches(' ').len());
        }
        out
    }
}
