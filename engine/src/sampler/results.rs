//! Results of a row of logits: scores, log-probabilities, draws.

use kernels::vocab::Total;
use plan::step::{Logprobs, OutputValue, Sampling, Want, WantKind};

use super::{Session, draw, draws::Drawn, history::Counts, philox, wants};
use crate::{InvalidStep, StepError, batch::Wanted, compute::Compute, question::Row};

/// Largest `top_k` for which ranks hand over candidates in place of slices.
const FEW: usize = 1024;

/// Makes results of rows.
#[derive(Debug)]
pub(super) struct Results {
    pub(super) compute: Compute,
    /// Size of the vocabulary.
    pub(super) vocab: usize,
    counts: Counts,
    /// A row of logits that settings changed.
    changed: Vec<f32>,
}

impl Results {
    pub(super) fn new(compute: Compute, vocab: usize) -> Self {
        Self { compute, vocab, counts: Counts::default(), changed: Vec::new() }
    }

    pub(super) fn isa(&self) -> kernels::Isa {
        self.compute.isa
    }

    /// Results of one row's wants; `drawn`: what the ranks drew together, if they did.
    pub(super) fn of_row(
        &mut self,
        session: &mut Session<'_>,
        wanted: &Wanted,
        (row, drawn): (&Row<'_>, Option<Drawn>),
        values: &mut Vec<OutputValue>,
    ) -> Result<(), StepError> {
        let total = Total::of(&row.tiles, 1.0);
        let mut targets = row.targets.iter();
        for want in wants(session.step, wanted).iter().filter(|w| !w.kind.is_vector()) {
            if row.broken || drawn == Some(Drawn::Broken) {
                values.push(OutputValue::Failed("the logits are not finite".to_owned()));
                continue;
            }
            values.push(match want.kind {
                WantKind::Score { top, .. } => OutputValue::Score(logprobs(&total, row, targets.next().copied(), top)),
                WantKind::Logits => OutputValue::Logits(row.logits.to_vec()),
                WantKind::Sample | WantKind::Pooled(_) | WantKind::Classes => self.sample(session, (wanted, want), (row, drawn), &total)?,
            });
        }
        Ok(())
    }

    /// Draws the token that follows a row.
    fn sample(
        &mut self,
        session: &mut Session<'_>,
        (wanted, want): (&Wanted, &Want),
        (row, drawn): (&Row<'_>, Option<Drawn>),
        total: &Total,
    ) -> Result<OutputValue, StepError> {
        let (step, part) = (session.step.id, &session.step.sequences[wanted.part]);
        let sequence = part.sequence;
        let position = part.first_position + want.offset;
        let Some(history) = session.histories.get(&sequence) else {
            return Err(StepError::Invalid { step, source: InvalidStep::NoSampling { sequence } });
        };
        let s = &history.sampling;
        let uniform = philox::uniform(s.seed, s.choice, position);
        let id = if let Some(Drawn::Token(drawn)) = drawn {
            drawn
        } else if let Some(few) = history.few().filter(|_| row.logits.is_empty()) {
            // What the mask forbids is not there, and would not be drawn.
            self.changed.clear();
            self.changed.resize(self.vocab, f32::NEG_INFINITY);
            few.iter().zip(&row.targets).for_each(|(&id, logit)| self.changed[id as usize] = *logit);
            history.apply(position as usize, &mut self.changed, &mut self.counts);
            draw::from_all(&self.compute, &self.changed, s, uniform)
        } else if history.changes_logits(position as usize) {
            self.changed.clear();
            self.changed.extend_from_slice(row.logits);
            history.apply(position as usize, &mut self.changed, &mut self.counts);
            draw::from_all(&self.compute, &self.changed, s, uniform)
        } else if let Some(k) = direct(s, self.vocab) {
            draw::from_first(&row.likeliest[..k.min(row.likeliest.len())], s, uniform)
        } else {
            draw::from_all(&self.compute, row.logits, s, uniform)
        };
        let Some(id) = id else { return Ok(OutputValue::Failed("no token can be drawn: none is allowed".to_owned())) };
        let logprobs = s.logprobs.map(|top| {
            let logit = match row.logits.get(id as usize) {
                Some(&logit) => Some(logit),
                None => row.likeliest.iter().find(|c| c.id == id).map(|c| c.logit),
            };
            logprobs(total, row, logit, top)
        });
        Ok(OutputValue::Token { id, logprobs })
    }
}

/// How many of the likeliest tokens a draw from unchanged logits looks at; `None`: all.
pub(super) fn direct(s: &Sampling, vocab: usize) -> Option<usize> {
    match s.top_k as usize {
        _ if s.temperature <= 0.0 => Some(1),
        0 => None,
        k if k <= FEW && k < vocab => Some(k),
        _ => None,
    }
}

/// Log-probabilities of a token with logit `logit`, and of the `top` likeliest.
fn logprobs(total: &Total, row: &Row<'_>, logit: Option<f32>, top: u32) -> Logprobs {
    let of = |logit: f32| total.log_probability(logit) as f32;
    let top = row.likeliest.iter().take(top as usize).map(|c| (c.id, of(c.logit))).collect();
    Logprobs { token: logit.map_or(f32::NEG_INFINITY, of), top }
}
