//! Memory shared by several processes: bytes, cells, and signals that can be waited for until a deadline.
//!
//! All access is by atomic operations, so that whatever another process writes at whatever moment, this one reads some bytes and no rule
//! is broken; protocols on top order their accesses with [`Signal`]s (a writer sets one after its bytes, a reader waits for it first).
#![expect(unsafe_code, reason = "shared mappings and futexes are system calls on raw pointers")]

use std::fs::{self, File, OpenOptions};
use std::hint::spin_loop;
use std::io;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A region of memory that every process sees that opened it.
#[derive(Debug)]
pub struct SharedRegion {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value, and its content is accessed by atomic operations alone.
unsafe impl Send for SharedRegion {}
// SAFETY: as above.
unsafe impl Sync for SharedRegion {}

/// What a wait ended with that did not see what it waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the deadline passed while the signal stood at {last}")]
pub struct DeadlinePassed {
    /// The value at the deadline.
    pub last: u32,
}

impl SharedRegion {
    /// Where regions belong that live in memory only: `/dev/shm` where there is one, else the folder for temporary files.
    pub fn folder() -> PathBuf {
        let shm = Path::new("/dev/shm");
        if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() }
    }

    /// Creates a region of `len` zero bytes in a new file at `path`, which only this user may open. The file's blocks are reserved at once,
    /// so that a full file system shows here and not as a signal at the first access.
    ///
    /// # Errors
    /// If the file exists already, `len` is 0, or the system refuses.
    pub fn create(path: &Path, len: usize) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;

        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        let region = reserve(&file, len).and_then(|()| Self::map(&file, len));
        if region.is_err() {
            // The error that is being returned is the one that matters.
            let _ = fs::remove_file(path);
        }
        region
    }

    /// Opens the region another process created at `path`.
    ///
    /// # Errors
    /// If there is none, or the system refuses.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        Self::map(&file, len)
    }

    /// Removes the name of a region; processes that have it open keep it. To be called once all have opened it, so that nothing is left
    /// when they die.
    ///
    /// # Errors
    /// If there is none, or the system refuses.
    pub fn unlink(path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn map(file: &File, len: usize) -> io::Result<Self> {
        use std::os::fd::AsRawFd;

        // SAFETY: a new mapping of an open file touches no existing memory; the system refuses a length of 0.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pointer to `len` bytes at `offset`.
    ///
    /// # Panics
    /// If they are out of bounds, or `offset` is not a multiple of `align`.
    fn at(&self, offset: usize, len: usize, align: usize) -> NonNull<u8> {
        assert!(offset.is_multiple_of(align), "offset {offset} is not a multiple of {align}");
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes at {offset} of a region of {}", self.len);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(offset) }
    }

    /// The 32-bit cell at `offset`.
    ///
    /// # Panics
    /// If it is out of bounds, or `offset` is not a multiple of 4.
    pub fn cell(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: aligned and inside the mapping, which lives as long as `self`; only atomics access it.
        unsafe { self.at(offset, 4, 4).cast().as_ref() }
    }

    /// The 64-bit cell at `offset`.
    ///
    /// # Panics
    /// If it is out of bounds, or `offset` is not a multiple of 8.
    pub fn cell64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: aligned and inside the mapping, which lives as long as `self`; only atomics access it.
        unsafe { self.at(offset, 8, 8).cast().as_ref() }
    }

    /// The signal in the 8 bytes at `offset`. Signals of different writers are best kept 128 bytes apart.
    ///
    /// # Panics
    /// If they are out of bounds, or `offset` is not a multiple of 8.
    pub fn signal(&self, offset: usize) -> Signal<'_> {
        let _ = self.at(offset, 8, 8);
        Signal { value: self.cell(offset), waiters: self.cell(offset + 4) }
    }

    fn words(&self, offset: usize, len: usize) -> (&[AtomicU64], &[AtomicU8]) {
        let start = self.at(offset, len, 8);
        // SAFETY: aligned and inside the mapping, which lives as long as `self`; only atomics access it.
        unsafe {
            let words = std::slice::from_raw_parts(start.cast().as_ptr(), len / 8);
            (words, std::slice::from_raw_parts(start.add(len / 8 * 8).cast().as_ptr(), len % 8))
        }
    }

    /// Copies `bytes` into the region at `offset`. A [`Signal::set`] afterwards makes them visible to whoever waits for it.
    ///
    /// # Panics
    /// If they are out of bounds, or `offset` is not a multiple of 8.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let (words, tail) = self.words(offset, bytes.len());
        let (chunks, rest) = bytes.as_chunks::<8>();
        for (word, chunk) in words.iter().zip(chunks) {
            word.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
        }
        for (cell, byte) in tail.iter().zip(rest) {
            cell.store(*byte, Ordering::Relaxed);
        }
    }

    /// Copies the bytes at `offset` out of the region.
    ///
    /// # Panics
    /// If they are out of bounds, or `offset` is not a multiple of 8.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let (words, tail) = self.words(offset, bytes.len());
        let (chunks, rest) = bytes.as_chunks_mut::<8>();
        for (word, chunk) in words.iter().zip(chunks) {
            *chunk = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        for (cell, byte) in tail.iter().zip(rest) {
            *byte = cell.load(Ordering::Relaxed);
        }
    }
}

impl Drop for SharedRegion {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this address and length and never unmapped before; all borrows of it have ended.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.len);
        }
    }
}

/// Gives `file` the length `len` with blocks reserved where the system can do that.
fn reserve(file: &File, len: usize) -> io::Result<()> {
    let size = u64::try_from(len).map_err(io::Error::other)?;
    file.set_len(size)?;
    #[cfg(target_os = "linux")]
    if len > 0 {
        use std::os::fd::AsRawFd;

        let length = libc::off_t::try_from(len).map_err(io::Error::other)?;
        // SAFETY: an open file and plain numbers.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) } {
            0 | libc::EOPNOTSUPP | libc::EINVAL => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
    Ok(())
}

/// A 32-bit value that one process sets and others wait for.
#[derive(Clone, Copy, Debug)]
pub struct Signal<'a> {
    value: &'a AtomicU32,
    /// How many sleep, so that setting costs a system call only then. A process that dies asleep leaves it too high, which costs only that.
    waiters: &'a AtomicU32,
}

impl Signal<'_> {
    /// Its value now; what was written before it was set can be read after this.
    pub fn load(&self) -> u32 {
        self.value.load(Ordering::Acquire)
    }

    /// Sets it and wakes all who wait. What this thread wrote before is visible to whoever sees the value.
    pub fn set(&self, value: u32) {
        // Sequentially consistent with `wait`: either this thread sees the waiter, or the waiter the value.
        self.value.store(value, Ordering::SeqCst);
        if self.waiters.load(Ordering::SeqCst) > 0 {
            wake_all(self.value);
        }
    }

    /// Waits until its value is one that `reached` accepts, and returns it: awake for at most `spin`, then asleep.
    ///
    /// # Errors
    /// If the deadline passes first.
    pub fn wait(&self, reached: impl Fn(u32) -> bool, deadline: Instant, spin: Duration) -> Result<u32, DeadlinePassed> {
        if reached(self.load()) {
            return Ok(self.load());
        }
        let awake_until = Instant::now() + spin;
        while !spin.is_zero() {
            for _ in 0..32 {
                let value = self.load();
                if reached(value) {
                    return Ok(value);
                }
                spin_loop();
            }
            if Instant::now() >= awake_until.min(deadline) {
                break;
            }
        }
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let result = loop {
            let value = self.value.load(Ordering::SeqCst);
            if reached(value) {
                break Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Err(DeadlinePassed { last: value });
            }
            sleep_while(self.value, value, left);
        };
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

/// Sleeps while `cell` holds `value`, at most `time`; may wake for no reason.
#[cfg(target_os = "linux")]
fn sleep_while(cell: &AtomicU32, value: u32, time: Duration) {
    let time = libc::timespec {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(time.subsec_nanos().cast_signed()),
    };
    // SAFETY: the cell and the time live through the call. Not a private futex: other processes wake it. Every outcome (woken, changed
    // already, interrupted, timed out) is for the caller to tell apart by looking.
    unsafe {
        libc::syscall(libc::SYS_futex, cell.as_ptr(), libc::FUTEX_WAIT, value, &raw const time, std::ptr::null::<u32>(), 0);
    }
}

#[cfg(target_os = "linux")]
fn wake_all(cell: &AtomicU32) {
    // SAFETY: the cell lives through the call, which only looks up who sleeps on its address.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            cell.as_ptr(),
            libc::FUTEX_WAKE,
            i32::MAX,
            std::ptr::null::<libc::timespec>(),
            std::ptr::null::<u32>(),
            0,
        );
    }
}

/// Without a futex that crosses processes: looks again after a while.
#[cfg(not(target_os = "linux"))]
fn sleep_while(cell: &AtomicU32, value: u32, time: Duration) {
    if cell.load(Ordering::SeqCst) == value {
        std::thread::sleep(time.min(Duration::from_micros(50)));
    }
}

#[cfg(not(target_os = "linux"))]
fn wake_all(_cell: &AtomicU32) {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn path(name: &str) -> PathBuf {
        SharedRegion::folder().join(format!("skein-test-{name}-{}", std::process::id()))
    }

    #[test]
    fn two_mappings_of_a_region_see_each_other() {
        let path = path("two");
        let first = SharedRegion::create(&path, 4096).unwrap();
        assert_eq!(SharedRegion::create(&path, 4096).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let second = SharedRegion::open(&path).unwrap();
        SharedRegion::unlink(&path).unwrap();
        assert!(SharedRegion::open(&path).is_err());
        for len in [0, 1, 7, 8, 9, 1000] {
            let sent: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
            let mut got = vec![0; len];
            first.write(64, &sent);
            second.read(64, &mut got);
            assert_eq!(sent, got);
        }
        first.cell64(8).store(u64::MAX - 1, Ordering::Relaxed);
        assert_eq!(second.cell64(8).load(Ordering::Relaxed), u64::MAX - 1);
        assert_eq!(second.len(), 4096);
    }

    #[test]
    fn a_signal_carries_what_was_written_before_it() {
        let path = path("ping");
        let regions = [SharedRegion::create(&path, 1024).unwrap(), SharedRegion::open(&path).unwrap()];
        SharedRegion::unlink(&path).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        thread::scope(|scope| {
            for (rank, region) in regions.iter().enumerate() {
                scope.spawn(move || {
                    for round in 1..=2000_u32 {
                        // Half of the rounds without spinning, so that sleeping and waking is seen too.
                        let spin = Duration::from_micros(u64::from(round % 2) * 5);
                        region.write(256 + 64 * rank, &round.to_le_bytes());
                        region.signal(128 * rank).set(round);
                        region.signal(128 * (1 - rank)).wait(|value| value >= round, deadline, spin).unwrap();
                        let mut bytes = [0; 4];
                        region.read(256 + 64 * (1 - rank), &mut bytes);
                        assert!(u32::from_le_bytes(bytes) >= round);
                    }
                });
            }
        });
    }

    #[test]
    fn a_wait_ends_at_its_deadline() {
        let path = path("deadline");
        let region = SharedRegion::create(&path, 64).unwrap();
        SharedRegion::unlink(&path).unwrap();
        region.signal(0).set(3);
        let deadline = Instant::now() + Duration::from_millis(5);
        assert_eq!(region.signal(0).wait(|value| value == 4, deadline, Duration::ZERO), Err(DeadlinePassed { last: 3 }));
        assert!(Instant::now() >= deadline);
        assert_eq!(region.signal(0).wait(|value| value == 3, deadline, Duration::ZERO), Ok(3));
    }

    #[test]
    #[should_panic(expected = "8 bytes at 64 of a region of 64")]
    fn access_out_of_bounds_is_refused() {
        let path = path("bounds");
        let region = SharedRegion::create(&path, 64).unwrap();
        SharedRegion::unlink(&path).unwrap();
        region.cell64(64);
    }
}
