//! What the engine thread waits for: steps, hidden states, tokens, masks, questions and parts of logits of one session.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use engine::Question;
use plan::step::{Mask, SequenceId, Step, TokenId};

use crate::{
    adapters::Change,
    failure::{Failure, Reason},
    link::Cargo,
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
    questions: VecDeque<Question>,
    /// What was asked of the first stage, by step and rank.
    parts: HashMap<u64, Vec<Part>>,
    /// The links that have ended.
    unlinked: HashSet<Cargo>,
    masks: HashMap<(u64, SequenceId), Mask>,
    over: bool,
    /// Grows with everything that comes.
    changes: u64,
}

/// A part of logits.
#[derive(Debug)]
struct Part {
    bytes: usize,
    came: Option<Vec<u8>>,
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

    pub(crate) fn push_question(&self, question: Question) -> Result<(), Failure> {
        let mut state = self.state();
        if state.questions.len() >= self.most {
            return Err(protocol(format!("questions of {} steps wait already, expected at most that many", state.questions.len())));
        }
        state.questions.push_back(question);
        self.wake(state);
        Ok(())
    }

    /// Parts of these many bytes will come, one from each rank of the first stage.
    pub(crate) fn expect_parts(&self, step: u64, bytes: Vec<usize>) {
        let mut state = self.state();
        if !state.over {
            state.parts.insert(step, bytes.into_iter().map(|bytes| Part { bytes, came: None }).collect());
        }
    }

    /// Bytes of the part that is to come.
    pub(crate) fn part_bytes(&self, step: u64, rank: usize) -> Result<usize, Failure> {
        match self.state().parts.get(&step).and_then(|parts| parts.get(rank)) {
            Some(Part { bytes, came: None }) => Ok(*bytes),
            _ => Err(protocol(format!("a part of step {step} came from rank {rank}, of which none was expected"))),
        }
    }

    pub(crate) fn push_part(&self, step: u64, rank: usize, part: Vec<u8>) {
        let mut state = self.state();
        // A session that ended meanwhile expects nothing any more.
        if let Some(expected) = state.parts.get_mut(&step).and_then(|parts| parts.get_mut(rank)) {
            expected.came = Some(part);
            self.wake(state);
        }
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

    /// No more of this comes.
    pub(crate) fn unlink(&self, cargo: Cargo) {
        let mut state = self.state();
        state.unlinked.insert(cargo);
        self.wake(state);
    }

    /// The session is over: everything is dropped, and every wait ends.
    pub(super) fn end(&self) {
        let mut state = self.state();
        *state = State { over: true, ..State::default() };
        self.wake(state);
    }

    /// The next step or change, if one has come.
    pub(crate) fn work(&self) -> Option<Work> {
        self.state().work.pop_front()
    }

    /// Whether no step or change is here, and none comes.
    pub(crate) fn is_drained(&self) -> bool {
        let state = self.state();
        state.closed && state.work.is_empty()
    }

    /// The hidden states of step `step`, if they have come.
    pub(crate) fn hidden(&self, step: u64) -> Result<Option<Vec<f32>>, Stop> {
        let mut state = self.state();
        match state.hidden.pop_front() {
            Some((of, values)) if of == step => Ok(Some(values)),
            Some((of, _)) => Err(protocol(format!("hidden states of step {of} came, expected those of {step}")).into()),
            None => state.gone(Cargo::Hidden).map(|()| None),
        }
    }

    /// The next question, if one has come; whoever expects one asks for it.
    pub(crate) fn question(&self) -> Result<Option<Question>, Stop> {
        let mut state = self.state();
        match state.questions.pop_front() {
            Some(question) => Ok(Some(question)),
            None => state.gone(Cargo::Tokens).map(|()| None),
        }
    }

    /// The parts of a step, by rank, if all have come.
    pub(crate) fn parts(&self, step: u64) -> Result<Option<Vec<Vec<u8>>>, Stop> {
        let mut state = self.state();
        let Some(parts) = state.parts.get(&step) else { return Ok(None) };
        if let Some(rank) = parts.iter().position(|part| part.came.is_none()) {
            return state.gone(Cargo::Parts(rank)).map(|()| None);
        }
        let parts = state.parts.remove(&step).unwrap_or_default();
        Ok(Some(parts.into_iter().filter_map(|part| part.came).collect()))
    }

    /// Ends the session when tokens are missing that cannot come any more.
    pub(crate) fn miss_tokens(&self) -> Result<(), Stop> {
        let state = self.state();
        if state.tokens.is_empty() { state.gone(Cargo::Tokens) } else { Ok(()) }
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

    /// Waits until something has come since `seen`, which is what this said last; 0 at first.
    pub(crate) fn wait(&self, seen: u64) -> Result<u64, Stop> {
        let mut state = self.state();
        loop {
            if state.over {
                return Err(Stop::Over);
            }
            if state.changes != seen {
                return Ok(state.changes);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nothing panics while it is held.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        state.changes += 1;
        drop(state);
        // One thread waits: the engine's.
        self.changed.notify_one();
    }
}

impl State {
    /// Ends the session where the link that is to bring something has ended.
    fn gone(&self, cargo: Cargo) -> Result<(), Stop> {
        if self.unlinked.contains(&cargo) {
            return Err(Failure::new(Reason::Link, "the link ended while something was expected of it").into());
        }
        Ok(())
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
    fn parts_are_there_when_every_rank_has_sent_its_own() {
        let inbox = Inbox::new(3);
        inbox.expect_parts(5, vec![3, 0]);
        inbox.expect_parts(6, vec![1, 1]);
        assert_eq!((inbox.part_bytes(5, 0), inbox.part_bytes(5, 1)), (Ok(3), Ok(0)));
        for (step, rank) in [(5, 2), (7, 0)] {
            assert_eq!(inbox.part_bytes(step, rank).expect_err("none is expected").reason, Reason::Protocol);
        }
        inbox.push_part(5, 1, Vec::new());
        inbox.push_part(6, 0, vec![9]);
        assert_eq!(inbox.parts(5), Ok(None));
        inbox.push_part(5, 0, vec![1, 2, 3]);
        assert!(inbox.part_bytes(5, 0).is_err(), "a second one");
        assert_eq!(inbox.parts(5), Ok(Some(vec![vec![1, 2, 3], Vec::new()])));
        // Another rank may be done; the one that is missed may not.
        inbox.unlink(Cargo::Parts(0));
        assert_eq!(inbox.parts(6), Ok(None));
        inbox.unlink(Cargo::Parts(1));
        assert!(matches!(inbox.parts(6), Err(Stop::Failed(failure)) if failure.reason == Reason::Link));
        inbox.end();
        assert_eq!(inbox.parts(6), Ok(None), "everything is dropped");
        assert_eq!(inbox.wait(0), Err(Stop::Over));
    }

    #[test]
    fn whoever_waits_wakes_for_everything_that_comes() {
        let inbox = Inbox::new(3);
        let mut seen = 0;
        let pushes: [&dyn Fn(); 4] = [
            &|| inbox.push_step(Step { id: 1, ..Step::default() }).expect("room"),
            &|| inbox.push_question(Question { step: 1, ..Question::default() }).expect("room"),
            &|| inbox.unlink(Cargo::Hidden),
            &|| inbox.close(),
        ];
        for push in pushes {
            push();
            let now = inbox.wait(seen).expect("not over");
            assert!(now != seen);
            seen = now;
        }
        assert!(matches!(inbox.work(), Some(Work::Step(step)) if step.id == 1) && inbox.is_drained());
        assert_eq!(inbox.question(), Ok(Some(Question { step: 1, ..Question::default() })));
        assert!(inbox.hidden(1).is_err(), "their link has ended");
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
