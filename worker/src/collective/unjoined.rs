//! The ranks of a stage between two sessions.

use std::ops::Range;

use engine::collective::{Collective, CollectiveError};

/// Stands where a collective will be; no exchange succeeds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unjoined {
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
}

impl Unjoined {
    fn refuse(&self) -> Result<(), CollectiveError> {
        if self.ranks == 1 {
            return Ok(());
        }
        Err(CollectiveError::Lost { rank: usize::from(self.rank == 0), detail: "no session has joined the ranks".into() })
    }
}

impl Collective for Unjoined {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_gather(&mut self, _buffer: &mut [u8], _parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        self.refuse()
    }

    fn gather(&mut self, _buffer: &mut [u8], _parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        self.refuse()
    }
}
