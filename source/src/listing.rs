//! Stores that list their files: hubs, buckets, registries.

use std::fmt;

use crate::{SourceError, admission::Admission, digest::Digest, http::Client};

/// Most pages of a listing that are read.
pub(crate) const MAX_PAGES: usize = 50;

/// One file of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its name, without its folder's.
    pub(crate) name: String,
    pub(crate) url: String,
    /// Its digest, where the store says it.
    pub(crate) digest: Option<Digest>,
}

/// Where files are listed.
pub(crate) trait Store: fmt::Debug {
    /// The files of `folder` (empty: the top), without those of its subfolders.
    fn list(&self, client: &Client, folder: &str) -> Result<Vec<Listed>, SourceError>;

    /// URL of the file at `path`, which has this digest.
    fn url(&self, path: &str, digest: &Digest) -> String;

    /// What messages call `folder`; ends with a slash.
    fn place(&self, folder: &str) -> String;

    fn admission(&self) -> &Admission;
}

/// What paths of the files of `folder` begin with.
pub(crate) fn below(folder: &str) -> String {
    if folder.is_empty() { String::new() } else { format!("{folder}/") }
}

/// The error of a listing that does not end.
pub(crate) fn endless(place: String) -> SourceError {
    SourceError::Protocol { place, expected: format!("at most {MAX_PAGES} pages of files"), got: "more".to_owned() }
}

/// Percent-encodes what may not stand in a path.
pub(crate) fn encode(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~/".contains(&b);
    path.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
