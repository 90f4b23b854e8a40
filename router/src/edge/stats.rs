//! Latencies and rates of a deployment's streams, over a short past.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// Streams whose time to the first token is remembered.
const TTFT_SAMPLES: usize = 512;
/// Tokens whose distance to the one before is remembered.
const ITL_SAMPLES: usize = 4096;
/// Seconds after which a latency says nothing of the load now.
const LATENCY_SECONDS: u64 = 60;
/// Seconds that rates are taken over.
const RATE_SECONDS: u64 = 10;

/// What is measured of a deployment. Cheap enough to be touched for every token.
#[derive(Debug)]
pub(crate) struct Stats {
    inner: Mutex<Inner>,
    start: Instant,
    /// Sequences submitted that have not entered a batch.
    pub(crate) waiting: AtomicUsize,
    /// Requests that wait because there is no replica at all.
    pub(crate) held: AtomicUsize,
    pub(crate) resumed: AtomicU64,
    pub(crate) refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    ttft: VecDeque<Sample>,
    itl: VecDeque<Sample>,
    tokens: u64,
    /// (second, tokens, sequences started), ascending by second.
    seconds: VecDeque<(u64, u32, u32)>,
}

/// A latency in seconds, and the second it was measured in.
type Sample = (u64, f32);

/// What [`Stats`] says now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rates {
    pub(crate) ttft_p90: Option<f32>,
    pub(crate) itl_p90: Option<f32>,
    pub(crate) tokens_per_second: f32,
    pub(crate) starts_per_second: f32,
    pub(crate) tokens: u64,
}

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            inner: Mutex::default(),
            start: Instant::now(),
            waiting: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            resumed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    pub(crate) fn started(&self, now: Instant) {
        self.second(&mut self.lock(), now).2 += 1;
    }

    pub(crate) fn first_token(&self, now: Instant, after: Duration) {
        let mut inner = self.lock();
        push(&mut inner.ttft, (self.at(now), after.as_secs_f32()), TTFT_SAMPLES);
        inner.tokens += 1;
        self.second(&mut inner, now).1 += 1;
    }

    pub(crate) fn token(&self, now: Instant, after: Option<Duration>) {
        let mut inner = self.lock();
        if let Some(after) = after {
            push(&mut inner.itl, (self.at(now), after.as_secs_f32()), ITL_SAMPLES);
        }
        inner.tokens += 1;
        self.second(&mut inner, now).1 += 1;
    }

    pub(crate) fn rates(&self, now: Instant) -> Rates {
        let elapsed = now.saturating_duration_since(self.start);
        let since = (elapsed.as_secs() + 1).saturating_sub(LATENCY_SECONDS);
        let recent =
            |samples: &VecDeque<Sample>| samples.iter().filter(|(second, _)| *second >= since).map(|(_, s)| *s).collect::<Vec<f32>>();
        let (mut ttft, mut itl, tokens, seconds) = {
            let inner = self.lock();
            (recent(&inner.ttft), recent(&inner.itl), inner.tokens, inner.seconds.clone())
        };
        let from = elapsed.as_secs().saturating_sub(RATE_SECONDS);
        let over = elapsed.as_secs_f32().clamp(1.0, RATE_SECONDS as f32);
        let recent = seconds.iter().filter(|(second, ..)| *second >= from);
        let (drawn, started) = recent.fold((0, 0), |(t, s), (_, tokens, starts)| (t + tokens, s + starts));
        Rates {
            ttft_p90: percentile(&mut ttft, 0.9),
            itl_p90: percentile(&mut itl, 0.9),
            tokens_per_second: drawn as f32 / over,
            starts_per_second: started as f32 / over,
            tokens,
        }
    }

    /// Seconds until a full queue of `waiting` sequences has probably moved on, 1 to 60.
    pub(crate) fn retry_after(&self, waiting: usize) -> u64 {
        let rate = self.rates(Instant::now()).starts_per_second;
        if rate > 0.0 { ((waiting as f32 / rate).ceil() as u64).clamp(1, 60) } else { 5 }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs()
    }

    fn second<'a>(&self, inner: &'a mut Inner, now: Instant) -> &'a mut (u64, u32, u32) {
        let second = self.at(now);
        if inner.seconds.back().is_none_or(|(last, ..)| *last < second) {
            inner.seconds.push_back((second, 0, 0));
            if inner.seconds.len() > RATE_SECONDS as usize + 1 {
                inner.seconds.pop_front();
            }
        }
        let last = inner.seconds.len() - 1;
        &mut inner.seconds[last]
    }
}

fn push(samples: &mut VecDeque<Sample>, value: Sample, most: usize) {
    if samples.len() == most {
        samples.pop_front();
    }
    samples.push_back(value);
}

fn percentile(samples: &mut [f32], p: f32) -> Option<f32> {
    let last = samples.len().checked_sub(1)?;
    let at = (last as f32 * p).ceil() as usize;
    let (_, value, _) = samples.select_nth_unstable_by(at.min(last), f32::total_cmp);
    Some(*value)
}

/// A place among the requests that wait for a deployment's replicas, or that are held because it has none; given back when dropped.
#[derive(Debug)]
pub(crate) struct QueueSlot {
    stats: Arc<Stats>,
    held: bool,
}

impl QueueSlot {
    /// Takes a place in the queue, or one of the `held`; the number there when `most` have one.
    pub(crate) fn take(stats: &Arc<Stats>, held: bool, most: usize) -> Result<Self, usize> {
        let take = |there: usize| (there < most).then_some(there + 1);
        let counter = if held { &stats.held } else { &stats.waiting };
        counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map(|_| Self { stats: stats.clone(), held })
    }

    /// The replicas came or went: counts it on the other side from now on. It was admitted, so no limit applies.
    pub(crate) fn count_as(&mut self, held: bool) {
        if self.held != held {
            self.counter().fetch_sub(1, Ordering::Relaxed);
            self.held = held;
            self.counter().fetch_add(1, Ordering::Relaxed);
        }
    }

    fn counter(&self) -> &AtomicUsize {
        if self.held { &self.stats.held } else { &self.stats.waiting }
    }
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        self.counter().fetch_sub(1, Ordering::Relaxed);
    }
}

/// One of the things that a counter counts, for as long as it is there.
#[derive(Debug)]
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub(crate) fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_rates_are_over_the_recent_past() {
        let stats = Stats::new();
        let start = stats.start;
        for i in 1..=10u64 {
            stats.first_token(start, Duration::from_secs(i));
        }
        let rates = stats.rates(start + Duration::from_secs(2));
        assert_eq!(rates.ttft_p90, Some(10.0));
        assert_eq!(rates.tokens_per_second, 5.0);
        let later = stats.rates(start + Duration::from_secs(60));
        assert_eq!((later.tokens_per_second, later.tokens), (0.0, 10));
        assert_eq!(stats.rates(start + Duration::from_secs(59)).ttft_p90, Some(10.0));
        assert_eq!(later.ttft_p90, None, "what was slow a minute ago says nothing of now");
        assert_eq!(later.itl_p90, None);
    }

    #[test]
    fn the_queue_is_bounded_and_places_come_back() {
        let stats = Arc::new(Stats::new());
        let mut slot = QueueSlot::take(&stats, false, 1).expect("empty");
        assert_eq!(QueueSlot::take(&stats, false, 1).err(), Some(1));
        let held = QueueSlot::take(&stats, true, 1).expect("those held are counted apart");
        slot.count_as(true);
        let counts = || (stats.waiting.load(Ordering::Relaxed), stats.held.load(Ordering::Relaxed));
        assert_eq!(counts(), (0, 2));
        drop((slot, held));
        assert_eq!(counts(), (0, 0));
        assert!(QueueSlot::take(&stats, false, 1).is_ok());
    }
}
