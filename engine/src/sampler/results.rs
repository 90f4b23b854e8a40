//! Results of a row of logits: scores, log-probabilities, draws.

use kernels::vocab::{self, Candidate, TileSum, Total};
use plan::step::{Logprobs, OutputValue, Sampling, TokenId, Want, WantKind};

use super::{Session, draw, history::Counts, philox, wants};
use crate::{InvalidStep, StepError, batch::Wanted, compute::Compute, question::Need};

/// Largest `top_k` for which ranks hand over candidates in place of slices.
const FEW: usize = 1024;

/// A row of logits, as far as rank 0 needs it.
#[derive(Debug, Default)]
pub(super) struct Row<'a> {
    /// `[vocab]`; empty where the rest is enough.
    pub(super) logits: &'a [f32],
    /// Parts of the softmax sum; none where it is not needed.
    pub(super) tiles: Vec<TileSum>,
    /// Whether a logit is NaN or infinity: the softmax sum is not a number then.
    pub(super) broken: bool,
    /// The likeliest, in order.
    pub(super) likeliest: Vec<Candidate>,
    /// Logit of each token to be scored, in the order of the wants.
    pub(super) targets: Vec<f32>,
    /// What the ranks drew together, if they did: a token, or that none can come.
    pub(super) drawn: Option<Option<TokenId>>,
}

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

    /// Results of one row's wants.
    pub(super) fn of_row(
        &mut self,
        session: &mut Session<'_>,
        wanted: &Wanted,
        row: &Row<'_>,
        values: &mut Vec<OutputValue>,
    ) -> Result<(), StepError> {
        let total = Total::of(&row.tiles, 1.0);
        let mut targets = row.targets.iter();
        for want in wants(session.step, wanted).iter().filter(|w| !w.kind.is_vector()) {
            if row.broken {
                values.push(OutputValue::Failed("the logits are not finite".to_owned()));
                continue;
            }
            values.push(match want.kind {
                WantKind::Score { top, .. } => OutputValue::Score(logprobs(&total, row, targets.next().copied(), top)),
                WantKind::Logits => OutputValue::Logits(row.logits.to_vec()),
                WantKind::Sample | WantKind::Pooled(_) | WantKind::Classes => self.sample(session, wanted, want, row, &total)?,
            });
        }
        Ok(())
    }

    /// Draws the token that follows a row.
    fn sample(
        &mut self,
        session: &mut Session<'_>,
        wanted: &Wanted,
        want: &Want,
        row: &Row<'_>,
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
        let id = if let Some(drawn) = row.drawn {
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

impl<'a> Row<'a> {
    /// A whole row of logits.
    pub(super) fn of(compute: &Compute, logits: &'a [f32], need: &Need) -> Self {
        let Compute { pool, isa } = compute;
        let mut tiles = Vec::new();
        let targets: Vec<f32> = need.targets.iter().map(|&id| logits[id as usize]).collect();
        let broken = if need.sparse {
            targets.iter().any(|logit| !logit.is_finite())
        } else if need.total {
            tiles.resize(logits.len().div_ceil(vocab::VOCAB_TILE), TileSum { max: 0.0, sum: 0.0 });
            vocab::tile_sums(pool, *isa, logits, 1.0, &mut tiles);
            tiles.iter().any(|tile| tile.sum.is_nan())
        } else {
            !vocab::bounded(pool, *isa, logits)
        };
        let likeliest = if need.top > 0 { vocab::top_k(pool, *isa, logits, 0, need.top) } else { Vec::new() };
        Self { logits: if need.sparse { &[] } else { logits }, tiles, broken, likeliest, targets, drawn: None }
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
