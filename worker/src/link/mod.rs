//! Links between workers: hidden states to the next stage, sampled tokens to the first.
//!
//! The hidden state is the same on every rank, so rank `r` of a stage receives it from rank `r mod ranks` of the stage before. The sampler (rank 0
//! of the last stage) sends tokens to every other rank of the first stage. So at most one link comes into a worker; where the first stage
//! multiplies a part of the vocabulary, it is asked on the sampler's links, and each of its ranks has one more to the sampler for what it answers.

mod inbound;
mod outbound;
mod vocabulary;

pub(crate) use inbound::accept;
pub(crate) use outbound::{Outbound, dial};

use proto::worker::WorkerAddress;

use crate::state::Worker;

/// Bytes of a hidden frame's rows; a wider row travels alone.
const FRAME: usize = 1 << 20;

/// What a link carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Cargo {
    Hidden,
    /// And questions.
    Tokens,
    /// Parts of logits, from this rank of the first stage.
    Parts(usize),
}

/// Ranks of a stage.
fn ranks(workers: &[WorkerAddress], stage: usize) -> usize {
    workers.iter().filter(|w| w.stage as usize == stage).count()
}

/// The (stage, rank) whose link comes into this worker, and what it brings; `parts`: which rank of the first stage says that it brings parts.
fn source(worker: &Worker, workers: &[WorkerAddress], parts: Option<usize>) -> Option<((usize, usize), Cargo)> {
    let shard = &worker.spec.shard;
    if let Some(rank) = parts {
        let asked = worker.samples() && !shard.splits.cuts.is_empty() && rank < ranks(workers, 0);
        return asked.then_some(((0, rank), Cargo::Parts(rank)));
    }
    if !shard.is_first() {
        return Some(((shard.stage - 1, shard.rank % ranks(workers, shard.stage - 1)), Cargo::Hidden));
    }
    (!worker.samples()).then(|| ((shard.stages - 1, 0), Cargo::Tokens))
}

/// Where this worker's links go, and what they bring.
fn targets<'a>(worker: &Worker, workers: &'a [WorkerAddress]) -> Vec<(&'a WorkerAddress, Cargo)> {
    let shard = &worker.spec.shard;
    let own = |w: &WorkerAddress| (w.stage as usize, w.rank as usize) == (shard.stage, shard.rank);
    let mut targets = Vec::new();
    if !shard.is_last() {
        let next = workers.iter().filter(|w| w.stage as usize == shard.stage + 1 && w.rank as usize % shard.ranks == shard.rank);
        targets.extend(next.map(|w| (w, Cargo::Hidden)));
    }
    if shard.is_first() && !shard.splits.cuts.is_empty() {
        let sampler = workers.iter().filter(|w| (w.stage as usize, w.rank) == (shard.stages - 1, 0));
        targets.extend(sampler.map(|w| (w, Cargo::Parts(shard.rank))));
    }
    if worker.samples() {
        targets.extend(workers.iter().filter(|w| w.stage == 0 && !own(w)).map(|w| (w, Cargo::Tokens)));
    }
    targets
}
