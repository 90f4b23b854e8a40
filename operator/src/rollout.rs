//! Which replicas should exist: from what is wanted and what stands to what is made, drained and deleted next. Pure.
//!
//! A replica is let go in steps: it drains (routers give it no new requests and move or finish what it has), then its objects are deleted. What
//! bounds a rollout are two numbers: never more replicas than wanted plus the surge are made, and no ready replica is let go where fewer than
//! wanted minus the unavailable would be left. Replicas of one revision are numbered from 0, so that scaling down lets the highest go.

mod memory;
#[cfg(test)]
mod tests;

use std::{cmp::Reverse, collections::BTreeSet};

use self::memory::Held;
pub use self::memory::Memory;

/// A worker without a node for want of resources counts as having no room after this many seconds: a node may be freed any moment.
const NO_ROOM: i64 = 10;
/// Seconds that a replica may wait for nodes for all of its workers before it is taken back.
pub const GANG: i64 = 60;
/// Part of the replicas that `Auto` adds at once: one in this many, and at least one.
const AUTO_SURGE: u32 = 4;

/// One replica: a revision's name and a number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// The revision it runs.
    pub revision: String,
    /// Its number, from 0.
    pub number: u32,
}

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goal {
    /// The revision of the spec.
    pub revision: String,
    /// The revision that was rolled out last, where one was and is known; what a paused deployment adds replicas of.
    pub current: Option<String>,
    /// Replicas.
    pub replicas: u32,
    /// What makes room for new ones.
    pub strategy: Strategy,
    /// Replaces nothing.
    pub paused: bool,
    /// Takes back what is not scheduled whole.
    pub gang: bool,
    /// Seconds without progress after which a rollout is stalled.
    pub deadline: i64,
    /// Seconds that a replica may drain.
    pub drain: i64,
}

/// What makes room for new replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// New ones beside the old, and in place of one where there is no room.
    Auto,
    /// Bounds as given.
    Rolling {
        /// Replicas beyond those wanted.
        surge: u32,
        /// Replicas that may be missing.
        unavailable: u32,
    },
    /// All old ones end first.
    Recreate,
}

/// A replica that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which.
    pub id: Id,
    /// A token came out of its last stage.
    pub ready: bool,
    /// Since when it drains.
    pub draining: Option<i64>,
    /// Its objects are being deleted, and something of it is left.
    pub leaving: bool,
    /// Sequences on it, summed over routers; `None` while that is not known, and for one that drains while not every router says that it
    /// knows so.
    pub sequences: Option<u32>,
    /// Whether its workers have nodes.
    pub placement: Placement,
    /// What it holds would be room enough for a replica of the revision wanted.
    pub covers: bool,
}

/// Whether a replica's workers have nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// None was refused one.
    Settled,
    /// One has none; the scheduler's words, and whether a resource is missing.
    Waiting {
        /// The scheduler's words.
        message: String,
        /// Some resource does not suffice, rather than that no node would be allowed.
        short: bool,
    },
}

/// A replica that is to exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Which.
    pub id: Id,
    /// Since when it drains.
    pub draining: Option<i64>,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Replicas that are to exist, in order.
    pub exist: Vec<Slot>,
    /// Replicas whose objects are to be deleted.
    pub remove: Vec<Id>,
    /// Replicas that begin to drain with this plan.
    pub drained: Vec<Id>,
    /// Replicas taken back because they found no nodes, and what was missing.
    pub taken_back: Vec<(Id, String)>,
    /// How the rollout goes.
    pub progress: Progress,
    /// When to look again though nothing happens.
    pub again: Option<i64>,
}

/// How a rollout goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing of the revision stands yet.
    New,
    /// So many of its replicas are ready, and so many others are left.
    Rolling {
        /// Ready replicas of the revision.
        ready: u32,
        /// Replicas of others.
        others: u32,
    },
    /// Nothing is replaced, because that was asked for.
    Paused,
    /// As `Rolling`, but nothing came of it for too long.
    Stalled {
        /// Ready replicas of the revision.
        ready: u32,
        /// Replicas of others.
        others: u32,
    },
    /// Every replica wanted is of the revision, and was ready.
    Complete,
}

/// What is being worked on.
struct Planning<'a> {
    goal: &'a Goal,
    /// The revision that replicas are made of.
    target: &'a str,
    /// Routers say what is ready.
    known: bool,
    now: i64,
    /// Whether surge was found to have no room.
    crowded: bool,
    plan: Plan,
}

/// Plans the next step from the replicas that stand. `known` says that routers report, so that what is not ready is known not to be.
pub fn plan(goal: &Goal, seen: &[Seen], known: bool, memory: &mut Memory, now: i64) -> Plan {
    memory.observe(goal, seen, now);
    // While nothing is replaced, what is missing is made of what was there.
    let target = goal.current.as_deref().filter(|_| goal.paused).unwrap_or(&goal.revision);
    let crowded = goal.strategy == Strategy::Auto && memory.crowded(target, seen, now, NO_ROOM);
    let plan =
        Plan { exist: Vec::new(), remove: Vec::new(), drained: Vec::new(), taken_back: Vec::new(), progress: Progress::New, again: None };
    let mut planning = Planning { goal, target, known, now, crowded, plan };
    planning.finish_draining(seen);
    planning.take_back(seen, memory);
    planning.let_go(seen);
    planning.make(seen, memory);
    planning.plan.exist.sort_by(|a, b| a.id.cmp(&b.id));
    if goal.strategy == Strategy::Auto && !crowded {
        memory.waits(target).for_each(|since| planning.look_at(since + NO_ROOM));
    }
    let progress = memory.progress(goal, seen, now);
    if !matches!(progress, Progress::Complete | Progress::Paused | Progress::Stalled { .. }) {
        planning.look_at(memory.progressed() + goal.deadline);
    }
    Plan { progress, ..planning.plan }
}

impl Planning<'_> {
    /// Replicas that may be missing.
    fn unavailable(&self) -> u32 {
        match self.goal.strategy {
            Strategy::Rolling { unavailable, .. } => unavailable,
            Strategy::Auto => 0,
            // There is no room beside what stands, so one that has the wrong number makes way.
            Strategy::Recreate => 1,
        }
    }

    /// Replicas beyond those wanted.
    fn surge(&self) -> u32 {
        match self.goal.strategy {
            Strategy::Auto => self.goal.replicas.div_ceil(AUTO_SURGE).max(1),
            Strategy::Rolling { surge, .. } => surge,
            Strategy::Recreate => 0,
        }
    }

    fn look_at(&mut self, at: i64) {
        if at > self.now {
            self.plan.again = Some(self.plan.again.map_or(at, |again| again.min(at)));
        }
    }

    /// Whether a replica is one that is to stay.
    fn keeps(&self, id: &Id) -> bool {
        id.revision == self.target && id.number < self.goal.replicas
    }

    /// Those that drain: wanted again, done, or to be looked at later.
    fn finish_draining(&mut self, seen: &[Seen]) {
        for replica in seen {
            if replica.leaving {
                self.plan.remove.push(replica.id.clone());
                continue;
            }
            let Some(since) = replica.draining else { continue };
            let ends = since + self.goal.drain;
            if self.keeps(&replica.id) {
                self.plan.exist.push(Slot { id: replica.id.clone(), draining: None });
            } else if replica.sequences == Some(0) || self.now >= ends {
                self.plan.remove.push(replica.id.clone());
            } else {
                self.look_at(ends);
                self.plan.exist.push(Slot { id: replica.id.clone(), draining: Some(since) });
            }
        }
    }

    /// Takes back replicas that wait for nodes for too long, so that two of them never hold what either needs. Where one is on its way out,
    /// room is on its way, and nothing is taken back.
    fn take_back(&mut self, seen: &[Seen], memory: &mut Memory) {
        if !self.goal.gang || seen.iter().any(|r| r.draining.is_some() || r.leaving) {
            return;
        }
        let waiting: Vec<&Seen> = seen.iter().filter(|r| matches!(r.placement, Placement::Waiting { .. })).collect();
        let lowest = waiting.iter().map(|r| (r.id.number, &r.id)).min().map(|(_, id)| id);
        for replica in &waiting {
            let Placement::Waiting { message, short } = &replica.placement else { continue };
            // The lowest keeps what it has until the others' room has come to it.
            let rivals = waiting.len() > 1 || memory.holds_other(&replica.id);
            let limit = if Some(&replica.id) == lowest && rivals { 2 * GANG } else { GANG };
            let ends = memory.waits_since(&replica.id).unwrap_or(self.now) + limit;
            if self.now < ends {
                self.look_at(ends);
                continue;
            }
            self.plan.remove.push(replica.id.clone());
            self.plan.taken_back.push((replica.id.clone(), message.clone()));
            memory.hold(&replica.id, Held::new(message, *short), self.now);
        }
    }

    /// Lets go of replicas that are not wanted any more, as far as those left are ready.
    fn let_go(&mut self, seen: &[Seen]) {
        let live: Vec<&Seen> = seen.iter().filter(|r| r.draining.is_none() && !self.plan.remove.contains(&r.id)).collect();
        let goal = self.goal;
        let (keep, mut surplus): (Vec<&Seen>, Vec<&Seen>) = live.iter().copied().partition(|r| self.keeps(&r.id));
        let others = surplus.iter().any(|r| r.id.revision != self.target);
        // Paused in the middle: both revisions stay, but not more of them than a rollout would have.
        let paused = goal.paused && others && live.len() as u32 <= goal.replicas + self.surge();
        if goal.replicas > 0 && (!self.known || paused) {
            self.plan.exist.extend(live.iter().map(|r| Slot { id: r.id.clone(), draining: None }));
            return;
        }
        let recreates = goal.strategy == Strategy::Recreate && others && !goal.paused;
        let least = i64::from(if recreates { 0 } else { goal.replicas.saturating_sub(self.unavailable()) });
        let count = |matches: &dyn Fn(&&Seen) -> bool| live.iter().filter(|r| matches(r)).count() as i64;
        // What can be missed of those that stand, counting on those that start, and of those that are ready.
        let mut budget = live.len() as i64 - least - keep.iter().filter(|r| !r.ready).count() as i64;
        let mut ready = count(&|r| r.ready) - least;
        // First what serves nobody, then old revisions (those that make room before others), then the highest numbers.
        surplus.sort_by_key(|r| (r.ready, r.id.revision == self.target, self.crowded && !r.covers, Reverse(r.id.number)));
        for replica in surplus {
            let excess = replica.id.revision == self.target && !replica.ready;
            // One more may be missing where that makes room for one that finds none.
            let room = i64::from(self.crowded && replica.covers);
            let spare = budget + room > 0 && (!replica.ready || ready + room > 0);
            if !excess && !recreates && !spare {
                self.plan.exist.push(Slot { id: replica.id.clone(), draining: None });
                continue;
            }
            budget -= i64::from(!excess);
            ready -= i64::from(replica.ready);
            let idle = self.known && !replica.ready && replica.sequences.unwrap_or(0) == 0;
            if idle || goal.drain == 0 {
                self.plan.remove.push(replica.id.clone());
            } else {
                self.look_at(self.now + goal.drain);
                self.plan.drained.push(replica.id.clone());
                self.plan.exist.push(Slot { id: replica.id.clone(), draining: Some(self.now) });
            }
        }
        self.plan.exist.extend(keep.iter().map(|r| Slot { id: r.id.clone(), draining: None }));
    }

    /// Makes what is missing. What is still being deleted counts, and keeps its number.
    fn make(&mut self, seen: &[Seen], memory: &Memory) {
        let goal = self.goal;
        if goal.strategy == Strategy::Recreate && !goal.paused && seen.iter().any(|r| r.id.revision != self.target) {
            return;
        }
        let room = |most: u32, standing: usize| most.saturating_sub(standing as u32);
        let most = room(goal.replicas + self.surge(), seen.len());
        let missing = match goal.paused {
            // In the middle of a rollout, replicas of both revisions count as wanted.
            true => most.min(room(goal.replicas, seen.iter().filter(|r| r.draining.is_none() || r.id.revision == self.target).count())),
            false => most,
        };
        let taken: BTreeSet<u32> = seen.iter().filter(|r| r.id.revision == self.target).map(|r| r.id.number).collect();
        for number in (0..goal.replicas).filter(|n| !taken.contains(n)).take(missing as usize) {
            let id = Id { revision: self.target.to_owned(), number };
            match memory.held_until(&id) {
                // Its place in the count is kept for it.
                Some(until) if until > self.now => self.look_at(until),
                _ => self.plan.exist.push(Slot { id, draining: None }),
            }
        }
    }
}
