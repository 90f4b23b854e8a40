//! What the engine thread waits for: steps, hidden states, tokens and masks of one session.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use plan::step::{Mask, SequenceId, Step, TokenId};

use crate::{
    adapters::Change,
    failure::{Failure, Reason},
};

/// Masks that may wait: more than the sequences of all steps in flight.
const MASKS: usize = 4096;

/// Steps whose tokens may wait, each with some of a sequence that no later one has: more than there are sequences.
const TOKENS: usize = 4096;

/// Tokens drawn in a step; `None` where the draw failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Drawn {
    pub(crate) step: u64,
    pub(crate) tokens: Vec<(SequenceId, Option<TokenId>)>,
}

/// What the engine thread does next.
#[derive(Debug)]
pub(crate) enum Work {
    Step(Step),
    /// A slot changes, behind the steps before and before those behind.
    Change(Change),
}

/// Why the engine thread gets nothing more.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The session is over; the reason is noted already.
    Over,
    /// It is to be ended for this.
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// The queues of a session. All are bounded by the steps an owner may have in flight; one that overflows is a broken protocol.
#[derive(Debug)]
pub(crate) struct Inbox {
    most: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    work: VecDeque<Work>,
    /// Number of the last step that came.
    last: u64,
    /// No more steps come.
    closed: bool,
    hidden: VecDeque<(u64, Vec<f32>)>,
    tokens: VecDeque<Drawn>,
    /// The link that brings hidden states or tokens has ended.
    unlinked: bool,
    masks: HashMap<(u64, SequenceId), Mask>,
    over: bool,
}

fn protocol(detail: String) -> Failure {
    Failure::new(Reason::Protocol, detail)
}

/// Drops tokens that are not the last of their sequences: a step that is still to run continues from the last alone, since its stage computes
/// the steps of a sequence in order, and no later token is drawn before.
fn keep_latest(tokens: &mut VecDeque<Drawn>) {
    let mut seen = HashSet::new();
    for drawn in tokens.iter_mut().rev() {
        drawn.tokens.retain(|(sequence, _)| seen.insert(*sequence));
    }
    tokens.retain(|drawn| !drawn.tokens.is_empty());
}

impl Inbox {
    /// For at most `most` steps that wait.
    pub(super) fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), changed: Condvar::new() }
    }

    pub(super) fn push_step(&self, step: Step) -> Result<(), Failure> {
        let mut state = self.state();
        if step.id <= state.last {
            return Err(protocol(format!("step {} came after step {}", step.id, state.last)));
        }
        let waiting = state.work.iter().filter(|work| matches!(work, Work::Step(_))).count();
        if waiting >= self.most {
            return Err(protocol(format!("{waiting} steps wait already, expected at most that many")));
        }
        state.last = step.id;
        state.work.push_back(Work::Step(step));
        self.wake(state);
        Ok(())
    }

    /// A slot changes, once the steps that wait are done. Nothing happens where the session is over.
    pub(crate) fn push_change(&self, change: Change) {
        let mut state = self.state();
        if !state.over {
            state.work.push_back(Work::Change(change));
            self.wake(state);
        }
    }

    /// Hidden states of a step, `[tokens, hidden]`.
    pub(crate) fn push_hidden(&self, step: u64, values: Vec<f32>) -> Result<(), Failure> {
        let mut state = self.state();
        if state.hidden.len() >= self.most {
            return Err(protocol(format!("hidden states of {} steps wait already, expected at most that many", state.hidden.len())));
        }
        state.hidden.push_back((step, values));
        self.wake(state);
        Ok(())
    }

    pub(crate) fn push_tokens(&self, drawn: Drawn) -> Result<(), Failure> {
        let mut state = self.state();
        state.tokens.push_back(drawn);
        // They are taken with the next step, and steps whose ids are known wait for none: where what reads the link was held up meanwhile,
        // those of any number of steps come at once.
        if state.tokens.len() > 2 * self.most {
            keep_latest(&mut state.tokens);
            if state.tokens.len() > TOKENS {
                return Err(protocol(format!("tokens of {TOKENS} sequences wait already, expected at most that many")));
            }
        }
        self.wake(state);
        Ok(())
    }

    pub(super) fn push_mask(&self, step: u64, sequence: SequenceId, mask: Mask) -> Result<(), Failure> {
        let mut state = self.state();
        if step == 0 || step > state.last {
            return Err(protocol(format!("a mask for step {step} came before the step, the last is {}", state.last)));
        }
        if state.masks.len() >= MASKS {
            return Err(protocol(format!("{MASKS} masks wait already, expected at most that many")));
        }
        if state.masks.insert((step, sequence), mask).is_some() {
            return Err(protocol(format!("a second mask came for sequence {sequence} in step {step}")));
        }
        self.wake(state);
        Ok(())
    }

    /// No more steps come.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        self.wake(state);
    }

    /// No more hidden states or tokens come.
    pub(crate) fn unlink(&self) {
        let mut state = self.state();
        state.unlinked = true;
        self.wake(state);
    }

    /// The session is over: everything is dropped, and every wait ends.
    pub(super) fn end(&self) {
        let mut state = self.state();
        *state = State { over: true, ..State::default() };
        self.wake(state);
    }

    /// The next step or change; `None` after the last.
    pub(crate) fn work(&self) -> Result<Option<Work>, Stop> {
        self.wait(|state| match state.work.pop_front() {
            Some(work) => Some(Ok(Some(work))),
            None => state.closed.then_some(Ok(None)),
        })
    }

    /// The hidden states of step `step`.
    pub(crate) fn hidden(&self, step: u64) -> Result<Vec<f32>, Stop> {
        self.wait(|state| match state.hidden.pop_front() {
            Some((of, values)) if of == step => Some(Ok(values)),
            Some((of, _)) => Some(Err(protocol(format!("hidden states of step {of} came, expected those of {step}")).into())),
            None => state.gone(),
        })
    }

    /// The next tokens; waits for them.
    pub(crate) fn tokens(&self) -> Result<Drawn, Stop> {
        self.wait(|state| match state.tokens.pop_front() {
            Some(drawn) => Some(Ok(drawn)),
            None => state.gone(),
        })
    }

    /// The tokens that have come.
    pub(crate) fn waiting_tokens(&self) -> VecDeque<Drawn> {
        std::mem::take(&mut self.state().tokens)
    }

    /// The mask of a draw; `None` when it does not come in time. Masks of earlier steps are dropped.
    pub(crate) fn mask(&self, step: u64, sequence: SequenceId, deadline: Instant) -> Result<Option<Mask>, Stop> {
        let mut state = self.state();
        state.masks.retain(|(of, _), _| *of >= step);
        loop {
            if state.over {
                return Err(Stop::Over);
            }
            if let Some(mask) = state.masks.remove(&(step, sequence)) {
                return Ok(Some(mask));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn wait<T>(&self, mut take: impl FnMut(&mut State) -> Option<Result<T, Stop>>) -> Result<T, Stop> {
        let mut state = self.state();
        loop {
            if state.over {
                return Err(Stop::Over);
            }
            if let Some(taken) = take(&mut state) {
                return taken;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nothing panics while it is held.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: MutexGuard<'_, State>) {
        drop(state);
        // One thread waits: the engine's.
        self.changed.notify_one();
    }
}

impl State {
    /// What a wait for the link ends with.
    fn gone<T>(&self) -> Option<Result<T, Stop>> {
        self.unlinked.then(|| Err(Failure::new(Reason::Link, "the link ended while something was expected of it").into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(step: u64, tokens: &[(SequenceId, TokenId)]) -> Drawn {
        Drawn { step, tokens: tokens.iter().map(|&(sequence, id)| (sequence, Some(id))).collect() }
    }

    #[test]
    fn tokens_of_many_steps_may_come_at_once_and_the_last_of_each_sequence_stays() {
        let inbox = Inbox::new(3);
        inbox.push_tokens(drawn(1, &[(7, 70), (8, 80)])).expect("room");
        for step in 2..=100 {
            inbox.push_tokens(drawn(step, &[(8, 80 + step as TokenId)])).expect("room");
        }
        let waiting = inbox.waiting_tokens();
        assert!(waiting.len() <= 7, "{waiting:?}");
        assert_eq!(waiting.front(), Some(&drawn(1, &[(7, 70)])), "no later step drew for it");
        assert_eq!(waiting.back(), Some(&drawn(100, &[(8, 180)])));
        // Few wait as they came.
        let few = [drawn(101, &[(8, 1)]), drawn(102, &[(8, 2)])];
        few.iter().for_each(|drawn| inbox.push_tokens(drawn.clone()).expect("room"));
        assert_eq!(inbox.waiting_tokens(), few);
    }

    #[test]
    fn tokens_of_more_sequences_than_there_can_be_are_a_broken_protocol() {
        let inbox = Inbox::new(3);
        for step in 1..=TOKENS as u64 {
            inbox.push_tokens(drawn(step, &[(step, 1)])).expect("room");
        }
        let refused = inbox.push_tokens(drawn(5000, &[(5000, 1)])).expect_err("too many");
        assert_eq!(refused, protocol(format!("tokens of {TOKENS} sequences wait already, expected at most that many")));
    }
}
