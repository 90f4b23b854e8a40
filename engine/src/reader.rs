//! Where weights come from.

use std::{io, ops::Range};

/// Reads byte ranges of a model's weight files.
pub trait WeightReader: Sync {
    /// Fills `into` with the bytes `range` of weight file `file` (an index into the header's files); `into` has the range's length.
    ///
    /// # Errors
    /// If the bytes cannot be had.
    fn read(&self, file: usize, range: Range<u64>, into: &mut [u8]) -> io::Result<()>;

    /// Whether bytes `range` of weight file `file` lie on this machine, so that threads may each read small pieces of it. What comes from
    /// elsewhere is read in order, in large pieces.
    fn is_at_hand(&self, file: usize, range: &Range<u64>) -> bool;
}
