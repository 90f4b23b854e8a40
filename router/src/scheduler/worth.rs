//! How many drafts are worth their rows: a step's time against the tokens that are to be expected of it.
//!
//! The unit is a step of one row. What the constants stand on is in ADR 0030.

/// Another row in a step, in steps of one row.
const ROW: f32 = 0.2;
/// Waiting for a token before the next step is sent, in steps of one row.
const WAIT: f32 = 0.1;
/// Rows of a step with drafts. Beyond them products are bound by arithmetic, and a row costs what a token does.
pub(super) const ROWS: usize = 16;

/// A step with one row for each of its sequences, and what drafts were added to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Worth {
    rows: usize,
    /// Tokens that are to be expected of it.
    tokens: f32,
    /// Its time.
    cost: f32,
}

impl Worth {
    /// Of a step of so many sequences, without drafts.
    pub(super) fn of(sequences: usize) -> Self {
        Self { rows: sequences, tokens: sequences as f32, cost: 1.0 + ROW * sequences.saturating_sub(1) as f32 }
    }

    /// Adds drafts of one sequence, at most `most`, each of which comes true with probability `trust` if those before it do; returns how
    /// many. A draft is added where it brings more tokens for its time than the step does without it.
    pub(super) fn add(&mut self, trust: f32, most: usize) -> usize {
        let (mut drafts, mut chance) = (0, trust);
        while drafts < most && self.rows < ROWS && chance * self.cost > ROW * self.tokens {
            self.rows += 1;
            self.tokens += chance;
            self.cost += ROW;
            chance *= trust;
            drafts += 1;
        }
        drafts
    }

    /// Whether drafts of a sequence would bring more than waiting for the token before them takes.
    pub(super) fn repays_waiting(self, trust: f32, most: usize) -> bool {
        let mut with = self;
        with.add(trust, most) > 0 && with.tokens * self.cost > self.tokens * (with.cost + WAIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafts(sequences: usize, trust: f32) -> usize {
        Worth::of(sequences).add(trust, 16)
    }

    #[test]
    fn the_more_is_trusted_the_more_is_drafted() {
        assert_eq!([0.0, 0.2, 0.5, 0.8, 0.95].map(|trust| drafts(1, trust)), [0, 0, 1, 4, 10]);
        assert_eq!(drafts(1, 1.0), ROWS - 1);
        assert_eq!(Worth::of(1).add(1.0, 3), 3, "no more than are allowed");
    }

    #[test]
    fn full_steps_have_none() {
        assert!(drafts(4, 0.6) > 0 && drafts(8, 0.6) == 0, "a row is worth more among few");
        assert_eq!(drafts(ROWS, 1.0), 0);
        let mut worth = Worth::of(6);
        let added: usize = (0..6).map(|_| worth.add(0.99, 4)).sum();
        assert_eq!(added, ROWS - 6, "all drafts of a step share its rows");
    }

    #[test]
    fn one_waits_only_for_what_repays_it() {
        let waits = |trust| Worth::of(1).repays_waiting(trust, 8);
        assert!(!waits(0.0) && !waits(0.3) && waits(0.5) && waits(0.9));
        assert!(!Worth::of(1).repays_waiting(0.9, 0));
    }
}
