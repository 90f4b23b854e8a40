//! Where a sequence's events go: to a stream of this router's own clients, or to the router whose client's it is.

use std::sync::Arc;

use tokio::{sync::mpsc, time::Instant};

use crate::{
    edge::stats::{Counted, QueueSlot, Stats},
    pool::PeerSink,
    scheduler::EventKind,
};

/// What an owner says about a sequence.
#[derive(Debug)]
pub(crate) enum SequenceEvent {
    /// It went on.
    Happened(EventKind),
    /// It is handed back: its replica was lost, drained or stopped. The last event.
    Released,
}

/// Where a sequence's events go.
#[derive(Debug)]
pub(crate) enum EventSink {
    /// To a stream of this router's clients.
    Stream(StreamSink),
    /// To another router.
    Peer(PeerSink),
}

/// The way to a stream in this process.
#[derive(Debug)]
pub(crate) struct StreamSink {
    /// Its capacity is what the sequence can say, so it is never full.
    pub(crate) events: mpsc::Sender<(SequenceEvent, Instant)>,
    /// Given back when the sequence enters a batch.
    pub(crate) slot: Option<QueueSlot>,
    /// When the stream was submitted.
    pub(crate) submitted: Instant,
    /// When its last token came.
    pub(crate) last_token: Option<Instant>,
    /// Of its deployment, and of the replica.
    pub(crate) stats: [Arc<Stats>; 2],
    /// It is on the replica for as long as the owner has this.
    pub(crate) _counted: Counted,
}

impl EventSink {
    /// Passes on an event that came at `at`. What nobody takes any more is dropped: the sequence's cancellation is on the way.
    pub(crate) fn send(&mut self, kind: EventKind, at: Instant) {
        match self {
            Self::Stream(sink) => sink.send(kind, at),
            Self::Peer(sink) => sink.send(&kind),
        }
    }

    /// Hands the sequence back.
    pub(crate) fn release(self) {
        match self {
            Self::Stream(sink) => {
                let _ = sink.events.try_send((SequenceEvent::Released, Instant::now()));
            }
            Self::Peer(sink) => sink.release(),
        }
    }

    /// Whether nobody takes events any more.
    pub(crate) fn is_closed(&self) -> bool {
        match self {
            Self::Stream(sink) => sink.events.is_closed(),
            Self::Peer(sink) => sink.is_closed(),
        }
    }

    /// The place in the queue of a sequence that was not taken.
    pub(crate) fn into_slot(self) -> Option<QueueSlot> {
        match self {
            Self::Stream(sink) => sink.slot,
            Self::Peer(_) => None,
        }
    }
}

impl StreamSink {
    fn send(&mut self, kind: EventKind, at: Instant) {
        match &kind {
            EventKind::Started => {
                self.slot = None;
                self.stats.iter().for_each(|stats| stats.started(at));
            }
            EventKind::Token { .. } => {
                for stats in &self.stats {
                    match self.last_token {
                        Some(last) => stats.token(at, Some(at - last)),
                        None => stats.first_token(at, at - self.submitted),
                    }
                }
                self.last_token = Some(at);
            }
            _ => {}
        }
        let _ = self.events.try_send((SequenceEvent::Happened(kind), at));
    }
}
