//! How long tokens take through the router: a histogram that threads share without a lock.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// What is told apart, in nanoseconds.
const UNIT: u64 = 100;
/// Buckets of one unit each, before those of two significant digits.
const UNITS: usize = 10;
/// Buckets of a decade: 10 to 99.
const DECADE: usize = 90;
/// Decades of two significant digits: from 1 µs to 100 s.
const DECADES: usize = 8;
/// All buckets; the last holds what took longer.
const BUCKETS: usize = UNITS + DECADES * DECADE + 1;

/// Delays, counted by their first two digits.
pub struct Delays {
    counts: Box<[AtomicU64]>,
    /// Nanoseconds in all.
    sum: AtomicU64,
}

impl Default for Delays {
    fn default() -> Self {
        Self { counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), sum: AtomicU64::new(0) }
    }
}

impl Delays {
    /// Counts one.
    pub fn observe(&self, delay: Duration) {
        let nanos = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(nanos, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn counted(&self) -> Counted {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        Counted { counts, sum: self.sum.load(Ordering::Relaxed) }
    }
}

impl std::fmt::Debug for Delays {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delays").field("count", &self.counted().count()).finish_non_exhaustive()
    }
}

/// What was counted up to some moment, or between two of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    counts: Vec<u64>,
    sum: u64,
}

impl Counted {
    /// What came after `before`, an earlier moment of the same delays.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let counts = self.counts.iter().zip(&before.counts).map(|(now, then)| now - then).collect();
        Self { counts, sum: self.sum - before.sum }
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All of them together, in seconds.
    pub fn seconds(&self) -> f64 {
        self.sum as f64 * 1e-9
    }

    /// What a fraction `share` of them, 0 to 1, do not exceed (nearest rank), rounded up to two digits; `None` when there are none. What took
    /// more than 100 s counts as [`Duration::MAX`].
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let rank = ((self.count() as f64 * share).ceil() as u64).max(1);
        let mut passed = 0;
        let reaches = |count: &u64| {
            passed += count;
            passed >= rank
        };
        self.counts.iter().position(reaches).map(|at| end(at).map_or(Duration::MAX, Duration::from_nanos))
    }

    /// For each of `bounds`, ascending and in seconds, those up to it and above the one before, and last those above all.
    pub fn buckets<'a>(&'a self, bounds: &'a [f64]) -> impl Iterator<Item = (f64, u64)> + 'a {
        let mut at = 0;
        bounds.iter().copied().chain([f64::INFINITY]).map(move |bound| {
            let before = at;
            // A bound is the end of a bucket up to its last bit.
            while at < BUCKETS && end(at).map_or(f64::INFINITY, |end| end as f64 * 1e-9) <= bound * (1.0 + 1e-9) {
                at += 1;
            }
            (bound, self.counts[before..at].iter().sum())
        })
    }
}

/// The bucket of a delay: its end is the delay or above it, its beginning below.
fn bucket(nanos: u64) -> usize {
    let units = nanos.saturating_sub(1) / UNIT;
    let Some(decade) = units.checked_ilog10().and_then(|digits| digits.checked_sub(1)) else { return units as usize };
    if decade as usize >= DECADES {
        return BUCKETS - 1;
    }
    UNITS + decade as usize * DECADE + (units / 10_u64.pow(decade)) as usize - 10
}

/// The longest delay of a bucket, in nanoseconds; `None` for the last.
fn end(bucket: usize) -> Option<u64> {
    let Some(at) = bucket.checked_sub(UNITS) else { return Some((bucket as u64 + 1) * UNIT) };
    let (decade, digits) = (at / DECADE, at % DECADE + 11);
    (decade < DECADES).then(|| digits as u64 * 10_u64.pow(decade as u32) * UNIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(nanos: impl IntoIterator<Item = u64>) -> Counted {
        let delays = Delays::default();
        nanos.into_iter().for_each(|n| delays.observe(Duration::from_nanos(n)));
        delays.counted()
    }

    #[test]
    fn every_delay_is_in_a_bucket_of_two_digits() {
        assert_eq!((0..BUCKETS).filter_map(end).count(), BUCKETS - 1);
        let ends: Vec<u64> = (0..BUCKETS - 1).filter_map(end).collect();
        assert!(ends.is_sorted_by(|a, b| a < b));
        let mut nanos = 1;
        while nanos < 200_000_000_000 {
            let at = bucket(nanos);
            assert!(end(at).is_none_or(|end| nanos <= end), "{nanos}");
            assert!(at == 0 || end(at - 1).is_some_and(|before| before < nanos), "{nanos}");
            let width = end(at).map_or(0, |end| end - nanos);
            assert!(width < UNIT.max(nanos / 10), "{nanos} is {width} from the end of its bucket");
            nanos += 1 + nanos / 37;
        }
        assert_eq!((bucket(0), bucket(1), bucket(100), bucket(101)), (0, 0, 0, 1));
        assert_eq!((bucket(100_000_000_000), bucket(100_000_000_001), bucket(u64::MAX)), (BUCKETS - 2, BUCKETS - 1, BUCKETS - 1));
    }

    #[test]
    fn quantiles_are_nearest_rank() {
        let all = counted((1..=100).map(|n| n * 10_000));
        let at = |share| all.quantile(share).expect("there are some").as_micros();
        assert_eq!((at(0.5), at(0.9), at(0.99), at(1.0), at(0.0)), (500, 900, 990, 1000, 10));
        assert_eq!((all.count(), all.seconds()), (100, 0.0505));
        assert_eq!(counted([]).quantile(0.5), None);
        assert_eq!(counted([200_000_000_000]).quantile(0.5), Some(Duration::MAX));
        // Rounded up, to two digits.
        assert_eq!(counted([123_456]).quantile(0.5), Some(Duration::from_micros(130)));
    }

    #[test]
    fn what_came_before_is_left_out() {
        let delays = Delays::default();
        delays.observe(Duration::from_secs(1));
        let before = delays.counted();
        delays.observe(Duration::from_millis(1));
        let after = delays.counted().since(&before);
        assert_eq!((after.count(), after.quantile(1.0)), (1, Some(Duration::from_millis(1))));
    }

    #[test]
    fn bounds_of_a_metric_are_ends_of_buckets() {
        let all = counted([10_000, 10_001, 20_000, 50_000, 1_000_000, 1_000_001, 500_000_000_000]);
        let buckets: Vec<(f64, u64)> = all.buckets(&[1e-5, 2e-5, 5e-5, 1e-3]).collect();
        assert_eq!(buckets, [(1e-5, 1), (2e-5, 2), (5e-5, 1), (1e-3, 1), (f64::INFINITY, 2)]);
    }
}
