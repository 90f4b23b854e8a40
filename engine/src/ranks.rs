//! This rank's place among those of its stage, and the exchanges between them.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use crate::collective::{Collective, CollectiveError};

/// The ranks of the stage, with scratch for their exchanges.
pub(crate) struct Ranks<'a> {
    pub(crate) collective: &'a mut dyn Collective,
    /// Time spent in exchanges.
    pub(crate) spent: Duration,
    parts: Vec<Range<usize>>,
}

impl<'a> Ranks<'a> {
    pub(crate) fn new(collective: &'a mut dyn Collective) -> Self {
        Self { collective, spent: Duration::ZERO, parts: Vec::new() }
    }

    /// Whether there are others.
    pub(crate) fn many(&self) -> bool {
        self.collective.ranks() > 1
    }

    pub(crate) fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// Fills `buffer`, in which each rank's part is `unit` bytes for every one of its `ranges`, with the parts of all ranks.
    ///
    /// `ranges` follow each other from 0.
    pub(crate) fn all_gather(&mut self, buffer: &mut [u8], ranges: &[Range<usize>], unit: usize) -> Result<(), CollectiveError> {
        self.parts.clear();
        self.parts.extend(ranges.iter().map(|r| r.start * unit..r.end * unit));
        let start = Instant::now();
        let result = self.collective.all_gather(buffer, &self.parts);
        self.spent += start.elapsed();
        result
    }

    /// Brings the parts of all ranks to rank 0.
    pub(crate) fn gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        let start = Instant::now();
        let result = self.collective.gather(buffer, parts);
        self.spent += start.elapsed();
        result
    }

    /// As [`Ranks::all_gather`] for `tokens` rows of floats whose columns are split into `columns`, one range a rank: `gathered` holds rank
    /// after rank `[tokens, columns]`, the caller's own part filled; `whole` gets `[tokens, width]`.
    pub(crate) fn all_gather_columns(
        &mut self,
        gathered: &mut [f32],
        columns: &[Range<usize>],
        tokens: usize,
        whole: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.all_gather(kernels::bytes::of_mut(gathered), columns, tokens * size_of::<f32>())?;
        let width = columns.last().map_or(0, |c| c.end);
        if width == 0 {
            return Ok(());
        }
        for columns in columns.iter().filter(|c| !c.is_empty()) {
            let part = &gathered[tokens * columns.start..tokens * columns.end];
            for (row, whole) in part.chunks_exact(columns.len()).zip(whole.chunks_exact_mut(width)) {
                whole[columns.clone()].copy_from_slice(row);
            }
        }
        Ok(())
    }
}
