//! Files that are kept in part: `parts/<key>`, which has holes, and `parts/<key>.ranges`, the journal of what of it was fetched.
//!
//! A line of the journal, `FROM TO`, is written once its bytes are on disk, so what a process had fetched when it ended is not fetched
//! again. A line that was cut off names fewer bytes, or none. Whoever fetches holds `locks/<key>`, so that several processes bring each byte
//! once; were two to write at the same time, they would write the same bytes to the same places.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tracing::{debug, info};

use crate::{SourceError, cache::write_error, http::Locator, http::Remote, ranges::Ranges};

/// Ranges with no more bytes between them are one request: what a format puts between tensors is less, what another rank owns is more.
const GAP: u64 = 512;
/// The same where that would leave more than [`MANY`] requests, as the columns of matrices that are stored turned do: these bytes cost less
/// than a request.
const WIDE_GAP: u64 = 32 << 10;
/// Requests to one file that are borne for the sake of not fetching a byte too many.
const MANY: usize = 1000;
/// Most bytes of one request, and most that are fetched again after a crash, for each request in flight.
const PIECE: u64 = 8 << 20;
/// Requests in flight.
const IN_FLIGHT: usize = 4;
/// How often it is looked whether another process has fetched what it wanted.
const LOOK: Duration = Duration::from_millis(100);

/// Told of bytes that came; says whether to go on.
pub(crate) type Came<'a> = dyn Fn(u64) -> bool + Sync + 'a;

/// A file of which the cache has some ranges.
#[derive(Debug)]
pub(crate) struct Parts {
    file: File,
    path: PathBuf,
    bytes: u64,
    journal: Mutex<Journal>,
    /// Of whoever fetches; nobody else does where nothing is to be found again.
    lock: Option<PathBuf>,
    locator: Locator,
    /// Found when something is missing.
    remote: OnceLock<Remote>,
    fetched: AtomicU64,
}

#[derive(Debug)]
struct Journal {
    file: File,
    path: PathBuf,
    /// What is on disk.
    have: Ranges,
}

/// The files of an entry.
fn paths(folder: &Path, key: &str) -> (PathBuf, PathBuf) {
    (folder.join(key), folder.join(format!("{key}.ranges")))
}

impl Parts {
    /// The entry `key` in `folder`, if there is one: a file of which something may have been fetched.
    pub(crate) fn find(folder: &Path, lock: PathBuf, key: &str, locator: Locator) -> Result<Option<Self>, SourceError> {
        let (path, journal) = paths(folder, key);
        let bytes = match fs::metadata(&path) {
            Ok(found) if journal.is_file() => found.len(),
            _ => return Ok(None),
        };
        Self::open(folder, Some(lock), key, bytes, locator).map(Some)
    }

    /// The entry for `remote`, made where there is none.
    pub(crate) fn of(folder: &Path, lock: PathBuf, key: &str, bytes: u64, remote: Remote) -> Result<Self, SourceError> {
        let parts = Self::open(folder, Some(lock), key, bytes, remote.locator().clone())?;
        Ok(Self { remote: remote.into(), ..parts })
    }

    /// One that is gone with this value.
    pub(crate) fn once(folder: &Path, key: &str, bytes: u64, remote: Remote) -> Result<Self, SourceError> {
        let parts = Self::open(folder, None, key, bytes, remote.locator().clone())?;
        let (path, journal) = paths(folder, key);
        for path in [path, journal] {
            fs::remove_file(&path).map_err(|e| SourceError::file("remove", &path, e))?;
        }
        Ok(Self { remote: remote.into(), ..parts })
    }

    fn open(folder: &Path, lock: Option<PathBuf>, key: &str, bytes: u64, locator: Locator) -> Result<Self, SourceError> {
        let (path, journal) = paths(folder, key);
        let fail = |e| SourceError::file("open", &journal, e);
        let file = OpenOptions::new().create(true).read(true).append(true).open(&journal).map_err(fail)?;
        file.lock().map_err(fail)?;
        let made = make(&path, bytes, &file, locator.url());
        file.unlock().map_err(fail)?;
        let mut journal = Journal { file, path: journal, have: Ranges::default() };
        let file = made?;
        journal.read(bytes)?;
        debug!(path = %path.display(), have = journal.have.bytes(), bytes, "a file kept in part");
        Ok(Self { file, path, bytes, journal: journal.into(), lock, locator, remote: OnceLock::new(), fetched: AtomicU64::new(0) })
    }

    /// Bytes of the whole file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it comes from.
    pub(crate) fn place(&self) -> String {
        self.locator.url().to_owned()
    }

    /// Bytes that came over the network so far.
    pub(crate) fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// What is fetched for `wanted`, and how many bytes of it are here.
    pub(crate) fn joined(&self, wanted: &Ranges) -> (Ranges, u64) {
        let mut joined = wanted.join(GAP);
        if joined.iter().count() > MANY {
            joined = joined.join(WIDE_GAP);
        }
        let missing = joined.without(&self.journal().have).bytes();
        let here = joined.bytes() - missing;
        (joined, here)
    }

    /// Brings what is missing of `wanted`, several requests at a time. `came` is told of what comes, also through another process.
    pub(crate) fn fetch(&self, wanted: &Ranges, came: &Came<'_>) -> Result<(), SourceError> {
        let before = wanted.without(&self.journal().have);
        if before.bytes() == 0 {
            return Ok(());
        }
        let _lock = self.lock(came)?;
        let missing = {
            let mut journal = self.journal();
            journal.read(self.bytes)?;
            wanted.without(&journal.have)
        };
        if !came(before.bytes() - missing.bytes()) {
            return Err(SourceError::Stopped { place: self.place() });
        }
        let cut = |range: Range<u64>| (range.start..range.end).step_by(PIECE as usize).map(move |at| at..range.end.min(at + PIECE));
        let pieces: Vec<Range<u64>> = missing.iter().flat_map(cut).collect();
        let (next, left, failed) = (AtomicUsize::new(0), AtomicU64::new(missing.bytes()), AtomicBool::new(false));
        let came = |bytes: u64| {
            left.fetch_sub(bytes, Ordering::Relaxed);
            came(bytes) && !failed.load(Ordering::Relaxed)
        };
        let work = || {
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)).filter(|_| !failed.load(Ordering::Relaxed)) {
                self.bring(piece, &left, &came).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            }
            Ok(())
        };
        let results = thread::scope(|scope| {
            let threads: Vec<_> = (0..IN_FLIGHT.min(pieces.len())).map(|_| scope.spawn(work)).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect::<Vec<_>>()
        });
        // One that was stopped because another had failed says less than that one.
        let mut errors: Vec<SourceError> = results.into_iter().filter_map(Result::err).collect();
        errors.sort_by_key(|e| matches!(e, SourceError::Stopped { .. }));
        errors.into_iter().next().map_or(Ok(()), Err)
    }

    /// Whether none of the range is missing.
    pub(crate) fn has(&self, range: &Range<u64>) -> bool {
        self.journal().have.missing(range).is_empty()
    }

    /// Reads a range, bringing what of it is missing.
    pub(crate) fn read(&self, range: &Range<u64>, into: &mut [u8]) -> Result<(), SourceError> {
        let missing = self.journal().have.missing(range);
        for piece in missing {
            self.bring(&piece, &AtomicU64::new(piece.end - piece.start), &|_| true)?;
        }
        self.file.read_exact_at(into, range.start).map_err(|e| SourceError::file("read", &self.path, e))
    }

    /// Fetches a piece to disk, and notes it.
    fn bring(&self, piece: &Range<u64>, left: &AtomicU64, came: &Came<'_>) -> Result<(), SourceError> {
        let full = |e| write_error(&self.path, left.load(Ordering::Relaxed).max(1), e);
        self.remote()?.pour(piece, &mut |at, bytes| {
            self.file.write_all_at(bytes, at).map_err(full)?;
            self.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if came(bytes.len() as u64) { Ok(()) } else { Err(SourceError::Stopped { place: self.place() }) }
        })?;
        self.file.sync_data().map_err(full)?;
        self.journal().note(piece)
    }

    /// The file on its server, looked for once, and of the length that is known.
    fn remote(&self) -> Result<&Remote, SourceError> {
        if let Some(remote) = self.remote.get() {
            return Ok(remote);
        }
        let found = self.locator.probe()?;
        if found.bytes() != Some(self.bytes) {
            let got = found.bytes().map_or("no length".to_owned(), |b| format!("a file of {b} bytes"));
            return Err(SourceError::Protocol { place: self.place(), expected: format!("one of {} as before", self.bytes), got });
        }
        Ok(self.remote.get_or_init(|| found))
    }

    /// Waits until no other process fetches.
    fn lock(&self, came: &Came<'_>) -> Result<Option<File>, SourceError> {
        let Some(lock) = &self.lock else { return Ok(None) };
        let fail = |e| SourceError::file("lock", lock, e);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(lock).map_err(fail)?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::Error(error)) => return Err(fail(error)),
                Err(TryLockError::WouldBlock) => {}
            }
            if !told {
                info!(place = self.locator.url(), "another process fetches of this file; waiting for it");
                told = true;
            }
            if !came(0) {
                return Err(SourceError::Stopped { place: self.place() });
            }
            thread::sleep(LOOK);
        }
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file with holes, made anew where it is missing; then the journal's lines are of another.
fn make(path: &Path, bytes: u64, journal: &File, place: &str) -> Result<File, SourceError> {
    let fail = |e| SourceError::file("open", path, e);
    let open = |new: bool| OpenOptions::new().read(true).write(true).create_new(new).open(path);
    match open(false) {
        Ok(file) => {
            let got = file.metadata().map_err(fail)?.len();
            if got == bytes {
                return Ok(file);
            }
            let (expected, got) = (format!("the {got} bytes that {} has", path.display()), format!("a length of {bytes} bytes"));
            Err(SourceError::Protocol { place: place.to_owned(), expected, got })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            journal.set_len(0).map_err(fail)?;
            // Complete before it has its name.
            let temporary = path.with_extension(crate::cache::unique("new"));
            let file =
                OpenOptions::new().read(true).write(true).create_new(true).open(&temporary).map_err(|e| write_error(path, bytes, e))?;
            file.set_len(bytes).and_then(|()| file.sync_all()).map_err(|e| write_error(path, bytes, e))?;
            fs::rename(&temporary, path).map_err(|e| write_error(path, bytes, e))?;
            Ok(file)
        }
        Err(error) => Err(fail(error)),
    }
}

impl Journal {
    /// Takes what any process has noted of a file of `bytes`.
    fn read(&mut self, bytes: u64) -> Result<(), SourceError> {
        let read = || {
            let mut text = vec![0; self.file.metadata()?.len() as usize];
            self.file.read_exact_at(&mut text, 0).map(|()| text)
        };
        let text = read().map_err(|e| SourceError::file("read", &self.path, e))?;
        let text = String::from_utf8_lossy(&text);
        for line in text.lines() {
            let range = line.split_once(' ').and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
            match range.filter(|r: &Range<u64>| r.start < r.end && r.end <= bytes) {
                Some(range) => self.have.insert(range),
                None => debug!(path = %self.path.display(), line, "a line that is no range"),
            }
        }
        Ok(())
    }

    /// Notes a range whose bytes are on disk.
    fn note(&mut self, range: &Range<u64>) -> Result<(), SourceError> {
        // It begins a line of its own, whatever a process that was killed left.
        let line = format!("\n{} {}\n", range.start, range.end);
        let file = &mut self.file;
        let written = file.lock().and_then(|()| {
            let written = file.write_all(line.as_bytes()).and_then(|()| file.sync_data());
            file.unlock().and(written)
        });
        written.map_err(|e| write_error(&self.path, line.len() as u64, e))?;
        self.have.insert(range.clone());
        Ok(())
    }
}

#[cfg(test)]
impl Parts {
    /// One whose file can be read, and not written for want of room.
    pub(crate) fn on_full_disk(path: &Path, bytes: u64, url: &str) -> Self {
        let folder = path.parent().expect("a folder");
        let key = path.file_name().expect("a name").to_string_lossy();
        let locator = crate::http::Client::new(&crate::SourceOptions::default()).locator("m", url, &crate::admission::Admission::Open);
        let parts = Self::open(folder, None, &key, bytes, locator).expect("an entry");
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").expect("the device that is always full");
        Self { file: full, ..parts }
    }
}
