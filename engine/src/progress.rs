//! Counters that another thread may read while a step runs.

use std::sync::atomic::{AtomicU64, Ordering};

/// Where an engine is; written by its owner thread, read by heartbeats.
#[derive(Debug, Default)]
pub struct Progress {
    step: AtomicU64,
    layer: AtomicU64,
    finished: AtomicU64,
}

impl Progress {
    /// Id of the step that runs or ran last; 0 before the first.
    pub fn step(&self) -> u64 {
        self.step.load(Ordering::Relaxed)
    }

    /// Layer of the model that the step is in; after the last one, the number of layers.
    pub fn layer(&self) -> u64 {
        self.layer.load(Ordering::Relaxed)
    }

    /// Id of the last step that ended.
    pub fn finished(&self) -> u64 {
        self.finished.load(Ordering::Relaxed)
    }

    pub(crate) fn begin(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    pub(crate) fn enter(&self, layer: usize) {
        self.layer.store(layer as u64, Ordering::Relaxed);
    }

    pub(crate) fn finish(&self, step: u64) {
        self.finished.store(step, Ordering::Relaxed);
    }

    pub(crate) fn reset(&self) {
        self.step.store(0, Ordering::Relaxed);
        self.layer.store(0, Ordering::Relaxed);
        self.finished.store(0, Ordering::Relaxed);
    }
}
