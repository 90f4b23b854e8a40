//! Who drives a replica, as the edge sees it: this router or another one of its pool.

use std::sync::{Arc, atomic::Ordering};

use crate::{
    pool::Peer,
    replica::owner::{EventSink, Owner},
    scheduler::{BlockHash, Counters, Submission},
};

/// Who drives a replica.
#[derive(Clone)]
pub(crate) enum Driver {
    /// This router.
    Here(Arc<Owner>),
    /// Another router, which knows the replica by this name.
    Peer(Arc<Peer>, String),
    /// Nobody for the moment: it changes hands.
    Nobody,
}

/// A sequence that was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// An adapter on a replica, or its draft model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// Every worker has it.
    Ready,
    /// It is to be loaded, or being loaded.
    Loading,
    /// It cannot be loaded, or was lost.
    Failed(String),
}

impl Presence {
    /// Whether it is ready, and why it is not where that is a failure.
    pub(crate) fn said(self) -> (bool, Option<String>) {
        match self {
            Self::Ready => (true, None),
            Self::Loading => (false, None),
            Self::Failed(why) => (false, Some(why)),
        }
    }
}

/// What an owner says of its replica.
#[derive(Clone, Debug, Default)]
pub(crate) struct Condition {
    pub(crate) queued: usize,
    pub(crate) running: usize,
    pub(crate) kv_used: f32,
    pub(crate) last_failure: Option<String>,
}

impl Driver {
    /// Submits a sequence; gives the sink back when the replica is not ready.
    pub(crate) fn submit(&self, submission: Submission, sink: EventSink) -> Result<Ticket, EventSink> {
        match self {
            Self::Here(owner) => {
                let ticket = owner.ticket();
                owner.submit(ticket, submission, sink).map(|()| Ticket(ticket))
            }
            Self::Peer(peer, replica) => peer.submit(replica, &submission, sink).map(Ticket),
            Self::Nobody => Err(sink),
        }
    }

    /// Drops a sequence with the next step.
    pub(crate) fn cancel(&self, ticket: Ticket) {
        match self {
            Self::Here(owner) => owner.cancel(ticket.0),
            Self::Peer(peer, _) => peer.cancel(ticket.0),
            Self::Nobody => {}
        }
    }

    /// Hands back every sequence that is not another router's to hand back.
    pub(crate) fn release(&self) {
        match self {
            Self::Here(owner) => owner.release(),
            Self::Peer(peer, replica) => peer.release(replica),
            Self::Nobody => {}
        }
    }

    /// Whether a token came out of the last stage in the present session.
    pub(crate) fn ready(&self) -> bool {
        match self {
            Self::Here(owner) => owner.ready(),
            Self::Peer(peer, replica) => peer.ready(replica),
            Self::Nobody => false,
        }
    }

    /// How the adapter of a numerics id is doing.
    pub(crate) fn adapter(&self, numerics: &str) -> Presence {
        match self {
            Self::Here(owner) => owner.adapter(numerics),
            Self::Peer(peer, replica) => peer.adapter(replica, numerics),
            Self::Nobody => Presence::Loading,
        }
    }

    /// Sequences submitted and not ended, of which `own` are this router's.
    pub(crate) fn live(&self, own: usize) -> usize {
        match self {
            Self::Here(owner) => owner.live(),
            Self::Peer(peer, replica) => own + peer.others(replica),
            Self::Nobody => own,
        }
    }

    /// How many blocks of a prefix are cached.
    pub(crate) fn cached_blocks(&self, hashes: &[BlockHash]) -> usize {
        match self {
            Self::Here(owner) => owner.cached_blocks(hashes),
            Self::Peer(peer, replica) => peer.cached_blocks(replica, hashes),
            Self::Nobody => 0,
        }
    }

    pub(crate) fn condition(&self) -> Condition {
        match self {
            Self::Here(owner) => Condition {
                queued: owner.queued.load(Ordering::Relaxed),
                running: owner.running.load(Ordering::Relaxed),
                kv_used: owner.kv_used(),
                last_failure: owner.last_failure(),
            },
            Self::Peer(peer, replica) => peer.condition(replica),
            Self::Nobody => Condition::default(),
        }
    }

    /// Steps finished and sessions that failed, while this router drove it.
    pub(crate) fn totals(&self) -> (u64, u64, Counters) {
        match self {
            Self::Here(owner) => (owner.steps.load(Ordering::Relaxed), owner.failures.load(Ordering::Relaxed), owner.counters()),
            Self::Peer(..) | Self::Nobody => Default::default(),
        }
    }

    /// Sessions of its draft model that failed, while this router drove it.
    pub(crate) fn draft_failures(&self) -> u64 {
        match self {
            Self::Here(owner) => owner.draft_failures.load(Ordering::Relaxed),
            Self::Peer(..) | Self::Nobody => 0,
        }
    }

    /// How its draft model is doing, where it has one and this router drives it.
    pub(crate) fn draft(&self) -> Option<Presence> {
        match self {
            Self::Here(owner) => owner.draft(),
            Self::Peer(..) | Self::Nobody => None,
        }
    }

    /// Whether it is this router.
    pub(crate) fn is_here(&self) -> bool {
        matches!(self, Self::Here(_))
    }
}
