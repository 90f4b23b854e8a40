//! From logits to results: log-probabilities, scores, draws.
//!
//! Rank 0 of the last stage has the last word. Where a request leaves the logits as they are, the other ranks hand it the softmax sums of
//! their tiles and their likeliest rows; where it changes them, or draws from all of them, whole slices of logits.

mod draw;
mod exchange;
mod history;
mod philox;
mod results;

use std::{collections::HashMap, ops::Range, time::Instant};

use plan::step::{Output, OutputValue, SequenceId, Step, Want, WantKind};

use crate::{
    InvalidStep, MaskSource, StepError,
    backend::{Backend, Context},
    batch::Wanted,
    compute::Compute,
    pooling,
    ranks::Ranks,
};

use exchange::{Exchange, Need};
pub(crate) use history::History;
use history::NoMask;
use results::{Results, Row};

/// Rows of logits computed at once: enough that the weights' way from memory costs less than the products, few enough to be small.
const ROWS: usize = 32;
/// The last stage's sampler, on each of its ranks.
#[derive(Debug)]
pub(crate) struct Sampler {
    /// Vocabulary rows of each rank.
    vocab: Vec<Range<usize>>,
    hidden: usize,
    results: Results,
    exchange: Exchange,
}

/// What draws and scores need to know beside the step.
pub(crate) struct Session<'a> {
    pub(crate) step: &'a Step,
    pub(crate) histories: &'a mut HashMap<SequenceId, History>,
    pub(crate) masks: &'a mut dyn MaskSource,
}

impl Sampler {
    pub(crate) fn new(compute: Compute, vocab: Vec<Range<usize>>, hidden: usize) -> Self {
        let results = Results::new(compute, vocab.last().map_or(0, |rows| rows.end));
        Self { vocab, hidden, results, exchange: Exchange::default() }
    }

    /// Results of the batch's wants, in order; none on ranks other than 0.
    pub(crate) fn run(
        &mut self,
        session: &mut Session<'_>,
        wanted: &[Wanted],
        backend: &mut dyn Backend,
        context: &mut Context<'_, '_>,
    ) -> Result<Vec<Output>, StepError> {
        let mut outputs = Vec::new();
        for (chunk, first) in wanted.chunks(ROWS).zip((0..).step_by(ROWS)) {
            let states: Vec<Option<Vec<f32>>> = (first..).zip(chunk).map(|(row, w)| self.state(session.step, w, row, backend)).collect();
            let rows: Vec<usize> = (first..).zip(chunk).filter(|(_, w)| w.logits).map(|(row, _)| row).collect();
            let with_logits: Vec<&Wanted> = chunk.iter().filter(|w| w.logits).collect();
            for wanted in &with_logits {
                self.take_mask(session, wanted)?;
            }
            let needs: Vec<Need> = with_logits.iter().map(|wanted| Need::of(session, wanted, self.results.vocab)).collect();
            let only = self.few_rows(&needs, context.ranks.rank());
            let logits: &[f32] = if rows.is_empty() { &[] } else { backend.logits(&rows, only.as_deref(), context) };
            let start = Instant::now();
            let exchanged = context.ranks.spent;
            let mut found = self.results(session, &with_logits, &needs, logits, context.ranks)?.into_iter();
            context.timings.sampling += start.elapsed().saturating_sub(context.ranks.spent - exchanged);
            if context.ranks.rank() > 0 {
                continue;
            }
            for (wanted, state) in chunk.iter().zip(states) {
                let part = &session.step.sequences[wanted.part];
                for want in &part.wants[wanted.wants.clone()] {
                    let value = match (&want.kind, &state) {
                        (WantKind::Pooled(pooled), Some(state)) => pooling::vector(self.results.isa(), state.clone(), pooled),
                        _ => found.next().unwrap_or_else(|| OutputValue::Failed("no result was computed".to_owned())),
                    };
                    outputs.push(Output { sequence: part.sequence, position: part.first_position + want.offset, value });
                }
            }
        }
        Ok(outputs)
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

    /// The vocabulary rows of rank `rank` that any of these needs, counted from its first, where none needs more than a few.
    fn few_rows(&self, needs: &[Need], rank: usize) -> Option<Vec<usize>> {
        if needs.is_empty() || !needs.iter().all(|need| need.sparse) {
            return None;
        }
        let own = &self.vocab[rank];
        let ids = needs.iter().flat_map(|need| &need.targets).map(|&id| id as usize).filter(|id| own.contains(id));
        let mut rows: Vec<usize> = ids.map(|id| id - own.start).collect();
        rows.sort_unstable();
        rows.dedup();
        Some(rows)
    }

    /// Results of the wants that need logits, in order; none on ranks other than 0. `logits`: this rank's, of each row.
    fn results(
        &mut self,
        session: &mut Session<'_>,
        rows: &[&Wanted],
        needs: &[Need],
        logits: &[f32],
        ranks: &mut Ranks<'_>,
    ) -> Result<Vec<OutputValue>, StepError> {
        let Self { vocab, results, exchange, .. } = self;
        let mut values = Vec::new();
        if !ranks.many() {
            for ((logits, wanted), need) in logits.chunks_exact(results.vocab).zip(rows).zip(needs) {
                let row = Row::of(&results.compute, logits, need);
                results.of_row(session, wanted, &row, &mut values)?;
            }
            return Ok(values);
        }
        exchange.run(&results.compute, vocab, needs, logits, ranks)?;
        if ranks.rank() == 0 {
            let compute = results.compute.clone();
            let mut reader = exchange.reader(vocab);
            for (wanted, need) in rows.iter().zip(needs) {
                let row = reader.row(&compute, need);
                results.of_row(session, wanted, &row, &mut values)?;
            }
        }
        Ok(values)
    }
}

/// The wants of a row.
fn wants<'a>(step: &'a Step, wanted: &Wanted) -> &'a [Want] {
    &step.sequences[wanted.part].wants[wanted.wants.clone()]
}
