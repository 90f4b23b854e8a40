//! Mixtures of experts: Shazeer et al. 2017, arXiv:1701.06538.
//!
//! Every rank routes all tokens, and runs the experts it has on the tokens that go to them, expert by expert. The outputs are ordered by
//! expert and then by token, so that each rank's are together; they are gathered, and each token's are added in the order in which its
//! experts were chosen. So the sum has one order, whatever the ranks and the tokens beside it.

use std::ops::Range;

use kernels::{
    Buffer, bytes,
    elementwise::{self, Gate},
    routing::{self, Choice, Groups, Routing},
};
use plan::model::{Experts, Scoring};

use super::{
    input::Inputs,
    weights::{Expert, Linear},
};
use crate::{collective::CollectiveError, compute::Compute, ranks::Ranks};

/// Where the tokens of a step go, and what comes back. Buffers grow as they are needed.
#[derive(Debug, Default)]
pub(super) struct Mixture {
    scores: Buffer<f32>,
    /// Experts of each token.
    used: usize,
    /// The experts of each token, `[tokens, used]`.
    chosen: Vec<Choice>,
    /// The places in `order` of each expert's choices.
    of_expert: Vec<Range<usize>>,
    /// Choices by expert, then by token.
    order: Vec<u32>,
    /// The place in `order` of each choice.
    places: Vec<u32>,
    /// An expert's inputs.
    inputs: Buffer<f32>,
    gate: Buffer<f32>,
    up: Buffer<f32>,
    /// Outputs in `order`, `[tokens · used, hidden]`.
    outputs: Buffer<f32>,
}

impl Mixture {
    /// Chooses the experts of each token of `h`, `[tokens, hidden]`.
    pub(super) fn route(
        &mut self,
        compute: &Compute,
        inputs: &mut Inputs,
        (router, bias): (&Linear, &[f32]),
        experts: Experts,
        h: &[f32],
        tokens: usize,
    ) {
        self.used = experts.used;
        let scores = self.scores.first(tokens * experts.count);
        inputs.multiply(compute, h, tokens, &[], [(router, &mut *scores)]);
        let routing = Routing {
            experts: experts.count,
            used: experts.used,
            scoring: match experts.scoring {
                Scoring::Softmax => routing::Scoring::Softmax,
                Scoring::Sigmoid => routing::Scoring::Sigmoid(bias),
            },
            groups: experts.groups.map(|g| Groups { count: g.count, used: g.used, best: g.best }),
            normalize: experts.normalize,
            scale: experts.scale,
        };
        routing::route(compute.isa, &routing, scores, &mut self.chosen);
        let mut counts = vec![0; experts.count];
        self.chosen.iter().for_each(|c| counts[c.expert as usize] += 1);
        self.of_expert.clear();
        let mut end = 0;
        self.of_expert.extend(counts.iter().map(|count| {
            end += count;
            end - count..end
        }));
        let mut next: Vec<usize> = self.of_expert.iter().map(|places| places.start).collect();
        self.order.resize(self.chosen.len(), 0);
        self.places.resize(self.chosen.len(), 0);
        for (choice, c) in self.chosen.iter().enumerate() {
            let place = &mut next[c.expert as usize];
            self.order[*place] = choice as u32;
            self.places[choice] = *place as u32;
            *place += 1;
        }
    }

    /// Runs this rank's experts, the first of which is `first_expert`, on the tokens that were given to them.
    pub(super) fn run(
        &mut self,
        compute: &Compute,
        inputs: &mut Inputs,
        (own, activation): (&[Expert], Gate),
        first_expert: usize,
        h: &[f32],
        hidden: usize,
    ) {
        self.outputs.first(self.chosen.len() * hidden);
        for (expert, places) in own.iter().zip(&self.of_expert[first_expert..]) {
            let rows = places.len();
            if rows == 0 {
                continue;
            }
            let x = self.inputs.first(rows * hidden);
            for (row, &choice) in x.chunks_exact_mut(hidden).zip(&self.order[places.clone()]) {
                let token = choice as usize / self.used;
                row.copy_from_slice(&h[token * hidden..(token + 1) * hidden]);
            }
            let width = rows * expert.gate.matrix.rows();
            let (gate, up) = (self.gate.first(width), self.up.first(width));
            inputs.multiply(compute, x, rows, &[], [(&expert.gate, &mut *gate), (&expert.up, &mut *up)]);
            elementwise::gate(&compute.pool, compute.isa, activation, gate, up);
            let out = &mut self.outputs[places.start * hidden..places.end * hidden];
            inputs.multiply(compute, gate, rows, &[], [(&expert.down, out)]);
        }
    }

    /// Gathers the outputs of all ranks' experts and adds those of each token: `sums`, `[tokens, hidden]`.
    pub(super) fn sum(
        &mut self,
        compute: &Compute,
        ranks: &mut Ranks<'_>,
        split: &[Range<usize>],
        sums: &mut [f32],
        hidden: usize,
    ) -> Result<(), CollectiveError> {
        let outputs = &mut self.outputs[..self.chosen.len() * hidden];
        if ranks.many() {
            let mut end = 0;
            let parts: Vec<Range<usize>> = split
                .iter()
                .map(|own| {
                    let len: usize = self.of_expert[own.clone()].iter().map(ExactSizeIterator::len).sum();
                    end += len;
                    end - len..end
                })
                .collect();
            ranks.all_gather(bytes::of_mut(outputs), &parts, hidden * size_of::<f32>())?;
        }
        let (chosen, places, used) = (&self.chosen, &self.places, self.used);
        compute.pool.for_rows(sums, hidden, 1, |first, rows| {
            for (token, sum) in rows.chunks_exact_mut(hidden).enumerate() {
                sum.fill(0.0);
                let choices = (first + token) * used..(first + token + 1) * used;
                for (c, &place) in chosen[choices.clone()].iter().zip(&places[choices]) {
                    let output = &outputs[place as usize * hidden..(place as usize + 1) * hidden];
                    elementwise::add_scaled(compute.isa, sum, output, c.weight);
                }
            }
        });
        Ok(())
    }
}
