//! One opened file, on disk or on a server.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{SourceError, http::Remote, parts::Parts};

/// Bytes of one request where a server's file is read from its beginning to an end that is not known yet.
const STREAMED: usize = 1 << 20;

/// A file that can be read by ranges.
#[derive(Debug)]
pub(crate) enum Place {
    Local {
        file: File,
        path: PathBuf,
        bytes: u64,
    },
    Remote {
        remote: Remote,
        bytes: u64,
    },
    /// On a server, with what was read of it on disk.
    Parts(Box<Parts>),
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
            Self::Parts(parts) => parts.bytes(),
        }
    }

    /// Where it is, for messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Local { path, .. } => path.display().to_string(),
            Self::Remote { remote, .. } => remote.place(),
            Self::Parts(parts) => parts.place(),
        }
    }

    /// The file's path when it is on disk.
    pub(crate) fn path(&self) -> Option<&Path> {
        if let Self::Local { path, .. } = self { Some(path) } else { None }
    }

    /// Whether the range lies on disk.
    pub(crate) fn is_at_hand(&self, range: &Range<u64>) -> bool {
        match self {
            Self::Local { .. } => true,
            Self::Remote { .. } => false,
            Self::Parts(parts) => parts.has(range),
        }
    }

    pub(crate) fn read(&self, range: &Range<u64>, into: &mut [u8]) -> Result<(), SourceError> {
        match self {
            Self::Local { file, path, .. } => file.read_exact_at(into, range.start).map_err(|e| SourceError::file("read", path, e)),
            Self::Remote { remote, .. } => remote.read(range, into),
            Self::Parts(parts) => parts.read(range, into),
        }
    }

    /// The file as a stream from its beginning.
    pub(crate) fn stream(&self) -> Result<Box<dyn Read + '_>, SourceError> {
        match self {
            Self::Local { file, .. } => {
                let at = |offset: u64, into: &mut [u8]| file.read_at(into, offset);
                Ok(Box::new(BufReader::with_capacity(1 << 16, At { read: at, offset: 0 })))
            }
            Self::Remote { remote, .. } => Ok(Box::new(BufReader::with_capacity(1 << 16, remote.open(0)?.1))),
            Self::Parts(parts) => {
                let at = |offset: u64, into: &mut [u8]| {
                    let n = (into.len() as u64).min(parts.bytes().saturating_sub(offset));
                    parts.read(&(offset..offset + n), &mut into[..n as usize]).map_err(io::Error::other)?;
                    Ok(n as usize)
                };
                Ok(Box::new(BufReader::with_capacity(STREAMED, At { read: at, offset: 0 })))
            }
        }
    }
}

/// Reads a file without moving its cursor, which other threads share.
struct At<F> {
    read: F,
    offset: u64,
}

impl<F: Fn(u64, &mut [u8]) -> io::Result<usize>> Read for At<F> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = (self.read)(self.offset, into)?;
        self.offset += n as u64;
        Ok(n)
    }
}
