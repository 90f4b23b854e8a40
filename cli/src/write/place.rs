//! Where files are written: beside their place, under a name of their own, until they are whole.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use tempfile::{Builder, NamedTempFile, TempDir};

use crate::exit::{Failure, Outcome, bad_input};

/// Refuses a place where there is something.
pub(crate) fn check_free(out: &Path) -> Outcome {
    match fs::symlink_metadata(out) {
        Ok(_) => Err(exists(out)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::Input(anyhow::Error::new(error).context(format!("cannot write {}", out.display())))),
    }
}

fn exists(out: &Path) -> Failure {
    bad_input!("{} exists already, and is not written over", out.display())
}

/// The folder in which `out` is to appear.
pub(super) fn parent(out: &Path) -> &Path {
    out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn builder_name(out: &Path) -> String {
    format!(".{}.", out.file_name().unwrap_or_default().to_string_lossy())
}

/// A file that becomes `out` when it is whole, and is removed when it does not.
pub(super) fn file(out: &Path) -> Outcome<NamedTempFile> {
    let made = Builder::new().prefix(&builder_name(out)).suffix(".part").tempfile_in(parent(out));
    made.map_err(|error| failed(out, 0, error))
}

/// A folder that becomes `out` when it is whole, and is removed when it does not.
pub(super) fn folder(out: &Path) -> Outcome<TempDir> {
    let made = Builder::new().prefix(&builder_name(out)).suffix(".part").tempdir_in(parent(out));
    made.map_err(|error| failed(out, 0, error))
}

/// Gives a file its name.
pub(super) fn keep_file(file: NamedTempFile, out: &Path) -> Outcome {
    open_to_readers(file.path(), out, 0o644)?;
    match file.persist_noclobber(out) {
        Ok(_) => sync(parent(out)),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(exists(out)),
        Err(error) => Err(failed(out, 0, error.error)),
    }
}

/// Gives a folder its name.
pub(super) fn keep_folder(folder: TempDir, out: &Path) -> Outcome {
    check_free(out)?;
    sync(folder.path())?;
    open_to_readers(folder.path(), out, 0o755)?;
    // It may fail when something came there meanwhile; a folder with files in it is not replaced.
    fs::rename(folder.path(), out).map_err(|error| failed(out, 0, error))?;
    let _ = folder.keep();
    sync(parent(out))
}

/// Temporary files are their owner's alone; what is done is as other files are.
fn open_to_readers(path: &Path, out: &Path, mode: u32) -> Outcome {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|error| failed(out, 0, error))
}

fn sync(folder: &Path) -> Outcome {
    let synced = File::open(folder).and_then(|f| f.sync_all());
    Ok(synced.with_context(|| format!("failed to sync folder {}", folder.display()))?)
}

/// A stream into a file that counts, and says what is missing when the disk is full.
pub(super) struct Stream<W: Write> {
    out: BufWriter<W>,
    path: PathBuf,
    total: u64,
    pub(super) written: u64,
}

impl<W: Write> Stream<W> {
    /// A stream of `total` bytes that will be `path`.
    pub(super) fn new(out: W, path: &Path, total: u64) -> Self {
        Self { out: BufWriter::with_capacity(1 << 20, out), path: path.to_owned(), total, written: 0 }
    }

    /// Writes all of `bytes`.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Outcome {
        self.out.write_all(bytes).map_err(|error| failed(&self.path, self.total - self.written.min(self.total), error))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// The file, everything handed to it.
    pub(super) fn finish(self) -> Outcome<W> {
        let (path, left) = (self.path, self.total - self.written.min(self.total));
        self.out.into_inner().map_err(|error| failed(&path, left, error.into_error()))
    }
}

/// Hands what was written to the disk.
pub(super) fn sync_file(file: &File, path: &Path) -> Outcome {
    file.sync_all().map_err(|error| failed(path, 0, error))
}

/// What failed while `out` was written; `needed` more bytes were to come.
fn failed(out: &Path, needed: u64, error: io::Error) -> Failure {
    let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    let what = match full {
        true => format!("no space left for {}: {needed} more bytes are needed, and nothing was left behind", out.display()),
        false => format!("failed to write {}", out.display()),
    };
    Failure::Failed(anyhow::Error::new(error).context(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with room for so many bytes.
    struct Disk(usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let taken = bytes.len().min(self.0);
            self.0 -= taken;
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_says_what_is_missing() {
        let mut stream = Stream::new(Disk(3 << 20), Path::new("m.gguf"), 8 << 20);
        let piece = vec![7; 2 << 20];
        stream.put(&piece).unwrap();
        let said = stream.put(&piece).unwrap_err().to_string();
        assert!(said.contains("no space left for m.gguf: 6291456 more bytes"), "{said}");
        // What is still in the buffer counts too.
        let mut stream = Stream::new(Disk(3), Path::new("m.gguf"), 4);
        stream.put(&[1; 4]).unwrap();
        assert!(stream.finish().is_err_and(|e| e.to_string().contains("no space left")));
        let mut stream = Stream::new(Disk(4), Path::new("m.gguf"), 4);
        stream.put(&[1; 4]).unwrap();
        assert!(stream.finish().is_ok());
    }

    #[test]
    fn nothing_is_written_over_and_nothing_is_left_behind() {
        let place = tempfile::tempdir().unwrap();
        let names = || fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        let out = place.path().join("m.gguf");
        drop(file(&out).unwrap());
        drop(folder(&out).unwrap());
        assert!(names().is_empty());
        keep_file(file(&out).unwrap(), &out).unwrap();
        assert_eq!(names(), ["m.gguf"]);
        assert!(check_free(&out).is_err_and(|e| e.to_string().contains("exists already")));
        // Also when it came while the other was written.
        assert!(keep_file(file(&out).unwrap(), &out).is_err_and(|e| e.to_string().contains("exists already")));
        assert!(keep_folder(folder(&out).unwrap(), &out).is_err());
        assert_eq!(names(), ["m.gguf"]);
        let out = place.path().join("folder");
        keep_folder(folder(&out).unwrap(), &out).unwrap();
        assert!(out.is_dir() && check_free(&out).is_err());
    }
}
