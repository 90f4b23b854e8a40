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
}

impl Timings {
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
