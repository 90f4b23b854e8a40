//! The vocabulary product spread over the first and the last stage.
//!
//! The last stage asks: it sends states and what is needed of their logits, and multiplies its own rows meanwhile. The parts of all are merged in
//! the order of their rows when those of the first stage have come; steps behind may be run until then.

use std::{collections::HashMap, ops::Range, sync::Arc, time::Instant};

use plan::step::{Output, SequenceId, Step, WantKind};

use super::{
    History, ROWS, Sampler, Session,
    exchange::{self, Reader},
};
use crate::{
    InvalidStep, NoMasks, Question, StepError, Timings,
    backend::{Backend, Context},
    batch::Wanted,
    question::part_bytes,
};

/// A step whose logits are computed in parts.
#[derive(Debug)]
pub(super) struct Waiting {
    step: Step,
    wanted: Vec<Wanted>,
    /// Final states that are wanted themselves.
    states: Vec<Option<Vec<f32>>>,
    question: Arc<Question>,
    /// The parts of this stage's ranks, one after the other, and where each lies.
    own: Vec<u8>,
    parts: Vec<Range<usize>>,
}

impl Waiting {
    /// Whether a token of `sequence` is to be drawn.
    fn draws(&self, sequence: SequenceId) -> bool {
        let parts = self.step.sequences.iter().filter(|part| part.sequence == sequence);
        parts.flat_map(|part| &part.wants).any(|want| want.kind == WantKind::Sample)
    }
}

/// The part of whoever multiplies `rows` of the vocabulary.
pub(crate) fn part(rows: &Range<usize>, hidden: usize, question: &Question, backend: &mut dyn Backend, timings: &mut Timings) -> Vec<u8> {
    let mut part = vec![0; part_bytes(&question.needs, rows)];
    if rows.is_empty() {
        return part;
    }
    let mut left = &mut part[..];
    for (needs, states) in question.needs.chunks(ROWS).zip(question.states.chunks(ROWS * hidden)) {
        let (into, behind) = left.split_at_mut(part_bytes(needs, rows));
        left = behind;
        exchange::write(rows, needs, &backend.vocabulary(states, needs, timings), into);
    }
    part
}

impl Sampler {
    /// What the first stage is asked for a batch's wants.
    pub(super) fn ask(&mut self, session: &mut Session<'_>, wanted: &[Wanted], backend: &dyn Backend) -> Result<Arc<Question>, StepError> {
        let with_logits: Vec<&Wanted> = wanted.iter().filter(|wanted| wanted.logits).collect();
        for wanted in &with_logits {
            self.take_mask(session, wanted)?;
        }
        self.gather_states(wanted, 0, backend);
        let question = Arc::new(Question {
            step: session.step.id,
            needs: with_logits.iter().map(|wanted| exchange::need(session, wanted, self.results.vocab).without_draw()).collect(),
            states: self.states.clone(),
        });
        self.asked.push_back(Waiting {
            step: session.step.clone(),
            wanted: wanted.to_vec(),
            states: (0..).zip(wanted).map(|(row, wanted)| self.state(session.step, wanted, row, backend)).collect(),
            question: question.clone(),
            own: Vec::new(),
            parts: Vec::new(),
        });
        Ok(question)
    }

    /// Multiplies this stage's part of the vocabulary for the first step that was asked for, and brings it to rank 0.
    pub(crate) fn multiply(&mut self, backend: &mut dyn Backend, context: &mut Context<'_, '_>) -> Result<(), StepError> {
        let Some(asked) = self.asked.pop_front() else { return Ok(()) };
        let rank = context.ranks.rank();
        let own = part(&self.vocab[rank], self.hidden, &asked.question, backend, context.timings);
        self.exchange.run(&self.vocab, &asked.question.needs, context.ranks, |into| into.copy_from_slice(&own))?;
        if rank == 0 {
            let (own, parts) = (std::mem::take(&mut self.exchange.buffer), self.exchange.parts.clone());
            self.waiting.push_back(Waiting { own, parts, ..asked });
        }
        Ok(())
    }

    /// The first sequence of `step` whose token is still to be drawn in one that waits: that one is to be finished before.
    pub(crate) fn waits(&self, step: &Step) -> Option<SequenceId> {
        let sequences = || step.frees.iter().copied().chain(step.sequences.iter().map(|part| part.sequence));
        self.asked.iter().chain(&self.waiting).find_map(|waiting| sequences().find(|&sequence| waiting.draws(sequence)))
    }

    /// Results of the step that waits longest, which must be `step`, with the parts of the first stage by rank.
    pub(crate) fn finish(
        &mut self,
        step: u64,
        lent: &[Vec<u8>],
        histories: &mut HashMap<SequenceId, History>,
        timings: &mut Timings,
    ) -> Result<Vec<Output>, StepError> {
        let start = Instant::now();
        let invalid = |source| Err(StepError::Invalid { step, source });
        let Some(waiting) = self.waiting.pop_front_if(|waiting| waiting.step.id == step) else {
            return invalid(InvalidStep::NotAsked);
        };
        let needs = &waiting.question.needs;
        let expected = self.lent.iter().map(|rows| part_bytes(needs, rows));
        if !lent.iter().map(Vec::len).eq(expected.clone()) {
            return invalid(InvalidStep::Parts { got: lent.iter().map(Vec::len).collect(), expected: expected.collect() });
        }
        let own = self.vocab.iter().cloned().zip(waiting.parts.iter().map(|part| &waiting.own[part.clone()]));
        let lent = self.lent.iter().cloned().zip(lent.iter().map(Vec::as_slice));
        let mut reader = Reader::new(own.chain(lent), &mut self.row);
        let mut session = Session { step: &waiting.step, histories, masks: &mut NoMasks };
        let compute = self.results.compute.clone();
        let mut values = Vec::new();
        for (wanted, need) in waiting.wanted.iter().filter(|wanted| wanted.logits).zip(needs) {
            let row = reader.row(&compute, need);
            self.results.of_row(&mut session, wanted, (&row, None), &mut values)?;
        }
        let mut outputs = Vec::new();
        self.outputs(&waiting.step, waiting.wanted.iter().zip(waiting.states), &mut values.into_iter(), &mut outputs);
        timings.sampling += start.elapsed();
        Ok(outputs)
    }
}
