//! How long the phases of the steps took.

use std::time::Duration;

/// Time spent since the engine was loaded, by phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Steps run.
    pub steps: u64,
    /// Tokens run.
    pub tokens: u64,
    /// Token embeddings.
    pub embedding: Duration,
    /// Query, key and value projections, with the norm before them.
    pub qkv: Duration,
    /// Rotation, cache writes and attention itself.
    pub attention: Duration,
    /// Attention output projection and what follows it.
    pub output: Duration,
    /// Gate, up and activation, with the norm before them.
    pub gate_up: Duration,
    /// Down projection and what follows it.
    pub down: Duration,
    /// Final norm and vocabulary product.
    pub vocabulary: Duration,
    /// Log-sum-exp, top-k and draws.
    pub sampling: Duration,
    /// Exchanges between ranks; part of the phases above.
    pub collective: Duration,
    /// Vocabulary products that were screened.
    pub screened: u64,
    /// Those of them that were compared with the whole product.
    pub screens_checked: u64,
    /// Those of the latter that lacked one of the likeliest tokens.
    pub screens_missed: u64,
}

impl Timings {
    /// What somebody has to know of the time between `before` and these: that screening lacked one of the likeliest tokens.
    pub fn alarm(&self, before: &Self) -> Option<String> {
        let Self { screened, screens_checked: checked, screens_missed: missed, .. } = self;
        let say = || {
            format!(
                "screening lacked one of the likeliest tokens in {missed} of {checked} products that were compared with the whole, of {screened} in all"
            )
        };
        (*missed > before.screens_missed).then(say)
    }

    /// The phases by name, in the order in which a step runs them.
    pub fn phases(&self) -> [(&'static str, Duration); 9] {
        [
            ("embedding", self.embedding),
            ("qkv", self.qkv),
            ("attention", self.attention),
            ("output", self.output),
            ("gate_up", self.gate_up),
            ("down", self.down),
            ("vocabulary", self.vocabulary),
            ("sampling", self.sampling),
            ("collective", self.collective),
        ]
    }
}
