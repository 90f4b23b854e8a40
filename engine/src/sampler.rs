//! From logits to results: log-probabilities, scores, draws.
//!
//! Rank 0 of the last stage has the last word. Where a request leaves the logits as they are, the other ranks hand it the softmax sums of
//! their tiles and their likeliest rows, or the tile that is drawn from (`draws`); where it changes them, or leaves out what is unlikely, whole
//! slices of logits. So do the ranks of the first stage where that multiplies a part of the vocabulary, but for draws: they are asked, and the
//! step waits for their parts (`spread`).

mod draw;
mod draws;
mod exchange;
mod history;
mod philox;
mod results;
mod spread;

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::Arc,
    time::Instant,
};

use plan::{
    shard::Splits,
    step::{Output, OutputValue, SequenceId, Step, Want, WantKind},
};

use crate::{
    InvalidStep, MaskSource, Question, StepError,
    backend::{Backend, Context},
    batch::Wanted,
    compute::Compute,
    pooling,
    question::{Need, Row},
    ranks::Ranks,
};

use draws::Draws;
use exchange::{Exchange, Reader};
pub(crate) use history::History;
use history::NoMask;
use results::Results;
use spread::Waiting;
pub(crate) use spread::part;

/// Rows of logits computed at once: enough that the weights' way from memory costs less than the products, few enough to be small.
const ROWS: usize = 64;

/// The last stage's sampler, on each of its ranks.
#[derive(Debug)]
pub(crate) struct Sampler {
    /// Vocabulary rows of each rank.
    vocab: Vec<Range<usize>>,
    /// Those of each rank of the first stage; none where the last has them all.
    lent: Vec<Range<usize>>,
    hidden: usize,
    results: Results,
    exchange: Exchange,
    draws: Draws,
    /// States of the rows at hand.
    states: Vec<f32>,
    /// A row of logits that came in parts.
    row: Vec<f32>,
    /// Steps that were asked for, until this stage has multiplied its own part, in their order.
    asked: VecDeque<Waiting>,
    /// On rank 0, steps that wait for the parts of the first stage, in their order.
    waiting: VecDeque<Waiting>,
}

/// What became of a step's wants.
pub(crate) enum Sampled {
    /// Results, in order; none on ranks other than 0.
    Outputs(Vec<Output>),
    /// What the first stage is asked.
    Question(Arc<Question>),
}

/// What draws and scores need to know beside the step.
pub(crate) struct Session<'a> {
    pub(crate) step: &'a Step,
    pub(crate) histories: &'a mut HashMap<SequenceId, History>,
    pub(crate) masks: &'a mut dyn MaskSource,
}

impl Sampler {
    pub(crate) fn new(compute: Compute, splits: &Splits, hidden: usize) -> Self {
        let ranks = 0..splits.vocab.len();
        let results = Results::new(compute, splits.vocab.last().map_or(0, |rows| rows.end));
        Self {
            vocab: ranks.clone().map(|rank| splits.kept(rank)).collect(),
            lent: if splits.cuts.is_empty() { Vec::new() } else { ranks.map(|rank| splits.lent(rank)).collect() },
            hidden,
            results,
            exchange: Exchange::default(),
            draws: Draws::default(),
            states: Vec::new(),
            row: Vec::new(),
            asked: VecDeque::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Forgets what waits.
    pub(crate) fn clear(&mut self) {
        self.asked.clear();
        self.waiting.clear();
    }

    /// Results of the batch's wants, or what the first stage is asked for them.
    pub(crate) fn run(
        &mut self,
        session: &mut Session<'_>,
        wanted: &[Wanted],
        backend: &mut dyn Backend,
        context: &mut Context<'_, '_>,
    ) -> Result<Sampled, StepError> {
        if !self.lent.is_empty() && wanted.iter().any(|wanted| wanted.logits) {
            return self.ask(session, wanted, backend).map(Sampled::Question);
        }
        let mut outputs = Vec::new();
        for (chunk, first) in wanted.chunks(ROWS).zip((0..).step_by(ROWS)) {
            let states: Vec<Option<Vec<f32>>> = (first..).zip(chunk).map(|(row, w)| self.state(session.step, w, row, backend)).collect();
            self.gather_states(chunk, first, backend);
            let with_logits: Vec<&Wanted> = chunk.iter().filter(|w| w.logits).collect();
            for wanted in &with_logits {
                self.take_mask(session, wanted)?;
            }
            let needs: Vec<Need> = with_logits.iter().map(|wanted| exchange::need(session, wanted, self.results.vocab)).collect();
            let found = if with_logits.is_empty() { Vec::new() } else { backend.vocabulary(&self.states, &needs, context.timings) };
            let start = Instant::now();
            let exchanged = context.ranks.spent;
            let mut found = self.results(session, &with_logits, &needs, &found, context.ranks)?.into_iter();
            context.timings.sampling += start.elapsed().saturating_sub(context.ranks.spent - exchanged);
            if context.ranks.rank() == 0 {
                self.outputs(session.step, chunk.iter().zip(states), &mut found, &mut outputs);
            }
        }
        Ok(Sampled::Outputs(outputs))
    }

    /// Puts results of logits and vectors into the order of the wants.
    fn outputs<'a>(
        &self,
        step: &Step,
        rows: impl Iterator<Item = (&'a Wanted, Option<Vec<f32>>)>,
        found: &mut impl Iterator<Item = OutputValue>,
        outputs: &mut Vec<Output>,
    ) {
        for (wanted, state) in rows {
            let part = &step.sequences[wanted.part];
            for want in &part.wants[wanted.wants.clone()] {
                let value = match (&want.kind, &state) {
                    (WantKind::Pooled(pooled), Some(state)) => pooling::vector(self.results.isa(), state.clone(), pooled),
                    _ => found.next().unwrap_or_else(|| OutputValue::Failed("no result was computed".to_owned())),
                };
                outputs.push(Output { sequence: part.sequence, position: part.first_position + want.offset, value });
            }
        }
    }

    /// Brings the states together whose logits are wanted; `first`: the row of the first of `wanted`.
    fn gather_states(&mut self, wanted: &[Wanted], first: usize, backend: &dyn Backend) {
        self.states.clear();
        for (row, _) in (first..).zip(wanted).filter(|(_, wanted)| wanted.logits) {
            self.states.extend_from_slice(&backend.rows()[row * self.hidden..(row + 1) * self.hidden]);
        }
    }

    /// The final hidden state of row `row`, if it is wanted.
    fn state(&self, step: &Step, wanted: &Wanted, row: usize, backend: &dyn Backend) -> Option<Vec<f32>> {
        let wanted = wants(step, wanted).iter().any(|w| w.kind.is_vector());
        wanted.then(|| backend.rows()[row * self.hidden..(row + 1) * self.hidden].to_vec())
    }

    /// Takes the mask of a row's draw, if it has one.
    fn take_mask(&self, session: &mut Session<'_>, wanted: &Wanted) -> Result<(), StepError> {
        let (step, sequence) = (session.step.id, session.step.sequences[wanted.part].sequence);
        let draws = wants(session.step, wanted).iter().any(|want| want.kind == WantKind::Sample);
        let Some(history) = session.histories.get_mut(&sequence).filter(|history| draws && history.sampling.masked) else { return Ok(()) };
        let mask = session.masks.mask(step, sequence).map_err(|source| StepError::Mask { step, sequence, source })?;
        let set = history.set_mask(mask, self.results.vocab);
        set.map_err(|NoMask| StepError::Invalid { step, source: InvalidStep::Mask { sequence } })
    }

    /// Results of the wants that need logits, in order; none on ranks other than 0. `found`: in this rank's part, of each row.
    fn results(
        &mut self,
        session: &mut Session<'_>,
        rows: &[&Wanted],
        needs: &[Need],
        found: &[Row<'_>],
        ranks: &mut Ranks<'_>,
    ) -> Result<Vec<OutputValue>, StepError> {
        let Self { vocab, results, exchange, draws, row, .. } = self;
        let mut values = Vec::new();
        if ranks.many() {
            let own = &vocab[ranks.rank()];
            exchange.run(vocab, needs, ranks, |into| exchange::write(own, needs, found, into))?;
        }
        let drawn = draws.run(vocab, needs, found, ranks)?;
        if ranks.rank() > 0 {
            return Ok(values);
        }
        let compute = results.compute.clone();
        let mut drawn = drawn.into_iter();
        let mut of_row = |wanted: &Wanted, need: &Need, row: &Row<'_>| {
            let drawn = need.draw.and_then(|_| drawn.next());
            results.of_row(session, wanted, (row, drawn), &mut values)
        };
        if ranks.many() {
            let parts = vocab.iter().cloned().zip(exchange.parts.iter().map(|part| &exchange.buffer[part.clone()]));
            let mut reader = Reader::new(parts, row);
            for (wanted, need) in rows.iter().zip(needs) {
                of_row(wanted, need, &reader.row(&compute, need))?;
            }
        } else {
            for ((wanted, need), row) in rows.iter().zip(needs).zip(found) {
                of_row(wanted, need, row)?;
            }
        }
        Ok(values)
    }
}

/// The wants of a row.
fn wants<'a>(step: &'a Step, wanted: &Wanted) -> &'a [Want] {
    &step.sequences[wanted.part].wants[wanted.wants.clone()]
}
