//! The feed-forward block of a layer.

use kernels::elementwise::{self, Gate};
use plan::model::Activation;

use super::{
    adapter::Adapted,
    forward::{Laps, add_block, all_rows, block_input, norm_in_place, own_part},
    stage::{Buffers, Cpu},
    weights::FeedForward,
};
use crate::{backend::Context, collective::CollectiveError};

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
        let Buffers { x, h, gate, up, gathered, block_out, rows, .. } = &mut self.buffers;
        let rows = *rows;
        let n = rows * config.hidden;
        let (x, h, gathered) = (&mut x[..n], &mut h[..n], &mut gathered[..n]);
        let activation = activation(config.activation);
        let h = block_input(&self.compute, config, x, &weights.ffn_norm, h);
        let out = match &weights.feed_forward {
            FeedForward::Dense(dense) => {
                let width = self.splits.ffn[self.rank].len();
                let (gate, up) = (&mut gate[..rows * width], &mut up[..rows * width]);
                let (pool, isa) = (&self.compute.pool, self.compute.isa);
                let inner = match &dense.gate {
                    Some(gate_weights) => {
                        self.inputs.multiply(&self.compute, h, rows, adapted, [(gate_weights, &mut *gate), (&dense.up, &mut *up)]);
                        elementwise::gate(pool, isa, activation, gate, up);
                        gate
                    }
                    None => {
                        self.inputs.multiply(&self.compute, h, rows, adapted, [(&dense.up, &mut *up)]);
                        elementwise::activate(pool, isa, activation, up);
                        up
                    }
                };
                laps.add(&mut context.timings.gate_up);
                let own = own_part(gathered, &self.splits.hidden[self.rank], rows);
                self.inputs.multiply_gathered(
                    &self.compute,
                    context.ranks,
                    inner,
                    &self.splits.ffn,
                    (rows, adapted),
                    (&dense.down, own),
                )?;
                all_rows(context.ranks, gathered, block_out, &self.splits.hidden, rows)?
            }
            FeedForward::Experts { router, own } => {
                let Some(experts) = config.experts else { return Ok(()) };
                let (inputs, split) = (&mut self.inputs, &self.splits.experts);
                self.mixture.route(&self.compute, inputs, router, experts, h, rows);
                self.mixture.run(&self.compute, inputs, (own, activation), split[self.rank].start, h, config.hidden);
                laps.add(&mut context.timings.gate_up);
                self.mixture.sum(&self.compute, context.ranks, split, gathered, config.hidden)?;
                &*gathered
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

fn activation(activation: Activation) -> Gate {
    match activation {
        Activation::Silu => Gate::Silu,
        Activation::GeluTanh => Gate::GeluTanh,
        Activation::Gelu => Gate::Gelu,
    }
}
