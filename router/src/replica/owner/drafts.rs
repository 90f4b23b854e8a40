//! The draft model's session: opened beside the replica's own, and again when it is lost; nobody's stream depends on it.

use std::{
    future::pending,
    sync::{Arc, OnceLock},
    time::Duration,
};

use plan::fleet::FleetDraft;
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep_until},
};

use crate::{
    encode::same_tokens,
    replica::{BoxFuture, Replica, ReplicaError, Session, StepReply},
};

/// First and longest pause between attempts to open its session.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Longest that sequences wait for the reply to a step of it. Its own driver knows when it is lost, but takes longer to be sure.
const PATIENCE: Duration = Duration::from_millis(500);

/// A draft model and what drives it.
#[derive(Clone)]
pub(crate) struct DraftModel {
    pub(crate) spec: FleetDraft,
    pub(crate) replica: Arc<dyn Replica>,
    /// Whether its tokens are the model's, once that is known.
    fit: Arc<OnceLock<Result<(), String>>>,
}

impl DraftModel {
    pub(crate) fn new(spec: FleetDraft, replica: Arc<dyn Replica>) -> Self {
        let fit = if spec.compared { OnceLock::from(Ok(())) } else { OnceLock::new() };
        Self { spec, replica, fit: Arc::new(fit) }
    }

    /// Whether both are the same worker.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.replica, &other.replica)
    }

    /// Opens a session with a worker whose tokens are those of `model`.
    async fn open(self, model: Arc<dyn Replica>) -> Result<Session, OpenError> {
        if self.fit.get().is_none() {
            let (own, of_model) = (self.replica.card().await?, model.card().await?);
            let compared = spawn_blocking(move || same_tokens(&own, &of_model).map_err(|error| error.to_string())).await;
            // Nobody else sets it meanwhile: a session is opened by one at a time.
            let _ = self.fit.set(compared.unwrap_or_else(|broken| Err(format!("its tokens could not be compared: {broken}"))));
        }
        match self.fit.get() {
            Some(Err(why)) => Err(OpenError::Unfit(why.clone())),
            _ => Ok(self.replica.open().await?),
        }
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// No session of it would be of any use.
    #[error("{0}")]
    Unfit(String),
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
    /// Its tokens are not the model's: it is not opened.
    Unfit(String),
}

/// How the draft model of a replica's session is doing.
pub(super) struct Drafts {
    /// What it guesses for.
    replica: Arc<dyn Replica>,
    model: Option<DraftModel>,
    state: State,
    pause: Duration,
}

enum State {
    /// There is no draft model, or none that could guess.
    None,
    Closed {
        until: Instant,
    },
    Opening(BoxFuture<'static, Result<Session, OpenError>>),
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
    /// For `replica`, which has none yet.
    pub(super) fn new(replica: Arc<dyn Replica>) -> Self {
        Self { replica, model: None, state: State::None, pause: BACKOFF.0 }
    }

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
                    self.state = State::Opening(Box::pin(model.clone().open(self.replica.clone())));
                }
                State::Opening(opening) => match opening.await {
                    Ok(session) => {
                        self.state = State::Open(Box::new(Open { session, since: Instant::now(), in_flight: 0, patience: None }));
                        return DraftEvent::Opened;
                    }
                    Err(OpenError::Replica(error)) => {
                        self.lose(&error);
                        return DraftEvent::Lost(error);
                    }
                    Err(OpenError::Unfit(why)) => {
                        self.state = State::None;
                        return DraftEvent::Unfit(why);
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
