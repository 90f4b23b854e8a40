//! The draft model's session: opened beside the replica's own, and again when it is lost; nobody's stream depends on it.

use std::{future::pending, sync::Arc, time::Duration};

use plan::fleet::FleetDraft;
use tokio::time::{Instant, sleep_until};

use crate::replica::{BoxFuture, Replica, ReplicaError, Session, StepReply};

/// First and longest pause between attempts to open its session.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Longest that sequences wait for the reply to a step of it. Its own driver knows when it is lost, but takes longer to be sure.
const PATIENCE: Duration = Duration::from_millis(500);

/// A draft model and what drives it.
#[derive(Clone)]
pub(crate) struct DraftModel {
    pub(crate) spec: FleetDraft,
    pub(crate) replica: Arc<dyn Replica>,
}

impl DraftModel {
    /// Whether both are the same worker.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.replica, &other.replica)
    }
}

/// What happened to the session.
pub(super) enum DraftEvent {
    /// It is there, and its worker empty.
    Opened,
    /// A step was answered.
    Reply(StepReply),
    /// A step has not been answered for so long that nobody shall wait for it.
    Late,
    /// It ended, or could not be opened; it is opened again.
    Lost(ReplicaError),
}

/// How the draft model of a replica's session is doing.
#[derive(Default)]
pub(super) struct Drafts {
    model: Option<DraftModel>,
    state: State,
    pause: Duration,
}

#[derive(Default)]
enum State {
    /// There is no draft model.
    #[default]
    None,
    Closed {
        until: Instant,
    },
    Opening(BoxFuture<'static, Result<Session, ReplicaError>>),
    Open(Box<Open>),
}

struct Open {
    session: Session,
    since: Instant,
    in_flight: usize,
    /// When the reply that is due has been waited for long enough; `None`: none is due, or it was said.
    patience: Option<Instant>,
}

impl Drafts {
    /// Follows what the fleet says; returns whether it is another draft model than before, or none.
    pub(super) fn follow(&mut self, model: Option<DraftModel>) -> bool {
        let same = match (&self.model, &model) {
            (Some(old), Some(new)) => old.is(new),
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.pause = BACKOFF.0;
            self.state = if model.is_some() { State::Closed { until: Instant::now() } } else { State::None };
            self.model = model;
        }
        !same
    }

    /// What it can hold.
    pub(super) fn spec(&self) -> Option<&FleetDraft> {
        self.model.as_ref().map(|model| &model.spec)
    }

    /// Sends a step; there is room for it.
    pub(super) fn send(&mut self, step: plan::step::Step) {
        if let State::Open(open) = &mut self.state {
            // One that cannot be sent is of a session that is over, and its end is the next thing that comes.
            if open.session.steps.try_send(step).is_ok() {
                open.in_flight += 1;
                open.patience.get_or_insert_with(|| Instant::now() + PATIENCE);
            }
        }
    }

    /// What happens next. Cancel-safe.
    pub(super) async fn next(&mut self) -> DraftEvent {
        loop {
            match &mut self.state {
                State::None => return pending().await,
                State::Closed { until } => {
                    sleep_until(*until).await;
                    let Some(model) = &self.model else { return pending().await };
                    let replica = model.replica.clone();
                    self.state = State::Opening(Box::pin(async move { replica.open().await }));
                }
                State::Opening(opening) => match opening.await {
                    Ok(session) => {
                        self.state = State::Open(Box::new(Open { session, since: Instant::now(), in_flight: 0, patience: None }));
                        return DraftEvent::Opened;
                    }
                    Err(error) => {
                        self.lose(&error);
                        return DraftEvent::Lost(error);
                    }
                },
                State::Open(open) => {
                    let patience = open.patience;
                    let late = async {
                        match patience {
                            Some(at) => sleep_until(at).await,
                            None => pending().await,
                        }
                    };
                    let reply = tokio::select! {
                        biased;
                        reply = open.session.replies.recv() => reply,
                        () = late => {
                            open.patience = None;
                            return DraftEvent::Late;
                        }
                    };
                    let error = match reply {
                        Some(Ok(reply)) => {
                            open.in_flight = open.in_flight.saturating_sub(1);
                            open.patience = (open.in_flight > 0).then(|| Instant::now() + PATIENCE);
                            return DraftEvent::Reply(reply);
                        }
                        Some(Err(error)) => error,
                        None => ReplicaError::Closed,
                    };
                    self.lose(&error);
                    return DraftEvent::Lost(error);
                }
            }
        }
    }

    /// Drops the session, to open another after a pause.
    pub(super) fn lose(&mut self, error: &ReplicaError) {
        if matches!(&self.state, State::Open(open) if open.since.elapsed() > BACKOFF.1) || matches!(error, ReplicaError::Loading { .. }) {
            self.pause = BACKOFF.0;
        }
        self.state = State::Closed { until: Instant::now() + self.pause };
        self.pause = (self.pause * 2).min(BACKOFF.1);
    }
}
