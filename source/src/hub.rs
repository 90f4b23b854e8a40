//! Repositories of a Hugging Face hub: their files by its API, and where each is downloaded.

use serde::Deserialize;

use crate::{
    SourceError,
    admission::Admission,
    digest::Digest,
    http::Client,
    listing::{Listed, MAX_PAGES, Store, below, encode, endless},
};

/// A repository at a revision.
#[derive(Debug)]
pub(crate) struct Repository {
    /// Base URL of the hub, without a slash at its end.
    pub(crate) hub: String,
    pub(crate) admission: Admission,
    pub(crate) repo: String,
    pub(crate) revision: String,
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
    fn resolve(&self, path: &str) -> String {
        format!("{}/{}/resolve/{}/{}", self.hub, self.repo, self.revision, encode(path))
    }
}

impl Store for Repository {
    fn list(&self, client: &Client, folder: &str) -> Result<Vec<Listed>, SourceError> {
        let base = format!("{}/api/models/{}/tree/{}", self.hub, self.repo, self.revision);
        let mut url = if folder.is_empty() { base } else { format!("{base}/{}", encode(folder)) };
        let mut files = Vec::new();
        for _ in 0..MAX_PAGES {
            let (bytes, next) = client.small(&url, &self.admission)?;
            let entries: Vec<Entry> = serde_json::from_slice(&bytes).map_err(|e| SourceError::Protocol {
                place: url.clone(),
                expected: "a JSON list of files".to_owned(),
                got: e.to_string(),
            })?;
            for entry in entries.into_iter().filter(|e| e.kind == "file") {
                let digest = entry.lfs.and_then(|l| format!("sha256:{}", l.oid.trim_start_matches("sha256:")).parse().ok());
                let name = entry.path.rsplit('/').next().unwrap_or(&entry.path).to_owned();
                files.push(Listed { url: self.resolve(&entry.path), name, digest });
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
        Err(endless(url))
    }

    fn url(&self, path: &str, _: &Digest) -> String {
        self.resolve(path)
    }

    fn place(&self, folder: &str) -> String {
        self.resolve(&below(folder))
    }

    fn admission(&self) -> &Admission {
        &self.admission
    }
}
