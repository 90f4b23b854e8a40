//! Loads the worker's shard.

use std::{io, ops::Range, sync::Arc, time::Instant};

use engine::{Engine, EngineOptions, WeightReader};
use kernels::Isa;
use source::{Keep, ProgressFn, Source, SourceError, SourceOptions};
use tracing::info;

use super::Jobs;
use crate::{error::WorkerError, state::Worker};

/// Reads weights until the worker is stopped.
struct Reader<'a> {
    source: &'a Source,
    jobs: &'a Jobs,
}

impl WeightReader for Reader<'_> {
    fn read(&self, file: usize, range: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        if self.jobs.is_closed() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "the worker stops"));
        }
        self.source.read(file, range, into).map_err(io::Error::other)
    }

    fn is_at_hand(&self, file: usize, range: &Range<u64>) -> bool {
        self.source.is_at_hand(file, range)
    }
}

/// Opens the model and loads the shard; `None` when the worker was stopped meanwhile.
pub(super) fn load(worker: &Arc<Worker>, options: SourceOptions, isa: Isa) -> Result<Option<Engine>, WorkerError> {
    let spec = &worker.spec;
    let shard = &spec.shard;
    let begun = Instant::now();
    let source = match open(worker, options) {
        Err(_) if worker.jobs.is_closed() => return Ok(None),
        opened => opened.map_err(|source| WorkerError::Source { uri: spec.uri.clone(), source })?,
    };
    let fetch_ms = begun.elapsed().as_millis() as u64;
    let options = EngineOptions { isa, threads: spec.threads, max_batch_tokens: spec.max_batch_tokens, max_context: spec.max_context };
    let reader = Reader { source: &source, jobs: &worker.jobs };
    let read_before = source.bytes_read();
    let loaded = |bytes| worker.loading.read(bytes);
    let engine = match Engine::load(&spec.config, shard, &spec.kv, options, &reader, Box::new(worker.unjoined()), &loaded) {
        Ok(engine) => engine,
        Err(_) if worker.jobs.is_closed() => return Ok(None),
        Err(source) => return Err(WorkerError::Load { stage: shard.stage, rank: shard.rank, source }),
    };
    let (stage, rank, shard_bytes) = (shard.stage, shard.rank, shard.weight_bytes);
    let (fetched_bytes, read_bytes) = (source.bytes_fetched(), source.bytes_read() - read_before);
    let elapsed_ms = begun.elapsed().as_millis() as u64;
    info!(stage, rank, shard_bytes, fetched_bytes, read_bytes, fetch_ms, elapsed_ms, "shard loaded");
    Ok(Some(engine))
}

/// Opens the model's files, and brings the shard's bytes here.
fn open(worker: &Arc<Worker>, options: SourceOptions) -> Result<Arc<Source>, SourceError> {
    let spec = &worker.spec;
    let digest = spec.digest.clone().or_else(|| options.digest.clone());
    let told = worker.clone();
    let progress: Arc<ProgressFn> = Arc::new(move |p| told.loading.fetched(p.done, p.total.unwrap_or(p.done)));
    let source = Source::open(&spec.uri, SourceOptions { digest, keep: Keep::Parts, progress: Some(progress), ..options })?;
    let source = Arc::new(source);
    worker.loading.source.send_replace(Some(source.clone()));
    source.fetch(spec.shard.ranges(), &|done, total| {
        worker.loading.fetched(done, total);
        !worker.jobs.is_closed()
    })?;
    Ok(source)
}
