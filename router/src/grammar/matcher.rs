//! A grammar followed along a sequence.

use plan::step::{Mask, TokenId};

use super::GrammarError;

/// Where a sequence stands in its grammar.
pub(crate) struct Matcher(Box<llguidance::Matcher>);

impl Matcher {
    pub(super) fn new(start: llguidance::Matcher) -> Self {
        Self(Box::new(start))
    }

    /// Goes on by ids that were emitted. What comes behind the end of the grammar is not looked at.
    ///
    /// # Errors
    /// When they do not match, or the grammar is too complex there.
    pub(crate) fn advance(&mut self, ids: &[TokenId]) -> Result<(), GrammarError> {
        for &id in ids {
            if self.0.is_stopped() && self.0.stop_reason().is_ok() {
                return Ok(());
            }
            self.0.consume_token(id).map_err(|e| GrammarError::of(&e))?;
        }
        Ok(())
    }

    /// Which tokens may come next: the end tokens alone where the grammar is at its end.
    ///
    /// # Errors
    /// When no token may come, or finding out takes more than it may.
    pub(crate) fn mask(&mut self) -> Result<Mask, GrammarError> {
        let set = self.0.compute_mask_or_eos().map_err(|e| GrammarError::of(&e))?;
        let (words, covered) = (set.as_slice(), set.len());
        // A list where it is the shorter of the two.
        let count: usize = words.iter().map(|word| word.count_ones() as usize).sum();
        if count * 32 <= covered {
            return Ok(Mask::Ids(set.iter().collect()));
        }
        let mut bits: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bits.truncate(covered.div_ceil(8));
        Ok(Mask::Bits(bits))
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").finish_non_exhaustive()
    }
}
