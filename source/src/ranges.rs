//! Sets of byte ranges of a file.

use std::{collections::BTreeMap, ops::Range};

/// Bytes of a file, as ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// End of each range by its start.
    ends: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds a range, joined with what it overlaps or touches.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        while let Some((&before, &until)) = self.ends.range(..=end).next_back().filter(|(_, until)| **until >= start) {
            self.ends.remove(&before);
            (start, end) = (start.min(before), end.max(until));
        }
        self.ends.insert(start, end);
    }

    /// Joins ranges with at most `gap` bytes between them.
    pub(crate) fn join(&self, gap: u64) -> Self {
        let mut joined = Self::default();
        let mut last: Option<Range<u64>> = None;
        for range in self.iter() {
            match &mut last {
                Some(last) if range.start - last.end <= gap => last.end = range.end,
                _ => joined.insert(last.replace(range).unwrap_or(0..0)),
            }
        }
        joined.insert(last.unwrap_or(0..0));
        joined
    }

    /// The parts of `range` that are not in the set.
    pub(crate) fn missing(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = range.start;
        let before = self.ends.range(..=range.start).next_back().map(|(&start, _)| start).unwrap_or(range.start);
        for (&start, &end) in self.ends.range(before..range.end) {
            if start > at {
                missing.push(at..start);
            }
            at = at.max(end);
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }

    /// What is not in `other`.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut left = Self::default();
        self.iter().flat_map(|range| other.missing(&range)).for_each(|range| left.insert(range));
        left
    }

    /// The ranges, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ends.iter().map(|(&start, &end)| start..end)
    }

    /// Bytes in all.
    pub(crate) fn bytes(&self) -> u64 {
        self.iter().map(|r| r.end - r.start).sum()
    }
}

impl FromIterator<Range<u64>> for Ranges {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]
mod tests {
    use super::*;

    fn list(set: &Ranges) -> Vec<Range<u64>> {
        set.iter().collect()
    }

    #[test]
    fn a_set_is_that_of_its_bytes() {
        // Against the same operations on single bytes.
        let mut state = 7_u64;
        let mut draw = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..300 {
            let (mut set, mut bytes) = (Ranges::default(), [false; 64]);
            for _ in 0..draw(9) {
                let start = draw(64);
                let end = (start + draw(12)).min(64);
                set.insert(start..end);
                bytes[start as usize..end as usize].fill(true);
            }
            let runs: Vec<Range<u64>> = bytes.iter().enumerate().fold(Vec::new(), |mut runs: Vec<Range<u64>>, (i, &is)| {
                let i = i as u64;
                match runs.last_mut() {
                    Some(last) if is && last.end == i => last.end += 1,
                    _ if is => runs.push(i..i + 1),
                    _ => {}
                }
                runs
            });
            assert_eq!(list(&set), runs);
            assert_eq!(set.bytes(), bytes.iter().filter(|b| **b).count() as u64);
            let asked = draw(64)..64;
            let missing: u64 = set.missing(&asked).iter().map(|r| r.end - r.start).sum();
            assert_eq!(missing, bytes[asked.start as usize..].iter().filter(|b| !**b).count() as u64);
            let whole: Ranges = [0..64].into_iter().collect();
            assert_eq!(whole.without(&set).bytes(), 64 - set.bytes());
            assert_eq!(set.without(&set).bytes(), 0);
        }
    }

    #[test]
    fn small_gaps_are_joined() {
        let set: Ranges = [0..10, 12..20, 30..40].into_iter().collect();
        assert_eq!(list(&set.join(2)), [0..20, 30..40]);
        assert_eq!(list(&set.join(1)), list(&set));
        assert_eq!(list(&set.join(100)), [0..40]);
        assert_eq!(list(&Ranges::default().join(5)), []);
    }
}
