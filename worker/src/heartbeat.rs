//! The heartbeats' thread: tells the owner where the engine is, whatever the other threads do.

use std::{sync::Arc, thread};

use crate::{error::WorkerError, session::BEAT, state::Worker};

/// Starts the thread; it ends, soon after `stop` and an unpark, with the worker.
pub(crate) fn start(worker: Arc<Worker>) -> Result<thread::JoinHandle<()>, WorkerError> {
    let beats = move || {
        while !worker.stop.is_cancelled() {
            thread::park_timeout(BEAT);
            if let Some(live) = worker.gate.live() {
                live.beat(worker.deadlines.owner);
            }
        }
    };
    thread::Builder::new().name("heartbeat".into()).spawn(beats).map_err(|source| WorkerError::Thread { name: "heartbeat", source })
}
