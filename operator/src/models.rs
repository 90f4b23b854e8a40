//! Headers of models, read from their sources and kept for as long as this process runs.

use std::{
    collections::HashMap,
    error::Error,
    sync::{Arc, Mutex, PoisonError},
};

use plan::{
    adapter::{AdapterHeader, AdapterSource},
    model::ModelHeader,
};
use source::{Credentials, Keep, PUBLIC_HUB, Source, SourceError, SourceOptions};

/// Most headers kept; beyond that all are read again.
const KEPT: usize = 1024;
/// Tries of a request to a source, beyond the first: the reconcile itself is repeated with growing pauses.
const RETRIES: u32 = 1;

/// What is wrong with a source, kept small: it goes into a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unresolved {
    /// From the closed list of `source`.
    pub reason: &'static str,
    /// The chain of errors.
    pub message: String,
}

/// An adapter that a spec names, as far as it could be read.
#[derive(Clone, Debug)]
pub struct Opened {
    /// What requests call it.
    pub name: String,
    /// Where it is.
    pub uri: String,
    /// What it is pinned to.
    pub digest: Option<String>,
    /// Its header.
    pub header: Result<Arc<AdapterHeader>, Unresolved>,
}

impl Opened {
    /// What workers are told, or why nothing.
    pub fn source(&self) -> Result<AdapterSource, String> {
        let header = self.header.as_ref().map_err(|unresolved| unresolved.message.clone())?;
        Ok(AdapterSource::new(&self.uri, self.digest.as_deref(), header))
    }
}

/// A source, and what it is shown.
type Key = (String, Option<Credentials>);

/// Reads and keeps headers.
#[derive(Debug)]
pub struct Models {
    hub: String,
    /// By source, and by what it was shown: what one may read is not for others.
    kept: Mutex<HashMap<Key, Arc<ModelHeader>>>,
    /// Of adapters, by their sources and those of their models.
    adapters: Mutex<HashMap<(String, String), Arc<AdapterHeader>>>,
}

impl Models {
    /// With `hub` as the base of `hf://` sources.
    pub fn new(hub: Option<String>) -> Self {
        Self { hub: hub.unwrap_or_else(|| PUBLIC_HUB.to_owned()), kept: Mutex::default(), adapters: Mutex::default() }
    }

    /// The header of the model at `uri`, which is a remote source and is shown `credentials`; its weights are not read.
    ///
    /// # Errors
    /// When it cannot be fetched, or is not a model's.
    pub async fn header(&self, uri: &str, credentials: Option<Credentials>) -> Result<Arc<ModelHeader>, Unresolved> {
        let key = (uri.to_owned(), credentials);
        if let Some(header) = self.lock().get(&key) {
            return Ok(header.clone());
        }
        let (hub, credentials) = (self.hub.clone(), key.1.clone());
        let options = SourceOptions { hub, credentials, keep: Keep::Nothing, retries: RETRIES, ..SourceOptions::default() };
        let name = uri.to_owned();
        let read = tokio::task::spawn_blocking(move || Source::open(&name, options)?.header()).await;
        let header = match read {
            Ok(Ok(header)) => Arc::new(header),
            Ok(Err(error)) => return Err(unresolved(&error)),
            Err(error) => return Err(Unresolved { reason: "DownloadFailed", message: format!("reading the header was cut off: {error}") }),
        };
        let mut kept = self.lock();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(key, header.clone());
        Ok(header)
    }

    /// The header of the adapter at `uri`, a remote source, for the model of `header` at `model`; its weights are not read.
    ///
    /// # Errors
    /// When it cannot be fetched, is no adapter, or not for this model.
    pub async fn adapter(&self, uri: &str, (model, header): (&str, &Arc<ModelHeader>)) -> Result<Arc<AdapterHeader>, Unresolved> {
        let key = (uri.to_owned(), model.to_owned());
        if let Some(known) = self.lock_adapters().get(&key) {
            return Ok(known.clone());
        }
        let options = SourceOptions { hub: self.hub.clone(), keep: Keep::Nothing, retries: RETRIES, ..SourceOptions::default() };
        let (name, header) = (uri.to_owned(), header.clone());
        let read = tokio::task::spawn_blocking(move || Source::open_adapter(&name, options)?.adapter_header(&header.config)).await;
        let read = match read {
            Ok(Ok(read)) => Arc::new(read),
            Ok(Err(error)) => return Err(unresolved(&error)),
            Err(error) => return Err(Unresolved { reason: "DownloadFailed", message: format!("reading the header was cut off: {error}") }),
        };
        let mut kept = self.lock_adapters();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(key, read.clone());
        Ok(read)
    }

    fn lock_adapters(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), Arc<AdapterHeader>>> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Knows the header of an adapter without reading it.
    #[cfg(test)]
    pub(crate) fn know_adapter(&self, uri: &str, model: &str, header: Arc<AdapterHeader>) {
        self.lock_adapters().insert((uri.to_owned(), model.to_owned()), header);
    }

    /// Whether the header of the model at `uri` was read, without credentials.
    pub fn knows(&self, uri: &str) -> bool {
        self.lock().contains_key(&(uri.to_owned(), None))
    }

    /// Knows the header of a model without reading it.
    #[cfg(test)]
    pub(crate) fn know(&self, uri: &str, header: Arc<ModelHeader>) {
        self.lock().insert((uri.to_owned(), None), header);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Arc<ModelHeader>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What keeps a source from being read.
pub(crate) fn unresolved(error: &SourceError) -> Unresolved {
    Unresolved { reason: error.reason(), message: chain(error) }
}

/// An error and its sources, on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Errors of the Kubernetes client print their sources themselves.
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}
