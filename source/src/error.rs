//! What goes wrong on the way to a model's bytes.

use std::{io, path::PathBuf};

use plan::header::HeaderError;

/// A source that cannot be opened or read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SourceError {
    #[error(
        "{uri} is not a source: {problem}; expected a path, file:, http://, https://, hf://org/repo@revision/file, s3://bucket/key, gs://bucket/key or oci://registry/repository:tag"
    )]
    Uri { uri: String, problem: String },
    #[error("{place} does not exist")]
    NotFound { place: String },
    #[error("access to {place} was refused with status {status}; credentials may be missing, wrong, or lack the right")]
    Unauthorized { place: String, status: u16 },
    #[error("{place} answered with status {status}")]
    Status { place: String, status: u16 },
    #[error("failed to reach {place} ({attempts} attempts)")]
    Unreachable { place: String, attempts: u32, source: io::Error },
    #[error("{place} sent {got}, expected {expected}")]
    Protocol { place: String, expected: String, got: String },
    #[error("{place} changed while it was read: its mark was {before} and is {now}")]
    Changed { place: String, before: String, now: String },
    #[error("{folder} holds no model: {problem}")]
    NoModel { folder: String, problem: String },
    #[error("failed to {action} {path}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("no space left for {path}: {needed} more bytes are needed")]
    DiskFull { path: PathBuf, needed: u64, source: io::Error },
    #[error("{place} has digest sha256:{got}, expected sha256:{expected}")]
    DigestMismatch { place: String, expected: String, got: String },
    #[error("digest {got:?} is not of the form sha256:<64 hexadecimal digits>")]
    Digest { got: String },
    #[error("{place} needs a cache to be downloaded to, and none is set")]
    NoCache { place: String },
    #[error("the credentials cannot be used: {problem}")]
    Credentials { problem: String },
    #[error("fetching from {place} was stopped")]
    Stopped { place: String },
    #[error("bytes {begin}..{end} of {name} were asked for, the file has {bytes}")]
    Range { name: String, begin: u64, end: u64, bytes: u64 },
    #[error("weight file {index} was asked for, the source has {files}")]
    FileIndex { index: usize, files: usize },
    #[error("{name} at byte {offset} of {place}: {problem}")]
    Packed { name: String, place: String, offset: u64, problem: String },
    #[error("the model in {place} cannot be used")]
    Header { place: String, source: Box<HeaderError> },
    #[error("the adapter in {place} cannot be used")]
    Adapter { place: String, source: Box<HeaderError> },
}

impl SourceError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Uri { .. } | Self::Digest { .. } => "InvalidSpec",
            Self::NotFound { .. } | Self::NoModel { .. } => "NotFound",
            Self::Unauthorized { .. } | Self::Credentials { .. } => "Unauthorized",
            Self::Unreachable { .. } | Self::Status { .. } => "SourceUnreachable",
            Self::Protocol { .. }
            | Self::Changed { .. }
            | Self::File { .. }
            | Self::Stopped { .. }
            | Self::Range { .. }
            | Self::FileIndex { .. }
            | Self::NoCache { .. } => "DownloadFailed",
            Self::DiskFull { .. } => "InsufficientDisk",
            Self::DigestMismatch { .. } => "DigestMismatch",
            Self::Packed { .. } => "feature_unsupported",
            Self::Header { source, .. } | Self::Adapter { source, .. } => source.reason(),
        }
    }

    /// Wraps an error of the file system.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        if source.kind() == io::ErrorKind::NotFound {
            Self::NotFound { place: path.display().to_string() }
        } else {
            Self::File { action, path, source }
        }
    }
}
