//! How many tokens steps have, counted by size.

/// Upper bounds of the sizes that are told apart; those of vLLM's `iteration_tokens_total`.
const BOUNDS: [usize; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384];

/// Steps by their number of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSizes {
    /// Steps of at most each bound and above the one before; the last holds those above all.
    counts: [u64; BOUNDS.len() + 1],
    /// Tokens in all.
    pub tokens: u64,
}

impl StepSizes {
    /// Counts a step of `tokens` tokens.
    pub(super) fn record(&mut self, tokens: usize) {
        self.counts[BOUNDS.partition_point(|bound| *bound < tokens)] += 1;
        self.tokens += tokens as u64;
    }

    /// Steps in all.
    pub fn steps(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Each upper bound, the last infinite, and the steps up to it and above the one before.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        BOUNDS.iter().map(|bound| *bound as f64).chain([f64::INFINITY]).zip(self.counts)
    }
}

impl std::ops::Add for StepSizes {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        for (own, more) in self.counts.iter_mut().zip(other.counts) {
            *own += more;
        }
        Self { tokens: self.tokens + other.tokens, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_at_a_bound_belongs_to_it() {
        let mut sizes = StepSizes::default();
        [1, 8, 9, 16_384, 16_385].into_iter().for_each(|n| sizes.record(n));
        let counted: Vec<(f64, u64)> = sizes.buckets().filter(|(_, n)| *n > 0).collect();
        assert_eq!(counted, [(1.0, 1), (8.0, 1), (16.0, 1), (16_384.0, 1), (f64::INFINITY, 1)]);
        let twice = sizes + sizes;
        assert_eq!((twice.steps(), twice.tokens), (10, 2 * 32_787));
    }
}
