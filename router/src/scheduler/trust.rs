//! How far the draft model is trusted with a sequence: the share of its guesses that came true.
//!
//! Nothing is known before it guesses. So a sequence begins with some trust, and where that is lost, it is tried again after a while, each
//! time after twice as long.

/// Trust before the first guess.
pub(super) const START: f32 = 0.8;
/// Weight of the latest guess.
const WEIGHT: f32 = 0.125;
/// Tokens until it is tried again the first time.
const PAUSE: usize = 64;
/// Times that the pause grows.
const DOUBLINGS: u32 = 5;

/// Trust in the draft model's guesses of one sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trust {
    share: f32,
    /// Ids from which on it is trusted.
    from: usize,
    pauses: u32,
}

impl Default for Trust {
    fn default() -> Self {
        Self { share: START, from: 0, pauses: 0 }
    }
}

impl Trust {
    /// The share, 0 to 1, of a sequence of `known` ids; `None` during a pause.
    pub(super) fn of(self, known: usize) -> Option<f32> {
        (known >= self.from).then_some(self.share)
    }

    /// So many guesses came true, and then one did not if `refused`.
    pub(super) fn learn(&mut self, accepted: usize, refused: bool) {
        for right in std::iter::repeat_n(1.0, accepted).chain(refused.then_some(0.0)) {
            self.share += WEIGHT * (right - self.share);
        }
    }

    /// It is too little for anything: no guess for a while.
    pub(super) fn pause(&mut self, known: usize) {
        *self = Self { share: START, from: known + (PAUSE << self.pauses), pauses: (self.pauses + 1).min(DOUBLINGS) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_true_is_trusted_more_and_what_does_not_is_left_for_a_while() {
        let mut trust = Trust::default();
        trust.learn(8, false);
        assert!(trust.of(0) > Some(0.93));
        trust.learn(0, true);
        trust.learn(1, true);
        assert!(trust.of(0) < Some(0.76));
        trust.pause(100);
        assert_eq!((trust.of(163), trust.of(164)), (None, Some(START)));
        trust.pause(200);
        assert_eq!((trust.of(327), trust.of(328)), (None, Some(START)));
        (0..20).for_each(|_| trust.pause(0));
        assert_eq!(trust.of(64 << DOUBLINGS), Some(START), "it is never given up");
    }
}
