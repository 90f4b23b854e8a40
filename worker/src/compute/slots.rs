//! Which adapter is in which slot of the engine, in a session.

use std::collections::{HashMap, HashSet};

use engine::Engine;
use proto::worker::{AdapterReply, session_reply::Message};

use crate::{
    adapters::Change,
    failure::{Failure, Reason, chain},
    session::{Live, Stop},
    state::Worker,
};

/// Numerics ids by slot.
#[derive(Debug, Default)]
pub(super) struct Slots(HashMap<u32, String>);

impl Slots {
    /// Fills or empties a slot; of one that is filled the owner is told.
    pub(super) fn change(&mut self, worker: &Worker, engine: &mut Engine, live: &Live, change: Change) -> Result<(), Stop> {
        match change {
            Change::Bind { slot, .. } if self.0.contains_key(&slot) => {
                Err(Failure::new(Reason::Protocol, format!("a second adapter came for slot {slot}")).into())
            }
            Change::Bind { slot, numerics, adapter } => {
                let bytes = adapter.bytes();
                let bound = engine.bind_adapter(slot, adapter);
                bound.map_err(|error| Failure::new(Reason::Protocol, chain(&error)))?;
                self.0.insert(slot, numerics);
                live.tell(&worker.runtime, Message::Adapter(AdapterReply { slot, failure: String::new(), bytes }))
            }
            Change::Unbind { slot } => {
                engine.unbind_adapter(slot);
                if self.0.remove(&slot).is_some() {
                    worker.adapters.keep(&self.bound());
                }
                Ok(())
            }
        }
    }

    /// What is in slots.
    pub(super) fn bound(&self) -> HashSet<String> {
        self.0.values().cloned().collect()
    }
}
