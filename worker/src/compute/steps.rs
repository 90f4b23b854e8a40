//! The steps of a session, one after the other.
//!
//! Where the vocabulary is spread over stages, the first answers questions between its steps, and the last runs steps on while others wait for
//! these answers. What is on the way to a token comes first, and no result depends on the order in which anything arrives.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use engine::{Engine, Question, StageOutput, part_bytes};
use plan::step::{Output, Step};
use proto::{
    convert::encode_output,
    worker::{self as wire, session_reply::Message},
};
use tracing::{trace, warn};

use super::{
    slots::Slots,
    tokens::{self, Tokens},
};
use crate::{
    failure::{Failure, Reason},
    link::Outbound,
    session::{Live, Masks, Stop, Work},
    state::Worker,
};

/// Runs steps until the owner has closed the session and the last one is answered.
pub(super) fn run(worker: &Worker, engine: &mut Engine, live: &Live, links: &Outbound, slots: &mut Slots) -> Result<(), Stop> {
    let mut steps = Steps {
        worker,
        engine,
        live,
        links,
        slots,
        tokens: Tokens::default(),
        next: None,
        asked: VecDeque::new(),
        products: VecDeque::new(),
        waiting: VecDeque::new(),
        spent: Spent::default(),
    };
    let mut seen = 0;
    loop {
        while steps.go_on()? {}
        if steps.are_done() {
            return Ok(());
        }
        let (begun, idle) = (Instant::now(), steps.are_idle());
        seen = live.inbox.wait(seen)?;
        if !idle {
            steps.spent.waited += begun.elapsed();
        }
    }
}

/// A session's steps as far as they are.
struct Steps<'a> {
    worker: &'a Worker,
    engine: &'a mut Engine,
    live: &'a Live,
    links: &'a Outbound,
    slots: &'a mut Slots,
    tokens: Tokens,
    /// The step that runs next, once its input is here.
    next: Option<Step>,
    /// On a first stage that multiplies a part of the vocabulary: the steps whose questions are still to come.
    asked: VecDeque<u64>,
    /// On the last stage: rows whose products with this stage's part of the vocabulary are still to be made, by step.
    products: VecDeque<usize>,
    /// Steps to be answered, in order.
    waiting: VecDeque<Waiting>,
    spent: Spent,
}

/// A step that was run.
struct Waiting {
    step: Step,
    /// Its results; until then it waits for the first stage's parts.
    outputs: Option<Vec<Output>>,
}

/// Where time went since the last answer.
#[derive(Default)]
struct Spent {
    waited: Duration,
    collective: Duration,
    compute: Duration,
    sent: Duration,
}

impl Steps<'_> {
    /// Does one thing that can be done now; whether there was any.
    fn go_on(&mut self) -> Result<bool, Stop> {
        if !self.asked.is_empty()
            && let Some(question) = self.live.inbox.question()?
        {
            return self.lend(&question).map(|()| true);
        }
        if self.answer()? {
            return Ok(true);
        }
        if self.next.is_none() {
            match self.live.inbox.work() {
                Some(Work::Step(step)) => {
                    if self.resolves() {
                        self.tokens.follow(&step);
                    }
                    self.next = Some(step);
                }
                Some(Work::Change(change)) => {
                    return self.slots.change(self.worker, self.engine, self.live, change).map(|()| true);
                }
                None => {}
            }
        }
        if (self.products.is_empty() || self.may_precede_product()) && self.run()? {
            return Ok(true);
        }
        if self.products.pop_front().is_some() {
            computed(self.engine, &mut self.spent, Engine::multiply)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Whether the next step, if it can be run, comes before the product that is to be made: the first stage then has the questions of both, and
    /// computes while the answer to the first and the token drawn from it are on their way. Not where that step is much longer, nor where other
    /// ranks, which exchange what they compute, might decide otherwise.
    fn may_precede_product(&self) -> bool {
        let rows = self.products.iter().sum::<usize>();
        let short = self.next.as_ref().is_some_and(|next| next.tokens() <= 2 * rows);
        self.products.len() == 1 && short && self.worker.spec.shard.ranks == 1
    }

    /// Whether every step was answered, and no question is to come.
    fn are_done(&self) -> bool {
        self.are_idle() && self.live.inbox.is_drained()
    }

    /// Whether nothing is to be done that has come.
    fn are_idle(&self) -> bool {
        self.next.is_none() && self.products.is_empty() && self.waiting.is_empty() && self.asked.is_empty()
    }

    /// Whether ids are needed: the first stage embeds them, the sampler keeps them for penalties.
    fn resolves(&self) -> bool {
        self.worker.spec.shard.is_first() || self.worker.samples()
    }

    /// Runs the next step, if its input is here and no draw of its sequences is still to be finished.
    fn run(&mut self) -> Result<bool, Stop> {
        let Some(mut step) = self.next.take() else { return Ok(false) };
        let shard = &self.worker.spec.shard;
        if self.resolves() {
            self.live.inbox.waiting_tokens().into_iter().for_each(|drawn| self.tokens.hear(drawn));
            if !self.tokens.are_heard(&step) {
                self.next = Some(step);
                return self.live.inbox.miss_tokens().map(|()| false);
            }
        }
        if self.engine.unfinished(&step).is_some() {
            self.next = Some(step);
            return Ok(false);
        }
        let mut hidden = Vec::new();
        if !shard.is_first() && step.tokens() > 0 {
            match self.live.inbox.hidden(step.id)? {
                Some(values) => hidden = values,
                None => {
                    self.next = Some(step);
                    return Ok(false);
                }
            }
        }
        if self.resolves() {
            self.tokens.resolve(&mut step)?;
        }
        let mut masks = Masks::new(self.live, self.worker.deadlines.mask);
        let output = computed(self.engine, &mut self.spent, |engine| engine.run(&step, &hidden, &mut masks))?;
        let outputs = match output {
            StageOutput::Hidden(values) if !shard.is_last() => {
                if step.tokens() > 0 {
                    sent(&mut self.spent, || self.links.hidden(step.id, step.tokens(), &values))?;
                }
                if !shard.splits.cuts.is_empty() && shard.is_first() && step.wants_logits() {
                    self.asked.push_back(step.id);
                }
                Some(Vec::new())
            }
            StageOutput::Question(question) if shard.is_last() => {
                let samples = self.worker.samples();
                if samples {
                    self.ask(&question)?;
                }
                self.products.push_back(question.needs.len());
                if samples { None } else { Some(Vec::new()) }
            }
            StageOutput::Outputs(results) if shard.is_last() => Some(results),
            _ => return Err(Failure::new(Reason::Engine, "the engine's output is not that of its stage").into()),
        };
        if let Some(results) = &outputs {
            self.tell_tokens(&step, results)?;
        }
        self.waiting.push_back(Waiting { step, outputs });
        Ok(true)
    }

    /// Asks the first stage for its part of logits.
    fn ask(&mut self, question: &Question) -> Result<(), Stop> {
        let splits = &self.worker.spec.shard.splits;
        let bytes = (0..splits.cuts.len()).map(|rank| part_bytes(&question.needs, &splits.lent(rank))).collect();
        self.live.inbox.expect_parts(question.step, bytes);
        sent(&mut self.spent, || self.links.question(question, self.worker.spec.config.hidden))
    }

    /// Answers a question of the last stage.
    fn lend(&mut self, question: &Question) -> Result<(), Stop> {
        if self.asked.pop_front() != Some(question.step) {
            let detail = format!("a question came of step {}, of which none was expected now", question.step);
            return Err(Failure::new(Reason::Protocol, detail).into());
        }
        let part = computed(self.engine, &mut self.spent, |engine| engine.lend(question))?;
        sent(&mut self.spent, || self.links.part(question.step, self.worker.rank(), part))
    }

    /// Answers the first step that waits, if it need not wait any longer.
    fn answer(&mut self) -> Result<bool, Stop> {
        // The products that are still to be made are those of the last that wait.
        let unfinished = self.waiting.iter().filter(|waiting| waiting.outputs.is_none()).count();
        let multiplied = unfinished > self.products.len();
        let Some(Waiting { step, outputs }) = self.waiting.pop_front_if(|first| first.outputs.is_some() || multiplied) else {
            return Ok(false);
        };
        let outputs = match outputs {
            Some(outputs) => outputs,
            None => match self.live.inbox.parts(step.id)? {
                Some(parts) => {
                    let results = computed(self.engine, &mut self.spent, |engine| engine.finish(step.id, &parts))?;
                    self.tell_tokens(&step, &results)?;
                    results
                }
                None => {
                    self.waiting.push_front(Waiting { step, outputs: None });
                    return Ok(false);
                }
            },
        };
        let Spent { waited, collective, compute, sent } = std::mem::take(&mut self.spent);
        trace!(step = step.id, tokens = step.tokens(), ?waited, ?collective, ?compute, ?sent, "step");
        let timing =
            wire::Timing { compute_us: micros(compute), collective_us: micros(collective), wait_us: micros(waited), link_us: micros(sent) };
        let outputs = outputs.iter().map(encode_output).collect();
        self.live.answer(&self.worker.runtime, Message::Step(wire::StepReply { step: step.id, outputs, timing: Some(timing) }))?;
        Ok(true)
    }

    /// Sends the tokens among the results to the first stage, and keeps them.
    fn tell_tokens(&mut self, step: &Step, results: &[Output]) -> Result<(), Stop> {
        if let Some(drawn) = tokens::drawn(step, results).filter(|_| self.worker.samples()) {
            sent(&mut self.spent, || self.links.tokens(&drawn))?;
            self.tokens.hear(drawn);
        }
        Ok(())
    }
}

/// Has the engine compute something.
fn computed<T>(
    engine: &mut Engine,
    spent: &mut Spent,
    compute: impl FnOnce(&mut Engine) -> Result<T, engine::StepError>,
) -> Result<T, Failure> {
    let (begun, before) = (Instant::now(), engine.timings());
    let result = compute(engine).map_err(Failure::from);
    let after = engine.timings();
    if let Some(alarm) = after.alarm(&before) {
        warn!("{alarm}");
    }
    let collective = after.collective.saturating_sub(before.collective);
    spent.collective += collective;
    spent.compute += begun.elapsed().saturating_sub(collective);
    result
}

/// Sends something.
fn sent(spent: &mut Spent, send: impl FnOnce() -> Result<(), Stop>) -> Result<(), Stop> {
    let begun = Instant::now();
    let result = send();
    spent.sent += begun.elapsed();
    result
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
