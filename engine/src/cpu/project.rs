//! Queries, keys and values of a layer: each a product of the hidden state, or made of compressed vectors.
//!
//! Latent attention keeps keys and values as they are unpacked, each head its own: the cache, and what attention makes of it, are those of any
//! other model (`docs/adr/0025-latent-attention.md`).

use kernels::{Buffer, norm};
use plan::model;

use super::{
    adapter::Adapted,
    forward::{Laps, Tail, block_input},
    stage::{Buffers, Cpu},
    weights::{Latent, Plain, Projection, Unpack},
};
use crate::{backend::Context, batch::Batch};

/// Buffers of latent attention, empty for other models.
#[derive(Debug)]
pub(super) struct LatentBuffers {
    /// Compressed queries.
    q: Buffer<f32>,
    /// Compressed keys and values, and the rotated part of keys.
    kv: Buffer<f32>,
    /// The former alone, normed.
    normed: Buffer<f32>,
    /// For each head the other part of its key, and its value where both are unpacked together.
    unpacked: Buffer<f32>,
}

impl LatentBuffers {
    /// For `tokens` tokens, of `unpacked` values each.
    pub(super) fn new(latent: Option<model::Latent>, tokens: usize, unpacked: usize) -> Self {
        let rows = |width: fn(model::Latent) -> usize| Buffer::zeroed(latent.map_or(0, |l| tokens * width(l)));
        Self {
            q: rows(|l| l.q_rank.unwrap_or(0)),
            kv: rows(|l| l.kv_rank + l.rotated),
            normed: rows(|l| l.kv_rank),
            unpacked: Buffer::zeroed(tokens * unpacked),
        }
    }
}

impl Cpu {
    /// Makes queries of the rows that go on, and keys and values of all rows, normed and rotated, in their buffers. Behind the keys and values
    /// only the rows of `tail` go on, if there is one.
    pub(super) fn project(&mut self, layer: usize, batch: &Batch<'_>, tail: Option<&Tail>, context: &mut Context<'_, '_>, laps: &mut Laps) {
        match &self.weights.layers[layer].projection {
            Projection::Plain(_) => self.project_plain(layer, batch, tail, context, laps),
            Projection::Latent(_) => self.project_latent(layer, batch, tail, context, laps),
        }
    }

    fn project_plain(&mut self, layer: usize, batch: &Batch<'_>, tail: Option<&Tail>, context: &mut Context<'_, '_>, laps: &mut Laps) {
        let (weights, place, config) = (&self.weights.layers[layer], &self.places[layer], &self.config);
        let Projection::Plain(plain) = &weights.projection else { return };
        let Plain { q: q_weights, k: k_weights, v: v_weights, head_norms } = &**plain;
        let (hidden, head_dim, tokens) = (config.hidden, config.head_dim, batch.tokens);
        let (q_width, kv_width) = (self.kv_heads.len() * head_dim, self.caches[place.cache].kv_heads() * head_dim);
        let (compute, inputs) = (&self.compute, &mut self.inputs);
        let Buffers { x, h, q, k, v, positions, rows, .. } = &mut self.buffers;
        let input = block_input(compute, config, &x[..tokens * hidden], &weights.attn_norm, &mut h[..tokens * hidden]);
        let (k, v) = (&mut k[..tokens * kv_width], &mut v[..tokens * kv_width]);
        match tail {
            None => {
                let into = [(q_weights, &mut q[..tokens * q_width]), (k_weights, &mut *k), (v_weights, &mut *v)];
                inputs.multiply(compute, input, tokens, &batch.adapted, into);
            }
            Some(tail) => {
                inputs.multiply(compute, input, tokens, &batch.adapted, [(k_weights, &mut *k), (v_weights, &mut *v)]);
                keep(tail, hidden, x, h, positions, rows);
                if *rows > 0 {
                    let into = [(q_weights, &mut q[..*rows * q_width])];
                    inputs.multiply(compute, &h[..*rows * hidden], *rows, &tail.adapted, into);
                }
            }
        }
        let q = &mut q[..*rows * q_width];
        laps.add(&mut context.timings.qkv);
        let (pool, isa) = (&compute.pool, compute.isa);
        if let Some(norms) = head_norms {
            norm::rms_norm_in_place(pool, isa, q, &norms.q, config.norm_eps);
            norm::rms_norm_in_place(pool, isa, k, &norms.k, config.norm_eps);
        }
        if let Some(rope) = place.rope.map(|rope| &self.ropes[rope]) {
            rope.apply(pool, isa, q, (head_dim, 0), positions);
            rope.apply(pool, isa, k, (head_dim, 0), &batch.positions);
        }
    }

    fn project_latent(&mut self, layer: usize, batch: &Batch<'_>, tail: Option<&Tail>, context: &mut Context<'_, '_>, laps: &mut Laps) {
        let (weights, place, config) = (&self.weights.layers[layer], &self.places[layer], &self.config);
        let (Projection::Latent(of), Some(shape)) = (&weights.projection, config.latent) else { return };
        let Latent { q_down, q: q_weights, kv_down, kv_norm, unpack } = &**of;
        let (hidden, head_dim, tokens) = (config.hidden, config.head_dim, batch.tokens);
        let (q_heads, kv_heads) = (self.kv_heads.len(), self.caches[place.cache].kv_heads());
        let (compute, inputs) = (&self.compute, &mut self.inputs);
        let (pool, isa) = (&compute.pool, compute.isa);
        let Buffers { x, h, q, k, v, latent, positions, rows, .. } = &mut self.buffers;
        let input = block_input(compute, config, &x[..tokens * hidden], &weights.attn_norm, &mut h[..tokens * hidden]);
        let kv_width = shape.kv_rank + shape.rotated;
        let kv = &mut latent.kv[..tokens * kv_width];
        // What is made of the hidden state at once: compressed queries, or queries.
        let (first, first_width, made) = match q_down {
            Some((down, _)) => (down, shape.q_rank.unwrap_or(0), &mut latent.q),
            None => (q_weights, q_heads * head_dim, &mut *q),
        };
        let mut adapted: &[Adapted] = &batch.adapted;
        match tail {
            None => inputs.multiply(compute, input, tokens, adapted, [(first, &mut made[..tokens * first_width]), (kv_down, &mut *kv)]),
            Some(tail) => {
                inputs.multiply(compute, input, tokens, adapted, [(kv_down, &mut *kv)]);
                keep(tail, hidden, x, h, positions, rows);
                adapted = &tail.adapted;
                if *rows > 0 {
                    let into = [(first, &mut made[..*rows * first_width])];
                    inputs.multiply(compute, &h[..*rows * hidden], *rows, adapted, into);
                }
            }
        }
        let rows = *rows;
        if let Some((_, norm)) = q_down.as_ref().filter(|_| rows > 0) {
            let compressed = &mut latent.q[..rows * first_width];
            norm::rms_norm_in_place(pool, isa, compressed, norm, shape.norm_eps);
            inputs.multiply(compute, compressed, rows, adapted, [(q_weights, &mut q[..rows * q_heads * head_dim])]);
        }
        let normed = &mut latent.normed[..tokens * shape.kv_rank];
        for (normed, kv) in normed.chunks_exact_mut(shape.kv_rank).zip(kv.chunks_exact(kv_width)) {
            normed.copy_from_slice(&kv[..shape.kv_rank]);
        }
        norm::rms_norm_in_place(pool, isa, normed, kv_norm, shape.norm_eps);
        let unrotated = head_dim - shape.rotated;
        let v = &mut v[..tokens * kv_heads * shape.value_dim];
        // What a head has in `unpacked`: its key's part, and its value too where both are unpacked together.
        let (width, unpacked) = match unpack {
            Unpack::Together(both) => {
                let width = unrotated + shape.value_dim;
                let unpacked = &mut latent.unpacked[..tokens * kv_heads * width];
                inputs.multiply(compute, normed, tokens, &batch.adapted, [(both, &mut *unpacked)]);
                (width, &*unpacked)
            }
            Unpack::Apart(keys, values) => {
                let unpacked = &mut latent.unpacked[..tokens * kv_heads * unrotated];
                inputs.multiply(compute, normed, tokens, &batch.adapted, [(keys, &mut *unpacked), (values, &mut *v)]);
                (unrotated, &*unpacked)
            }
        };
        laps.add(&mut context.timings.qkv);
        if let Some(rope) = place.rope.map(|rope| &self.ropes[rope]) {
            let q = &mut q[..rows * q_heads * head_dim];
            rope.apply(pool, isa, q, (head_dim, unrotated), positions);
            rope.apply(pool, isa, kv, (kv_width, shape.kv_rank), &batch.positions);
        }
        pool.for_rows(&mut k[..tokens * kv_heads * head_dim], kv_heads * head_dim, 4, |token, keys| {
            for (at, key) in keys.chunks_exact_mut(head_dim).enumerate() {
                let (own, shared) = key.split_at_mut(unrotated);
                let head = token * kv_heads + at;
                own.copy_from_slice(&unpacked[head * width..][..unrotated]);
                shared.copy_from_slice(&kv[head / kv_heads * kv_width + shape.kv_rank..][..shape.rotated]);
            }
        });
        if let Unpack::Together(_) = unpack {
            pool.for_rows(v, kv_heads * shape.value_dim, 4, |token, values| {
                for (at, value) in values.chunks_exact_mut(shape.value_dim).enumerate() {
                    value.copy_from_slice(&unpacked[(token * kv_heads + at) * width + unrotated..][..shape.value_dim]);
                }
            });
        }
    }
}

/// Moves the tail's rows of the residual stream, of its norm and of the positions to the front; they are all that is left.
fn keep(tail: &Tail, hidden: usize, x: &mut [f32], h: &mut [f32], positions: &mut Vec<u32>, rows: &mut usize) {
    for values in [x, h] {
        for (to, &from) in tail.rows.iter().enumerate().filter(|(to, from)| to != *from) {
            values.copy_within(from * hidden..(from + 1) * hidden, to * hidden);
        }
    }
    for (to, &from) in tail.rows.iter().enumerate() {
        positions[to] = positions[from];
    }
    positions.truncate(tail.rows.len());
    *rows = tail.rows.len();
}
