//! How many drafts are worth their rows: a step's time against the tokens that are to be expected of it.
//!
//! The unit is a step of one row. What the constants stand on is in ADR 0030; ADR 0035 has what draft models add.

/// Another row in a step, in steps of one row.
pub(super) const ROW: f32 = 0.2;
/// Waiting for a token before the next step is sent, in steps of one row.
const WAIT: f32 = 0.1;
/// Rows of a step with drafts. Beyond them products are bound by arithmetic, and a row costs what a token does.
pub(super) const ROWS: usize = 16;

/// What may be drafted for a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prospect {
    /// Chance of a draft to come true, if those before it do.
    pub(super) trust: f32,
    /// What a draft takes: its row, and what it takes to guess it.
    pub(super) price: f32,
    /// How many there may be.
    pub(super) most: usize,
}

/// What a draft takes that a draft model draws together with those of `sequences` sequences, a step of which takes `cost`.
pub(super) fn drawn(cost: f32, sequences: usize) -> f32 {
    let sequences = sequences.max(1) as f32;
    ROW + cost * (1.0 + ROW * (sequences - 1.0)) / sequences
}

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

    /// Adds drafts of one sequence; returns how many. A draft is added where it brings more tokens for its time than the step does without it.
    pub(super) fn add(&mut self, Prospect { trust, price, most }: Prospect) -> usize {
        let (mut drafts, mut chance) = (0, trust);
        while drafts < most && self.rows < ROWS && chance * self.cost > price * self.tokens {
            self.rows += 1;
            self.tokens += chance;
            self.cost += price;
            chance *= trust;
            drafts += 1;
        }
        drafts
    }

    /// Whether drafts of a sequence would bring more than waiting for the token before them takes.
    pub(super) fn repays_waiting(self, prospect: Prospect) -> bool {
        let mut with = self;
        with.add(prospect) > 0 && with.tokens * self.cost > self.tokens * (with.cost + WAIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looked_up(trust: f32, most: usize) -> Prospect {
        Prospect { trust, price: ROW, most }
    }

    fn drafts(sequences: usize, trust: f32) -> usize {
        Worth::of(sequences).add(looked_up(trust, 16))
    }

    #[test]
    fn what_a_model_draws_has_to_be_worth_its_steps_too() {
        let drawn = |sequences, trust, cost| Worth::of(sequences).add(Prospect { trust, price: drawn(cost, sequences), most: 8 });
        assert_eq!([0.05, 0.1, 0.3, 0.6].map(|cost| drawn(1, 0.8, cost)), [3, 3, 2, 0]);
        assert_eq!(drawn(1, 0.99, 1.0), 0, "a model as large is worth nothing");
        assert_eq!(drawn(1, 1.0, 0.05), 8);
        assert!(super::drawn(0.5, 4) < super::drawn(0.5, 1), "steps are shared");
    }

    #[test]
    fn the_more_is_trusted_the_more_is_drafted() {
        assert_eq!([0.0, 0.2, 0.5, 0.8, 0.95].map(|trust| drafts(1, trust)), [0, 0, 1, 4, 10]);
        assert_eq!(drafts(1, 1.0), ROWS - 1);
        assert_eq!(Worth::of(1).add(looked_up(1.0, 3)), 3, "no more than are allowed");
    }

    #[test]
    fn full_steps_have_none() {
        assert!(drafts(4, 0.6) > 0 && drafts(8, 0.6) == 0, "a row is worth more among few");
        assert_eq!(drafts(ROWS, 1.0), 0);
        let mut worth = Worth::of(6);
        let added: usize = (0..6).map(|_| worth.add(looked_up(0.99, 4))).sum();
        assert_eq!(added, ROWS - 6, "all drafts of a step share its rows");
    }

    #[test]
    fn one_waits_only_for_what_repays_it() {
        let waits = |trust| Worth::of(1).repays_waiting(looked_up(trust, 8));
        assert!(!waits(0.0) && !waits(0.3) && waits(0.5) && waits(0.9));
        assert!(!Worth::of(1).repays_waiting(looked_up(0.9, 0)));
    }
}
