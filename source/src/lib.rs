//! Where model files come from: range reads over files, HTTP, the Hugging Face hub, object stores and registries, and a content-addressed cache.
//!
//! Everything here blocks; asynchronous callers use a thread of their own.

mod admission;
mod beside;
mod bucket;
mod cache;
mod credentials;
mod digest;
mod error;
mod http;
mod hub;
mod inspection;
mod layout;
mod listing;
mod locate;
mod logins;
mod model;
mod open;
mod packed;
mod parts;
mod place;
mod ranges;
mod registry;
mod split;
#[cfg(test)]
mod tests;

pub use cache::{Cache, default_cache_root};
pub use credentials::{AccessKeys, Credentials};
pub use digest::Digest;
pub use error::SourceError;
pub use inspection::{Inspection, InspectionError};
pub use model::{RawHeader, Source};

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

/// Hub whose repositories `hf://` names, unless told otherwise.
pub const PUBLIC_HUB: &str = "https://huggingface.co";

/// How a source is fetched.
#[derive(Clone)]
pub struct SourceOptions {
    /// Root of the cache; `None` keeps nothing, so pinned remote files cannot be opened.
    pub cache: Option<PathBuf>,
    /// `sha256:<hex>` that the model's single weight file must have.
    pub digest: Option<String>,
    /// Base URL of the hub that `hf://` names.
    pub hub: String,
    /// Bearer token for the hub, where `credentials` are not given.
    pub token: Option<String>,
    /// How `s3://` is reached, and what is shown where `credentials` are not given.
    pub s3: StoreOptions,
    /// What the source is shown, be it a hub or another server.
    pub credentials: Option<Credentials>,
    /// What is kept of remote weight files.
    pub keep: Keep,
    /// Longest silence of a server.
    pub timeout: Duration,
    /// How often a request is tried again after a server error or a lost connection.
    pub retries: u32,
    /// Wait before the first retry; doubles with each.
    pub backoff: Duration,
    /// Told of a download's progress.
    pub progress: Option<Arc<ProgressFn>>,
}

/// How object stores of Amazon's protocol are reached; what keys name themselves goes first.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// Base URL of the store; Amazon's where there is none.
    pub endpoint: Option<String>,
    /// Region of the bucket.
    pub region: Option<String>,
    /// What signs; without, requests are not signed.
    pub keys: Option<AccessKeys>,
}

/// What the cache keeps of weight files on servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Files whose digest is known, whole: the digest is checked. Of others, only what is asked for is read, and not kept.
    Whole,
    /// What is asked for. Whole, all the same, where the server sends no ranges, or does not say that a file has the digest that is pinned.
    Parts,
    /// Nothing, unless the server sends no ranges or a digest is pinned.
    Nothing,
}

/// Called with a download's progress, about once per megabyte.
pub type ProgressFn = dyn Fn(&Progress<'_>) + Send + Sync;

/// How far the download of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file.
    pub name: &'a str,
    /// Bytes in the cache so far.
    pub done: u64,
    /// Bytes of the file, when the server says.
    pub total: Option<u64>,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            cache: None,
            digest: None,
            hub: PUBLIC_HUB.to_owned(),
            token: None,
            s3: StoreOptions::default(),
            credentials: None,
            keep: Keep::Whole,
            timeout: Duration::from_secs(30),
            retries: 4,
            backoff: Duration::from_millis(250),
            progress: None,
        }
    }
}

impl fmt::Debug for SourceOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceOptions")
            .field("cache", &self.cache)
            .field("digest", &self.digest)
            .field("hub", &self.hub)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("s3", &self.s3)
            .field("credentials", &self.credentials)
            .field("keep", &self.keep)
            .finish_non_exhaustive()
    }
}
