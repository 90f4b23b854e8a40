//! The vocabulary product: as much of it as is needed.

use kernels::vocab::{Found, Wanted};
use plan::step::TokenId;

use super::{
    forward::Laps,
    screen::{Screen, Screened},
    stage::Cpu,
};
use crate::{
    Timings,
    question::{self, Need, Of, Row},
};

impl Cpu {
    /// What is needed of this rank's logits of states, `[rows, hidden]`, for each of `needs`.
    pub(super) fn vocabulary_product(&mut self, states: &[f32], needs: &[Need], timings: &mut Timings) -> Vec<Row<'_>> {
        let mut laps = Laps::begin();
        let Some((id, matrix)) = self.weights.vocabulary().filter(|_| !self.product.is_empty()) else {
            return needs.iter().map(|_| Row::default()).collect();
        };
        // The last stage sees every state that goes in; the first, which has a part of the rows, sees them once more.
        let observed = if self.is_last { None } else { self.inputs.observed.take() };
        let (compute, own) = (&self.compute, &self.product);
        let rows = match (question::wanted(needs, own), &self.screen) {
            (Of::Rows(rows), _) => {
                let logits = self.inputs.multiply_rows(compute, states, needs.len(), (id, matrix), &rows);
                let of_rows = |(at, need)| few(need, own.start, &rows, &logits[at * rows.len()..(at + 1) * rows.len()]);
                needs.iter().enumerate().map(of_rows).collect()
            }
            (Of::Likeliest(count), Some(screen)) if Screen::takes(needs.len(), count) => {
                let screened = Screened { states, tokens: needs.len(), matrix: (id, matrix), rows: (own.len(), own.start as u32) };
                let found = screen.product(compute, &mut self.inputs, screened, count, timings);
                found.into_iter().zip(needs).map(|(found, need)| row(found, need, &[])).collect()
            }
            (Of::All | Of::Likeliest(_), _) => {
                let wanted: Vec<Wanted<'_>> = needs.iter().map(wanted).collect();
                let logits = self.buffers.logits.first(wanted.iter().filter(|wanted| wanted.kept).count() * own.len());
                let found = self.inputs.vocabulary(compute, states, (id, matrix), (own.len(), own.start as u32), &wanted, logits);
                let mut kept = logits.chunks_exact(own.len());
                let logits = |wanted: &Wanted<'_>| if wanted.kept { kept.next().unwrap_or_default() } else { &[] };
                let logits: Vec<&[f32]> = wanted.iter().map(logits).collect();
                found.into_iter().zip(needs).zip(logits).map(|((found, need), logits)| row(found, need, logits)).collect()
            }
        };
        self.inputs.observed = observed.or(self.inputs.observed.take());
        laps.add(&mut timings.vocabulary);
        rows
    }
}

/// What a product is to find.
fn wanted(need: &Need) -> Wanted<'_> {
    Wanted {
        sums: need.draw.map(|draw| draw.factor).or(need.total.then_some(1.0)),
        top: need.top,
        rows: &need.targets,
        kept: need.whole || need.draw.is_some(),
    }
}

fn row<'a>(found: Found, need: &Need, logits: &'a [f32]) -> Row<'a> {
    let broken = if need.sparse { broken(&found.logits) } else { !found.bounded };
    let likeliest = found.likeliest.into_iter().take(need.top).collect();
    Row { logits, tiles: found.tiles, broken, likeliest, targets: found.logits }
}

/// Of a row of which only `rows` were multiplied, counted from `first`.
fn few<'a>(need: &Need, first: usize, rows: &[usize], logits: &[f32]) -> Row<'a> {
    let logit = |&id: &TokenId| {
        let at = (id as usize).checked_sub(first).and_then(|row| rows.binary_search(&row).ok());
        at.map_or(0.0, |at| logits[at])
    };
    let targets: Vec<f32> = need.targets.iter().map(logit).collect();
    Row { broken: broken(&targets), targets, ..Row::default() }
}

/// Whether any of the logits of a few allowed tokens cannot be drawn from.
fn broken(logits: &[f32]) -> bool {
    logits.iter().any(|logit| !logit.is_finite())
}
