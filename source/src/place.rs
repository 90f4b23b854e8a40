//! One opened file, on disk or on a server.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{SourceError, http::Remote};

/// A file that can be read by ranges.
#[derive(Debug)]
pub(crate) enum Place {
    Local { file: File, path: PathBuf, bytes: u64 },
    Remote { remote: Remote, bytes: u64 },
}

impl Place {
    pub(crate) fn local(path: &Path) -> Result<Self, SourceError> {
        // Looked at first: opening a pipe would wait for its other end.
        let kind = std::fs::metadata(path).map_err(|e| SourceError::file("open", path, e))?;
        if !kind.is_file() {
            return Err(SourceError::File { action: "open", path: path.to_owned(), source: io::Error::other("it is not a file") });
        }
        let file = File::open(path).map_err(|e| SourceError::file("open", path, e))?;
        let meta = file.metadata().map_err(|e| SourceError::file("stat", path, e))?;
        Ok(Self::Local { file, path: path.to_owned(), bytes: meta.len() })
    }

    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Local { bytes, .. } | Self::Remote { bytes, .. } => *bytes,
        }
    }

    /// Where it is, for messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Local { path, .. } => path.display().to_string(),
            Self::Remote { remote, .. } => remote.place(),
        }
    }

    /// The file's path when it is on disk.
    pub(crate) fn path(&self) -> Option<&Path> {
        if let Self::Local { path, .. } = self { Some(path) } else { None }
    }

    pub(crate) fn read(&self, range: &Range<u64>, into: &mut [u8]) -> Result<(), SourceError> {
        match self {
            Self::Local { file, path, .. } => file.read_exact_at(into, range.start).map_err(|e| SourceError::file("read", path, e)),
            Self::Remote { remote, .. } => remote.read(range, into),
        }
    }

    /// The file as a stream from its beginning.
    pub(crate) fn stream(&self) -> Result<Box<dyn Read + '_>, SourceError> {
        match self {
            Self::Local { file, .. } => Ok(Box::new(BufReader::with_capacity(1 << 16, At { file, offset: 0 }))),
            Self::Remote { remote, .. } => Ok(Box::new(BufReader::with_capacity(1 << 16, remote.open(0)?.1))),
        }
    }
}

/// Reads a file without moving its cursor, which other threads share.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(into, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}
