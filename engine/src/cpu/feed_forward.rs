//! The feed-forward block of a layer.

use std::ops::Range;

use kernels::elementwise::{self, Gate};
use plan::model::Activation;

use super::{
    adapter::Adapted,
    forward::{Laps, add_block, all_rows, block_input, norm_in_place, own_part},
    input::Inputs,
    stage::{Buffers, Cpu},
    weights::{Dense, FeedForward},
};
use crate::{backend::Context, collective::CollectiveError, compute::Compute};

impl Cpu {
    /// The feed-forward block of a layer, residual included.
    pub(super) fn feed_forward(
        &mut self,
        layer: usize,
        adapted: &[Adapted],
        context: &mut Context<'_, '_>,
        laps: &mut Laps,
    ) -> Result<(), CollectiveError> {
        let (weights, config) = (&self.weights.layers[layer], &self.config);
        let Buffers { x, h, gate, up, gathered, block_out, sums, rows, .. } = &mut self.buffers;
        let rows = *rows;
        let n = rows * config.hidden;
        let (x, h, gathered) = (&mut x[..n], &mut h[..n], &mut gathered[..n]);
        let activation = activation(config.activation);
        let h = block_input(&self.compute, config, x, &weights.ffn_norm, h);
        let out = match &weights.feed_forward {
            FeedForward::Dense(dense) => {
                let block =
                    Block { weights: dense, activation, split: &self.splits.ffn, hidden: &self.splits.hidden, input: h, rows, adapted };
                let made = Made { gate, up, gathered, whole: block_out };
                block.run(&self.compute, &mut self.inputs, made, context, laps)?
            }
            FeedForward::Experts(experts) => {
                let Some(kind) = config.experts else { return Ok(()) };
                let (inputs, split) = (&mut self.inputs, &self.splits.experts);
                self.mixture.route(&self.compute, inputs, (&experts.router, &experts.router_bias), kind, h, rows);
                self.mixture.run(&self.compute, inputs, (&experts.own, activation), split[self.rank].start, h, config.hidden);
                laps.add(&mut context.timings.gate_up);
                match &experts.shared {
                    None => {
                        self.mixture.sum(&self.compute, context.ranks, split, gathered, config.hidden)?;
                        &*gathered
                    }
                    Some(shared) => {
                        let sums = &mut sums[..n];
                        self.mixture.sum(&self.compute, context.ranks, split, sums, config.hidden)?;
                        let block = Block {
                            weights: shared,
                            activation,
                            split: &self.splits.shared,
                            hidden: &self.splits.hidden,
                            input: h,
                            rows,
                            adapted: &[],
                        };
                        let made = Made { gate, up, gathered, whole: block_out };
                        let out = block.run(&self.compute, inputs, made, context, laps)?;
                        elementwise::add(&self.compute.pool, self.compute.isa, sums, out);
                        &*sums
                    }
                }
            }
        };
        add_block(&self.compute, x, out, weights.post_ffn_norm.as_deref(), config.norm_eps);
        if config.post_norms {
            norm_in_place(&self.compute, &mut self.buffers, n, &weights.ffn_norm, config.norm_eps);
        }
        laps.add(&mut context.timings.down);
        Ok(())
    }
}

/// A block whose rows of gate and up are split over the ranks, and what it is given.
struct Block<'a> {
    weights: &'a Dense,
    activation: Gate,
    split: &'a [Range<usize>],
    /// How the rows of down, the outputs, are split.
    hidden: &'a [Range<usize>],
    /// `[rows, hidden]`.
    input: &'a [f32],
    rows: usize,
    adapted: &'a [Adapted],
}

/// Where the parts of a block's product are made.
struct Made<'a> {
    gate: &'a mut [f32],
    up: &'a mut [f32],
    /// Outputs, rank after rank.
    gathered: &'a mut [f32],
    /// The same, token after token.
    whole: &'a mut [f32],
}

impl Block<'_> {
    /// The outputs of all ranks, `[rows, hidden]`.
    fn run<'m>(
        &self,
        compute: &Compute,
        inputs: &mut Inputs,
        made: Made<'m>,
        context: &mut Context<'_, '_>,
        laps: &mut Laps,
    ) -> Result<&'m [f32], CollectiveError> {
        let Self { weights, activation, split, hidden, input, rows, adapted } = *self;
        let rank = context.ranks.rank();
        let width = split[rank].len();
        let (gate, up) = (&mut made.gate[..rows * width], &mut made.up[..rows * width]);
        let inner = match &weights.gate {
            Some(gate_weights) => {
                inputs.multiply(compute, input, rows, adapted, [(gate_weights, &mut *gate), (&weights.up, &mut *up)]);
                elementwise::gate(&compute.pool, compute.isa, activation, gate, up);
                gate
            }
            None => {
                inputs.multiply(compute, input, rows, adapted, [(&weights.up, &mut *up)]);
                elementwise::activate(&compute.pool, compute.isa, activation, up);
                up
            }
        };
        laps.add(&mut context.timings.gate_up);
        let own = own_part(made.gathered, &hidden[rank], rows);
        inputs.multiply_gathered(compute, context.ranks, inner, split, (rows, adapted), (&weights.down, own))?;
        all_rows(context.ranks, made.gathered, made.whole, hidden, rows)
    }
}

fn activation(activation: Activation) -> Gate {
    match activation {
        Activation::Silu => Gate::Silu,
        Activation::GeluTanh => Gate::GeluTanh,
        Activation::Gelu => Gate::Gelu,
    }
}
