//! What the draft model runs: for each sequence that it guesses for a course, which follows the sequence's ids and draws behind them.
//!
//! Its worker is an ordinary one in a session of its own, with block tables of its own. It draws by the sequence's own settings, seed and
//! positions, so that where both models see the same odds they draw the same token. What was drawn and did not come true is overwritten.
//! Reading what a sequence said before it was followed takes steps of their own, for which nobody waits.

use std::collections::{BTreeMap, HashMap, VecDeque};

use plan::{
    fleet::{FleetDraft, ReplicaLimits},
    shard::{BLOCK_TOKENS, KvGroup},
    step::{Begin, Input, Output, OutputValue, Sampling, SequenceId, SequenceStep, Step, TableChange, TokenId, Want, WantKind},
};

use super::{Admission, ReplyError, Sequence, Table, blocks::BlockPool, prefix::first_needed};

/// Most tokens drawn behind a sequence: past that the least chance of all of them is too small for any worth.
pub(super) const MOST: usize = 8;
/// Ids that a course may be behind for its sequence to wait for its guess.
const CLOSE: usize = 64;
/// Ids that are read in a step for which nobody waits: the next guess may have to wait for it.
const READ: usize = 128;
/// Steps in flight: one runs, one is there when it ends.
const IN_FLIGHT: usize = 2;

/// The draft model of a session.
#[derive(Debug)]
pub(super) struct Drafter {
    limits: ReplicaLimits,
    /// What a step of one row takes, in such steps of the model that it guesses for.
    pub(super) cost: f32,
    pools: Vec<BlockPool>,
    /// By the arrival of their sequences.
    courses: BTreeMap<u64, Course>,
    frees: Vec<SequenceId>,
    in_flight: VecDeque<Record>,
    last_step: u64,
    last_sequence: SequenceId,
    /// It did not answer in time: nobody waits for it until it has.
    late: bool,
}

/// Where the draft model stands with one sequence.
#[derive(Debug)]
struct Course {
    id: SequenceId,
    tables: Vec<Table>,
    begun: bool,
    /// Positions that were read and are of the sequence, as far as is known.
    base: usize,
    /// Positions that were read, guesses too.
    sent: usize,
    /// Ids of the sequence that are to be read.
    goal: usize,
    /// Tokens to be drawn behind them.
    wanted: usize,
    guess: Vec<TokenId>,
    /// Draws in flight.
    drawing: usize,
    last_step: u64,
    /// When its sequence last asked to be followed.
    followed: u64,
}

/// A step in flight.
#[derive(Debug)]
struct Record {
    id: u64,
    /// Arrival and number of each sequence, and whether a token is drawn.
    entries: Vec<(u64, SequenceId, bool)>,
}

impl Course {
    /// Whether something is to be drawn that is in no step yet.
    fn is_asked(&self) -> bool {
        self.guess.len() + self.drawing < self.wanted
    }

    /// Whether it has to go on before it can be asked for something else.
    fn is_drawing(&self) -> bool {
        self.guess.len() < self.wanted
    }

    /// Draws no more behind ids that others of the sequence's `known` ids follow by now: nobody waited.
    fn give_up_what_came_too_late(&mut self, known: usize) {
        if self.is_drawing() && self.drawing == 0 && self.goal < known {
            self.wanted = self.guess.len();
        }
    }
}

impl Drafter {
    pub(super) fn new(draft: &FleetDraft) -> Self {
        let pools = draft.limits.kv.groups.iter().map(|g| BlockPool::new(g.blocks, false)).collect();
        Self {
            limits: draft.limits.clone(),
            cost: draft.cost as f32 / 1000.0,
            pools,
            courses: BTreeMap::new(),
            frees: Vec::new(),
            in_flight: VecDeque::new(),
            last_step: 0,
            last_sequence: 0,
            late: false,
        }
    }

    /// Nobody waits for it any more until it has answered.
    pub(super) fn set_late(&mut self) {
        self.late = !self.in_flight.is_empty();
    }

    /// Keeps up with a sequence from which `known` ids are known, at time `now`. Where there are no blocks, and none that are held for
    /// sequences which are not followed any more, it is not followed.
    pub(super) fn follow(&mut self, arrival: u64, known: usize, now: u64) {
        if known >= self.limits.max_context {
            return self.forget(arrival);
        }
        if !self.courses.contains_key(&arrival) {
            while !self.has_room_for(known) {
                if !self.drop_idle(now) {
                    return;
                }
            }
            self.last_sequence += 1;
            let course = Course {
                id: self.last_sequence,
                tables: vec![Table::default(); self.pools.len()],
                begun: false,
                base: 0,
                sent: 0,
                goal: 0,
                wanted: 0,
                guess: Vec::new(),
                drawing: 0,
                last_step: 0,
                followed: now,
            };
            self.courses.insert(arrival, course);
        }
        let Some(course) = self.courses.get_mut(&arrival) else { return };
        course.followed = now;
        course.give_up_what_came_too_late(known);
        if !course.is_drawing() && course.base + CLOSE < known {
            // What is drawn behind is forgotten: too much came since.
            (course.sent, course.goal, course.wanted) = (course.base, known - 1, 0);
            course.guess.clear();
        }
    }

    /// How many tokens may be guessed behind `known` ids of a sequence at the most; 0 where a guess would have to be waited for too long.
    pub(super) fn most(&self, arrival: u64, known: usize) -> usize {
        let Some(course) = self.courses.get(&arrival).filter(|_| !self.late) else { return 0 };
        if course.base + CLOSE < known || (course.is_drawing() && course.goal != known) {
            return 0;
        }
        MOST.min(self.limits.max_context.saturating_sub(known))
    }

    /// Has `n` tokens drawn behind `ids`, as far as they are not being drawn. Returns whether there is room for them.
    pub(super) fn ask(&mut self, arrival: u64, ids: &[TokenId], n: usize, now: u64) -> bool {
        let Some(course) = self.courses.get_mut(&arrival) else { return false };
        let read = &course.guess[..course.guess.len().min(course.sent.saturating_sub(course.base))];
        let right = ids[course.base.min(ids.len())..].iter().zip(read).take_while(|(id, guess)| id == guess).count();
        // The last id is always read, since what follows it is what is wanted.
        let at = if course.guess.is_empty() { course.sent } else { course.base + right };
        course.sent = at.min(ids.len() - 1);
        course.base = course.sent;
        (course.goal, course.wanted) = (ids.len(), n);
        course.guess.clear();
        let end = ids.len() + n;
        while !self.grow(arrival, end) {
            if !self.drop_idle(now) {
                self.forget(arrival);
                return false;
            }
        }
        true
    }

    /// What is guessed to follow `known` ids of a sequence, once all of it was drawn.
    pub(super) fn guess(&self, arrival: u64, known: usize) -> Option<&[TokenId]> {
        let course = self.courses.get(&arrival).filter(|course| course.goal == known && course.wanted > 0 && !course.is_drawing())?;
        Some(&course.guess)
    }

    /// Whether a guess of what follows `known` ids is being drawn, and worth waiting for.
    pub(super) fn is_drawing(&self, arrival: u64, known: usize) -> bool {
        !self.late && self.courses.get(&arrival).is_some_and(|course| course.goal == known && course.is_drawing())
    }

    /// Gives up a sequence that is not here any more.
    pub(super) fn forget(&mut self, arrival: u64) {
        let Some(course) = self.courses.remove(&arrival) else { return };
        if course.begun {
            self.frees.push(course.id);
        }
        for (table, pool) in course.tables.iter().zip(&mut self.pools) {
            table.blocks.iter().for_each(|block| pool.release(*block));
        }
    }

    /// The next step to send, if there is something to run. Guesses come before what is only read.
    pub(super) fn next_step(&mut self, running: &BTreeMap<u64, (Sequence, Admission)>) -> Option<Step> {
        if self.late || self.in_flight.len() >= IN_FLIGHT {
            return None;
        }
        for (arrival, course) in &mut self.courses {
            if let Some((sequence, _)) = running.get(arrival) {
                course.give_up_what_came_too_late(sequence.ids.len());
            }
        }
        let asked = self.courses.values().any(Course::is_asked);
        let most = self.limits.max_batch_tokens;
        let mut budget = if asked { most } else { most.min(READ) };
        let mut step = Step { id: self.last_step + 1, ..Step::default() };
        let mut entries = Vec::new();
        let arrivals: Vec<u64> = self.courses.iter().filter(|(_, c)| c.is_asked() == asked).map(|(arrival, _)| *arrival).collect();
        for arrival in arrivals {
            if budget == 0 || entries.len() == self.limits.max_batch_sequences {
                break;
            }
            let (Some((sequence, _)), Some(course)) = (running.get(&arrival), self.courses.get(&arrival)) else { continue };
            let (tokens, input) = match course.goal.saturating_sub(course.sent) {
                0 if asked => (1, Input::Sampled { step: course.last_step, drafts: Vec::new() }),
                0 => continue,
                left => {
                    let tokens = left.min(budget);
                    (tokens, Input::Ids(sequence.ids[course.sent..course.sent + tokens].to_vec()))
                }
            };
            let end = course.sent + tokens;
            if !self.grow(arrival, end) {
                self.forget(arrival);
                continue;
            }
            let Some(course) = self.courses.get_mut(&arrival) else { continue };
            let draws = end >= course.goal && course.wanted > 0;
            budget -= tokens;
            entries.push((arrival, course.id, draws));
            step.sequences.push(course.part(sequence, (tokens, input), draws));
            (course.sent, course.last_step) = (end, step.id);
            course.base = course.base.max(end.min(course.goal));
            course.drawing += usize::from(draws);
        }
        if entries.is_empty() {
            return None;
        }
        // Not before the step is whole: all of it is written before any of it is read.
        entries.iter().for_each(|(arrival, ..)| self.pass(*arrival));
        step.frees = std::mem::take(&mut self.frees);
        self.last_step = step.id;
        self.in_flight.push_back(Record { id: step.id, entries });
        Some(step)
    }

    /// Takes the results of the oldest step in flight.
    ///
    /// # Errors
    /// When the reply does not answer that step. The drafter is then of no more use.
    pub(super) fn reply(&mut self, step: u64, outputs: Vec<Output>) -> Result<(), ReplyError> {
        let expected = self.in_flight.front().map(|record| record.id);
        let record = match self.in_flight.pop_front() {
            Some(record) if record.id == step => record,
            _ => return Err(ReplyError::Order { got: step, expected }),
        };
        self.late &= !self.in_flight.is_empty();
        let mut outputs = outputs.into_iter();
        for (arrival, sequence, _) in record.entries.into_iter().filter(|(_, _, draws)| *draws) {
            let output = outputs.next().filter(|output| output.sequence == sequence);
            let course = self.courses.get_mut(&arrival).filter(|course| course.id == sequence);
            match (output.map(|output| output.value), course) {
                (Some(OutputValue::Token { id, .. }), Some(course)) => {
                    course.drawing -= 1;
                    course.guess.push(id);
                }
                (Some(OutputValue::Failed(_)), Some(_)) => self.forget(arrival),
                (Some(OutputValue::Token { .. } | OutputValue::Failed(_)), None) => {}
                _ => return Err(ReplyError::Outputs { step, detail: format!("no token of sequence {sequence}") }),
            }
        }
        match outputs.next() {
            Some(extra) => {
                Err(ReplyError::Outputs { step, detail: format!("result for sequence {}, which wanted none there", extra.sequence) })
            }
            None => Ok(()),
        }
    }

    /// Checks that every block is free or held by one course.
    ///
    /// # Errors
    /// Says what is wrong.
    pub(super) fn check(&self) -> Result<(), String> {
        for (g, pool) in self.pools.iter().enumerate() {
            let mut held: HashMap<_, u32> = HashMap::new();
            for block in self.courses.values().flat_map(|course| &course.tables[g].blocks) {
                *held.entry(*block).or_default() += 1;
            }
            pool.check(&held).map_err(|error| format!("draft model, group {g}: {error}"))?;
            if let Some((block, _)) = held.iter().find(|(_, holders)| **holders > 1) {
                return Err(format!("draft model, group {g}: block {block} is held twice"));
            }
        }
        Ok(())
    }

    /// Whether a course for a sequence of `known` ids would find blocks for all that it holds at a time.
    fn has_room_for(&self, known: usize) -> bool {
        let need = |group: &KvGroup| {
            let tokens = group.window.map_or(known, |w| known.min(w as usize + READ.max(CLOSE)));
            (tokens + MOST).div_ceil(BLOCK_TOKENS) + usize::from(group.window.is_some())
        };
        self.limits.kv.groups.iter().zip(&self.pools).all(|(group, pool)| pool.available() >= need(group))
    }

    /// Gives up a course whose sequence was not followed at time `now`; the one that was followed longest ago.
    fn drop_idle(&mut self, now: u64) -> bool {
        let idle = self.courses.iter().filter(|(_, course)| course.followed < now).min_by_key(|(_, course)| course.followed);
        let Some(arrival) = idle.map(|(arrival, _)| *arrival) else { return false };
        self.forget(arrival);
        true
    }

    /// Allocates blocks for the positions below `end`; returns whether there were enough.
    fn grow(&mut self, arrival: u64, end: usize) -> bool {
        let Some(course) = self.courses.get_mut(&arrival) else { return false };
        for (table, pool) in course.tables.iter_mut().zip(&mut self.pools) {
            while table.end() < end.div_ceil(BLOCK_TOKENS) {
                let Some(block) = pool.allocate() else { return false };
                table.blocks.push_back(block);
            }
        }
        true
    }

    /// Gives back blocks of window groups that are passed. A course may go back to the id before its base, and no further.
    fn pass(&mut self, arrival: u64) {
        let Some(course) = self.courses.get_mut(&arrival) else { return };
        let back = course.base.min(course.sent).saturating_sub(1);
        for ((group, pool), table) in self.limits.kv.groups.iter().zip(&mut self.pools).zip(&mut course.tables) {
            while table.first < first_needed(group, back) {
                let Some(block) = table.blocks.pop_front() else { break };
                table.first += 1;
                pool.release(block);
            }
        }
    }
}

impl Course {
    /// Its part of a step, with `tokens` tokens of input.
    fn part(&mut self, sequence: &Sequence, (tokens, input): (usize, Input), draws: bool) -> SequenceStep {
        let begin = (!self.begun).then(|| {
            Box::new(Begin {
                ids: sequence.ids.clone(),
                prompt_len: sequence.submission.prompt.len() as u32,
                // Its own odds are nobody's business, and it has no masks.
                sampling: Sampling { logprobs: None, masked: false, ..sequence.submission.sampling.clone() },
            })
        });
        self.begun = true;
        let mut tables = Vec::new();
        for (group, table) in self.tables.iter_mut().enumerate() {
            let from = table.announced.max(table.first);
            if from < table.end() {
                let blocks = table.blocks.iter().skip(from - table.first).copied().collect();
                tables.push(TableChange { group: group as u32, first: from as u32, blocks });
                table.announced = table.end();
            }
        }
        let wants = if draws { vec![Want { offset: tokens as u32 - 1, kind: WantKind::Sample }] } else { Vec::new() };
        SequenceStep { sequence: self.id, first_position: self.sent as u32, input, tables, wants, begin, adapter: 0, second: 0 }
    }
}
