//! The owner of a replica: opens its session, runs the scheduler, and hands sequences back when the session is lost.
//!
//! Between an edge and an owner there are sequences one way and their events the other, and nothing else; the edge keeps
//! what is needed to submit a sequence again. Here is the owner's side, and the edge's where both are in one process.

mod adapters;
mod drafts;
mod masks;
mod prefixes;
mod sink;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use plan::{
    adapter::AdapterSource,
    fleet::{FleetDraft, ReplicaLimits},
    step::{Pooled, Sampling, Want, WantKind},
};
use tokio::{
    sync::{Notify, OnceCell},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::{
    adapters::Adapters,
    drafts::{DraftEvent, Drafts},
    masks::{Made, Masks},
};
pub(crate) use self::{
    drafts::DraftModel,
    prefixes::{PrefixDelta, Prefixes},
    sink::{EventSink, SequenceEvent, StreamSink},
};
use super::{Replica, ReplicaError, Session};
use crate::{
    fleet::Presence,
    grammar::Grammars,
    scheduler::{BlockHash, Counters, EventKind, Scheduler, SchedulerOptions, Submission},
};

/// First and longest pause between attempts to open a session. It grows with what fails, not while workers load: they are asked again at the first.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Ticket of the one-token sequence that proves a session.
const PROBE: u64 = 0;

enum Command {
    Submit(u64, Box<Submission>, EventSink),
    Cancel(u64),
    /// Hand back every sequence.
    Release,
}

/// Commands not taken yet. At most one submission per queue slot or live stream, one cancellation per live sequence.
#[derive(Default)]
struct Inbox {
    open: bool,
    commands: Vec<Command>,
}

/// The edge's side of an owner.
pub(crate) struct Owner {
    inbox: Mutex<Inbox>,
    wake: Notify,
    tickets: AtomicU64,
    /// Sequences submitted and not ended.
    live: AtomicUsize,
    pub(crate) queued: AtomicUsize,
    pub(crate) running: AtomicUsize,
    kv_used: AtomicU32,
    pub(crate) steps: AtomicU64,
    pub(crate) failures: AtomicU64,
    last_failure: Mutex<Option<String>>,
    counters: Mutex<Counters>,
    prefixes: Mutex<Prefixes>,
    /// Adapters that its workers are to have.
    wanted: Mutex<Vec<AdapterSource>>,
    /// Most tokens drafted for a sequence in a step.
    prompt_lookup: AtomicUsize,
    /// The model that guesses for it.
    draft: Mutex<Option<DraftModel>>,
    /// Sessions of it that ended in a failure.
    pub(crate) draft_failures: AtomicU64,
    /// How it is doing in the present session, where there is one.
    draft_presence: Mutex<Option<Presence>>,
    /// How they are doing in the present session, by numerics id.
    present: Mutex<HashMap<String, Presence>>,
}

impl Owner {
    pub(crate) fn new() -> Self {
        Self {
            inbox: Mutex::default(),
            wake: Notify::new(),
            tickets: AtomicU64::new(PROBE + 1),
            live: AtomicUsize::new(0),
            queued: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            kv_used: AtomicU32::new(0),
            steps: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            last_failure: Mutex::default(),
            counters: Mutex::default(),
            prefixes: Mutex::default(),
            wanted: Mutex::default(),
            prompt_lookup: AtomicUsize::new(0),
            draft: Mutex::default(),
            draft_failures: AtomicU64::new(0),
            draft_presence: Mutex::default(),
            present: Mutex::default(),
        }
    }

    /// A number for a sequence to be submitted.
    pub(crate) fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::Relaxed)
    }

    /// Submits a sequence; gives the sink back when the replica is not ready.
    pub(crate) fn submit(&self, ticket: u64, submission: Submission, sink: EventSink) -> Result<(), EventSink> {
        {
            let mut inbox = lock(&self.inbox);
            if !inbox.open {
                return Err(sink);
            }
            self.live.fetch_add(1, Ordering::Relaxed);
            inbox.commands.push(Command::Submit(ticket, Box::new(submission), sink));
        }
        self.wake.notify_one();
        Ok(())
    }

    /// Drops a sequence with the next step.
    pub(crate) fn cancel(&self, ticket: u64) {
        self.command(Command::Cancel(ticket));
    }

    /// Hands every sequence back.
    pub(crate) fn release(&self) {
        self.command(Command::Release);
    }

    fn command(&self, command: Command) {
        let mut inbox = lock(&self.inbox);
        if inbox.open {
            inbox.commands.push(command);
            drop(inbox);
            self.wake.notify_one();
        }
    }

    /// Whether a token came out of the last stage in the present session.
    pub(crate) fn ready(&self) -> bool {
        lock(&self.inbox).open
    }

    /// Sequences submitted and not ended.
    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    pub(crate) fn kv_used(&self) -> f32 {
        f32::from_bits(self.kv_used.load(Ordering::Relaxed))
    }

    pub(crate) fn last_failure(&self) -> Option<String> {
        lock(&self.last_failure).clone()
    }

    pub(crate) fn counters(&self) -> Counters {
        *lock(&self.counters)
    }

    /// Says which adapters its workers are to have from now on.
    pub(crate) fn want(&self, adapters: Vec<AdapterSource>) {
        let mut wanted = lock(&self.wanted);
        if *wanted != adapters {
            *wanted = adapters;
            drop(wanted);
            self.wake.notify_one();
        }
    }

    /// Says how many tokens are drafted at most for a sequence in a step, from the next step on.
    pub(crate) fn set_prompt_lookup(&self, most: usize) {
        self.prompt_lookup.store(most, Ordering::Relaxed);
    }

    /// Says which model guesses for it, if any; `connect` makes what drives it, where it is another than before.
    pub(crate) fn set_draft(&self, spec: Option<&FleetDraft>, connect: impl FnOnce() -> Option<Arc<dyn Replica>>) {
        let mut draft = lock(&self.draft);
        if draft.as_ref().map(|draft| &draft.spec) != spec {
            *draft = spec.and_then(|spec| Some(DraftModel::new(spec.clone(), connect()?)));
            drop(draft);
            self.wake.notify_one();
        }
    }

    /// How the draft model is doing, where there is one; nothing is known of it while there is no session.
    pub(crate) fn draft(&self) -> Option<Presence> {
        let told = lock(&self.draft).is_some();
        told.then(|| lock(&self.draft_presence).clone().unwrap_or(Presence::Loading))
    }

    /// How an adapter is doing here.
    pub(crate) fn adapter(&self, numerics: &str) -> Presence {
        lock(&self.present).get(numerics).cloned().unwrap_or(Presence::Loading)
    }

    /// How many blocks of a prefix are cached here.
    pub(crate) fn cached_blocks(&self, hashes: &[BlockHash]) -> usize {
        lock(&self.prefixes).cached(hashes)
    }

    /// How the prefix cache changed since `cursor`, and the cursor for the next time.
    pub(crate) fn prefixes_since(&self, cursor: u64) -> (PrefixDelta, u64) {
        lock(&self.prefixes).since(cursor)
    }

    fn take(&self) -> Vec<Command> {
        std::mem::take(&mut lock(&self.inbox).commands)
    }

    fn set_open(&self, open: bool) -> Vec<Command> {
        let mut inbox = lock(&self.inbox);
        inbox.open = open;
        if open { Vec::new() } else { std::mem::take(&mut inbox.commands) }
    }
}

/// Nothing panics while one of these is held; a poisoned one is as good as before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The owner's task: what it needs for as long as the replica is in the fleet.
pub(crate) struct Drive {
    pub(crate) name: String,
    pub(crate) owner: Arc<Owner>,
    pub(crate) replica: Arc<dyn Replica>,
    pub(crate) limits: ReplicaLimits,
    pub(crate) revision: Vec<u8>,
    pub(crate) stop: CancellationToken,
    /// Called when readiness changes.
    pub(crate) changed: Box<dyn Fn() + Send + Sync>,
    /// Of the replica's model; read when a constrained sequence comes whose grammar is not compiled.
    pub(crate) grammars: Arc<OnceCell<Grammars>>,
}

impl Drive {
    /// Opens sessions and runs sequences until stopped. Every sequence is handed back in the end.
    pub(crate) async fn run(self) {
        let mut pause = BACKOFF.0;
        loop {
            let error = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                opened = self.replica.open() => match opened {
                    Ok(session) => {
                        let started = Instant::now();
                        let error = self.serve(session).await;
                        if started.elapsed() > BACKOFF.1 {
                            pause = BACKOFF.0;
                        }
                        error
                    }
                    Err(error) => Some(error),
                },
            };
            let Some(error) = error else { return };
            self.note(&error);
            if matches!(error, ReplicaError::Loading { .. }) {
                pause = BACKOFF.0;
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(BACKOFF.1),
            }
        }
    }

    fn note(&self, error: &ReplicaError) {
        let text = error.to_string();
        let mut last = lock(&self.owner.last_failure);
        let again = last.as_deref() == Some(&text);
        if matches!(error, ReplicaError::Loading { .. }) || again {
            debug!(replica = self.name, error = text, "session not opened");
        } else {
            warn!(replica = self.name, reason = error.reason(), error = text, "session lost or not opened");
        }
        *last = Some(text);
    }

    /// Runs a session until it fails (the reason) or the owner is stopped (`None`).
    async fn serve(&self, session: Session) -> Option<ReplicaError> {
        let options = SchedulerOptions { limits: self.limits.clone(), stages: self.replica.stages(), revision: self.revision.clone() };
        let before = self.owner.counters();
        let (scheduler, adapters) = (Scheduler::new(options), Adapters::default());
        let masks = Masks::new(self.replica.clone(), self.grammars.clone());
        let drafts = Drafts::new(self.replica.clone());
        let mut run = Run { drive: self, scheduler, adapters, masks, drafts, sinks: HashMap::new(), session, before, proven: false };
        let result = run.run().await;
        let was_ready = run.proven;
        run.hand_back();
        if result.is_some() && was_ready {
            self.owner.failures.fetch_add(1, Ordering::Relaxed);
        }
        (self.changed)();
        result
    }
}

/// One session of an owner.
struct Run<'a> {
    drive: &'a Drive,
    scheduler: Scheduler,
    adapters: Adapters,
    masks: Masks,
    drafts: Drafts,
    sinks: HashMap<u64, EventSink>,
    session: Session,
    /// Counters of the sessions before.
    before: Counters,
    /// A token came out, or a vector.
    proven: bool,
}

impl Run<'_> {
    async fn run(&mut self) -> Option<ReplicaError> {
        let owner = &self.drive.owner;
        let probe = if self.drive.limits.is_encoder() {
            let vector = Want { offset: 0, kind: WantKind::Pooled(Pooled::HIDDEN) };
            Submission::encode(Arc::new([0]), 0, Arc::new([vector]))
        } else {
            Submission::generate(Arc::new([0]), Sampling::default(), 1, Arc::new([]))
        };
        if let Err(detail) = self.scheduler.submit(PROBE, probe) {
            return Some(ReplicaError::Protocol { worker: self.drive.name.clone(), detail });
        }
        // When that came which events of the present round are from.
        let mut at = Instant::now();
        loop {
            for command in owner.take() {
                self.obey(command);
            }
            self.scheduler.set_prompt_lookup(owner.prompt_lookup.load(Ordering::Relaxed));
            let draft = lock(&owner.draft).clone();
            if self.drafts.follow(draft) {
                self.scheduler.set_draft_model(None);
                self.publish_draft(None);
            }
            // Tokens go before the next step, unless a stage would wait for it.
            if self.scheduler.in_flight() >= self.drive.replica.stages() {
                self.dispatch(at);
            }
            while let Some(step) = self.scheduler.next_step() {
                if self.session.steps.try_send(step).is_err() {
                    return Some(self.closing_error().await);
                }
            }
            while let Some(step) = self.scheduler.next_draft_step() {
                self.drafts.send(step);
            }
            self.dispatch(at);
            self.follow_adapters();
            self.publish();
            let again = self.adapters.again();
            tokio::select! {
                biased;
                () = self.drive.stop.cancelled() => return None,
                reply = self.session.replies.recv() => {
                    if let Some(Ok(reply)) = &reply {
                        at = reply.arrived;
                    }
                    let mut next = Some(reply);
                    while let Some(reply) = next {
                        match reply {
                            Some(Ok(reply)) => {
                                owner.steps.fetch_add(1, Ordering::Relaxed);
                                if let Err(error) = self.scheduler.reply(reply.step, reply.outputs) {
                                    let (worker, detail) = (self.drive.name.clone(), error.to_string());
                                    return Some(ReplicaError::Protocol { worker, detail });
                                }
                            }
                            Some(Err(error)) => return Some(error),
                            None => return Some(ReplicaError::Closed),
                        }
                        next = self.session.replies.try_recv().ok().map(Some);
                    }
                }
                Some(answer) = self.session.adapters.answers.recv() => {
                    at = Instant::now();
                    self.adapters.take(answer, &mut self.scheduler);
                    self.publish_adapters();
                }
                Some(made) = self.masks.next() => {
                    at = Instant::now();
                    self.take_mask(made);
                }
                event = self.drafts.next() => {
                    at = Instant::now();
                    self.take_draft(event);
                }
                () = owner.wake.notified() => at = Instant::now(),
                () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => at = Instant::now(),
            }
        }
    }

    fn follow_adapters(&mut self) {
        let wanted = lock(&self.drive.owner.wanted).clone();
        if self.adapters.follow(&wanted, &mut self.scheduler, &self.session.adapters.orders) {
            self.publish_adapters();
        }
    }

    /// Tells edges how the adapters are doing.
    fn publish_adapters(&self) {
        *lock(&self.drive.owner.present) = self.adapters.presence();
        (self.drive.changed)();
    }

    /// The session takes no more steps: the error it left, if any.
    async fn closing_error(&mut self) -> ReplicaError {
        while let Some(reply) = self.session.replies.recv().await {
            if let Err(error) = reply {
                return error;
            }
        }
        ReplicaError::Closed
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(ticket, submission, sink) => {
                if sink.is_closed() {
                    self.end(1);
                    return;
                }
                self.sinks.insert(ticket, sink);
                match (&submission.constraint, &self.session.unmasked) {
                    (None, _) => self.admit(ticket, *submission),
                    (Some(_), None) => self.masks.begin(ticket, submission),
                    (Some(_), Some(why)) => {
                        let why = why.clone();
                        self.emit(ticket, EventKind::Failed(why), Instant::now());
                    }
                }
            }
            Command::Cancel(ticket) => {
                self.scheduler.cancel(ticket);
                self.masks.forget(ticket);
                let known = self.sinks.remove(&ticket).is_some();
                self.end(usize::from(known));
            }
            Command::Release => {
                for (ticket, sink) in std::mem::take(&mut self.sinks) {
                    self.scheduler.cancel(ticket);
                    self.masks.forget(ticket);
                    sink.release();
                    self.end(1);
                }
            }
        }
    }

    fn admit(&mut self, ticket: u64, submission: Submission) {
        if !submission.adapter.is_empty() && !self.scheduler.has_adapter(&submission.adapter) {
            // It came or went meanwhile; the edge looks again.
            self.masks.forget(ticket);
            if let Some(sink) = self.sinks.remove(&ticket) {
                sink.release();
                self.end(1);
            }
            return;
        }
        if let Err(message) = self.scheduler.submit(ticket, submission) {
            self.emit(ticket, EventKind::Failed(message), Instant::now());
        }
    }

    /// A mask was made, or cannot be.
    fn take_mask(&mut self, made: Made) {
        let Made { ticket, emitted, submission, result } = made;
        if let Some(submission) = submission {
            self.admit(ticket, *submission);
        }
        match result {
            Ok(mask) => self.scheduler.set_mask(ticket, emitted, mask),
            Err(message) => self.scheduler.refuse(ticket, message),
        }
    }

    /// Notes how the draft model is doing.
    fn publish_draft(&self, presence: Option<Presence>) {
        *lock(&self.drive.owner.draft_presence) = presence;
    }

    /// Something happened to the draft model's session.
    fn take_draft(&mut self, event: DraftEvent) {
        let replica = &self.drive.name;
        let error = match event {
            DraftEvent::Opened => {
                info!(replica, "draft model ready");
                self.scheduler.set_draft_model(self.drafts.spec());
                self.publish_draft(Some(Presence::Ready));
                return;
            }
            DraftEvent::Unfit(why) => {
                warn!(replica, why, "draft model cannot guess; sequences go on without it");
                self.publish_draft(Some(Presence::Failed(why)));
                return;
            }
            DraftEvent::Reply(reply) => match self.scheduler.draft_reply(reply.step, reply.outputs) {
                Ok(()) => return,
                Err(error) => {
                    let error = ReplicaError::Protocol { worker: FleetDraft::name(replica), detail: error.to_string() };
                    self.drafts.lose(&error);
                    error
                }
            },
            DraftEvent::Late => {
                warn!(replica, "draft model does not answer; sequences go on without it until it does");
                self.scheduler.go_on_without_drafts();
                return;
            }
            DraftEvent::Lost(error) => error,
        };
        if self.scheduler.has_draft_model() {
            self.scheduler.set_draft_model(None);
            self.publish_draft(Some(Presence::Failed(error.to_string())));
            self.drive.owner.draft_failures.fetch_add(1, Ordering::Relaxed);
            warn!(replica, reason = error.reason(), error = error.to_string(), "draft model lost; sequences go on without it");
        } else {
            debug!(replica, error = error.to_string(), "draft model's session not opened");
        }
    }

    fn end(&self, sequences: usize) {
        self.drive.owner.live.fetch_sub(sequences, Ordering::Relaxed);
    }

    /// Passes on what happened at `at`.
    fn dispatch(&mut self, at: Instant) {
        for event in self.scheduler.take_events() {
            if event.ticket == PROBE {
                if matches!(event.kind, EventKind::Finished(_)) {
                    self.proven = true;
                    self.drive.owner.set_open(true);
                    *lock(&self.drive.owner.last_failure) = None;
                    info!(replica = self.drive.name, "replica ready");
                    (self.drive.changed)();
                }
            } else {
                if let EventKind::Token { id, .. } = &event.kind {
                    self.masks.follow(event.ticket, *id);
                }
                self.emit(event.ticket, event.kind, at);
            }
        }
    }

    fn emit(&mut self, ticket: u64, kind: EventKind, at: Instant) {
        let last = matches!(kind, EventKind::Finished(_) | EventKind::Failed(_));
        if last {
            self.masks.forget(ticket);
        }
        if let Some(sink) = self.sinks.get_mut(&ticket) {
            sink.send(kind, at);
            if last {
                self.sinks.remove(&ticket);
                self.end(1);
            }
        }
    }

    fn publish(&mut self) {
        let owner = &self.drive.owner;
        owner.queued.store(self.scheduler.queued(), Ordering::Relaxed);
        owner.running.store(self.scheduler.running(), Ordering::Relaxed);
        owner.kv_used.store(self.scheduler.kv_used().to_bits(), Ordering::Relaxed);
        *lock(&owner.counters) = self.before + self.scheduler.counters();
        let changes = self.scheduler.take_prefix_changes();
        if !changes.is_empty() {
            lock(&owner.prefixes).apply(changes);
        }
    }

    /// The session is over: nothing more is taken, and every sequence goes back to its stream.
    fn hand_back(mut self) {
        let owner = &self.drive.owner;
        let left = owner.set_open(false);
        // Tokens that came with the last replies go first.
        self.dispatch_last();
        for command in left {
            if let Command::Submit(ticket, _, sink) = command {
                self.sinks.insert(ticket, sink);
            }
        }
        self.end(self.sinks.len());
        for (_, sink) in self.sinks.drain() {
            sink.release();
        }
        for value in [&owner.queued, &owner.running] {
            value.store(0, Ordering::Relaxed);
        }
        owner.kv_used.store(0, Ordering::Relaxed);
        lock(&owner.prefixes).clear();
        lock(&owner.present).clear();
        *lock(&owner.draft_presence) = None;
    }

    fn dispatch_last(&mut self) {
        for event in self.scheduler.take_events() {
            if event.ticket != PROBE {
                self.emit(event.ticket, event.kind, Instant::now());
            }
        }
    }
}
