//! What a rollout remembers between two looks: since when something waits, and when something last came of it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Goal, Id, Placement, Progress, Seen};
use crate::names::digest;

/// First and longest pause of a replica that was taken back, in seconds.
const BACKOFF: (i64, i64) = (30, 600);

/// A replica that was taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// What was missing.
    message: String,
    short: bool,
    until: i64,
    times: u32,
}

impl Held {
    pub(super) fn new(message: &str, short: bool) -> Self {
        Self { message: message.to_owned(), short, until: 0, times: 0 }
    }
}

/// How far a rollout has come at best; less of it later is no progress when it comes back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Best {
    revision: String,
    /// Replicas wanted meanwhile: another number is a new start.
    wanted: u32,
    placed: usize,
    ready: usize,
    others: usize,
}

/// What a process remembers of a deployment's rollout. Nothing is lost with it but time: another process counts anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    waiting: BTreeMap<Id, i64>,
    held: BTreeMap<Id, Held>,
    last: BTreeSet<Id>,
    best: Option<Best>,
    progressed: i64,
    /// The revision that was rolled out.
    completed: Option<String>,
}

impl Memory {
    /// What is known from before this process: the revision that was rolled out, and when something last came of the present one.
    pub fn recall(completed: Option<String>, progressed: i64) -> Self {
        Self { completed, progressed, ..Self::default() }
    }

    /// Takes note of what stands.
    pub(super) fn observe(&mut self, goal: &Goal, seen: &[Seen], now: i64) {
        let ids: BTreeSet<Id> = seen.iter().map(|r| r.id.clone()).collect();
        // What went by plan has left room: whoever waits may try again, and has all its time.
        let freed = self.last.iter().any(|id| !ids.contains(id) && !self.held.contains_key(id));
        if freed {
            self.held.values_mut().for_each(|held| held.until = now);
            self.waiting.values_mut().for_each(|since| *since = now);
        }
        self.last = ids;
        for replica in seen {
            match replica.placement {
                Placement::Settled => drop(self.waiting.remove(&replica.id)),
                Placement::Waiting { .. } => drop(self.waiting.entry(replica.id.clone()).or_insert(now)),
            }
            if replica.ready {
                self.held.remove(&replica.id);
            }
        }
        self.waiting.retain(|id, _| self.last.contains(id));
        let wanted = |id: &Id| (id.revision == goal.revision || Some(&id.revision) == goal.current.as_ref()) && id.number < goal.replicas;
        self.held.retain(|id, _| wanted(id));
    }

    /// Since when a replica waits for nodes.
    pub(super) fn waits_since(&self, id: &Id) -> Option<i64> {
        self.waiting.get(id).copied()
    }

    /// Since when replicas of a revision wait.
    pub(super) fn waits(&self, revision: &str) -> impl Iterator<Item = i64> {
        self.waiting.iter().filter(move |(id, _)| id.revision == revision).map(|(_, since)| *since)
    }

    /// Keeps a replica from being made again for a while, longer each time, and not all at the same moment.
    pub(super) fn hold(&mut self, id: &Id, mut held: Held, now: i64) {
        let times = self.held.get(id).map_or(0, |h| h.times);
        let pause = (BACKOFF.0 << times.min(10)).min(BACKOFF.1);
        let name = digest(&[&id.revision, &id.number.to_string(), &times.to_string()], 4);
        let jitter = i64::from_str_radix(&name, 16).unwrap_or(0) % (pause / 2).max(1);
        held.until = now + pause + jitter;
        held.times = times + 1;
        self.held.insert(id.clone(), held);
    }

    /// Until when a replica is not made again.
    pub(super) fn held_until(&self, id: &Id) -> Option<i64> {
        self.held.get(id).map(|h| h.until)
    }

    /// Whether another replica was taken back, and waits to be made again.
    pub(super) fn holds_other(&self, id: &Id) -> bool {
        self.held.keys().any(|other| other != id && !self.last.contains(other))
    }

    /// What was missing where a replica was taken back and is not there now.
    pub fn shortage(&self) -> Option<(&Id, &str)> {
        self.held.iter().find(|(id, _)| !self.last.contains(id)).map(|(id, held)| (id, held.message.as_str()))
    }

    /// Whether replicas of `revision` find no room.
    pub(super) fn crowded(&self, revision: &str, seen: &[Seen], now: i64, after: i64) -> bool {
        let short = |r: &Seen| {
            let waits = matches!(r.placement, Placement::Waiting { short: true, .. });
            waits && r.id.revision == revision && self.waits_since(&r.id).is_some_and(|since| since + after <= now)
        };
        let held = self.held.iter().any(|(id, held)| id.revision == revision && held.short && !self.last.contains(id));
        held || seen.iter().any(short)
    }

    /// When something last came of the rollout.
    pub(super) fn progressed(&self) -> i64 {
        self.progressed
    }

    /// Compares what stands with the best there was.
    pub(super) fn progress(&mut self, goal: &Goal, seen: &[Seen], now: i64) -> Progress {
        let (of, others): (Vec<&Seen>, Vec<&Seen>) = seen.iter().partition(|r| r.id.revision == goal.revision);
        let kept = of.iter().filter(|r| r.draining.is_none() && !r.leaving && r.id.number < goal.replicas);
        let ready = kept.clone().filter(|r| r.ready).count();
        let placed = kept.filter(|r| r.placement == Placement::Settled).count();
        let done = self.completed.as_ref() == Some(&goal.revision);
        if others.is_empty() && (done || ready == goal.replicas as usize) {
            self.completed = Some(goal.revision.clone());
            self.best = None;
            return Progress::Complete;
        }
        if !others.is_empty() {
            // What has begun to be replaced is not there any more until it is there whole.
            self.completed = None;
        }
        let state = Best { revision: goal.revision.clone(), wanted: goal.replicas, placed, ready, others: others.len() };
        let best = match self.best.take() {
            Some(best) if best.revision == state.revision && best.wanted == state.wanted => {
                if state.placed > best.placed || state.ready > best.ready || state.others < best.others {
                    self.progressed = now;
                }
                Best {
                    placed: best.placed.max(state.placed),
                    ready: best.ready.max(state.ready),
                    others: best.others.min(state.others),
                    ..state
                }
            }
            // The first look of this process goes on from what is known from before.
            None if self.progressed > 0 => state,
            _ => {
                self.progressed = now;
                state
            }
        };
        self.best = Some(best);
        let (ready, others) = (ready as u32, others.len() as u32);
        match () {
            () if goal.paused => {
                self.progressed = now;
                Progress::Paused
            }
            () if now >= self.progressed + goal.deadline => Progress::Stalled { ready, others },
            () if of.is_empty() => Progress::New,
            () => Progress::Rolling { ready, others },
        }
    }
}
