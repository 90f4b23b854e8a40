//! How the ranks of a stage exchange slices. Nothing is ever summed: ranks only gather.

mod threads;

use std::ops::Range;

pub use threads::Threads;

/// Why an exchange failed. The step, and with it the session, is over.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// A peer did not answer within the deadline.
    #[error("rank {rank} did not answer within {millis} ms")]
    Deadline {
        /// The silent rank.
        rank: usize,
        /// The deadline.
        millis: u64,
    },
    /// A peer is gone, or the session was aborted.
    #[error("rank {rank} is gone: {detail}")]
    Lost {
        /// The lost rank.
        rank: usize,
        /// What was seen.
        detail: String,
    },
    /// A peer is in another epoch or at another exchange.
    #[error("rank {rank} sent a frame of {got}, expected {expected}")]
    Mismatch {
        /// The other rank.
        rank: usize,
        /// What its frame says.
        got: String,
        /// What was expected.
        expected: String,
    },
}

/// The ranks of one stage, joined for one epoch.
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn ranks(&self) -> usize;

    /// Fills `buffer` so that every rank holds every rank's part.
    ///
    /// `parts[r]` is rank r's part of `buffer`, the same on every rank; on entry the caller's own part is filled. Parts may be empty.
    fn all_gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError>;

    /// Brings every rank's part to rank 0; elsewhere only the caller's own part of `buffer` means anything afterwards.
    fn gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError>;
}

/// The only rank of its stage.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn all_gather(&mut self, _buffer: &mut [u8], _parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn gather(&mut self, _buffer: &mut [u8], _parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        Ok(())
    }
}
