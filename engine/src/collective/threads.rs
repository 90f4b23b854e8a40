//! Ranks as threads of one process.

use std::{
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{Collective, CollectiveError};

/// One rank of a group whose ranks are threads of this process.
///
/// A rank that is dropped, or whose exchange fails, ends the group: every rank that waits, or waits later, gets an error at once.
#[derive(Debug)]
pub struct Threads {
    group: Arc<Group>,
    rank: usize,
    ranks: usize,
    /// Exchanges begun by this rank.
    exchange: u64,
    deadline: Duration,
}

#[derive(Debug)]
struct Group {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    ranks: Vec<RankState>,
    /// The rank that ended the group, and how.
    lost: Option<(usize, String)>,
}

#[derive(Debug, Default)]
struct RankState {
    /// Exchanges this rank has posted its part of.
    posted: u64,
    /// Exchanges this rank has finished.
    finished: u64,
    /// Its parts of the last two exchanges, by number modulo 2: a rank that need not wait for others may be one ahead of them.
    parts: [Part; 2],
}

/// What a rank posted for an exchange.
#[derive(Debug, Default)]
struct Part {
    kind: &'static str,
    layout: Vec<Range<usize>>,
    bytes: Vec<u8>,
}

impl Threads {
    /// The ranks of a new group, each to be moved to its thread. No exchange waits longer than `deadline`.
    pub fn group(ranks: usize, deadline: Duration) -> Vec<Self> {
        let state = State { ranks: (0..ranks).map(|_| RankState::default()).collect(), lost: None };
        let group = Arc::new(Group { state: Mutex::new(state), changed: Condvar::new() });
        (0..ranks).map(|rank| Self { group: Arc::clone(&group), rank, ranks, exchange: 0, deadline }).collect()
    }

    /// Posts this rank's part, waits for the parts of `from` and copies them into `buffer`.
    fn exchange(
        &mut self,
        kind: &'static str,
        buffer: &mut [u8],
        parts: &[Range<usize>],
        from: Range<usize>,
    ) -> Result<(), CollectiveError> {
        self.exchange += 1;
        let result = self.try_exchange(kind, buffer, parts, from);
        if let Err(error) = &result {
            self.end(error.to_string());
        }
        result
    }

    fn try_exchange(
        &mut self,
        kind: &'static str,
        buffer: &mut [u8],
        parts: &[Range<usize>],
        from: Range<usize>,
    ) -> Result<(), CollectiveError> {
        let (number, until) = (self.exchange, Instant::now() + self.deadline);
        let group = Arc::clone(&self.group);
        // The slot was used two exchanges ago; wait until nobody reads it any more.
        let mut state = self.wait(lock(&group), until, 0..self.ranks, |rank| rank.finished + 2 >= number)?;
        let own = &mut state.ranks[self.rank];
        let part = &mut own.parts[number as usize % 2];
        part.kind = kind;
        part.layout.clear();
        part.layout.extend_from_slice(parts);
        part.bytes.clear();
        part.bytes.extend_from_slice(&buffer[parts[self.rank].clone()]);
        own.posted = number;
        group.changed.notify_all();
        for peer in from {
            state = self.wait(state, until, peer..peer + 1, |rank| rank.posted >= number)?;
            let part = &state.ranks[peer].parts[number as usize % 2];
            if part.kind != kind || part.layout != parts {
                return Err(CollectiveError::Mismatch {
                    rank: peer,
                    got: format!("{} {:?}", part.kind, part.layout),
                    expected: format!("{kind} {parts:?}"),
                });
            }
            if peer != self.rank {
                buffer[parts[peer].clone()].copy_from_slice(&part.bytes);
            }
        }
        state.ranks[self.rank].finished = number;
        group.changed.notify_all();
        Ok(())
    }

    /// Waits until `ready` holds for all of `ranks`.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        until: Instant,
        ranks: Range<usize>,
        ready: impl Fn(&RankState) -> bool,
    ) -> Result<MutexGuard<'a, State>, CollectiveError> {
        loop {
            // What was posted before the end of the group still counts.
            let Some(rank) = ranks.clone().find(|&rank| !ready(&state.ranks[rank])) else { return Ok(state) };
            if let Some((rank, detail)) = &state.lost {
                return Err(CollectiveError::Lost { rank: *rank, detail: detail.clone() });
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CollectiveError::Deadline { rank, millis: self.deadline.as_millis() as u64 });
            }
            state = self.group.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn end(&self, detail: String) {
        lock(&self.group).lost.get_or_insert((self.rank, detail));
        self.group.changed.notify_all();
    }
}

/// A panic under the lock leaves counters that are behind, never wrong, so a poisoned state is usable.
fn lock(group: &Group) -> MutexGuard<'_, State> {
    group.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.end("its engine was dropped".to_owned());
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        self.exchange("all-gather", buffer, parts, 0..self.ranks)
    }

    fn gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        let from = if self.rank == 0 { 0..self.ranks } else { 0..0 };
        self.exchange("gather", buffer, parts, from)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn parts(lens: &[usize]) -> Vec<Range<usize>> {
        let mut start = 0;
        lens.iter()
            .map(|len| {
                start += len;
                start - len..start
            })
            .collect()
    }

    #[test]
    fn every_rank_sees_every_part() {
        let layout = parts(&[3, 0, 5]);
        let expected = [1, 1, 1, 3, 3, 3, 3, 3];
        let run = move |mut rank: Threads, layout: Vec<Range<usize>>| {
            for round in 0..500_u32 {
                let shift = round as u8 % 50;
                let mut buffer = [0; 8];
                buffer[layout[rank.rank()].clone()].fill(rank.rank() as u8 + 1 + shift);
                let mut root = buffer;
                rank.all_gather(&mut buffer, &layout).unwrap();
                assert_eq!(buffer, expected.map(|v| v + shift), "rank {} round {round}", rank.rank());
                rank.gather(&mut root, &layout).unwrap();
                if rank.rank() == 0 {
                    assert_eq!(root, expected.map(|v| v + shift), "round {round}");
                }
            }
            rank
        };
        let ranks = Threads::group(3, LONG);
        let threads: Vec<_> = ranks.into_iter().map(|rank| (rank, layout.clone())).map(|(r, l)| thread::spawn(move || run(r, l))).collect();
        // Kept until all are through, since dropping one ends the group.
        let ranks: Vec<Threads> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        drop(ranks);
    }

    #[test]
    fn a_silent_rank_is_named_and_ends_the_group() {
        let mut ranks = Threads::group(2, Duration::from_millis(20));
        let mut buffer = [0; 2];
        let error = ranks[0].all_gather(&mut buffer, &parts(&[1, 1])).unwrap_err();
        assert!(matches!(error, CollectiveError::Deadline { rank: 1, millis: 20 }), "{error}");
        // The part of rank 0 was posted, so rank 1 needs a second exchange to notice.
        ranks[1].all_gather(&mut buffer, &parts(&[1, 1])).unwrap();
        let error = ranks[1].all_gather(&mut buffer, &parts(&[1, 1])).unwrap_err();
        assert!(matches!(error, CollectiveError::Lost { rank: 0, .. }), "{error}");
    }

    #[test]
    fn a_dropped_rank_wakes_those_that_wait() {
        let mut ranks = Threads::group(2, LONG);
        let other = ranks.pop();
        let waiting = thread::spawn(move || ranks[0].all_gather(&mut [0; 2], &parts(&[1, 1])));
        drop(other);
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(error, CollectiveError::Lost { rank: 1, .. }), "{error}");
    }

    #[test]
    fn ranks_at_different_exchanges_are_told_so() {
        let mut ranks = Threads::group(2, LONG);
        let mut first = ranks.remove(0);
        let waiting = thread::spawn(move || first.all_gather(&mut [0; 3], &parts(&[1, 2])));
        let error = ranks[0].all_gather(&mut [0; 2], &parts(&[1, 1]));
        let errors = [error, waiting.join().unwrap()];
        assert!(errors.iter().any(|e| matches!(e, Err(CollectiveError::Mismatch { .. }))), "{errors:?}");
    }
}
