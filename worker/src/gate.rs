//! Which epoch a worker is in: what it has seen, granted and accepted, and the session that is live.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use plan::worker::Epoch;
use tokio::{sync::watch, time::timeout};

use crate::{
    failure::{Failure, Reason},
    session::Live,
};

/// An owner silent for this long may be replaced.
pub(crate) const REPLACEABLE: Duration = Duration::from_secs(1);

/// A number that no other process or call draws: the operating system's randomness through the standard library's hash keys.
pub(crate) fn draw() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    if let Ok(since) = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
        hasher.write_u128(since.as_nanos());
    }
    hasher.finish()
}

/// The worker's epochs.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Grants epochs, and enters only those it granted itself.
    arbiter: bool,
    state: Mutex<State>,
    /// The epoch entered last.
    entered: watch::Sender<Epoch>,
}

#[derive(Debug, Default)]
struct State {
    /// Granted last, and when.
    granted: Option<(Epoch, Instant)>,
    /// The session of the epoch entered last; it may be over.
    session: Option<Arc<Live>>,
    stopping: bool,
}

/// An epoch cannot be granted at the moment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the replica is driven in epoch {epoch}, and its owner spoke within the last second")]
pub(crate) struct Busy {
    epoch: Epoch,
}

impl Gate {
    pub(crate) fn new(arbiter: bool) -> Self {
        Self { arbiter, state: Mutex::default(), entered: watch::Sender::new(Epoch::default()) }
    }

    /// The highest epoch entered or granted.
    pub(crate) fn highest(&self) -> Epoch {
        let entered = *self.entered.borrow();
        self.state().granted.map(|g| g.0).filter(|g| g.number > entered.number).unwrap_or(entered)
    }

    /// The session entered last, unless it is over.
    pub(crate) fn live(&self) -> Option<Arc<Live>> {
        self.state().session.clone().filter(|s| !s.is_over())
    }

    /// Enters the epoch of `session`; the one before ends.
    pub(crate) fn enter(&self, session: &Arc<Live>) -> Result<(), Failure> {
        let mut state = self.state();
        if state.stopping {
            return Err(Failure::new(Reason::Shutdown, "the worker stops"));
        }
        let (epoch, entered) = (session.epoch, *self.entered.borrow());
        let stale = |expected: String| Err(Failure::new(Reason::StaleEpoch, format!("epoch {epoch} came, expected {expected}")));
        if epoch.number <= entered.number {
            return stale(format!("a number above {}", entered.number));
        }
        if self.arbiter {
            match state.granted {
                Some((granted, _)) if granted == epoch => {}
                Some((granted, _)) => return stale(granted.to_string()),
                None => return stale("one that was granted here".into()),
            }
        }
        let before = state.session.replace(session.clone());
        // While the lock is held, so that epochs are entered in the order in which they were admitted.
        self.entered.send_replace(epoch);
        drop(state);
        if let Some(before) = before {
            before.fail(Failure::new(Reason::Superseded, format!("epoch {epoch} began")));
        }
        Ok(())
    }

    /// Waits until this worker is in `epoch`, and returns its session.
    ///
    /// # Errors
    /// If it is in another one, does not enter it within `limit`, or the session is over.
    pub(crate) async fn session(&self, epoch: Epoch, limit: Duration) -> Result<Arc<Live>, Failure> {
        let mut entered = self.entered.subscribe();
        // The sender is `self`, so what ends the wait is the epoch or the limit.
        let _ = timeout(limit, entered.wait_for(|e| e.number >= epoch.number)).await;
        let session = self.state().session.clone();
        match session {
            Some(session) if session.epoch == epoch && !session.is_over() => Ok(session),
            Some(session) if session.epoch == epoch => {
                Err(Failure::new(Reason::StaleEpoch, format!("the session of epoch {epoch} is over")))
            }
            _ => Err(Failure::new(Reason::StaleEpoch, format!("epoch {epoch} came, expected {}", *self.entered.borrow()))),
        }
    }

    /// Whether an epoch may be granted now: the present session is over, its owner silent, or it hands over.
    pub(crate) fn grantable(&self, handover: bool) -> Result<(), Busy> {
        self.state().grantable(handover)
    }

    /// Grants an epoch above `highest` and everything seen here.
    pub(crate) fn grant(&self, highest: u64, handover: bool) -> Result<Epoch, Busy> {
        let mut state = self.state();
        state.grantable(handover)?;
        let seen = state.granted.map_or(0, |g| g.0.number).max(self.entered.borrow().number).max(highest);
        let epoch = Epoch { number: seen + 1, session: draw() };
        state.granted = Some((epoch, Instant::now()));
        Ok(epoch)
    }

    /// Ends the session and lets no other begin.
    pub(crate) fn stop(&self) {
        let session = {
            let mut state = self.state();
            state.stopping = true;
            state.session.clone()
        };
        if let Some(session) = session {
            session.fail(Failure::new(Reason::Shutdown, "the worker stops"));
        }
    }

    /// Nothing panics while it is held.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn grantable(&self, handover: bool) -> Result<(), Busy> {
        let session = self.session.as_ref();
        if handover {
            return Ok(());
        }
        if let Some(session) = session.filter(|s| !s.is_over() && s.silent() < REPLACEABLE) {
            return Err(Busy { epoch: session.epoch });
        }
        // An epoch that was granted and not begun yet counts as a session whose owner spoke then.
        match self.granted {
            Some((epoch, at)) if at.elapsed() < REPLACEABLE && session.is_none_or(|s| s.epoch.number < epoch.number) => Err(Busy { epoch }),
            _ => Ok(()),
        }
    }
}
