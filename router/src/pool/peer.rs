//! Another router of the pool, as an edge sees it: the replicas it drives, and the sequences that are there.

use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use plan::fleet::FleetRouter;
use proto::{
    convert::ConvertError,
    pool::{self as wire, edge_message::Message},
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{announced::Announcement, convert, lock, owners::Standing};
use crate::{
    fleet::{Condition, Presence},
    replica::owner::{EventSink, Prefixes, SequenceEvent},
    scheduler::{BlockHash, EventKind, Submission},
};

/// Another router.
pub(crate) struct Peer {
    pub(super) name: String,
    pub(super) address: String,
    /// Whose router it is, as in [`FleetRouter::pool`].
    pub(super) pool: String,
    /// It is not in the fleet state any more.
    pub(super) stop: CancellationToken,
    tickets: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// It was reached, or shown not to be there.
    known: bool,
    /// While it answers.
    line: Option<Line>,
    leaving: bool,
    /// Term and number of its fleet state.
    number: (u64, u64),
    replicas: HashMap<String, Distant>,
    sequences: HashMap<u64, Sequence>,
}

/// The way to it.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) outgoing: mpsc::Sender<wire::EdgeMessage>,
    /// It takes too little, or says what cannot be.
    pub(super) broken: CancellationToken,
}

/// A replica that it drives.
#[derive(Default)]
struct Distant {
    status: wire::ReplicaStatus,
    prefixes: Prefixes,
}

/// A sequence that is there.
struct Sequence {
    replica: String,
    sink: EventSink,
}

impl Line {
    /// Queues a message; with no room left, the line is broken.
    fn send(&self, message: Message) -> bool {
        let sent = self.outgoing.try_send(wire::EdgeMessage { message: Some(message) }).is_ok();
        if !sent {
            self.broken.cancel();
        }
        sent
    }
}

impl Peer {
    pub(super) fn new(router: &FleetRouter, stop: CancellationToken) -> Self {
        let (name, address, pool) = (router.name.clone(), router.address.clone(), router.pool.clone());
        Self { name, address, pool, stop, tickets: AtomicU64::new(1), state: Mutex::default() }
    }

    /// What counts for who drives `replica`.
    pub(super) fn standing(&self, replica: &str) -> Standing {
        let state = lock(&self.state);
        let holds = state.replicas.contains_key(replica);
        Standing { known: state.known, alive: state.line.is_some(), leaving: state.leaving, holds }
    }

    pub(crate) fn ready(&self, replica: &str) -> bool {
        lock(&self.state).ready(replica)
    }

    /// How an adapter is doing there.
    pub(crate) fn adapter(&self, replica: &str, numerics: &str) -> Presence {
        let state = lock(&self.state);
        let known = state.replicas.get(replica).and_then(|d| d.status.adapters.iter().find(|a| a.numerics == numerics));
        match known {
            Some(state) if state.ready => Presence::Ready,
            Some(state) if !state.failure.is_empty() => Presence::Failed(state.failure.clone()),
            _ => Presence::Loading,
        }
    }

    /// Sequences on a replica that are not this router's.
    pub(crate) fn others(&self, replica: &str) -> usize {
        let status = |d: &Distant| d.status.live.saturating_sub(d.status.yours) as usize;
        lock(&self.state).replicas.get(replica).map_or(0, status)
    }

    pub(crate) fn condition(&self, replica: &str) -> Condition {
        let condition = |Distant { status, .. }: &Distant| Condition {
            queued: status.queued as usize,
            running: status.running as usize,
            kv_used: status.kv_used,
            last_failure: Some(status.last_failure.clone()).filter(|f| !f.is_empty()),
        };
        lock(&self.state).replicas.get(replica).map(condition).unwrap_or_default()
    }

    pub(crate) fn cached_blocks(&self, replica: &str, hashes: &[BlockHash]) -> usize {
        lock(&self.state).replicas.get(replica).map_or(0, |d| d.prefixes.cached(hashes))
    }

    /// Submits a sequence; gives the sink back when the replica is not ready there.
    pub(crate) fn submit(&self, replica: &str, submission: &Submission, sink: EventSink) -> Result<u64, EventSink> {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let message = Message::Submit(convert::encode_submission(ticket, replica, submission));
        let mut state = lock(&self.state);
        if !state.ready(replica) || !state.line.as_ref().is_some_and(|line| line.send(message)) {
            return Err(sink);
        }
        // Its first event is taken under the same lock.
        state.sequences.insert(ticket, Sequence { replica: replica.to_owned(), sink });
        Ok(ticket)
    }

    /// Drops a sequence.
    pub(crate) fn cancel(&self, ticket: u64) {
        let mut state = lock(&self.state);
        if state.sequences.remove(&ticket).is_some()
            && let Some(line) = &state.line
        {
            line.send(Message::Cancel(wire::Cancel { ticket }));
        }
    }

    /// Hands back this router's sequences on a replica.
    pub(crate) fn release(&self, replica: &str) {
        let mut state = lock(&self.state);
        let tickets: Vec<u64> = state.sequences.iter().filter(|(_, s)| s.replica == replica).map(|(ticket, _)| *ticket).collect();
        for ticket in tickets {
            if let Some(line) = &state.line {
                line.send(Message::Cancel(wire::Cancel { ticket }));
            }
            if let Some(sequence) = state.sequences.remove(&ticket) {
                sequence.sink.release();
            }
        }
    }

    /// Passes on that a worker announced itself.
    pub(super) fn tell(&self, announcement: &Announcement) {
        if let Some(line) = &lock(&self.state).line {
            line.send(Message::Announcement(convert::encode_announcement(announcement)));
        }
    }

    /// Says that this router is there.
    pub(super) fn alive(&self) {
        if let Some(line) = &lock(&self.state).line {
            line.send(Message::Alive(wire::Alive {}));
        }
    }

    /// It answers.
    pub(super) fn joined(&self, line: Line) {
        let mut state = lock(&self.state);
        state.known = true;
        state.line = Some(line);
    }

    /// It does not answer (any more): its sequences go back to their streams. Whether it did before, and whether that was known.
    pub(super) fn lost(&self) -> (bool, bool) {
        let mut state = lock(&self.state);
        let before = std::mem::replace(&mut *state, State { known: true, ..State::default() });
        for (_, sequence) in before.sequences {
            sequence.sink.release();
        }
        (before.line.is_some(), before.line.is_some() || !before.known)
    }

    /// Term and number of its fleet state, as it said last.
    pub(super) fn number(&self) -> (u64, u64) {
        lock(&self.state).number
    }

    /// Takes its word for its replicas; whether that changes who drives what, or what is ready.
    pub(super) fn take_status(&self, status: wire::Status) -> bool {
        let mut state = lock(&self.state);
        state.number = (status.term, status.number);
        let mut changed = state.leaving != status.leaving;
        state.leaving = status.leaving;
        let mut before = std::mem::take(&mut state.replicas);
        for replica in status.replicas {
            let name = replica.replica.clone();
            let old = before.remove(&name);
            changed |= old.as_ref().is_none_or(|d| (d.status.ready, &d.status.adapters) != (replica.ready, &replica.adapters));
            let prefixes = old.map(|d| d.prefixes).unwrap_or_default();
            state.replicas.insert(name, Distant { status: replica, prefixes });
        }
        changed || !before.is_empty()
    }

    /// Takes its word for what a replica has cached.
    pub(super) fn take_prefixes(&self, prefixes: &wire::Prefixes) -> Result<(), ConvertError> {
        let delta = convert::decode_prefixes(prefixes)?;
        if let Some(distant) = lock(&self.state).replicas.get_mut(&prefixes.replica) {
            distant.prefixes.follow(delta);
        }
        Ok(())
    }

    /// Passes an event on to its sequence. Those of sequences that were cancelled meanwhile are dropped.
    pub(super) fn take_event(&self, event: wire::Event) -> Result<(), ConvertError> {
        let ticket = event.ticket;
        let event = convert::decode_event(event)?;
        let mut state = lock(&self.state);
        match event {
            SequenceEvent::Released => {
                if let Some(sequence) = state.sequences.remove(&ticket) {
                    sequence.sink.release();
                }
            }
            SequenceEvent::Happened(kind) => {
                let last = matches!(kind, EventKind::Finished(_) | EventKind::Failed(_));
                if let Some(sequence) = state.sequences.get_mut(&ticket) {
                    sequence.sink.send(kind, Instant::now());
                }
                if last {
                    state.sequences.remove(&ticket);
                }
            }
        }
        Ok(())
    }
}

impl State {
    fn ready(&self, replica: &str) -> bool {
        self.line.is_some() && self.replicas.get(replica).is_some_and(|d| d.status.ready)
    }
}
