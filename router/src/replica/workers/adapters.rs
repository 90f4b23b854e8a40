//! Adapters that the workers of a session are loading: one answer for all of them.

use std::collections::{HashMap, HashSet};

use tokio::sync::mpsc;

use crate::replica::AdapterAnswer;

/// Loads under way.
#[derive(Debug)]
pub(super) struct Loading {
    slots: HashMap<u32, Waiting>,
    answers: mpsc::Sender<AdapterAnswer>,
}

#[derive(Debug)]
struct Waiting {
    /// Workers that have not answered.
    workers: HashSet<usize>,
    /// The first failure.
    failure: Option<String>,
}

impl Loading {
    pub(super) fn new(answers: mpsc::Sender<AdapterAnswer>) -> Self {
        Self { slots: HashMap::new(), answers }
    }

    /// All of `workers` workers were told to load an adapter into a slot.
    pub(super) fn begin(&mut self, slot: u32, workers: usize) {
        self.slots.insert(slot, Waiting { workers: (0..workers).collect(), failure: None });
    }

    /// A load that no worker is told of.
    pub(super) fn refused(&self, slot: u32, why: String) {
        self.say(slot, Err(why));
    }

    /// Takes a worker's answer; what is wrong with it, where it is none to a question.
    pub(super) fn answered(&mut self, worker: usize, slot: u32, failure: Option<String>) -> Result<(), String> {
        let unasked = || format!("it answers for slot {slot}, which it was not asked to fill");
        let waiting = self.slots.get_mut(&slot).ok_or_else(unasked)?;
        if !waiting.workers.remove(&worker) {
            return Err(unasked());
        }
        waiting.failure = waiting.failure.take().or(failure);
        if waiting.workers.is_empty()
            && let Some(Waiting { failure, .. }) = self.slots.remove(&slot)
        {
            self.say(slot, failure.map_or(Ok(()), Err));
        }
        Ok(())
    }

    fn say(&self, slot: u32, result: Result<(), String>) {
        // There is a place for every order that may wait, and nobody to tell once the session is dropped.
        let _ = self.answers.try_send(AdapterAnswer { slot, result });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_answered_for_when_every_worker_has_answered() {
        let (send, mut answers) = mpsc::channel(4);
        let mut loading = Loading::new(send);
        loading.begin(1, 2);
        loading.begin(2, 2);
        assert_eq!(loading.answered(1, 2, None), Ok(()));
        assert_eq!(loading.answered(0, 1, Some("no room".into())), Ok(()));
        assert!(answers.try_recv().is_err());
        assert_eq!(loading.answered(0, 2, None), Ok(()));
        assert_eq!(answers.try_recv(), Ok(AdapterAnswer { slot: 2, result: Ok(()) }));
        assert_eq!(loading.answered(1, 1, None), Ok(()));
        assert_eq!(answers.try_recv(), Ok(AdapterAnswer { slot: 1, result: Err("no room".into()) }));
        assert!(loading.answered(1, 1, None).is_err());
        loading.refused(3, "old".into());
        assert_eq!(answers.try_recv(), Ok(AdapterAnswer { slot: 3, result: Err("old".into()) }));
    }
}
