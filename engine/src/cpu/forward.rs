//! The forward pass of a stage: embedding rows, layers, final norm.

use std::time::{Duration, Instant};

use kernels::{Attention, KV_BLOCK, KvSpan, bytes, elementwise, norm};
use plan::model::ModelConfig;

use super::{
    adapter::Adapted,
    stage::{Buffers, Cpu},
    weights::Norm,
};
use crate::{
    backend::Context,
    batch::{Batch, Span},
    collective::CollectiveError,
    compute::Compute,
    ranks::Ranks,
};

/// Measures phases that follow each other.
pub(super) struct Laps(Instant);

impl Laps {
    /// From now on.
    pub(super) fn begin() -> Self {
        Self(Instant::now())
    }

    pub(super) fn add(&mut self, phase: &mut Duration) {
        let now = Instant::now();
        *phase += now - self.0;
        self.0 = now;
    }
}

/// The rows of the last layer that go on behind its keys and values: those whose results are wanted.
pub(super) struct Tail {
    spans: Vec<Span>,
    /// The sequence of each span.
    parts: Vec<usize>,
    /// Rows of the batch, ascending.
    pub(super) rows: Vec<usize>,
    /// Those of them that run with adapters, counted among them.
    pub(super) adapted: Vec<Adapted>,
}

impl Tail {
    /// The tail of the last layer, if it is shorter than the batch.
    fn new(batch: &Batch<'_>) -> Option<Self> {
        if batch.wanted.len() == batch.tokens {
            return None;
        }
        let rows: Vec<usize> = batch.wanted.iter().map(|w| w.row).collect();
        let adapted = batch.adapted.iter().map(|of| {
            let kept = rows.iter().enumerate().filter(|(_, row)| of.rows.binary_search(row).is_ok()).map(|(at, _)| at);
            Adapted { adapter: of.adapter.clone(), rows: kept.collect() }
        });
        let mut tail = Self { spans: Vec::new(), parts: Vec::new(), adapted: adapted.collect(), rows };
        for (at, wanted) in batch.wanted.iter().enumerate() {
            let span = &batch.spans[wanted.part];
            match tail.spans.last_mut() {
                Some(last) if at > 0 && batch.wanted[at - 1].row + 1 == wanted.row && tail.parts.last() == Some(&wanted.part) => {
                    last.rows.end += 1;
                }
                _ => {
                    tail.spans.push(Span { rows: at..at + 1, first: span.first + wanted.row - span.rows.start });
                    tail.parts.push(wanted.part);
                }
            }
        }
        Some(tail)
    }
}

impl Cpu {
    pub(super) fn run_layers(&mut self, batch: &Batch<'_>, hidden: &[f32], context: &mut Context<'_, '_>) -> Result<(), CollectiveError> {
        let mut laps = Laps::begin();
        self.buffers.rows = batch.tokens;
        self.buffers.positions.clear();
        self.buffers.positions.extend(&batch.positions);
        if self.is_first {
            self.embed(batch, context.ranks)?;
        } else {
            self.buffers.x[..hidden.len()].copy_from_slice(hidden);
        }
        laps.add(&mut context.timings.embedding);
        // Spans over each group's tables, made once for all of its layers.
        let own = if self.config.encoder.is_some() { own_tables(&batch.spans) } else { Vec::new() };
        let all: Vec<Vec<KvSpan<'_>>> = match self.config.encoder {
            None => batch.tables.iter().map(|tables| kv_spans(&batch.spans, tables.iter().copied())).collect(),
            Some(_) => vec![kv_spans(&batch.spans, own.iter().map(Vec::as_slice))],
        };
        let decides = self.is_last && self.config.encoder.is_none();
        let layers = self.weights.layers.len();
        for layer in 0..layers {
            context.progress.enter(self.first_layer + layer);
            let spans = &all[self.places[layer].group];
            let tail = if decides && layer + 1 == layers { Tail::new(batch) } else { None };
            self.attend(layer, batch, spans, tail.as_ref(), context, &mut laps)?;
            if self.buffers.rows > 0 {
                let adapted = tail.as_ref().map_or(&batch.adapted, |tail| &tail.adapted);
                self.feed_forward(layer, adapted, context, &mut laps)?;
            }
        }
        if decides && self.buffers.rows > 0 {
            let n = self.buffers.rows * self.config.hidden;
            let Buffers { x, h, .. } = &mut self.buffers;
            normed(&self.compute, &x[..n], &self.weights.output_norm, self.config.norm_eps, &mut h[..n]);
            laps.add(&mut context.timings.vocabulary);
        }
        context.progress.enter(self.first_layer + layers);
        Ok(())
    }

    /// Looks the ids up: each rank sends the rows it owns.
    fn embed(&mut self, batch: &Batch<'_>, ranks: &mut Ranks<'_>) -> Result<(), CollectiveError> {
        let Some(table) = &self.weights.embedding else { return Ok(()) };
        let hidden = self.config.hidden;
        let own = self.splits.vocab[self.rank].clone();
        let Buffers { x, gathered, .. } = &mut self.buffers;
        let x = &mut x[..batch.tokens * hidden];
        let mine = |id: u32| own.contains(&(id as usize)).then(|| id as usize - own.start);
        if ranks.many() {
            // The rows of rank 0 in the order of their tokens, then those of rank 1, and so on.
            let owner = |id: u32| self.splits.vocab.iter().position(|rows| rows.contains(&(id as usize))).unwrap_or(0);
            let mut order: Vec<usize> = (0..batch.tokens).collect();
            order.sort_by_key(|&token| owner(batch.ids[token]));
            let mut start = 0;
            let parts: Vec<_> = (0..self.splits.vocab.len())
                .map(|rank| {
                    let len = order[start..].iter().take_while(|&&token| owner(batch.ids[token]) == rank).count();
                    start += len;
                    start - len..start
                })
                .collect();
            let gathered = &mut gathered[..batch.tokens * hidden];
            for (&token, row) in order.iter().zip(gathered.chunks_exact_mut(hidden)) {
                if let Some(row_of_table) = mine(batch.ids[token]) {
                    table.row(row_of_table, row);
                }
            }
            ranks.all_gather(bytes::of_mut(gathered), &parts, hidden * size_of::<f32>())?;
            for (&token, row) in order.iter().zip(gathered.chunks_exact(hidden)) {
                x[token * hidden..(token + 1) * hidden].copy_from_slice(row);
            }
        } else {
            self.compute.pool.for_rows(x, hidden, 4, |first, rows| {
                for (id, row) in batch.ids[first..].iter().zip(rows.chunks_exact_mut(hidden)) {
                    if let Some(row_of_table) = mine(*id) {
                        table.row(row_of_table, row);
                    }
                }
            });
        }
        if self.config.embedding_scale != 1.0 {
            elementwise::scale(&self.compute.pool, self.compute.isa, x, self.config.embedding_scale);
        }
        if let Some(table) = &self.weights.positions {
            let places = &mut gathered[..x.len()];
            self.compute.pool.for_rows(places, hidden, 4, |first, rows| {
                for (&position, row) in batch.positions[first..].iter().zip(rows.chunks_exact_mut(hidden)) {
                    table.row(position as usize, row);
                }
            });
            elementwise::add(&self.compute.pool, self.compute.isa, x, places);
        }
        if let Some(table) = &self.weights.token_types {
            let kinds = &mut gathered[..x.len()];
            for (&kind, row) in batch.types.iter().zip(kinds.chunks_exact_mut(hidden)) {
                table.row(usize::from(kind), row);
            }
            elementwise::add(&self.compute.pool, self.compute.isa, x, kinds);
        }
        if let Some(norm) = &self.weights.embedding_norm {
            norm_in_place(&self.compute, &mut self.buffers, batch.tokens * hidden, norm, self.config.norm_eps);
        }
        Ok(())
    }

    /// The attention block of a layer, residual included. Behind the layer's keys and values only the rows of `tail` go on, if there is one.
    fn attend(
        &mut self,
        layer: usize,
        batch: &Batch<'_>,
        spans: &[KvSpan<'_>],
        tail: Option<&Tail>,
        context: &mut Context<'_, '_>,
        laps: &mut Laps,
    ) -> Result<(), CollectiveError> {
        self.project(layer, batch, tail, context, laps);
        let (weights, place, config) = (&self.weights.layers[layer], &self.places[layer], &self.config);
        let hidden = config.hidden;
        let Compute { pool, isa } = &self.compute;
        let isa = *isa;
        let Buffers { q, k, v, attention, rows, .. } = &mut self.buffers;
        let (rows, tokens) = (*rows, batch.tokens);
        let (head_dim, value_dim, kv_heads) = (config.head_dim, config.value_dim(), self.caches[place.cache].kv_heads());
        let (q, k, v) =
            (&q[..rows * self.kv_heads.len() * head_dim], &k[..tokens * kv_heads * head_dim], &v[..tokens * kv_heads * value_dim]);
        let tail_spans = tail.map(|tail| kv_spans(&tail.spans, tail.parts.iter().map(|&part| spans[part].table)));
        let query_spans = tail_spans.as_deref().unwrap_or(spans);
        let width = self.kv_heads.len() * value_dim;
        self.caches[place.cache].write(isa, spans, k, v);
        let attention = &mut attention[..rows * width];
        let kernel = Attention {
            cache: &self.caches[place.cache],
            kv_heads: &self.kv_heads,
            scale: config.attention_scale,
            window: place.window,
            causal: config.encoder.is_none(),
        };
        kernel.run(pool, isa, query_spans, q, attention);
        laps.add(&mut context.timings.attention);
        if rows == 0 {
            return Ok(());
        }
        let Buffers { x, attention, gathered, block_out, .. } = &mut self.buffers;
        let gathered = &mut gathered[..rows * hidden];
        let own = own_part(gathered, &self.splits.hidden[self.rank], rows);
        let attention = &attention[..rows * width];
        let adapted = tail.map_or(batch.adapted.as_slice(), |tail| &tail.adapted);
        self.inputs.multiply_gathered(&self.compute, context.ranks, attention, &self.head_columns, (rows, adapted), (&weights.o, own))?;
        let out = all_rows(context.ranks, gathered, block_out, &self.splits.hidden, rows)?;
        add_block(&self.compute, &mut x[..rows * hidden], out, weights.post_attn_norm.as_deref(), config.norm_eps);
        if config.post_norms {
            norm_in_place(&self.compute, &mut self.buffers, rows * hidden, &weights.attn_norm, config.norm_eps);
        }
        laps.add(&mut context.timings.output);
        Ok(())
    }
}

/// Block tables of sequences that are there for this step alone: one block after the other.
fn own_tables(spans: &[Span]) -> Vec<Vec<u32>> {
    let mut next = 0;
    let table = |span: &Span| {
        let first = next;
        next += span.rows.len().div_ceil(KV_BLOCK) as u32;
        (first..next).collect()
    };
    spans.iter().map(table).collect()
}

/// The spans as the kernels want them.
fn kv_spans<'a>(spans: &[Span], tables: impl Iterator<Item = &'a [u32]>) -> Vec<KvSpan<'a>> {
    spans.iter().zip(tables).map(|(s, table)| KvSpan { table, first_position: s.first, tokens: s.rows.len() }).collect()
}

/// This rank's part of a buffer that holds rank after rank `[tokens, rows of the matrix]`.
pub(super) fn own_part<'a>(gathered: &'a mut [f32], rows: &std::ops::Range<usize>, tokens: usize) -> &'a mut [f32] {
    &mut gathered[tokens * rows.start..tokens * rows.end]
}

/// Exchanges the outputs of a product whose rows are split over the ranks: `[tokens, hidden]`.
pub(super) fn all_rows<'a>(
    ranks: &mut Ranks<'_>,
    gathered: &'a mut [f32],
    whole: &'a mut [f32],
    split: &[std::ops::Range<usize>],
    tokens: usize,
) -> Result<&'a [f32], CollectiveError> {
    if !ranks.many() {
        return Ok(gathered);
    }
    let whole = &mut whole[..gathered.len()];
    ranks.all_gather_columns(gathered, split, tokens, whole)?;
    Ok(whole)
}

/// What goes into a block: the residual stream itself where the sum is normed behind the block, else its norm, made in `h`.
pub(super) fn block_input<'a>(compute: &Compute, config: &ModelConfig, x: &'a [f32], norm: &Norm, h: &'a mut [f32]) -> &'a [f32] {
    if config.post_norms {
        return x;
    }
    normed(compute, x, norm, config.norm_eps, h);
    h
}

/// Norms the first `len` values of the residual stream.
pub(super) fn norm_in_place(compute: &Compute, buffers: &mut Buffers, len: usize, norm: &Norm, eps: f32) {
    normed(compute, &buffers.x[..len], norm, eps, &mut buffers.h[..len]);
    std::mem::swap(&mut buffers.x, &mut buffers.h);
}

/// The norm of each row, of the kind that the weights are for.
pub(super) fn normed(compute: &Compute, x: &[f32], norm: &Norm, eps: f32, y: &mut [f32]) {
    if norm.bias.is_empty() {
        norm::rms_norm(&compute.pool, compute.isa, x, &norm.weight, eps, y);
    } else {
        norm::layer_norm(&compute.pool, compute.isa, x, (&norm.weight, &norm.bias), eps, y);
    }
}

/// Adds a block's output to the residual stream, normed first where the family does so.
pub(super) fn add_block(compute: &Compute, x: &mut [f32], out: &[f32], norm: Option<&[f32]>, eps: f32) {
    match norm {
        Some(weight) => norm::add_rms_norm(&compute.pool, compute.isa, out, weight, eps, x),
        None => elementwise::add(&compute.pool, compute.isa, x, out),
    }
}
