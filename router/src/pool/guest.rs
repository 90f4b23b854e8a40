//! Another router's sequences on the replicas that this one drives.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::pool::{
    self as wire, EdgeMessage, OwnerMessage, ReplicaStatus, Submit, Welcome, edge_message::Message as Said, owner_message::Message,
};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::{Pool, SILENT, TICK, VERSIONS, convert, lock};
use crate::{
    fleet::{Driver, View},
    replica::owner::{EventSink, Owner},
    scheduler::EventKind,
};

/// Longest wait for the first message.
const HELLO: Duration = Duration::from_secs(1);

type Outgoing = mpsc::Sender<Result<OwnerMessage, Status>>;
/// The caller's sequences, by its tickets.
type Sequences = Arc<Mutex<HashMap<u64, Sequence>>>;

/// A sequence of the caller, where it is here.
struct Sequence {
    replica: String,
    owner: Arc<Owner>,
    ticket: u64,
}

/// The way to the router whose sequence it is.
pub(crate) struct PeerSink {
    ticket: u64,
    outgoing: Outgoing,
    broken: CancellationToken,
    sequences: Sequences,
}

impl std::fmt::Debug for PeerSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerSink").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl PeerSink {
    pub(crate) fn send(&self, kind: &EventKind) {
        self.say(convert::encode_event(self.ticket, kind));
    }

    pub(crate) fn release(self) {
        self.say(convert::released(self.ticket));
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.broken.is_cancelled()
    }

    fn say(&self, event: wire::Event) {
        say(&self.outgoing, &self.broken, Message::Event(event));
    }
}

impl Drop for PeerSink {
    fn drop(&mut self) {
        lock(&self.sequences).remove(&self.ticket);
    }
}

/// Queues a message; with no room left the stream is ended, and with it the caller's sequences.
fn say(outgoing: &Outgoing, broken: &CancellationToken, message: Message) {
    if outgoing.try_send(Ok(OwnerMessage { message: Some(message) })).is_err() {
        broken.cancel();
    }
}

/// Serves one router's stream until it ends.
pub(super) async fn serve(
    pool: Arc<Pool>,
    view: watch::Receiver<Arc<View>>,
    mut incoming: Streaming<EdgeMessage>,
    outgoing: Outgoing,
    broken: CancellationToken,
) {
    let from = match timeout(HELLO, welcome(&pool, &mut incoming)).await {
        Ok(Ok(from)) => from,
        Ok(Err(status)) => {
            warn!(%status, "a stream to this router is refused");
            // The queue is empty, so there is room.
            let _ = outgoing.try_send(Err(status));
            return;
        }
        Err(_) => return,
    };
    info!(router = from, "a router of the pool joined");
    let guest = Guest { pool, view, from, outgoing, broken, sequences: Sequences::default(), told: HashMap::new() };
    let from = guest.from.clone();
    guest.run(incoming).await;
    info!(router = from, "a router of the pool left");
}

/// Who calls, once it is clear that it means this router and speaks its version.
async fn welcome(pool: &Pool, incoming: &mut Streaming<EdgeMessage>) -> Result<String, Status> {
    let Some(EdgeMessage { message: Some(Said::Hello(hello)) }) = incoming.message().await? else {
        return Err(Status::invalid_argument("a stream begins with a hello"));
    };
    if hello.to != pool.name {
        return Err(Status::failed_precondition(format!("this is router {}, and not {}", pool.name, hello.to)));
    }
    if hello.version_min > VERSIONS.1 || hello.version_max < VERSIONS.0 {
        let (min, max) = (hello.version_min, hello.version_max);
        return Err(Status::failed_precondition(format!("versions {min} to {max} came, expected one of {VERSIONS:?}")));
    }
    Ok(hello.from)
}

/// One router that has sequences here.
struct Guest {
    pool: Arc<Pool>,
    view: watch::Receiver<Arc<View>>,
    from: String,
    outgoing: Outgoing,
    broken: CancellationToken,
    sequences: Sequences,
    /// How far the caller knows each replica's prefix cache.
    told: HashMap<String, (Arc<Owner>, u64)>,
}

impl Guest {
    async fn run(mut self, mut incoming: Streaming<EdgeMessage>) {
        self.say(Message::Welcome(Welcome { version: VERSIONS.1, name: self.pool.name.clone() }));
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = 0;
        let reason = loop {
            tokio::select! {
                message = incoming.message() => {
                    silent = 0;
                    match message {
                        Ok(Some(EdgeMessage { message: Some(message) })) => if let Err(status) = self.obey(message) {
                            break status.to_string();
                        },
                        Ok(Some(EdgeMessage { message: None })) => {}
                        Ok(None) => break "it closed the stream".to_owned(),
                        Err(status) => break status.to_string(),
                    }
                }
                changed = self.view.changed() => match changed {
                    Ok(()) => self.say_status(),
                    Err(_) => break "this router stops".to_owned(),
                },
                _ = ticks.tick() => {
                    silent += 1;
                    if silent > SILENT {
                        break format!("it has been silent for {} ms", (TICK * SILENT).as_millis());
                    }
                    self.say_status();
                    self.say_prefixes();
                }
                () = self.broken.cancelled() => break "it does not take what it is sent, or this router stops".to_owned(),
            }
        };
        debug!(router = self.from, reason, "a stream to this router ended");
        self.broken.cancel();
        // Taken out first: each sink that is dropped looks for itself there.
        let sequences = std::mem::take(&mut *lock(&self.sequences));
        for sequence in sequences.into_values() {
            sequence.owner.cancel(sequence.ticket);
        }
    }

    fn say(&self, message: Message) {
        say(&self.outgoing, &self.broken, message);
    }

    fn obey(&self, message: Said) -> Result<(), Status> {
        match message {
            Said::Submit(submit) => self.submit(submit)?,
            Said::Cancel(cancel) => {
                let sequence = lock(&self.sequences).remove(&cancel.ticket);
                if let Some(sequence) = sequence {
                    sequence.owner.cancel(sequence.ticket);
                }
            }
            Said::Announcement(announcement) => {
                let announcement = convert::decode_announcement(announcement);
                if let Err(error) = self.pool.announce(announcement, true) {
                    // The other router's fleet state may be another one.
                    debug!(router = self.from, %error, "an announcement passed on is not taken");
                }
            }
            Said::Alive(_) => {}
            Said::Hello(_) => return Err(Status::invalid_argument("a hello in the midst of a stream")),
        }
        Ok(())
    }

    /// Submits a sequence, or hands it back at once where its replica is not driven here or not ready.
    fn submit(&self, submit: Submit) -> Result<(), Status> {
        let (theirs, replica) = (submit.ticket, submit.replica.clone());
        let submission = convert::decode_submission(submit).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let view = self.view.borrow().clone();
        let sink =
            PeerSink { ticket: theirs, outgoing: self.outgoing.clone(), broken: self.broken.clone(), sequences: self.sequences.clone() };
        let sink = match view.member(&replica).map(|m| &m.driver) {
            Some(Driver::Here(owner)) => {
                let ticket = owner.ticket();
                // Before it runs, since its end looks for it there.
                lock(&self.sequences).insert(theirs, Sequence { replica, owner: owner.clone(), ticket });
                match owner.submit(ticket, submission, EventSink::Peer(sink)) {
                    Ok(()) => return Ok(()),
                    Err(sink) => sink,
                }
            }
            _ => EventSink::Peer(sink),
        };
        // What was not ready is told first, or the sequence would come again at once.
        self.say_status();
        sink.release();
        Ok(())
    }

    fn say_status(&self) {
        let view = self.view.borrow().clone();
        let mut yours: HashMap<String, u32> = HashMap::new();
        for sequence in lock(&self.sequences).values() {
            *yours.entry(sequence.replica.clone()).or_default() += 1;
        }
        let members = view.deployments.iter().flat_map(|d| d.members.iter().map(move |m| (d, m)));
        let driven = members.filter(|(_, m)| m.driver.is_here()).map(|(d, m)| {
            let condition = m.driver.condition();
            ReplicaStatus {
                replica: m.spec.name.clone(),
                ready: m.driver.ready(),
                queued: condition.queued as u32,
                running: condition.running as u32,
                live: m.live() as u32,
                yours: yours.get(&m.spec.name).copied().unwrap_or_default(),
                kv_used: condition.kv_used,
                last_failure: condition.last_failure.unwrap_or_default(),
                adapters: m.adapters(&d.spec).into_iter().map(convert::encode_presence).collect(),
            }
        });
        let ending = view.ending.iter().map(|name| ReplicaStatus { replica: name.clone(), ..ReplicaStatus::default() });
        let (term, number) = self.pool.store.number();
        self.say(Message::Status(wire::Status { term, number, leaving: self.pool.leaving(), replicas: driven.chain(ending).collect() }));
    }

    fn say_prefixes(&mut self) {
        let view = self.view.borrow().clone();
        let mut told = HashMap::new();
        for member in view.deployments.iter().flat_map(|d| &d.members) {
            let Driver::Here(owner) = &member.driver else { continue };
            let before = self.told.get(&member.spec.name).filter(|(o, _)| Arc::ptr_eq(o, owner)).map_or(0, |(_, cursor)| *cursor);
            let (delta, cursor) = owner.prefixes_since(before);
            if !delta.is_empty() {
                self.say(Message::Prefixes(convert::encode_prefixes(&member.spec.name, &delta)));
            }
            told.insert(member.spec.name.clone(), (owner.clone(), cursor));
        }
        self.told = told;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_that_takes_nothing_is_let_go_and_its_sequence_forgotten() {
        let (outgoing, _messages) = mpsc::channel(1);
        let (broken, sequences) = (CancellationToken::new(), Sequences::default());
        let sequence = Sequence { replica: "r0".to_owned(), owner: Arc::new(Owner::new()), ticket: 1 };
        lock(&sequences).insert(7, sequence);
        let sink = PeerSink { ticket: 7, outgoing, broken: broken.clone(), sequences: sequences.clone() };
        sink.send(&EventKind::Started);
        assert!(!broken.is_cancelled(), "there was room for one");
        sink.send(&EventKind::Started);
        assert!(broken.is_cancelled() && sink.is_closed());
        drop(sink);
        assert!(lock(&sequences).is_empty());
    }
}
