//! What the sampler knows of a sequence: its ids, its settings, its mask; and what these do to logits.

use plan::step::{Mask, Sampling, TokenId};

/// Most ids of a mask for which the vocabulary product is computed in their rows alone. Each row costs up to a tile of 16, which is read whole.
const FEW: usize = 512;

/// A sequence's settings and ids.
#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) sampling: Sampling,
    prompt_len: usize,
    /// Ids by position; those behind the last draw may be drafts that were refused. Empty on ranks that do not sample.
    ids: Vec<TokenId>,
    /// The mask of the last draw, one bit an id.
    mask: Option<Vec<u8>>,
    /// What it allows, ascending, where that is little.
    few: Option<Vec<TokenId>>,
}

/// A mask is that of the draw before, of which there was none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMask;

/// Occurrences of each id, `[vocab]`, all 0 between uses.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// 0: not seen; else 1 + occurrences in the output.
    seen: Vec<u32>,
    touched: Vec<TokenId>,
}

impl History {
    /// A sequence of the given ids, the first `prompt_len` of which are prompt.
    pub(crate) fn new(ids: &[TokenId], prompt_len: usize, sampling: Sampling) -> Self {
        Self { sampling, prompt_len, ids: ids.to_vec(), mask: None, few: None }
    }

    /// Takes over the mask of an earlier draw.
    pub(crate) fn with_mask_of(self, before: Self) -> Self {
        Self { mask: before.mask, few: before.few, ..self }
    }

    /// Notes the ids at positions `first ..`; `first` is at most the number of known ids.
    pub(crate) fn feed(&mut self, first: usize, ids: &[TokenId]) {
        for (position, &id) in (first..).zip(ids) {
            match self.ids.get_mut(position) {
                Some(known) => *known = id,
                None => self.ids.push(id),
            }
        }
    }

    /// Takes a mask for the next draw; the rows of a vocabulary of `vocab` ids that it does not cover are not drawn.
    ///
    /// # Errors
    /// When it is said to be unchanged, and there was none.
    pub(crate) fn set_mask(&mut self, mask: Mask, vocab: usize) -> Result<(), NoMask> {
        match mask {
            Mask::Unchanged if self.mask.is_some() => {}
            Mask::Unchanged => return Err(NoMask),
            Mask::Ids(mut ids) => {
                ids.retain(|&id| (id as usize) < vocab);
                let bits = self.mask.get_or_insert_default();
                bits.clear();
                bits.resize(vocab.div_ceil(8), 0);
                for id in &ids {
                    bits[*id as usize / 8] |= 1 << (id % 8);
                }
                self.few = Some(ids).filter(|ids| ids.len() <= FEW);
            }
            Mask::Bits(mut bits) => {
                bits.resize(vocab.div_ceil(8), 0);
                self.mask = Some(bits);
                self.few = None;
            }
        }
        Ok(())
    }

    /// The tokens of which one is drawn next, ascending, where a mask allows few.
    pub(crate) fn few(&self) -> Option<&[TokenId]> {
        self.few.as_deref().filter(|_| self.sampling.masked)
    }

    /// Whether [`History::apply`] does anything to the draw after `position`.
    pub(crate) fn changes_logits(&self, position: usize) -> bool {
        self.sampling.masked || !self.sampling.logit_bias.is_empty() || self.suppresses(position) || self.penalizes()
    }

    fn penalizes(&self) -> bool {
        let s = &self.sampling;
        s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0
    }

    fn suppresses(&self, position: usize) -> bool {
        let emitted = (position + 1).saturating_sub(self.prompt_len);
        !self.sampling.suppress.is_empty() && emitted < self.sampling.min_tokens as usize
    }

    /// Changes the logits `[vocab]` of the draw after `position`: bias, ids not to be drawn yet, penalties, mask.
    pub(crate) fn apply(&self, position: usize, logits: &mut [f32], counts: &mut Counts) {
        for &(id, bias) in &self.sampling.logit_bias {
            logits[id as usize] += bias;
        }
        if self.suppresses(position) {
            for &id in &self.sampling.suppress {
                logits[id as usize] = f32::NEG_INFINITY;
            }
        }
        if self.penalizes() {
            self.penalize(position, logits, counts);
        }
        if let Some(mask) = self.mask.as_ref().filter(|_| self.sampling.masked) {
            for (logits, allowed) in logits.chunks_mut(8).zip(mask) {
                for (i, logit) in logits.iter_mut().enumerate() {
                    if allowed >> i & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }

    fn penalize(&self, position: usize, logits: &mut [f32], counts: &mut Counts) {
        let s = &self.sampling;
        counts.seen.resize(logits.len(), 0);
        for (at, &id) in self.ids.iter().take(position + 1).enumerate() {
            let seen = &mut counts.seen[id as usize];
            if *seen == 0 {
                counts.touched.push(id);
                *seen = 1;
            }
            *seen += u32::from(at >= self.prompt_len);
        }
        for id in counts.touched.drain(..) {
            let (logit, seen) = (&mut logits[id as usize], &mut counts.seen[id as usize]);
            let emitted = std::mem::take(seen) - 1;
            *logit = if *logit < 0.0 { *logit * s.repetition_penalty } else { *logit / s.repetition_penalty };
            if emitted > 0 {
                *logit -= s.frequency_penalty * emitted as f32;
                *logit -= s.presence_penalty;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(history: &History, position: usize, vocab: usize) -> Vec<f32> {
        let mut logits: Vec<f32> = (0..vocab).map(|i| i as f32 - 4.0).collect();
        let mut counts = Counts::default();
        history.apply(position, &mut logits, &mut counts);
        assert!(counts.seen.iter().all(|&n| n == 0) && counts.touched.is_empty());
        logits
    }

    #[test]
    fn penalties_count_prompt_and_output_as_they_should() {
        let sampling = Sampling { repetition_penalty: 2.0, presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::default() };
        // Prompt 1 6 6, output 7 7 1; the last id is a draft behind the draw.
        let history = History::new(&[1, 6, 6, 7, 7, 1, 9], 3, sampling);
        assert!(history.changes_logits(5));
        let got = changed(&history, 5, 10);
        let expected = [-4.0, -3.0 * 2.0 - 0.25 - 0.5, -2.0, -1.0, 0.0, 1.0, 2.0 / 2.0, 3.0 / 2.0 - 0.5 - 0.5, 4.0, 5.0];
        assert_eq!(got, expected);
        // One position earlier, the second 1 is not there yet: it is prompt only.
        assert_eq!(changed(&history, 4, 10)[1], -6.0);
    }

    #[test]
    fn bias_suppression_and_mask_are_applied_in_this_order() {
        let sampling =
            Sampling { logit_bias: vec![(2, 10.0), (3, 20.0)], suppress: vec![3], min_tokens: 2, masked: true, ..Sampling::default() };
        let mut history = History::new(&[5, 5], 1, sampling);
        assert_eq!(history.set_mask(Mask::Unchanged, 10), Err(NoMask));
        assert_eq!(history.set_mask(Mask::Ids(vec![2, 3, 9, 10, 4000]), 10), Ok(()));
        let low = f32::NEG_INFINITY;
        assert_eq!(changed(&history, 1, 10), [low, low, 8.0, low, low, low, low, low, low, 5.0]);
        assert_eq!(history.set_mask(Mask::Unchanged, 10), Ok(()));
        // Two tokens were emitted: 3 may come.
        history.feed(2, &[1]);
        assert_eq!(changed(&history, 2, 10)[3], 19.0);
        // Of a vocabulary that has fewer rows than the mask has ids, and of one that has more.
        for bits in [vec![0xff, 0, 0xff], vec![0xff]] {
            assert_eq!(history.set_mask(Mask::Bits(bits), 10), Ok(()));
            assert_eq!(changed(&history, 2, 10)[8..], [low, low]);
            assert_eq!(changed(&history, 2, 10)[3], 19.0);
        }
    }

    #[test]
    fn plain_settings_change_nothing() {
        let sampling = Sampling { suppress: vec![1], min_tokens: 2, temperature: 0.7, top_k: 5, ..Sampling::default() };
        let history = History::new(&[1, 2, 3], 1, sampling);
        assert!(history.changes_logits(1) && !history.changes_logits(2));
        assert_eq!(changed(&history, 2, 4), [-4.0, -3.0, -2.0, -1.0]);
    }

    #[test]
    fn fed_ids_replace_refused_drafts() {
        let sampling = Sampling { frequency_penalty: 1.0, ..Sampling::default() };
        let mut history = History::new(&[0], 1, sampling);
        history.feed(1, &[1, 2, 3]);
        history.feed(2, &[1]);
        assert_eq!(changed(&history, 2, 4), [-4.0, -5.0, -2.0, -1.0]);
    }
}
