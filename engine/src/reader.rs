//! Where weights come from.

use std::{io, ops::Range};

/// Reads byte ranges of a model's weight files.
pub trait WeightReader {
    /// Fills `into` with the bytes `range` of weight file `file` (an index into the header's files); `into` has the range's length.
    ///
    /// # Errors
    /// If the bytes cannot be had.
    fn read(&self, file: usize, range: Range<u64>, into: &mut [u8]) -> io::Result<()>;
}
