//! The hook through which masks of constrained sequences arrive.

use plan::step::{Mask, SequenceId};

/// Hands over the mask of a sequence's next draw.
///
/// Called on every rank of the last stage, just before the vocabulary product of a draw for a sequence whose settings say `masked`; may wait.
pub trait MaskSource {
    /// The mask for the next draw of `sequence` in step `step`.
    fn mask(&mut self, step: u64, sequence: SequenceId) -> Result<Mask, Box<dyn std::error::Error + Send + Sync>>;
}

/// For sessions without constrained sequences: every request for a mask is an error.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMasks;

impl MaskSource for NoMasks {
    fn mask(&mut self, _step: u64, _sequence: SequenceId) -> Result<Mask, Box<dyn std::error::Error + Send + Sync>> {
        Err("this session has no source of masks".into())
    }
}
