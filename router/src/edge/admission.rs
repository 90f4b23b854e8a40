//! Who may wait, for what and how long: for a replica to be ready, for the model's card, for the first replica at all.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use plan::card::ModelCard;
use tokio::time::{sleep, timeout};

use super::{Edge, SubmitError, stats::QueueSlot};
use crate::fleet::Deployment;

/// Pause before workers that gave no card are asked again; a replica that becomes ready is asked at once.
const ASK_AGAIN: Duration = Duration::from_millis(250);

impl Deployment {
    /// A place for one more request, and how long it may wait there: in the queue, or among those held while there is no replica.
    ///
    /// # Errors
    /// When all places are taken, or there is no replica and nothing is held for one.
    pub(super) fn admit(&self) -> Result<(QueueSlot, Duration), SubmitError> {
        let (serving, stats) = (&self.spec.serving, &self.lasting.stats);
        let queue = Duration::from_secs(serving.queue_seconds);
        let refused = |error| {
            stats.refused.fetch_add(1, Ordering::Relaxed);
            error
        };
        if let Some(why) = self.stopped() {
            return Err(refused(SubmitError::Stopped(self.spec.model.clone(), why)));
        }
        if !self.members.is_empty() {
            let slot = QueueSlot::take(stats, false, serving.queue_requests)
                .map_err(|queued| refused(SubmitError::QueueFull { queued, retry_after_seconds: stats.retry_after(queued) }))?;
            return Ok((slot, queue));
        }
        let hold = serving.hold.ok_or_else(|| SubmitError::NotReady(self.spec.model.clone()))?;
        let slot = QueueSlot::take(stats, true, hold.requests)
            .map_err(|held| refused(SubmitError::HoldFull { model: self.spec.model.clone(), held }))?;
        // The replica that comes has its weights to load, which is part of the hold.
        Ok((slot, queue.max(Duration::from_secs(hold.seconds))))
    }
}

impl Edge {
    /// The files needed to tokenize for `model`, fetched from a worker once and kept.
    ///
    /// A request that arrives while no worker can give them waits, in the queue or held, as one would whose ids are known.
    ///
    /// # Errors
    /// When the model is unknown, too many requests wait already, or no worker gave the card in time.
    pub async fn card(&self, model: &str) -> Result<Arc<ModelCard>, SubmitError> {
        let deployment = self.find(model)?;
        if let Some(card) = deployment.known_card() {
            return Ok(card);
        }
        let (slot, limit) = deployment.admit()?;
        let mut last = "it has no replicas".to_owned();
        match timeout(limit, self.await_card(&deployment, slot, &mut last)).await {
            Ok(Ok(Some(card))) => Ok(card),
            Ok(Ok(None)) => Err(SubmitError::NotReady(format!("{model} ({last})"))),
            Ok(Err(stopped)) => Err(stopped),
            Err(_) => Err(SubmitError::Queue { model: model.to_owned(), seconds: limit.as_secs(), detail: last }),
        }
    }

    /// The card, once a worker gives it; `None` when the deployment or the edge ends. `last` says why there is none yet.
    ///
    /// # Errors
    /// When the deployment is to have no replicas any more.
    async fn await_card(&self, from: &Deployment, mut slot: QueueSlot, last: &mut String) -> Result<Option<Arc<ModelCard>>, SubmitError> {
        let mut view = self.watch();
        // What was held for a whole start of a replica is not let into the queue, where it may wait less long, before the replica is ready.
        let held = from.members.is_empty();
        loop {
            let Some(deployment) = view.borrow_and_update().deployment(&from.spec.name).cloned() else {
                "its deployment is gone".clone_into(last);
                return Ok(None);
            };
            if let Some(why) = deployment.stopped() {
                return Err(SubmitError::Stopped(from.spec.model.clone(), why));
            }
            slot.count_as(deployment.holds());
            let ready = deployment.members.iter().any(|m| m.driver.ready());
            if !deployment.members.is_empty() && (ready || !held) {
                match deployment.card().await {
                    Ok(card) => return Ok(Some(card)),
                    Err(error) => *last = error,
                }
            }
            tokio::select! {
                changed = view.changed() => if changed.is_err() {
                    return Ok(None);
                },
                () = sleep(ASK_AGAIN), if ready || !held => {}
            }
        }
    }
}
