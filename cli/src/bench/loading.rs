//! How long a model takes from its files to its first token, beside the time that reading the files alone takes.

use std::{
    io,
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use engine::WeightReader;
use plan::shard::ExecutionPlan;
use serde::Serialize;

/// Bytes read at a time.
const PIECE: u64 = 256 << 10;

/// As `--json` prints it. Times are in seconds, all with the files in the page cache.
#[derive(Debug, Serialize)]
pub(crate) struct Loading {
    pub(crate) test: &'static str,
    /// Bytes of weights that the workers read.
    pub(crate) bytes: u64,
    /// Reading these bytes with as many threads, and dropping them.
    pub(crate) read_s: f64,
    /// From the plan to workers that are ready.
    pub(crate) load_s: f64,
    /// From the plan to a token behind a prompt of one.
    pub(crate) first_token_s: f64,
    pub(crate) threads: usize,
    pub(crate) isa: &'static str,
    pub(crate) pp: usize,
    pub(crate) tp: usize,
}

/// Reads what the workers of a plan read, twice, and says how long the second time took: then the page cache has it, if it can hold it.
///
/// # Errors
/// When something cannot be read.
pub(crate) fn read(reader: &dyn WeightReader, plan: &ExecutionPlan, threads: usize) -> io::Result<Duration> {
    let pieces: Vec<(usize, Range<u64>)> =
        plan.stages.iter().flat_map(|stage| &stage.shards).flat_map(|s| s.ranges()).flat_map(cut).collect();
    once(reader, &pieces, threads)?;
    let start = Instant::now();
    once(reader, &pieces, threads)?;
    Ok(start.elapsed())
}

fn cut((file, range): (usize, Range<u64>)) -> impl Iterator<Item = (usize, Range<u64>)> {
    (range.start..range.end).step_by(PIECE as usize).map(move |at| (file, at..range.end.min(at + PIECE)))
}

fn once(reader: &dyn WeightReader, pieces: &[(usize, Range<u64>)], threads: usize) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = vec![0; PIECE as usize];
        while let Some((file, range)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            reader.read(*file, range.clone(), &mut buffer[..(range.end - range.start) as usize])?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
