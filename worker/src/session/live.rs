//! The session that a worker is in.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use engine::Progress;
use plan::worker::Epoch;
use proto::worker::{Heartbeat, SessionReply, WorkerAddress, session_reply::Message};
use tokio::{runtime::Handle, sync::mpsc};

use super::{BEAT, Ending, Stop, inbox::Inbox, send};
use crate::{
    collective::Interrupt,
    failure::{Failure, Reason},
    link::Cargo,
};

/// A session, as the owner's messages, the engine thread, links and heartbeats see it.
pub(crate) struct Live {
    pub(crate) epoch: Epoch,
    pub(crate) version: u32,
    /// All workers of the replica, as granted.
    pub(crate) workers: Vec<WorkerAddress>,
    pub(crate) inbox: Inbox,
    pub(crate) ending: Arc<Ending>,
    replies: mpsc::Sender<SessionReply>,
    progress: Arc<Progress>,
    /// Steps answered.
    finished: AtomicU64,
    /// Heartbeats since the owner spoke last. Counted so, a worker that was stopped itself does not blame the owner.
    quiet: AtomicU32,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    /// The links that have come in, one of a kind.
    linked: Mutex<HashSet<Cargo>>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Live({}, over: {})", self.epoch, self.is_over())
    }
}

impl Live {
    pub(super) fn new(
        epoch: Epoch,
        version: u32,
        workers: Vec<WorkerAddress>,
        most_steps: usize,
        replies: mpsc::Sender<SessionReply>,
        ending: Arc<Ending>,
        progress: Arc<Progress>,
    ) -> Self {
        Self {
            epoch,
            version,
            workers,
            inbox: Inbox::new(most_steps),
            ending,
            replies,
            progress,
            finished: AtomicU64::new(0),
            quiet: AtomicU32::new(0),
            interrupt: Mutex::new(None),
            linked: Mutex::default(),
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.ending.is_over()
    }

    /// Ends the session for a reason; every wait in it ends.
    pub(crate) fn fail(&self, failure: Failure) {
        self.ending.end(Some(failure));
        self.quit();
    }

    /// Ends the session: every step was answered.
    pub(crate) fn finish(&self) {
        self.ending.end(None);
        self.quit();
    }

    /// Makes sure that nothing waits in a session that is over.
    pub(crate) fn quit(&self) {
        self.inbox.end();
        if self.ending.failure().is_some()
            && let Some(interrupt) = &*self.interrupt.lock().unwrap_or_else(PoisonError::into_inner)
        {
            interrupt.interrupt();
        }
    }

    /// Interrupts the ranks' exchanges with this when the session fails.
    pub(super) fn interrupt_with(&self, interrupt: Arc<dyn Interrupt>) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = Some(interrupt);
        if self.is_over() {
            self.quit();
        }
    }

    /// Takes the place of the one inbound link of a kind.
    pub(crate) fn claim_link(&self, cargo: Cargo) -> bool {
        self.linked.lock().unwrap_or_else(PoisonError::into_inner).insert(cargo)
    }

    /// Tells the owner; waits while it does not read. Says nothing once the owner is gone.
    pub(crate) async fn say(&self, message: Message) {
        // Closed when the owner's stream is dropped, which ends the session.
        let _ = self.replies.send(SessionReply { message: Some(message) }).await;
    }

    /// Answers a step, from the engine thread; waits while the owner does not read.
    pub(crate) fn answer(&self, runtime: &Handle, message: Message) -> Result<(), Stop> {
        self.finished.fetch_add(1, Ordering::Relaxed);
        self.tell(runtime, message)
    }

    /// Tells the owner something, from the engine thread; waits while the owner does not read.
    pub(crate) fn tell(&self, runtime: &Handle, message: Message) -> Result<(), Stop> {
        send(runtime, &self.ending, &self.replies, SessionReply { message: Some(message) })
    }

    /// The owner spoke.
    pub(super) fn heard(&self) {
        self.quiet.store(0, Ordering::Relaxed);
    }

    /// How long it has not.
    pub(crate) fn silent(&self) -> Duration {
        BEAT * self.quiet.load(Ordering::Relaxed)
    }

    /// Tells the owner where the engine is, and ends the session when the owner has been silent for `limit`.
    pub(crate) fn beat(&self, limit: Duration) {
        let (step, finished) = (self.progress.step(), self.progress.finished());
        let layer = u32::try_from(self.progress.layer()).unwrap_or(u32::MAX);
        // The step runs only between its beginning and its end.
        let (step, layer) = if step == finished { (0, 0) } else { (step, layer) };
        let heartbeat = Heartbeat { step, layer, finished: self.finished.load(Ordering::Relaxed) };
        // A full queue has fresher news for an owner that reads again, a closed one has no owner.
        let _ = self.replies.try_send(SessionReply { message: Some(Message::Heartbeat(heartbeat)) });
        self.quiet.fetch_add(1, Ordering::Relaxed);
        if self.silent() >= limit {
            self.fail(Failure::new(Reason::PeerLost, format!("the owner has been silent for {} ms", self.silent().as_millis())));
        }
    }
}
