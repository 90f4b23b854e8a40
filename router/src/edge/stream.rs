//! One client's stream of tokens: where it runs, what it emitted, and how it goes on elsewhere.

use std::{sync::Arc, time::Duration};

use plan::step::{Output, TokenId};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    FinishReason, StreamError, StreamEvent,
    stats::{Counted, QueueSlot, Stats},
};
use crate::{
    fleet::{Driver, Ticket, View},
    replica::owner::{EventSink, SequenceEvent, StreamSink},
    scheduler::{EventKind, Submission},
};

/// The events of one generation. Dropping it cancels the sequence with the next step.
///
/// The stream does its own resuming, inside [`TokenStream::next`]: no task stands behind it.
#[derive(Debug)]
pub struct TokenStream(pub(super) Course);

impl TokenStream {
    /// When the sequence entered a batch for the first time, as far as the events taken say.
    pub(crate) fn started_at(&self) -> Option<Instant> {
        self.0.started_at
    }

    /// When the reply came that the last event taken is from.
    pub(crate) fn arrived_at(&self) -> Option<Instant> {
        self.0.arrived_at
    }

    /// The next event; `None` after `Finished` or `Failed`. Cancel-safe.
    pub async fn next(&mut self) -> Option<StreamEvent> {
        loop {
            if let Item::Event(event) = self.0.next().await? {
                return Some(event);
            }
        }
    }
}

/// What a course of a sequence brings.
#[derive(Debug)]
pub(super) enum Item {
    Event(StreamEvent),
    Output(Output),
}

/// A sequence on its way through one replica or several.
pub(super) struct Course {
    view: watch::Receiver<Arc<View>>,
    /// Resource name of its deployment.
    deployment: String,
    /// Name of its adapter; empty: none.
    adapter: String,
    stats: Arc<Stats>,
    /// As it was submitted first.
    submission: Submission,
    /// Prompt, then what was emitted.
    ids: Vec<TokenId>,
    prompt_done: bool,
    /// Results that came for `submission.wants`.
    wants_done: usize,
    /// A result came: only equal numerics can go on with it.
    begun: bool,
    /// Of the replica it is on, or was on last.
    numerics: String,
    slot: Option<QueueSlot>,
    submitted: Instant,
    /// When it entered a batch for the first time.
    started_at: Option<Instant>,
    last_token: Option<Instant>,
    /// When the reply came that the last event taken is from.
    arrived_at: Option<Instant>,
    place: Place,
    limits: Limits,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) queue: Duration,
    pub(super) resume: Duration,
    pub(super) total: Option<Duration>,
}

enum Place {
    /// No replica yet, or lost at this time.
    Waiting {
        since: Instant,
    },
    Running {
        driver: Driver,
        ticket: Ticket,
        events: mpsc::Receiver<(SequenceEvent, Instant)>,
        started: bool,
    },
    Done,
}

/// What the next thing to happen is.
enum Wake {
    Event(Option<(SequenceEvent, Instant)>),
    View,
    Late,
}

impl Course {
    pub(super) fn new(
        view: watch::Receiver<Arc<View>>,
        (deployment, adapter): (String, String),
        stats: Arc<Stats>,
        submission: Submission,
        slot: QueueSlot,
        limits: Limits,
    ) -> Self {
        let now = Instant::now();
        let mut course = Self {
            view,
            deployment,
            adapter,
            stats,
            ids: submission.prompt.to_vec(),
            submission,
            prompt_done: false,
            wants_done: 0,
            begun: false,
            numerics: String::new(),
            slot: Some(slot),
            submitted: now,
            started_at: None,
            last_token: None,
            arrived_at: None,
            place: Place::Waiting { since: now },
            limits,
        };
        course.try_place();
        course
    }

    /// The next item; `None` after the end. Cancel-safe: what was received is either kept or returned.
    pub(super) async fn next(&mut self) -> Option<Item> {
        loop {
            if let Some(error) = self.hopeless() {
                return Some(self.fail(error));
            }
            let deadline = self.deadline();
            let wake = match &mut self.place {
                Place::Done => return None,
                Place::Running { events, .. } => tokio::select! {
                    biased;
                    event = events.recv() => Wake::Event(event),
                    () = until(deadline) => Wake::Late,
                },
                Place::Waiting { .. } => tokio::select! {
                    biased;
                    changed = self.view.changed() => if changed.is_ok() { Wake::View } else { Wake::Event(None) },
                    () = until(deadline) => Wake::Late,
                },
            };
            match wake {
                Wake::Event(Some((SequenceEvent::Happened(kind), at))) => {
                    self.arrived_at = Some(at);
                    if let Some(item) = self.take(kind) {
                        return Some(item);
                    }
                }
                Wake::Event(Some((SequenceEvent::Released, _)) | None) => {
                    if let Some(item) = self.lost() {
                        return Some(item);
                    }
                }
                Wake::View => {
                    let Some(deployment) = self.view.borrow_and_update().deployment(&self.deployment).cloned() else {
                        return Some(self.fail(StreamError::NoReplica("its deployment is gone".to_owned())));
                    };
                    if let Some(why) = deployment.stopped().filter(|_| !self.begun || deployment.members.is_empty()) {
                        return Some(self.fail(StreamError::Stopped(deployment.spec.model.clone(), why)));
                    }
                    if let Some(slot) = &mut self.slot {
                        slot.count_as(deployment.holds());
                    }
                    self.try_place();
                }
                Wake::Late => return Some(self.late()),
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let total = self.limits.total.map(|limit| self.submitted + limit);
        let place = match &self.place {
            Place::Waiting { since } if self.begun => Some(*since + self.limits.resume),
            Place::Waiting { .. } => Some(self.submitted + self.limits.queue),
            Place::Running { started, .. } if !self.begun && !started => Some(self.submitted + self.limits.queue),
            Place::Running { .. } | Place::Done => None,
        };
        [total, place].into_iter().flatten().min()
    }

    /// Why no replica will take it, where it waits for one with its adapter.
    fn hopeless(&self) -> Option<StreamError> {
        let (Place::Waiting { .. }, false) = (&self.place, self.submission.adapter.is_empty()) else { return None };
        let view = self.view.borrow();
        let deployment = view.deployment(&self.deployment)?;
        if !deployment.has_adapter(&self.submission.adapter) {
            return Some(StreamError::NoAdapter(self.adapter.clone()));
        }
        let why = deployment.adapter_failure(&self.submission.adapter)?;
        Some(StreamError::AdapterFailed { name: self.adapter.clone(), why })
    }

    /// Submits to the replica of choice, when there is one.
    fn try_place(&mut self) {
        let view = self.view.borrow().clone();
        let Some(deployment) = view.deployment(&self.deployment) else { return };
        let Some(member) = deployment.choose(&self.ids, &self.submission.adapter, self.begun.then_some(self.numerics.as_str())) else {
            return;
        };
        let submission = self.remaining();
        let left = (submission.max_tokens as usize).min(deployment.spec.limits.max_context) - submission.emitted.len();
        // Every token with its logits, every want, and: started, prompt, end, released.
        let most = left * (1 + usize::from(submission.logits)) + submission.wants.len() + 4;
        let (sender, events) = mpsc::channel(most);
        let sink = EventSink::Stream(StreamSink {
            events: sender,
            slot: self.slot.take(),
            submitted: self.submitted,
            last_token: self.last_token,
            stats: [self.stats.clone(), member.stats.clone()],
            _counted: Counted::new(&member.sequences),
        });
        match member.driver.submit(submission, sink) {
            Ok(ticket) => {
                if self.begun {
                    self.stats.resumed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
                self.numerics.clone_from(&member.spec.numerics);
                self.place = Place::Running { driver: member.driver.clone(), ticket, events, started: false };
            }
            // It was lost between the choice and now; the view changes with it.
            Err(sink) => self.slot = sink.into_slot(),
        }
    }

    /// The sequence as it is to be submitted now.
    fn remaining(&self) -> Submission {
        let mut submission = self.submission.clone();
        submission.emitted = self.ids[submission.prompt.len()..].to_vec();
        submission.wants = self.submission.wants[self.wants_done..].into();
        if self.prompt_done {
            submission.score_prompt = None;
        }
        submission
    }

    fn take(&mut self, kind: EventKind) -> Option<Item> {
        self.begun |= !matches!(kind, EventKind::Started);
        let event = match kind {
            EventKind::Started => {
                self.started_at.get_or_insert_with(Instant::now);
                if let Place::Running { started, .. } = &mut self.place {
                    *started = true;
                }
                return None;
            }
            EventKind::Prompt { .. } if self.prompt_done => return None,
            EventKind::Prompt { cached_tokens, scores } => {
                self.prompt_done = true;
                StreamEvent::Prompt { cached_tokens, scores }
            }
            EventKind::Token { id, logprobs } => {
                self.ids.push(id);
                self.last_token = self.arrived_at;
                StreamEvent::Token { id, logprobs }
            }
            EventKind::Output(output) => {
                self.wants_done = (self.wants_done + 1).min(self.submission.wants.len());
                return Some(Item::Output(output));
            }
            EventKind::Finished(reason) => {
                self.place = Place::Done;
                StreamEvent::Finished(reason)
            }
            EventKind::Failed(message) => return Some(self.fail(StreamError::Engine(message))),
        };
        Some(Item::Event(event))
    }

    /// The replica is gone. Goes on elsewhere, or waits; ends when everything was emitted already.
    fn lost(&mut self) -> Option<Item> {
        if self.view.has_changed().is_err() {
            return Some(self.fail(StreamError::Stopping));
        }
        self.place = Place::Waiting { since: Instant::now() };
        let emitted = &self.ids[self.submission.prompt.len()..];
        let end = if emitted.last().is_some_and(|id| self.submission.end_ids.contains(id)) {
            Some(FinishReason::Stop)
        } else {
            (self.prompt_done && emitted.len() >= self.submission.max_tokens as usize).then_some(FinishReason::Length)
        };
        if let Some(reason) = end {
            self.place = Place::Done;
            return Some(Item::Event(StreamEvent::Finished(reason)));
        }
        self.view.mark_unchanged();
        self.try_place();
        None
    }

    fn late(&mut self) -> Item {
        let waited = self.submitted.elapsed();
        let error = if self.limits.total.is_some_and(|limit| waited >= limit) {
            StreamError::Deadline(waited.as_secs())
        } else if self.begun {
            StreamError::NoReplica(format!("none was ready within {} s", self.limits.resume.as_secs()))
        } else {
            StreamError::Queue(waited.as_secs())
        };
        self.fail(error)
    }

    fn fail(&mut self, error: StreamError) -> Item {
        self.cancel();
        Item::Event(StreamEvent::Failed(error))
    }

    fn cancel(&mut self) {
        if let Place::Running { driver, ticket, .. } = std::mem::replace(&mut self.place, Place::Done) {
            driver.cancel(ticket);
        }
        self.slot = None;
    }
}

impl Drop for Course {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl std::fmt::Debug for Course {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Course").field("deployment", &self.deployment).finish_non_exhaustive()
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
