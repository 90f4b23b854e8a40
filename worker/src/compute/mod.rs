//! The engine's thread: loads the shard, then runs one session after the other.

mod load;
mod slots;
mod steps;
mod tokens;

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
};

use engine::collective::Collective;
use kernels::Isa;
use source::SourceOptions;
use tokio::sync::oneshot;

use self::slots::Slots;
use crate::{
    error::WorkerError,
    link::Outbound,
    session::{Live, Stop},
    state::Worker,
};

/// A session for the engine.
pub(crate) struct Job {
    pub(crate) live: Arc<Live>,
    pub(crate) collective: Box<dyn Collective>,
    pub(crate) links: Outbound,
    /// Told when the engine has no sequences and waits for the first step.
    pub(crate) ready: oneshot::Sender<()>,
}

/// The next session. A later one takes the place of one that has not begun: it has ended that one already.
#[derive(Default)]
pub(crate) struct Jobs {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    job: Option<Job>,
    closed: bool,
}

impl Jobs {
    pub(crate) fn put(&self, job: Job) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let later = |held: &Job| held.live.epoch.number > job.live.epoch.number;
        if !state.closed && !state.job.as_ref().is_some_and(later) {
            state.job = Some(job);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// The engine is to end.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = Waiting { job: None, closed: true };
        drop(state);
        self.changed.notify_one();
    }

    fn is_closed(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(job) = state.job.take() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Starts the thread; told how it ended, or nothing when it panicked.
pub(crate) fn start(
    worker: Arc<Worker>,
    source: SourceOptions,
    isa: Isa,
) -> Result<oneshot::Receiver<Result<(), WorkerError>>, WorkerError> {
    let (end, ended) = oneshot::channel();
    let thread = move || {
        // Nobody listens any more when the worker stopped before it had loaded.
        let _ = end.send(run(&worker, source, isa));
    };
    let started = thread::Builder::new().name("engine".into()).spawn(thread);
    started.map_err(|source| WorkerError::Thread { name: "engine", source })?;
    Ok(ended)
}

fn run(worker: &Arc<Worker>, source: SourceOptions, isa: Isa) -> Result<(), WorkerError> {
    let Some(mut engine) = load::load(worker, source, isa)? else { return Ok(()) };
    worker.loading.loaded(engine.progress());
    while let Some(Job { live, collective, links, ready }) = worker.jobs.next() {
        engine.reset();
        engine.set_collective(collective);
        let mut slots = Slots::default();
        // When nobody waits, the session is over before it began.
        if ready.send(()).is_ok() {
            match steps::run(worker, &mut engine, &live, &links, &mut slots) {
                Ok(()) => live.finish(),
                Err(Stop::Over) => {}
                Err(Stop::Failed(failure)) => live.fail(failure),
            }
        }
        engine.set_collective(Box::new(worker.unjoined()));
        engine.reset();
        // The next session has most of them loaded again, which costs nothing for what is kept.
        worker.adapters.keep(&slots.bound());
    }
    Ok(())
}
