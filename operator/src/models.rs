//! Headers of models, read from their sources and kept for as long as this process runs.

use std::{
    collections::HashMap,
    error::Error,
    sync::{Arc, Mutex, PoisonError},
};

use plan::model::ModelHeader;
use source::{PUBLIC_HUB, Source, SourceError, SourceOptions};

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

/// Reads and keeps headers.
#[derive(Debug)]
pub struct Models {
    hub: String,
    kept: Mutex<HashMap<String, Arc<ModelHeader>>>,
}

impl Models {
    /// With `hub` as the base of `hf://` sources.
    pub fn new(hub: Option<String>) -> Self {
        Self { hub: hub.unwrap_or_else(|| PUBLIC_HUB.to_owned()), kept: Mutex::default() }
    }

    /// The header of the model at `uri`, which is a remote source; its weights are not read.
    ///
    /// # Errors
    /// When it cannot be fetched, or is not a model's.
    pub async fn header(&self, uri: &str) -> Result<Arc<ModelHeader>, Unresolved> {
        if let Some(header) = self.lock().get(uri) {
            return Ok(header.clone());
        }
        let options = SourceOptions { hub: self.hub.clone(), whole: false, retries: RETRIES, ..SourceOptions::default() };
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
        kept.insert(uri.to_owned(), header.clone());
        Ok(header)
    }

    /// Knows the header of a model without reading it.
    #[cfg(test)]
    pub(crate) fn know(&self, uri: &str, header: Arc<ModelHeader>) {
        self.lock().insert(uri.to_owned(), header);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<ModelHeader>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unresolved(error: &SourceError) -> Unresolved {
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
