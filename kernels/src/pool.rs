//! A fork-join thread pool for regions of a few microseconds.
//!
//! The caller is thread 0. Workers spin for a bounded time after a region, since the next one usually follows at once, and then park.
//! Where threads outnumber the cores nobody spins.
#![expect(unsafe_code, reason = "a region borrows the caller's closure, and hands out disjoint parts of its buffers, across threads")]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread waits awake before it parks. To wake one takes 18 µs in a virtual machine, and what one thread does alone between regions,
/// or takes longer over its share of a block, is mostly less than this.
const SPIN: Duration = Duration::from_micros(100);

/// Cores this process may use: the smaller of its affinity and its cgroup quota (v1 and v2, rounded down), at least 1.
pub fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Part `part` of `parts` of `0..len`, cut at multiples of `align` as evenly as that allows; the parts are disjoint and cover everything.
///
/// # Panics
/// If `align` or `parts` is 0, or `part` is not below `parts`.
pub fn split(len: usize, parts: usize, part: usize, align: usize) -> Range<usize> {
    assert!(part < parts, "part {part} of {parts}");
    let units = len.div_ceil(align);
    let border = |part: usize| ((units / parts * part + (units % parts).min(part)) * align).min(len);
    border(part)..border(part + 1)
}

/// Units of work that every thread has a run of, from whose end others take when theirs are done: threads end together though one of them is
/// slower, and each goes through memory in order.
pub(crate) struct Shares(Vec<Padded<AtomicU64>>);

impl Shares {
    /// Units `0..len`, of `threads` threads.
    ///
    /// # Panics
    /// If they are more than 2^32 - 1.
    pub(crate) fn new(len: usize, threads: usize) -> Self {
        assert!(u32::try_from(len).is_ok(), "{len} units");
        Self((0..threads).map(|thread| Padded(AtomicU64::new(packed(&split(len, threads, thread, 1))))).collect())
    }

    /// The next units of `thread` itself: an eighth of what is left, at least `grain` and a multiple of it, or the rest.
    pub(crate) fn own(&self, thread: usize, grain: usize) -> Option<Range<usize>> {
        self.take(thread, |left| {
            let n = piece(left.len(), grain);
            (left.start..left.start + n, left.start + n..left.end)
        })
    }

    /// As [`Shares::own`], from the end of another thread's.
    pub(crate) fn of(&self, other: usize, grain: usize) -> Option<Range<usize>> {
        self.take(other, |left| {
            let n = piece(left.len(), grain);
            (left.end - n..left.end, left.start..left.end - n)
        })
    }

    fn take(&self, thread: usize, cut: impl Fn(Range<usize>) -> (Range<usize>, Range<usize>)) -> Option<Range<usize>> {
        let left = &self.0[thread].0;
        let mut seen = left.load(Ordering::Relaxed);
        loop {
            let range = (seen >> 32) as usize..(seen & u64::from(u32::MAX)) as usize;
            if range.is_empty() {
                return None;
            }
            let (taken, rest) = cut(range);
            // Only the numbers are shared: what they stand for was there before the region, and is looked at after it.
            match left.compare_exchange_weak(seen, packed(&rest), Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken),
                Err(now) => seen = now,
            }
        }
    }
}

fn packed(range: &Range<usize>) -> u64 {
    (range.start as u64) << 32 | range.end as u64
}

/// How many of `left` units are taken at a time.
fn piece(left: usize, grain: usize) -> usize {
    let grain = grain.max(1);
    (left / 8 / grain * grain).max(grain).min(left)
}

type Region = *const (dyn Fn(usize) + Sync);

/// Keeps what different threads write in different cache lines.
#[repr(align(128))]
struct Padded<T>(T);

struct Shared {
    /// Number of regions begun; workers wait for it to change.
    epoch: Padded<AtomicU64>,
    /// Workers that have not finished the current region.
    pending: Padded<AtomicUsize>,
    /// The current region; written by the caller before `epoch`, read by workers between that and their decrement of `pending`.
    region: UnsafeCell<Option<Region>>,
    stop: AtomicBool,
    parked: Vec<Padded<AtomicBool>>,
    caller_parked: AtomicBool,
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    spin: Duration,
}

// SAFETY: `region` is written only while no worker runs (`pending` is 0 and `epoch` is not yet raised) and read only while one does; the
// closure behind it is `Sync`. All other fields are `Sync` by themselves.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is only followed during a region, while the caller keeps the closure alive.
unsafe impl Send for Shared {}

/// Threads that run the same closure together.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    running: Mutex<()>,
}

thread_local! {
    /// Whether this thread is inside a region.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until `done`, awake for `spin`, then parked; `parked` tells the waker that an unpark is needed.
fn wait(spin: Duration, parked: &AtomicBool, done: impl Fn() -> bool) {
    if done() {
        return;
    }
    if !spin.is_zero() {
        let start = Instant::now();
        loop {
            for _ in 0..32 {
                if done() {
                    return;
                }
                spin_loop();
            }
            if start.elapsed() >= spin {
                break;
            }
        }
    }
    // Sequentially consistent on both sides: either this thread sees the condition, or its waker sees the flag.
    parked.store(true, Ordering::SeqCst);
    while !done() {
        thread::park();
    }
    parked.store(false, Ordering::SeqCst);
}

impl Shared {
    fn work(&self, thread: usize) {
        INSIDE.set(true);
        let mut seen = 0;
        loop {
            wait(self.spin, &self.parked[thread - 1].0, || self.epoch.0.load(Ordering::SeqCst) != seen);
            seen = self.epoch.0.load(Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: the epoch was raised after the region was stored, and the caller neither changes it nor lets the closure die
            // before this thread decrements `pending`.
            let result = unsafe { (*self.region.get()).map(|region| catch_unwind(AssertUnwindSafe(|| (*region)(thread)))) };
            if let Some(Err(panic)) = result {
                lock(&self.panic).get_or_insert(panic);
            }
            if self.pending.0.fetch_sub(1, Ordering::SeqCst) == 1
                && self.caller_parked.load(Ordering::SeqCst)
                && let Some(caller) = &*lock(&self.caller)
            {
                caller.unpark();
            }
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] being one of them; 0 counts as 1.
    ///
    /// # Panics
    /// If the system cannot start a thread.
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            epoch: Padded(AtomicU64::new(0)),
            pending: Padded(AtomicUsize::new(0)),
            region: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            parked: (1..threads).map(|_| Padded(AtomicBool::new(false))).collect(),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
            spin: if threads > available_threads() { Duration::ZERO } else { SPIN },
        });
        let start = |thread: usize| {
            let shared = Arc::clone(&shared);
            match thread::Builder::new().name(format!("kernels-{thread}")).spawn(move || shared.work(thread)) {
                Ok(handle) => handle,
                #[expect(clippy::panic, reason = "documented, as std::thread::spawn does")]
                Err(error) => panic!("the system cannot start a compute thread: {error}"),
            }
        };
        Self { workers: (1..threads).map(start).collect(), shared, running: Mutex::new(()) }
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `region(thread)` once for every thread `0..threads()`, the caller being thread 0, and returns when all are done.
    ///
    /// # Panics
    /// If `region` panicked on any thread (with one of the panics), or when called from inside a region.
    pub fn run(&self, region: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return region(0);
        }
        assert!(!INSIDE.get(), "a region must not start another");
        let running = lock(&self.running);
        let shared = &*self.shared;
        *lock(&shared.caller) = Some(thread::current());
        // SAFETY: only the lifetime is erased. The pointer is followed only by workers in this region, and this function returns, or
        // unwinds, only after the last of them has finished with it.
        let erased = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(region) };
        // SAFETY: no worker is in a region: `pending` is 0, and `running` keeps other callers out.
        unsafe { *shared.region.get() = Some(erased) };
        shared.pending.0.store(self.workers.len(), Ordering::SeqCst);
        shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        self.wake();
        INSIDE.set(true);
        let own = catch_unwind(AssertUnwindSafe(|| region(0)));
        INSIDE.set(false);
        wait(shared.spin, &shared.caller_parked, || shared.pending.0.load(Ordering::SeqCst) == 0);
        let theirs = lock(&shared.panic).take();
        drop(running);
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }

    /// Splits `out` into runs of whole rows of `row_len` values, at multiples of `grain` rows, one run a thread, and calls
    /// `fill(first_row, rows)` for each that is not empty.
    ///
    /// # Panics
    /// If `row_len` or `grain` is 0 or `out` is not whole rows, and as [`Pool::run`].
    pub fn for_rows<T: Send>(&self, out: &mut [T], row_len: usize, grain: usize, fill: impl Fn(usize, &mut [T]) + Sync) {
        assert!(row_len > 0 && out.len().is_multiple_of(row_len), "{} values are not whole rows of {row_len}", out.len());
        let rows = out.len() / row_len;
        if self.workers.is_empty() || rows <= grain {
            if rows > 0 {
                fill(0, out);
            }
            return;
        }
        let parts = Disjoint::new(out);
        self.run(&|thread| {
            let mine = split(rows, self.threads(), thread, grain);
            if !mine.is_empty() {
                // SAFETY: `split` gives every thread rows of its own, within `rows`.
                fill(mine.start, unsafe { parts.slice(mine.start * row_len..mine.end * row_len) });
            }
        });
    }

    /// Calls `work` once for every item; a thread that is free takes the next one.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub fn for_each<T: Send>(&self, items: &mut [T], work: impl Fn(&mut T) + Sync) {
        if self.workers.is_empty() || items.len() < 2 {
            return items.iter_mut().for_each(work);
        }
        let len = items.len();
        let next = AtomicUsize::new(0);
        let items = Disjoint::new(items);
        self.run(&|_| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= len {
                    return;
                }
                // SAFETY: the counter gives every index to one thread, once.
                unsafe { items.slice(i..i + 1) }.iter_mut().for_each(&work);
            }
        });
    }

    fn wake(&self) {
        for (worker, parked) in self.workers.iter().zip(&self.shared.parked) {
            if parked.0.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        self.wake();
        for worker in self.workers.drain(..) {
            // A worker catches every panic of a region, so it cannot end with one.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

/// A buffer of which several threads write different parts.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    buffer: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: only disjoint parts are handed out (the contract of `slice`), each to one thread, as `split_at_mut` would.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(buffer: &'a mut [T]) -> Self {
        Self { start: buffer.as_mut_ptr(), len: buffer.len(), buffer: std::marker::PhantomData }
    }

    /// The part `range`.
    ///
    /// # Safety
    /// No two parts that are alive at the same time may overlap.
    ///
    /// # Panics
    /// If `range` does not lie in the buffer.
    #[expect(clippy::mut_from_ref, reason = "that the parts are disjoint is the caller's promise")]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} values", self.len);
        // SAFETY: inside the buffer, which is borrowed exclusively for `'a`; disjoint from all other parts by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_taken_once_in_order_and_from_the_ends_of_others() {
        for (len, threads, grain) in [(0, 2, 1), (1, 3, 4), (100, 2, 1), (1000, 3, 7), (64, 1, 16)] {
            let shares = Shares::new(len, threads);
            let mut seen = vec![0; len];
            let mut last = 0;
            while let Some(part) = shares.own(0, grain) {
                assert!(part.start == last && !part.is_empty());
                last = part.end;
                seen[part].iter_mut().for_each(|n| *n += 1);
            }
            assert_eq!(last, split(len, threads, 0, 1).end);
            for other in 1..threads {
                let mut end = split(len, threads, other, 1).end;
                while let Some(part) = shares.of(other, grain) {
                    assert!(part.end == end && part.len() <= grain.max(len));
                    end = part.start;
                    seen[part].iter_mut().for_each(|n| *n += 1);
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "{len} units of {threads} threads");
        }
        // All at once: whoever comes.
        let pool = Pool::new(3);
        let shares = Shares::new(10_000, 3);
        let seen: Vec<AtomicUsize> = (0..10_000).map(|_| AtomicUsize::new(0)).collect();
        pool.run(&|thread| {
            for victim in (thread..3).chain(0..thread) {
                while let Some(part) = if victim == thread { shares.own(victim, 2) } else { shares.of(victim, 2) } {
                    seen[part].iter().for_each(|n| {
                        n.fetch_add(1, Ordering::Relaxed);
                    });
                }
            }
        });
        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn every_thread_runs_each_region_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..200 {
                pool.run(&|thread| {
                    counts[thread].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 200), "{threads} threads: {counts:?}");
        }
    }

    #[test]
    fn parked_workers_wake_and_several_callers_take_turns() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        // Longer than workers stay awake, so that some regions begin with all of them parked.
                        thread::park_timeout(2 * SPIN);
                        pool.run(&|thread| {
                            sum.fetch_add(thread, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 50 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        for bad in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(&|thread| assert!(thread != bad, "thread {bad} fails"))));
            let text = result.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(*text, format!("thread {bad} fails"));
        }
        let runs = AtomicUsize::new(0);
        pool.run(&|_| {
            runs.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(runs.into_inner(), 3);
    }

    #[test]
    fn a_nested_region_is_refused() {
        let pool = Pool::new(2);
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(&|_| pool.run(&|_| {})))).is_err());
    }

    #[test]
    fn parts_cover_everything_once_at_aligned_borders() {
        for len in [0, 1, 15, 16, 17, 33, 1000] {
            for parts in 1..6 {
                for align in [1, 16] {
                    let mut end = 0;
                    for part in 0..parts {
                        let range = split(len, parts, part, align);
                        assert_eq!(range.start, end);
                        assert!(range.start.is_multiple_of(align) || range.start == len);
                        end = range.end;
                    }
                    assert_eq!(end, len);
                }
            }
        }
    }

    #[test]
    fn every_item_is_worked_on_once() {
        for threads in [1, 3] {
            for len in [0, 1, 2, 100] {
                let mut items: Vec<usize> = (0..len).collect();
                Pool::new(threads).for_each(&mut items, |item| *item += 7);
                assert!(items.iter().enumerate().all(|(i, &item)| item == i + 7));
            }
        }
    }

    #[test]
    fn rows_are_filled_once() {
        let pool = Pool::new(3);
        for rows in [0, 1, 2, 7, 50] {
            let mut out = vec![0_usize; rows * 5];
            pool.for_rows(&mut out, 5, 2, |first, part| {
                for (i, value) in part.iter_mut().enumerate() {
                    *value += first * 5 + i + 1;
                }
            });
            assert!(out.iter().enumerate().all(|(i, &value)| value == i + 1));
        }
    }
}
