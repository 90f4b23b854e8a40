//! The collective over shared memory, for ranks on one machine.
//!
//! Every rank has two slots and a signal that counts the chunks it has posted. Before chunk `c` a rank waits until all others have posted
//! chunk `c - 1`: they have read chunk `c - 2` by then, so its slot may be written again. Then it writes, posts, and (where the exchange is for
//! it) waits for the others' chunk `c` and reads them. Chunk 0 is "I am here".

use std::{
    io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use engine::collective::{Collective, CollectiveError};
use kernels::shm::SharedRegion;
use plan::worker::Epoch;

use super::Interrupt;

/// Bytes of a chunk.
const CHUNK: usize = 256 << 10;
/// Signals and slots of different ranks share no cache line, nor the pair that is fetched with it.
const LINE: usize = 128;
/// Offsets in the region: epoch number, session, and whether the ranks gave up. Signals follow, then slots.
const NUMBER: usize = 0;
const SESSION: usize = 8;
const GIVEN_UP: usize = 16;
/// Longest sleep, so that an interruption is seen.
const SLICE: Duration = Duration::from_millis(20);
/// Pause before the region is looked for again.
const RETRY: Duration = Duration::from_millis(1);

/// The region, shared with whoever may interrupt.
pub(super) struct Shared {
    region: SharedRegion,
    interrupted: AtomicBool,
}

impl Interrupt for Shared {
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
        self.region.cell(GIVEN_UP).store(1, Ordering::Relaxed);
    }
}

/// Ranks joined by a region.
pub(super) struct SharedMemory {
    rank: usize,
    ranks: usize,
    /// Chunks posted; wraps.
    posted: u32,
    shared: Arc<Shared>,
    limit: Duration,
    /// Awake before sleeping, in each wait.
    spin: Duration,
}

/// Why the ranks could not meet.
#[derive(Debug)]
pub(super) enum Unmet {
    Io(io::Error),
    Missing(usize),
    Interrupted,
}

/// Removes the region's name, however the meeting ends.
struct Name(PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        // Nothing but this names it, so the only failure is that it is gone already.
        let _ = SharedRegion::unlink(&self.0);
    }
}

impl SharedMemory {
    /// Meets the other ranks of `stage` in `epoch`; rank 0 makes the region. Blocks until `deadline` at most.
    pub(super) fn meet(
        epoch: Epoch,
        stage: usize,
        (rank, ranks): (usize, usize),
        deadline: Instant,
        (limit, spin): (Duration, Duration),
        abandoned: &AtomicBool,
    ) -> Result<Self, Unmet> {
        let path = SharedRegion::folder().join(format!("skein-{}-{:016x}-s{stage}", epoch.number, epoch.session));
        let len = slot(ranks, ranks, 0);
        let mut name = None;
        let region = if rank == 0 {
            let region = SharedRegion::create(&path, len).map_err(Unmet::Io)?;
            name = Some(Name(path));
            region.cell64(NUMBER).store(epoch.number, Ordering::Relaxed);
            region.cell64(SESSION).store(epoch.session, Ordering::Relaxed);
            region
        } else {
            loop {
                match SharedRegion::open(&path) {
                    Ok(region) if region.len() == len => break region,
                    // Being made at this moment.
                    Ok(_) => {}
                    Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {}
                    Err(e) => return Err(Unmet::Io(e)),
                }
                if abandoned.load(Ordering::Relaxed) {
                    return Err(Unmet::Interrupted);
                }
                if Instant::now() >= deadline {
                    return Err(Unmet::Missing(0));
                }
                thread::sleep(RETRY);
            }
        };
        let shared = Arc::new(Shared { region, interrupted: AtomicBool::new(false) });
        let met = Self { rank, ranks, posted: 1, shared, limit, spin };
        met.region().signal(signal(rank)).set(1);
        for other in (0..ranks).filter(|r| *r != rank) {
            met.await_chunk(other, 1, deadline, Duration::ZERO, abandoned).map_err(|unmet| match unmet {
                Waited::Deadline => Unmet::Missing(other),
                Waited::Interrupted => Unmet::Interrupted,
            })?;
        }
        drop(name);
        Ok(met)
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    fn region(&self) -> &SharedRegion {
        &self.shared.region
    }

    /// Waits until rank `other` has posted `count` chunks.
    fn await_chunk(&self, other: usize, count: u32, deadline: Instant, spin: Duration, abandoned: &AtomicBool) -> Result<(), Waited> {
        let signal = self.region().signal(signal(other));
        // Counts wrap; ranks are never further apart than two.
        let reached = |value: u32| value.wrapping_sub(count).cast_signed() >= 0;
        if reached(signal.load()) {
            return Ok(());
        }
        let mut spin = spin;
        loop {
            let now = Instant::now();
            if signal.wait(reached, deadline.min(now + SLICE), spin).is_ok() {
                return Ok(());
            }
            spin = Duration::ZERO;
            if abandoned.load(Ordering::Relaxed) || self.region().cell(GIVEN_UP).load(Ordering::Relaxed) != 0 {
                return Err(Waited::Interrupted);
            }
            if Instant::now() >= deadline {
                return Err(Waited::Deadline);
            }
        }
    }

    fn await_posted(&self, other: usize, count: u32) -> Result<(), CollectiveError> {
        let deadline = Instant::now() + self.limit;
        self.await_chunk(other, count, deadline, self.spin, &self.shared.interrupted).map_err(|waited| match waited {
            Waited::Deadline => CollectiveError::Deadline { rank: other, millis: self.limit.as_millis() as u64 },
            Waited::Interrupted => CollectiveError::Lost { rank: other, detail: "the session was ended".into() },
        })
    }

    /// One exchange; the parts of all others come to this rank if it `receives`.
    fn exchange(&mut self, tag: Tag, buffer: &mut [u8], parts: &[Range<usize>], receives: bool) -> Result<(), CollectiveError> {
        let (epoch, region) = (self.region().cell64(SESSION).load(Ordering::Relaxed), Arc::clone(&self.shared));
        let region = &region.region;
        let longest = parts.iter().map(Range::len).max().unwrap_or(0);
        for first in (0..longest).step_by(CHUNK) {
            let others = || (0..self.ranks).filter(|r| *r != self.rank);
            for other in others() {
                self.await_posted(other, self.posted)?;
            }
            let own = piece(&parts[self.rank], first);
            let at = slot(self.ranks, self.rank, self.posted);
            let label = tag.label(epoch, self.posted, own.len());
            region.cell64(at).store(label, Ordering::Relaxed);
            region.write(at + LINE, &buffer[own]);
            let posted = self.posted.wrapping_add(1);
            region.signal(signal(self.rank)).set(posted);
            if receives {
                for other in others() {
                    self.await_posted(other, posted)?;
                    let theirs = piece(&parts[other], first);
                    let at = slot(self.ranks, other, self.posted);
                    let (got, expected) = (region.cell64(at).load(Ordering::Relaxed), tag.label(epoch, self.posted, theirs.len()));
                    if got != expected {
                        let (got, expected) = (format!("label {got:016x}"), format!("{tag:?} of {} bytes, {expected:016x}", theirs.len()));
                        return Err(CollectiveError::Mismatch { rank: other, got, expected });
                    }
                    region.read(at + LINE, &mut buffer[theirs]);
                }
            }
            self.posted = posted;
        }
        Ok(())
    }
}

enum Waited {
    Deadline,
    Interrupted,
}

/// What a chunk belongs to.
#[derive(Clone, Copy, Debug)]
enum Tag {
    AllGather = 4,
    Gather = 5,
}

impl Tag {
    /// A label of a chunk that no chunk of another exchange, length or epoch has but by chance.
    fn label(self, session: u64, chunk: u32, bytes: usize) -> u64 {
        session.rotate_left(self as u32) ^ u64::from(chunk) << 32 ^ bytes as u64
    }
}

/// The part of `part` that travels in the chunk that begins `first` bytes into the longest part.
fn piece(part: &Range<usize>, first: usize) -> Range<usize> {
    (part.start + first).min(part.end)..(part.start + first + CHUNK).min(part.end)
}

fn signal(rank: usize) -> usize {
    LINE * (1 + rank)
}

/// Where a rank's chunk is: its label, then, a line later, its bytes.
fn slot(ranks: usize, rank: usize, chunk: u32) -> usize {
    LINE * (1 + ranks) + (2 * rank + (chunk % 2) as usize) * (LINE + CHUNK)
}

impl Collective for SharedMemory {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        self.exchange(Tag::AllGather, buffer, parts, true)
    }

    fn gather(&mut self, buffer: &mut [u8], parts: &[Range<usize>]) -> Result<(), CollectiveError> {
        self.exchange(Tag::Gather, buffer, parts, self.rank == 0)
    }
}
