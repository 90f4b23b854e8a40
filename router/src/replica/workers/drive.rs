//! Drives a session: steps to every worker, replies to the scheduler.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream};
use plan::{step::Step, worker::Epoch};
use proto::{
    convert::{decode_output, encode_load, encode_mask, encode_step},
    worker::{self as wire, Alive, Close, SessionReply, SessionRequest, session_reply, session_request::Message},
};
use tokio::{
    sync::mpsc::{self, OwnedPermit},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};
use tonic::Status;

use super::adapters::Loading;
use super::{
    ReplicaError, Workers,
    dial::Remote,
    open::{Line, Opened, failed},
    pace::{Pace, TICK, Trouble},
};
use crate::replica::{AdapterEnd, AdapterLine, AdapterOrder, Session, StepReply, WorkerTimes};

/// The first version of the protocol with adapters.
const ADAPTERS: u32 = 2;
/// The first version in which every rank of the last stage takes masks, which may cover fewer or more ids than the model has rows.
const MASKS: u32 = 3;
/// Ticks between two signs of life to workers: 200 ms, where 300 are asked for.
const ALIVE: u32 = 2;
/// Longest wait for workers to end a session that was closed.
const CLOSE: Duration = Duration::from_secs(1);
/// Ticks after which workers that all wait while a step is due have lost something: 5 s, far above any hop between stages.
const LOST: u32 = 50;

/// Steps that the slowest worker may be behind the last one sent. The sampler's replies alone do not bound that: it waits for nobody in a step
/// without tokens.
fn behind(stages: usize) -> usize {
    2 * (stages + 1)
}

/// Messages that may wait for one worker beside those about adapters: the steps it is behind with a mask for each of a step's sequences, the
/// hello or close, and some signs of life.
fn needed(replica: &Workers) -> usize {
    behind(replica.stages) * (1 + replica.sequences) + 8
}

/// Messages that may wait for one worker.
pub(super) fn requests(replica: &Workers) -> usize {
    needed(replica) + 8
}

/// Starts the task of a session.
pub(super) fn start(replica: &Workers, opened: Opened) -> (Session, JoinHandle<()>) {
    let stages = replica.stages;
    let (steps, receive_steps) = mpsc::channel(stages + 1);
    // Every step in flight, and one error. Each step takes its reply's place along, so a place is always free, and steps wait while replies do.
    let (replies, receive_replies) = mpsc::channel(stages + 2);
    let versions: Vec<u32> = opened.lines.iter().map(|line| line.version).collect();
    let (requests, streams): (Vec<_>, Vec<_>) = opened.lines.into_iter().map(|Line { requests, replies, .. }| (requests, replies)).unzip();
    let (adapters, AdapterEnd { orders, answers }) = AdapterLine::new();
    let sampler = replica.sampler();
    let old = replica.workers.iter().zip(&versions).find(|(worker, version)| worker.stage + 1 == stages && **version < MASKS);
    let unmasked = old
        .map(|(worker, version)| format!("{} speaks version {version} of the protocol, constrained output needs {MASKS}", worker.name()));
    // The sampler's vocabulary product is most of a step and counts as one layer; elsewhere a stage's layers are alike.
    let layers = |worker: usize| if worker == sampler { 1 } else { replica.layers / stages };
    let watched = |(worker, requests): (usize, _)| Watched {
        remote: replica.workers[worker].clone(),
        requests,
        pace: Pace::new(layers(worker)),
        answered: 0,
        version: versions[worker],
    };
    let driver = Driver {
        epoch: opened.epoch,
        sampler,
        workers: requests.into_iter().enumerate().map(watched).collect(),
        behind: behind(stages),
        flight: VecDeque::new(),
        sent: 0,
        idle: 0,
        replies,
        places: VecDeque::new(),
        loading: Loading::new(answers),
        room: needed(replica),
        times: replica.times.clone(),
    };
    let events = streams.into_iter().enumerate().map(|(worker, stream)| {
        let end = stream::once(std::future::ready(None));
        Box::pin(stream.map(Some).chain(end).map(move |event| (worker, event)))
    });
    let driver = tokio::spawn(driver.run(receive_steps, orders, stream::select_all(events)));
    (Session { steps, replies: receive_replies, adapters, unmasked }, driver)
}

/// What came from a worker: a reply, an error, or its end.
type Event = (usize, Option<Result<SessionReply, Status>>);

struct Watched {
    remote: Arc<Remote>,
    requests: mpsc::Sender<SessionRequest>,
    pace: Pace,
    /// Its last answered step.
    answered: u64,
    /// Of the protocol.
    version: u32,
}

/// A step that not every worker has answered.
struct Due {
    id: u64,
    tokens: usize,
}

type Reply = Result<StepReply, ReplicaError>;
type Place = OwnedPermit<Reply>;

struct Driver {
    epoch: Epoch,
    /// Index of the worker whose replies are the session's.
    sampler: usize,
    workers: Vec<Watched>,
    /// Most steps in flight.
    behind: usize,
    /// Steps that the slowest worker has not answered.
    flight: VecDeque<Due>,
    /// Number of the last step.
    sent: u64,
    /// Ticks for which steps were due and every worker waited for its input.
    idle: u32,
    replies: mpsc::Sender<Reply>,
    /// For the replies of steps that the sampler has not answered.
    places: VecDeque<Place>,
    loading: Loading,
    /// Places of a worker's queue that are kept for other messages than those about adapters.
    room: usize,
    /// Where the workers' time went.
    times: Arc<Mutex<Vec<WorkerTimes>>>,
}

impl Driver {
    async fn run(
        mut self,
        mut steps: mpsc::Receiver<Step>,
        mut orders: mpsc::Receiver<AdapterOrder>,
        mut events: impl Stream<Item = Event> + Unpin,
    ) {
        let Ok(place) = self.replies.clone().try_reserve_owned() else { return self.close(events).await };
        match self.drive(&mut steps, &mut orders, &mut events).await {
            Ok(()) => self.close(events).await,
            Err(error) => drop(place.send(Err(error))),
        }
    }

    /// Until the scheduler drops the session.
    async fn drive(
        &mut self,
        steps: &mut mpsc::Receiver<Step>,
        orders: &mut mpsc::Receiver<AdapterOrder>,
        events: &mut (impl Stream<Item = Event> + Unpin),
    ) -> Result<(), ReplicaError> {
        let mut ticks = interval(TICK);
        // A tick that was missed is not made up for: see `pace`.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut number = 0;
        loop {
            tokio::select! {
                biased;
                event = events.next() => match event {
                    Some((worker, event)) => self.take(worker, event)?,
                    None => return Err(ReplicaError::Closed),
                },
                step = next(steps, self.replies.clone()), if self.flight.len() < self.behind => match step {
                    Some((step, place)) => self.send(&step, place)?,
                    None => return Ok(()),
                },
                Some(order) = orders.recv(), if self.workers.iter().all(|w| w.requests.capacity() > self.room) => self.order(order)?,
                _ = ticks.tick() => {
                    number += 1;
                    self.tick(number)?;
                }
                () = self.replies.closed() => return Ok(()),
            }
        }
    }

    fn send(&mut self, step: &Step, place: Place) -> Result<(), ReplicaError> {
        if step.id != self.sent + 1 {
            let detail = format!("step {} was to be sent after step {}", step.id, self.sent);
            return Err(ReplicaError::Protocol { worker: "this router".into(), detail });
        }
        self.sent = step.id;
        self.places.push_back(place);
        self.flight.push_back(Due { id: step.id, tokens: step.tokens() });
        let message = SessionRequest { message: Some(Message::Step(encode_step(self.epoch, step))) };
        for worker in &self.workers {
            // It holds every step in flight, so a worker for which it is full has stopped reading.
            let sent = worker.requests.try_send(message.clone());
            sent.map_err(|e| worker.remote.lost(format!("it takes no steps: {}", full_or_closed(&e))))?;
        }
        // Every rank of the last stage: where few tokens are allowed, none computes the others' logits.
        let last = self.workers[self.sampler].remote.stage;
        for (sequence, mask) in &step.masks {
            let message = SessionRequest { message: Some(Message::Mask(encode_mask(self.epoch, step.id, *sequence, mask))) };
            for worker in self.workers.iter().filter(|worker| worker.remote.stage == last) {
                let sent = worker.requests.try_send(message.clone());
                sent.map_err(|e| worker.remote.lost(format!("it takes no masks: {}", full_or_closed(&e))))?;
            }
        }
        Ok(())
    }

    /// Passes an order about an adapter on to every worker.
    fn order(&mut self, order: AdapterOrder) -> Result<(), ReplicaError> {
        let message = match order {
            AdapterOrder::Load { slot, adapter } => {
                if let Some(old) = self.workers.iter().find(|w| w.version < ADAPTERS) {
                    let why = format!("{} speaks version {} of the protocol, adapters need {ADAPTERS}", old.remote.name(), old.version);
                    self.loading.refused(slot, why);
                    return Ok(());
                }
                self.loading.begin(slot, self.workers.len());
                Message::LoadAdapter(encode_load(slot, &adapter))
            }
            // A worker of a version without adapters has none.
            AdapterOrder::Unload { .. } if self.workers.iter().any(|w| w.version < ADAPTERS) => return Ok(()),
            AdapterOrder::Unload { slot } => Message::UnloadAdapter(wire::UnloadAdapter { slot }),
        };
        for worker in &self.workers {
            let sent = worker.requests.try_send(SessionRequest { message: Some(message.clone()) });
            sent.map_err(|e| worker.remote.lost(format!("it takes no adapters: {}", full_or_closed(&e))))?;
        }
        Ok(())
    }

    fn take(&mut self, worker: usize, event: Option<Result<SessionReply, Status>>) -> Result<(), ReplicaError> {
        let watched = &mut self.workers[worker];
        watched.pace.heard();
        let reply = match event {
            Some(Ok(reply)) => reply.message,
            Some(Err(status)) => return Err(watched.remote.refused(&status)),
            None => return Err(watched.remote.lost("it ended the session")),
        };
        match reply {
            Some(session_reply::Message::Step(reply)) => self.answered(worker, reply),
            Some(session_reply::Message::Heartbeat(heartbeat)) => {
                watched.pace.beat(heartbeat);
                Ok(())
            }
            Some(session_reply::Message::Failure(failure)) => Err(failed(&watched.remote, failure)),
            Some(session_reply::Message::Adapter(reply)) => {
                let failure = Some(reply.failure).filter(|failure| !failure.is_empty());
                let failure = failure.map(|failure| format!("{}: {failure}", watched.remote.name()));
                self.loading.answered(worker, reply.slot, failure).map_err(|detail| self.workers[worker].remote.protocol(detail))
            }
            Some(session_reply::Message::Welcome(_)) => Err(watched.remote.protocol("it welcomes the session again")),
            None => Err(watched.remote.protocol("a message of no known kind came")),
        }
    }

    fn answered(&mut self, worker: usize, reply: wire::StepReply) -> Result<(), ReplicaError> {
        let arrived = Instant::now();
        let watched = &mut self.workers[worker];
        let expected = watched.answered + 1;
        if reply.step != expected || expected > self.sent {
            return Err(watched.remote.protocol(format!("it answered step {}, expected {expected} of {}", reply.step, self.sent)));
        }
        watched.answered = expected;
        if let Some(timing) = reply.timing {
            let micros = |time: u32| Duration::from_micros(time.into());
            let (compute, collective) = (micros(timing.compute_us), micros(timing.collective_us));
            if let Some(due) = self.flight.iter().find(|d| d.id == expected) {
                watched.pace.answered(due.tokens, compute + collective);
            }
            if let Some(times) = self.times.lock().unwrap_or_else(PoisonError::into_inner).get_mut(worker) {
                times.steps += 1;
                times.compute += compute;
                times.collective += collective;
                times.link += micros(timing.link_us);
                times.wait += micros(timing.wait_us);
            }
        }
        if worker == self.sampler {
            let outputs = reply.outputs.into_iter().map(decode_output).collect::<Result<_, _>>();
            let outputs = outputs.map_err(|e| watched.remote.protocol(e.to_string()))?;
            if let Some(place) = self.places.pop_front() {
                place.send(Ok(StepReply { step: expected, arrived, outputs }));
            }
        }
        let all = self.workers.iter().map(|w| w.answered).min().unwrap_or(0);
        while self.flight.front().is_some_and(|d| d.id <= all) {
            self.flight.pop_front();
        }
        Ok(())
    }

    fn tick(&mut self, number: u32) -> Result<(), ReplicaError> {
        for worker in &mut self.workers {
            // A worker may have answered a step and still compute a part of its logits for another one.
            let due = self.flight.iter().filter(|d| d.id > worker.answered || !worker.pace.waits()).map(|d| d.tokens).max();
            match worker.pace.tick(due) {
                None => {}
                Some(Trouble::Silent { millis }) => return Err(ReplicaError::Silent { worker: worker.remote.name(), millis }),
                Some(Trouble::Stuck { step, layer, millis }) => {
                    return Err(ReplicaError::Stuck { worker: worker.remote.name(), step, layer, millis });
                }
            }
            if number.is_multiple_of(ALIVE) {
                // Where it is full, there is something else to hear.
                let _ = worker.requests.try_send(SessionRequest { message: Some(Message::Alive(Alive {})) });
            }
        }
        if self.deadlocked() {
            let (worker, millis) = (self.workers[self.sampler].remote.name(), (TICK * self.idle).as_millis() as u64);
            let step = self.flight.front().map_or(0, |d| d.id);
            return Err(ReplicaError::Stuck { worker, step, layer: 0, millis });
        }
        Ok(())
    }

    /// Whether every worker waits for another one.
    fn deadlocked(&mut self) -> bool {
        let waits = !self.flight.is_empty() && self.workers.iter().all(|w| w.pace.waits());
        self.idle = if waits { self.idle + 1 } else { 0 };
        self.idle > LOST
    }

    /// Ends the session in good order: workers answer what is in flight, and are free for the next one.
    async fn close(self, mut events: impl Stream<Item = Event> + Unpin) {
        for worker in &self.workers {
            // Where it is full, the dropped stream ends the session too.
            let _ = worker.requests.try_send(SessionRequest { message: Some(Message::Close(Close {})) });
        }
        drop((self.workers, self.replies, self.places));
        let deadline = Instant::now() + CLOSE;
        while let Ok(Some(_)) = timeout_at(deadline, events.next()).await {}
    }
}

/// The next step, and the place of its reply; nothing when the session is dropped.
async fn next(steps: &mut mpsc::Receiver<Step>, replies: mpsc::Sender<Reply>) -> Option<(Step, Place)> {
    let place = replies.reserve_owned().await.ok()?;
    steps.recv().await.map(|step| (step, place))
}

fn full_or_closed<T>(error: &mpsc::error::TrySendError<T>) -> &'static str {
    match error {
        mpsc::error::TrySendError::Full(_) => "too many messages wait",
        mpsc::error::TrySendError::Closed(_) => "its stream is closed",
    }
}
