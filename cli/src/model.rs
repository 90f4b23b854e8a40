//! A model given on the command line: its source, opened, and its header, read.

use std::{
    collections::HashMap,
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use engine::WeightReader;
use indicatif::ProgressBar;
use plan::{
    adapter::{AdapterHeader, AdapterSource},
    card::ModelCard,
    dtype::DType,
    manifest::AdapterSpec,
    model::ModelHeader,
};
use source::{AccessKeys, Credentials, PUBLIC_HUB, Source, SourceError, SourceOptions};

use crate::{
    args::{CacheArgs, Global},
    exit::{BadInput, Failure, Outcome},
    output::{self, Unit},
};

/// A model whose header was read.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// What the user called it.
    pub(crate) name: String,
    /// Source that other processes can open too.
    pub(crate) uri: String,
    /// `sha256:<hex>` of its one weight file, when pinned.
    pub(crate) digest: Option<String>,
    /// What its source is shown.
    pub(crate) credentials: Option<Credentials>,
    pub(crate) source: Arc<Source>,
    pub(crate) header: Arc<ModelHeader>,
}

impl Model {
    /// Opens the model at `uri`: a folder, a file or a source.
    ///
    /// # Errors
    /// Bad input when there is no model, or it is damaged or of an unknown kind.
    pub(crate) async fn open(global: &Global, uri: &str) -> Outcome<Self> {
        Self::pinned(global, uri, None, None).await
    }

    /// Opens the model at `uri`, whose one weight file has `digest` if that is given, and whose source is shown `credentials`.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub(crate) async fn pinned(global: &Global, uri: &str, digest: Option<&str>, credentials: Option<Credentials>) -> Outcome<Self> {
        let own = source_options(global)?;
        let credentials = credentials.or(own.credentials.clone());
        Self::with(global, uri, digest, SourceOptions { credentials, ..own }).await
    }

    /// Opens the model at `uri`, which stands beside another: what lets that one's source be read is not for it.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub(crate) async fn beside(global: &Global, uri: &str, digest: Option<&str>) -> Outcome<Self> {
        Self::with(global, uri, digest, SourceOptions { credentials: None, ..source_options(global)? }).await
    }

    async fn with(global: &Global, uri: &str, digest: Option<&str>, options: SourceOptions) -> Outcome<Self> {
        let options = SourceOptions { digest: digest.map(str::to_owned), progress: progress(global.quiet), ..options };
        let credentials = options.credentials.clone();
        let (name, digest) = (uri.to_owned(), digest.map(str::to_owned));
        let opened = tokio::task::spawn_blocking(move || {
            let source = Source::open(&name, options)?;
            let header = source.header()?;
            Ok((name, source, header))
        });
        let (name, source, header) = opened.await.context("opening the model was cut off")?.map_err(failure)?;
        let uri = absolute(&name)?;
        Ok(Self { name, uri, digest, credentials, source: Arc::new(source), header: Arc::new(header) })
    }

    /// Opens a low-rank adapter for this model.
    ///
    /// # Errors
    /// Bad input when there is no adapter, it is damaged or of an unknown kind, or not for this model.
    pub(crate) async fn adapter(&self, global: &Global, spec: &AdapterSpec) -> Outcome<Adapter> {
        // What lets the model's source be read is not for others.
        let own = SourceOptions { credentials: None, ..source_options(global)? };
        let options = SourceOptions { digest: spec.digest.clone(), progress: progress(global.quiet), ..own };
        let (uri, header) = (spec.uri.clone(), self.header.clone());
        let opened = tokio::task::spawn_blocking(move || Source::open_adapter(&uri, options)?.adapter_header(&header.config));
        let header = opened.await.context("opening the adapter was cut off")?.map_err(failure)?;
        let source = AdapterSource::new(&absolute(&spec.uri)?, spec.digest.as_deref(), &header);
        Ok(Adapter { name: spec.name.clone(), source, header: Arc::new(header) })
    }

    /// The same model with its floats converted to `to` as they are loaded.
    pub(crate) fn loaded_as(mut self, to: Option<DType>) -> Self {
        if let Some(to) = to {
            self.header = Arc::new(self.header.loaded_as(to));
        }
        self
    }

    /// Refuses an encoder for `purpose`, which needs tokens.
    ///
    /// # Errors
    /// Bad input, if it is one.
    pub(crate) fn must_generate(&self, purpose: &str) -> Outcome {
        match self.header.config.encoder {
            None => Ok(()),
            Some(_) => {
                Err(crate::exit::bad_input!("{} is an encoder, which draws no tokens; {purpose} needs a model that does", self.name))
            }
        }
    }

    /// The files that tell how its text is made.
    ///
    /// # Errors
    /// Bad input when they cannot be read.
    pub(crate) async fn card(&self) -> Outcome<Arc<ModelCard>> {
        let source = self.source.clone();
        let card = tokio::task::spawn_blocking(move || source.card()).await.context("reading the model was cut off")?;
        card.map(Arc::new).map_err(failure)
    }

    /// Reads weights for an engine.
    pub(crate) fn reader(&self) -> Reader {
        Reader(self.source.clone())
    }
}

/// A low-rank adapter whose header was read.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    /// What requests call it.
    pub(crate) name: String,
    /// Source that other processes can open too.
    pub(crate) source: AdapterSource,
    pub(crate) header: Arc<AdapterHeader>,
}

/// Where files come from and are kept.
///
/// # Errors
/// Bad input when what sources are to be shown cannot stand in a header.
pub(crate) fn source_options(global: &Global) -> Outcome<SourceOptions> {
    let cache = &global.cache;
    Ok(SourceOptions {
        cache: cache.folder(),
        hub: cache.hf_endpoint.clone().unwrap_or_else(|| PUBLIC_HUB.to_owned()),
        token: cache.hf_token.clone(),
        credentials: credentials(cache)?,
        s3: cache.s3.options(),
        ..SourceOptions::default()
    })
}

/// What this process was told to show to its model's source.
fn credentials(cache: &CacheArgs) -> Outcome<Option<Credentials>> {
    if let Some(keys) = &cache.s3.access_keys {
        let keys: AccessKeys = serde_json::from_str(keys).context("SKEIN_ACCESS_KEYS cannot be read").bad_input()?;
        return Ok(Some(keys.into()));
    }
    cache.authorization.as_deref().map(Credentials::authorization).transpose().map_err(failure)
}

/// Whether the user's input is to blame, or the world around.
pub(crate) fn is_input(error: &SourceError) -> bool {
    let world = matches!(
        error,
        SourceError::Unreachable { .. }
            | SourceError::Status { .. }
            | SourceError::Protocol { .. }
            | SourceError::DiskFull { .. }
            | SourceError::NoCache { .. }
    );
    !world
}

fn failure(error: SourceError) -> Failure {
    if is_input(&error) { Failure::Input(error.into()) } else { Failure::Failed(error.into()) }
}

/// The source in a form that does not depend on this process's folder.
fn absolute(uri: &str) -> Outcome<String> {
    if uri.contains("://") {
        return Ok(uri.to_owned());
    }
    let path = uri.strip_prefix("file:").unwrap_or(uri);
    let path = std::path::absolute(path).with_context(|| format!("failed to find the place of {path}"))?;
    path.into_os_string().into_string().map_err(|path| crate::exit::bad_input!("the path {} is not UTF-8", path.display()))
}

/// Shows downloads, a bar for each file.
fn progress(quiet: bool) -> Option<Arc<source::ProgressFn>> {
    let bars: Mutex<HashMap<String, ProgressBar>> = Mutex::default();
    Some(Arc::new(move |progress| {
        let mut bars = bars.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = bars.entry(progress.name.to_owned()).or_insert_with(|| output::bar(quiet, "Downloading", 0, Unit::Bytes));
        if let Some(total) = progress.total {
            bar.set_length(total);
        }
        bar.set_position(progress.done);
        if progress.total == Some(progress.done) {
            bar.finish_and_clear();
        }
    }))
}

/// Weight files, as an engine reads them.
#[derive(Clone, Debug)]
pub(crate) struct Reader(Arc<Source>);

impl WeightReader for Reader {
    fn read(&self, file: usize, range: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        self.0.read(file, range, into).map_err(io::Error::other)
    }

    fn is_at_hand(&self, file: usize, range: &Range<u64>) -> bool {
        self.0.is_at_hand(file, range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_absolute_and_sources_stay() {
        assert_eq!(absolute("hf://a/b").unwrap(), "hf://a/b");
        assert_eq!(absolute("/a/b").unwrap(), "/a/b");
        assert!(absolute("b").unwrap().ends_with("/b") && absolute("b").unwrap().starts_with('/'));
        assert!(absolute("file:b").unwrap().starts_with('/'));
    }
}
