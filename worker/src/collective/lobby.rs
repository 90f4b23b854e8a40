//! Where connections of other ranks wait until their epoch is joined.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use plan::worker::Epoch;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use super::stream::Stream;

/// The epoch a worker is in, and who has come for it.
#[derive(Debug)]
pub struct Lobby {
    epoch: watch::Sender<Epoch>,
    /// At most one stream per rank of the stage.
    arrived: Mutex<HashMap<usize, Stream>>,
    changed: Notify,
}

impl Default for Lobby {
    fn default() -> Self {
        Self { epoch: watch::Sender::new(Epoch::default()), arrived: Mutex::default(), changed: Notify::new() }
    }
}

impl Lobby {
    /// Enters an epoch, unless a higher one was; what came for an earlier one is dropped.
    pub fn enter(&self, epoch: Epoch) {
        let mut arrived = self.arrived();
        if self.epoch.send_if_modified(|present| {
            let higher = epoch.number > present.number;
            if higher {
                *present = epoch;
            }
            higher
        }) {
            arrived.clear();
        }
        drop(arrived);
        self.changed.notify_one();
    }

    /// Waits until this worker is in `epoch`.
    ///
    /// # Errors
    /// If it is in another one of the same or a higher number, or does not enter it within `limit`.
    pub(super) async fn admit(&self, epoch: Epoch, limit: Duration) -> Result<(), String> {
        let mut present = self.epoch.subscribe();
        let reached = timeout(limit, present.wait_for(|e| e.number >= epoch.number)).await;
        let present = match reached {
            // The sender is `self`.
            Ok(present) => present.map_err(|e| e.to_string())?.to_owned(),
            Err(_) => *self.epoch.borrow(),
        };
        if present == epoch { Ok(()) } else { Err(format!("epoch {epoch}, expected {present}")) }
    }

    /// Hands over the stream of `rank`, unless the epoch is another one by now.
    pub(super) fn deposit(&self, epoch: Epoch, rank: usize, stream: Stream) -> Result<(), String> {
        let mut arrived = self.arrived();
        let present = *self.epoch.borrow();
        if present != epoch {
            return Err(format!("epoch {epoch}, expected {present}"));
        }
        arrived.insert(rank, stream);
        drop(arrived);
        self.changed.notify_one();
        Ok(())
    }

    /// Waits for the streams of `ranks` in `epoch`. One caller at a time.
    ///
    /// # Errors
    /// The first rank that is missing when the epoch is left.
    pub(super) async fn collect(&self, epoch: Epoch, ranks: std::ops::Range<usize>) -> Result<Vec<(usize, Stream)>, usize> {
        loop {
            {
                let mut arrived = self.arrived();
                let Some(missing) = ranks.clone().find(|r| !arrived.contains_key(r)) else {
                    return Ok(ranks.filter_map(|r| Some((r, arrived.remove(&r)?))).collect());
                };
                if *self.epoch.borrow() != epoch {
                    return Err(missing);
                }
            }
            self.changed.notified().await;
        }
    }

    /// The first of `ranks` that has not come.
    pub(super) fn missing(&self, mut ranks: std::ops::Range<usize>) -> Option<usize> {
        let arrived = self.arrived();
        ranks.find(|r| !arrived.contains_key(r))
    }

    /// Nothing panics while it is held.
    fn arrived(&self) -> MutexGuard<'_, HashMap<usize, Stream>> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
