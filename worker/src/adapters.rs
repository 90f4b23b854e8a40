//! Adapters of this worker: loaded beside the engine's thread, and kept as long as sessions have them in a slot.

use std::{
    collections::{HashMap, HashSet},
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use engine::{Adapter, LoadShardError, WeightReader};
use plan::{adapter::AdapterSource, model::ModelConfig, shard::Shard};
use proto::worker::{AdapterReply, session_reply::Message};
use source::{Source, SourceError, SourceOptions};
use tracing::{info, warn};

use crate::{failure::chain, session::Live, state::Worker};

/// An adapter that cannot be loaded. The others, and the model, are not concerned.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// It cannot be opened, or is not for this model.
    #[error("failed to open the adapter at {uri}")]
    Source {
        /// Where it was looked for.
        uri: String,
        /// The source's error.
        #[source]
        source: SourceError,
    },
    /// It is not what the sender knows.
    #[error("the adapter at {uri} has numerics id {got}, expected {expected}: it is not the one that was planned")]
    Other {
        /// Where it was looked for.
        uri: String,
        /// Of what is there.
        got: String,
        /// Of what was planned.
        expected: String,
    },
    /// This rank's part cannot be loaded.
    #[error("failed to load the adapter at {uri}")]
    Load {
        /// Where it was looked for.
        uri: String,
        /// The engine's error.
        #[source]
        source: LoadShardError,
    },
}

/// Reads an adapter's weights.
struct Reader<'a>(&'a Source);

impl WeightReader for Reader<'_> {
    fn read(&self, file: usize, range: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        self.0.read(file, range, into).map_err(io::Error::other)
    }

    fn is_at_hand(&self, file: usize, range: &Range<u64>) -> bool {
        self.0.is_at_hand(file, range)
    }
}

/// Opens an adapter for a model of shape `config` and loads the part of the worker of `shard`. Blocks.
///
/// # Errors
/// When it cannot be opened, is another one than `adapter` says, or does not fit.
pub fn load_adapter(config: &ModelConfig, shard: &Shard, adapter: &AdapterSource, options: SourceOptions) -> Result<Adapter, AdapterError> {
    let uri = || adapter.uri.clone();
    // What lets this worker in at the model's source is not for others.
    let options = SourceOptions { digest: adapter.digest.clone(), credentials: None, ..options };
    let opened =
        Source::open_adapter(&adapter.uri, options).and_then(|source| source.adapter_header(config).map(|header| (source, header)));
    let (source, header) = opened.map_err(|source| AdapterError::Source { uri: uri(), source })?;
    let got = header.numerics(adapter.identity());
    if got != adapter.numerics {
        return Err(AdapterError::Other { uri: uri(), got, expected: adapter.numerics.clone() });
    }
    Adapter::load(config, shard, &header.of(config, shard), &Reader(&source)).map_err(|source| AdapterError::Load { uri: uri(), source })
}

/// The adapters in memory, by numerics id.
#[derive(Debug, Default)]
pub(crate) struct Adapters(Mutex<HashMap<String, Arc<Adapter>>>);

impl Adapters {
    /// The adapter, loaded unless it is in memory. Blocks.
    fn get(&self, worker: &Worker, adapter: &AdapterSource) -> Result<Arc<Adapter>, AdapterError> {
        if let Some(known) = self.lock().get(&adapter.numerics) {
            return Ok(known.clone());
        }
        let begun = Instant::now();
        let loaded = Arc::new(load_adapter(&worker.spec.config, &worker.spec.shard, adapter, worker.source.clone())?);
        let (bytes, elapsed_ms) = (loaded.bytes(), begun.elapsed().as_millis() as u64);
        info!(uri = adapter.uri, numerics = adapter.numerics, bytes, elapsed_ms, "adapter loaded");
        self.lock().insert(adapter.numerics.clone(), loaded.clone());
        Ok(loaded)
    }

    /// Lets go of all but `kept`.
    pub(crate) fn keep(&self, kept: &HashSet<String>) {
        self.lock().retain(|numerics, _| kept.contains(numerics));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Adapter>>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What becomes of a slot, in the order of the steps beside it.
#[derive(Debug)]
pub(crate) enum Change {
    Bind { slot: u32, numerics: String, adapter: Arc<Adapter> },
    Unbind { slot: u32 },
}

/// Loads an adapter for a session, which is told when it is in its slot, or why it is not.
pub(crate) async fn bring(worker: Arc<Worker>, live: Arc<Live>, slot: u32, adapter: AdapterSource) {
    let (loader, numerics, uri) = (worker.clone(), adapter.numerics.clone(), adapter.uri.clone());
    let loaded = tokio::task::spawn_blocking(move || loader.adapters.get(&loader, &adapter)).await;
    let failure = match loaded {
        Ok(Ok(adapter)) => return live.inbox.push_change(Change::Bind { slot, numerics, adapter }),
        Ok(Err(error)) => chain(&error),
        Err(broken) => broken.to_string(),
    };
    warn!(slot, uri, failure, "an adapter is not loaded");
    live.say(Message::Adapter(AdapterReply { slot, failure, bytes: 0 })).await;
}
