//! The adapters of a session: which are wanted, which slots they have, and when a slot is emptied.
//!
//! An adapter that is not wanted any more takes no further sequence; its slot is emptied when the last one that has it has ended. Slots are
//! numbered anew for each session and never used twice in it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use plan::adapter::AdapterSource;
use tokio::{sync::mpsc, time::Instant};

use crate::{
    fleet::Presence,
    replica::{AdapterAnswer, AdapterOrder},
    scheduler::Scheduler,
};

/// First and longest pause before an adapter that could not be loaded is tried again.
const AGAIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));

/// The adapters of one session.
#[derive(Debug, Default)]
pub(super) struct Adapters {
    last_slot: u32,
    /// By numerics id.
    held: BTreeMap<String, Held>,
    /// Slots of adapters that are not wanted any more and still have sequences.
    retiring: Vec<u32>,
    /// Slots that are being filled with what is not wanted any more.
    orphans: HashSet<u32>,
}

#[derive(Debug)]
struct Held {
    slot: u32,
    state: State,
    /// Why it could not be loaded when that was tried last, and how long it was waited then.
    failure: Option<(String, Duration)>,
}

#[derive(Debug, PartialEq)]
enum State {
    Loading,
    Ready,
    /// Until it is tried again.
    Failed(Instant),
}

impl Adapters {
    /// Loads what is `wanted` and not there, lets go of what is not, and empties slots that nothing uses. Whether anything changed for edges.
    pub(super) fn follow(&mut self, wanted: &[AdapterSource], scheduler: &mut Scheduler, orders: &mpsc::Sender<AdapterOrder>) -> bool {
        let mut changed = false;
        let gone: Vec<String> = self.held.keys().filter(|id| !wanted.iter().any(|a| a.numerics == **id)).cloned().collect();
        for id in gone {
            if let Some(Held { slot, state, .. }) = self.held.remove(&id) {
                changed = true;
                match state {
                    State::Loading => drop(self.orphans.insert(slot)),
                    State::Ready => {
                        scheduler.unbind(&id);
                        self.retiring.push(slot);
                    }
                    State::Failed(_) => {}
                }
            }
        }
        for adapter in wanted {
            let failure = match self.held.get(&adapter.numerics) {
                None => None,
                Some(Held { state: State::Failed(again), failure, .. }) if *again <= Instant::now() => failure.clone(),
                Some(_) => continue,
            };
            let slot = self.last_slot + 1;
            // Where it is full, there is something to come first; where it is closed, the session is over.
            if orders.try_send(AdapterOrder::Load { slot, adapter: adapter.clone() }).is_ok() {
                self.last_slot = slot;
                self.held.insert(adapter.numerics.clone(), Held { slot, state: State::Loading, failure });
                changed = true;
            }
        }
        self.retiring.retain(|&slot| scheduler.uses(slot) || orders.try_send(AdapterOrder::Unload { slot }).is_err());
        changed
    }

    /// Takes what became of a load.
    pub(super) fn take(&mut self, answer: AdapterAnswer, scheduler: &mut Scheduler) {
        let AdapterAnswer { slot, result } = answer;
        if self.orphans.remove(&slot) {
            self.retiring.push(slot);
            return;
        }
        let Some((id, held)) = self.held.iter_mut().find(|(_, held)| held.slot == slot) else { return };
        match result {
            Ok(()) => {
                scheduler.bind(id, slot);
                (held.state, held.failure) = (State::Ready, None);
            }
            Err(why) => {
                let pause = held.failure.take().map_or(AGAIN.0, |(_, pause)| (pause * 2).min(AGAIN.1));
                held.state = State::Failed(Instant::now() + pause);
                held.failure = Some((why, pause));
                // Some of the workers may have it.
                self.retiring.push(slot);
            }
        }
    }

    /// When an adapter is to be tried again.
    pub(super) fn again(&self) -> Option<Instant> {
        let again = |held: &Held| if let State::Failed(again) = held.state { Some(again) } else { None };
        self.held.values().filter_map(again).min()
    }

    /// How each of them is doing.
    pub(super) fn presence(&self) -> HashMap<String, Presence> {
        let presence = |held: &Held| match (&held.state, &held.failure) {
            (State::Ready, _) => Presence::Ready,
            (_, Some((why, _))) => Presence::Failed(why.clone()),
            _ => Presence::Loading,
        };
        self.held.iter().map(|(id, held)| (id.clone(), presence(held))).collect()
    }
}
