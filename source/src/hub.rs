//! Repositories of a Hugging Face hub: their files by its API, and where each is downloaded.

use std::fmt;

use serde::Deserialize;

use crate::{Credentials, SourceError, digest::Digest, http::Client};

/// Most pages of a listing that are read.
const MAX_PAGES: usize = 50;

/// One file of a repository.
#[derive(Clone, Debug)]
pub(crate) struct HubFile {
    /// Path in the repository.
    pub(crate) path: String,
    /// Digest, for files in large-file storage.
    pub(crate) digest: Option<Digest>,
}

/// A repository at a revision.
#[derive(Clone)]
pub(crate) struct Repository {
    /// Base URL of the hub, without a slash at its end.
    pub(crate) hub: String,
    pub(crate) shown: Option<Credentials>,
    pub(crate) repo: String,
    pub(crate) revision: String,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.hub, self.repo, self.revision)
    }
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
}

impl Repository {
    /// URL of a file's bytes.
    pub(crate) fn url(&self, path: &str) -> String {
        let path: Vec<String> = path.split('/').map(encode).collect();
        format!("{}/{}/resolve/{}/{}", self.hub, self.repo, self.revision, path.join("/"))
    }

    /// The files in `folder` (empty: the top), without those of its subfolders.
    pub(crate) fn list(&self, client: &Client, folder: &str) -> Result<Vec<HubFile>, SourceError> {
        let base = format!("{}/api/models/{}/tree/{}", self.hub, self.repo, self.revision);
        let mut url =
            if folder.is_empty() { base } else { format!("{base}/{}", folder.split('/').map(encode).collect::<Vec<_>>().join("/")) };
        let mut files = Vec::new();
        for _ in 0..MAX_PAGES {
            let (bytes, next) = client.small(&url, self.shown.as_ref())?;
            let entries: Vec<Entry> = serde_json::from_slice(&bytes).map_err(|e| SourceError::Protocol {
                place: url.clone(),
                expected: "a JSON list of files".to_owned(),
                got: e.to_string(),
            })?;
            for entry in entries.into_iter().filter(|e| e.kind == "file") {
                let digest = entry.lfs.and_then(|l| format!("sha256:{}", l.oid.trim_start_matches("sha256:")).parse().ok());
                files.push(HubFile { path: entry.path, digest });
            }
            // Credentials must not follow a link to another host.
            let own = format!("{}/", self.hub);
            match next {
                None => return Ok(files),
                Some(next) if next.starts_with(&own) => url = next,
                Some(got) => {
                    let expected = format!("a next page under {own}");
                    return Err(SourceError::Protocol { place: url, expected, got });
                }
            }
        }
        let (expected, got) = (format!("at most {MAX_PAGES} pages of files"), "more".to_owned());
        Err(SourceError::Protocol { place: url, expected, got })
    }
}

/// Percent-encodes what may not stand in a path segment.
fn encode(segment: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
    segment.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
