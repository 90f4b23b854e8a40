//! The content-addressed cache: `blobs/sha256/<hex>`, filled by resumable downloads that are checked before they get their name, and
//! `beside/<key>`, the small files that belong to a pinned weight file.
//!
//! A download goes to `partial/<key>` under the lock `locks/<key>`, so two processes never fetch the same file at once. The lock dies
//! with its process; the partial file stays and is resumed.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use sha2::{Digest as _, Sha256};
use tracing::{debug, info, warn};

use crate::{
    Progress, SourceError, SourceOptions,
    digest::Digest,
    digest::hash_file,
    http::{Locator, Remote},
    parts::Parts,
};

/// Bytes between two reports of progress.
const PIECE: usize = 1 << 20;

/// Where the cache is: `$SKEIN_CACHE`, else `$XDG_CACHE_HOME/skein`, else `$HOME/.cache/skein`.
///
/// The values are handed in, since only a binary's arguments module reads the environment. `None` when none of them is set.
pub fn default_cache_root(skein_cache: Option<OsString>, xdg_cache_home: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let set = |v: Option<OsString>| v.filter(|v| !v.is_empty()).map(PathBuf::from);
    set(skein_cache).or_else(|| set(xdg_cache_home).map(|d| d.join("skein"))).or_else(|| set(home).map(|d| d.join(".cache").join("skein")))
}

/// A cache folder; it need not exist.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where a blob with this digest is or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join("sha256").join(digest.hex())
    }

    /// The blob with this digest, when it is there.
    pub fn blob(&self, digest: &Digest) -> Option<PathBuf> {
        Some(self.blob_path(digest)).filter(|p| p.is_file())
    }

    /// Downloads `remote` unless a blob with its digest is there, and returns the blob's path.
    ///
    /// Without a digest the blob is found again by the server's own mark of the file (ETag or date, and length).
    pub(crate) fn fetch(&self, remote: &Remote, digest: Option<&Digest>, options: &SourceOptions) -> Result<PathBuf, SourceError> {
        if let Some(path) = digest.and_then(|d| self.blob(d)) {
            return Ok(path);
        }
        let key = digest.map_or_else(|| Digest::of_bytes(remote.identity()).hex().to_owned(), |d| d.hex().to_owned());
        let _lock = self.lock(&key)?;
        if let Some(path) = digest.and_then(|d| self.blob(d)).or_else(|| self.alias(&key)) {
            debug!(file = remote.name(), "another process fetched it");
            return Ok(path);
        }
        let partial = self.folder("partial")?.join(&key);
        let resumed = partial.exists();
        let mut got = download(remote, &partial, options)?;
        if resumed && digest.is_some_and(|d| *d != got) {
            // The part that was there may be of another file, or damaged when the machine went down.
            warn!(file = remote.name(), "the resumed download has another digest, starting over");
            fs::remove_file(&partial).map_err(|e| SourceError::file("remove", &partial, e))?;
            got = download(remote, &partial, options)?;
        }
        if let Some(expected) = digest.filter(|d| **d != got) {
            fs::remove_file(&partial).map_err(|e| SourceError::file("remove", &partial, e))?;
            let (expected, got) = (expected.hex().to_owned(), got.hex().to_owned());
            return Err(SourceError::DigestMismatch { place: remote.place(), expected, got });
        }
        let blob = self.blob_path(&got);
        let parent = self.folder("blobs/sha256")?;
        fs::rename(&partial, &blob).map_err(|e| SourceError::file("rename", &partial, e))?;
        File::open(&parent).and_then(|d| d.sync_all()).map_err(|e| SourceError::file("sync", &parent, e))?;
        if digest.is_none() {
            self.remember(&key, &got)?;
        }
        info!(file = remote.name(), digest = %got, "downloaded");
        Ok(blob)
    }

    /// The part that is kept of the file with this digest, if any.
    pub(crate) fn part(&self, digest: &Digest, locator: Locator) -> Result<Option<Parts>, SourceError> {
        Parts::find(&self.root.join("parts"), self.root.join("locks").join(digest.hex()), digest.hex(), locator)
    }

    /// A file of which only what is read is fetched; `digest` is what its source says it has.
    pub(crate) fn parts(&self, remote: &Remote, bytes: u64, digest: Option<&Digest>) -> Result<Parts, SourceError> {
        let identity = || Digest::of_bytes(remote.identity()).hex().to_owned();
        let folder = self.folder("parts")?;
        if digest.is_none() && !remote.is_marked() {
            // What such a server sends tomorrow may be of another file: nothing is to be found again.
            return Parts::once(&folder, &format!("{}-{}", identity(), unique("once")), bytes, remote.clone());
        }
        let key = digest.map_or_else(identity, |digest| digest.hex().to_owned());
        Parts::of(&folder, self.folder("locks")?.join(&key), &key, bytes, remote.clone())
    }

    /// Whether the file at `path` was found to have `digest` before and has not changed since.
    pub(crate) fn check_file(&self, path: &Path, digest: &Digest) -> Result<(), SourceError> {
        let key = file_key(path)?;
        if self.named(&key).as_ref() == Some(digest) {
            return Ok(());
        }
        check_file(path, digest)?;
        self.remember(&key, digest)
    }

    /// Keeps the small files beside the weight file with this digest, for the source at `uri`.
    pub(crate) fn keep_beside(&self, digest: &Digest, uri: &str, files: &BTreeMap<&'static str, Vec<u8>>) -> Result<(), SourceError> {
        let folder = self.beside_path(digest, uri);
        if folder.is_dir() {
            return Ok(());
        }
        let temporary = self.folder("beside")?.join(unique("new"));
        let fail = |e| SourceError::file("write", &folder, e);
        fs::create_dir(&temporary).map_err(fail)?;
        for (name, bytes) in files {
            let path = temporary.join(name);
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).map_err(fail)?;
            }
            File::create_new(path).and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all())).map_err(fail)?;
        }
        match fs::rename(&temporary, &folder) {
            // Another process was faster.
            Err(_) if folder.is_dir() => fs::remove_dir_all(&temporary).map_err(fail),
            done => done.map_err(fail),
        }
    }

    /// The small files kept by [`Cache::keep_beside`].
    pub(crate) fn beside(
        &self,
        digest: &Digest,
        uri: &str,
        names: &[&'static str],
    ) -> Result<Option<BTreeMap<&'static str, Vec<u8>>>, SourceError> {
        let folder = self.beside_path(digest, uri);
        if !folder.is_dir() {
            return Ok(None);
        }
        let mut files = BTreeMap::new();
        for name in names {
            match fs::read(folder.join(name)) {
                Ok(bytes) => drop(files.insert(*name, bytes)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(SourceError::file("read", folder.join(name), e)),
            }
        }
        Ok(Some(files))
    }

    fn beside_path(&self, digest: &Digest, uri: &str) -> PathBuf {
        self.root.join("beside").join(Digest::of_bytes(format!("beside {digest} {uri}")).hex())
    }

    fn folder(&self, name: &str) -> Result<PathBuf, SourceError> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).map_err(|e| SourceError::file("create", &path, e))?;
        Ok(path)
    }

    /// Takes the lock on `key`, waiting for another process that has it.
    fn lock(&self, key: &str) -> Result<File, SourceError> {
        let path = self.folder("locks")?.join(key);
        let fail = |e| SourceError::file("lock", &path, e);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(fail)?;
        file.lock().map_err(fail)?;
        Ok(file)
    }

    /// Notes which digest the thing `key` stands for has.
    fn remember(&self, key: &str, digest: &Digest) -> Result<(), SourceError> {
        let path = self.folder("known")?.join(key);
        let temporary = path.with_extension(unique("new"));
        let write = || fs::write(&temporary, digest.to_string()).and_then(|()| fs::rename(&temporary, &path));
        write().map_err(|e| SourceError::file("write", &path, e))
    }

    fn named(&self, key: &str) -> Option<Digest> {
        fs::read_to_string(self.root.join("known").join(key)).ok()?.parse().ok()
    }

    fn alias(&self, key: &str) -> Option<PathBuf> {
        self.named(key).and_then(|d| self.blob(&d))
    }
}

/// A name that no other thread or process uses.
pub(crate) fn unique(kind: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}.{kind}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Checks the digest of a local file by reading it whole.
pub(crate) fn check_file(path: &Path, expected: &Digest) -> Result<(), SourceError> {
    let got = Digest::of_file(path)?;
    if got == *expected {
        return Ok(());
    }
    let (expected, got) = (expected.hex().to_owned(), got.hex().to_owned());
    Err(SourceError::DigestMismatch { place: path.display().to_string(), expected, got })
}

/// What stands for a local file as long as it does not change.
fn file_key(path: &Path) -> Result<String, SourceError> {
    let stat = || fs::canonicalize(path).and_then(|full| fs::metadata(&full).map(|m| (full, m)));
    let (full, meta) = stat().map_err(|e| SourceError::file("stat", path, e))?;
    let modified = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    Ok(Digest::of_bytes(format!("file {} {} {modified:?}", full.display(), meta.len())).hex().to_owned())
}

/// Downloads `remote` to `partial`, resuming what is there, and returns the digest of the whole.
fn download(remote: &Remote, partial: &Path, options: &SourceOptions) -> Result<Digest, SourceError> {
    let total = remote.bytes();
    let mut attempt = 0;
    loop {
        let mut hash = Sha256::new();
        let mut done = if partial.exists() { hash_file(partial, &mut hash)? } else { 0 };
        if total.is_some_and(|t| done > t) {
            (done, hash) = (0, Sha256::new());
        }
        if total.is_none_or(|t| done < t) || done == 0 {
            let (from, body) = match remote.open(done) {
                // Nothing follows what is there: the file is another one, or its length was not known.
                Err(SourceError::Status { status: 416, .. }) if done > 0 => {
                    fs::remove_file(partial).map_err(|e| SourceError::file("remove", partial, e))?;
                    continue;
                }
                opened => opened?,
            };
            if from != done {
                debug!(file = remote.name(), "the server sends the file from its start");
                (done, hash) = (0, Sha256::new());
            }
            let before = done;
            let report = |done| {
                if let Some(progress) = &options.progress {
                    progress(&Progress { name: remote.name(), done, total });
                }
            };
            report(done);
            let lost = copy(body, partial, &mut done, total, &mut hash, &report)?;
            let short = total.is_some_and(|t| done < t);
            if lost.is_some() || short {
                // Bytes that arrived pay for the attempt: only a server that sends nothing uses up the retries.
                attempt = if done > before { 0 } else { attempt + 1 };
                let source = lost.unwrap_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the connection closed early"));
                if attempt > options.retries {
                    return Err(SourceError::Unreachable { place: remote.place(), attempts: attempt, source });
                }
                warn!(file = remote.name(), done, error = %source, "connection lost, resuming");
                std::thread::sleep(options.backoff * 2u32.saturating_pow(attempt));
                continue;
            }
        }
        if let Some(total) = total.filter(|&t| done > t) {
            fs::remove_file(partial).map_err(|e| SourceError::file("remove", partial, e))?;
            let (expected, got) = (format!("{total} bytes"), format!("{done} bytes"));
            return Err(SourceError::Protocol { place: remote.place(), expected, got });
        }
        return Ok(Digest::of(hash));
    }
}

/// An error of writing to the cache; `needed` more bytes were to come.
pub(crate) fn write_error(path: &Path, needed: u64, source: io::Error) -> SourceError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SourceError::DiskFull { path: path.to_owned(), needed, source },
        _ => SourceError::file("write", path, source),
    }
}

/// Copies a body behind the first `done` bytes of `partial`. Returns the connection's error, if it was lost.
fn copy(
    body: Box<dyn Read>,
    partial: &Path,
    done: &mut u64,
    total: Option<u64>,
    hash: &mut Sha256,
    report: &dyn Fn(u64),
) -> Result<Option<io::Error>, SourceError> {
    let full = |e: io::Error, done: u64| write_error(partial, total.map_or(1, |t| t.saturating_sub(done)), e);
    // One byte more than expected is enough to see that the server sends too much.
    let mut body = body.take(total.map_or(u64::MAX, |t| t.saturating_sub(*done) + 1));
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(partial).map_err(|e| full(e, *done))?;
    file.set_len(*done).and_then(|()| io::Seek::seek(&mut file, io::SeekFrom::End(0))).map_err(|e| full(e, *done))?;
    let mut piece = vec![0; PIECE];
    let mut reported = *done;
    loop {
        let n = match body.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                file.sync_all().map_err(|e| full(e, *done))?;
                return Ok(Some(e));
            }
        };
        file.write_all(&piece[..n]).map_err(|e| full(e, *done))?;
        hash.update(&piece[..n]);
        *done += n as u64;
        if *done - reported >= PIECE as u64 {
            reported = *done;
            report(*done);
        }
    }
    file.sync_all().map_err(|e| full(e, *done))?;
    report(*done);
    Ok(None)
}
