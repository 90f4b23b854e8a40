//! Inputs of products: quantized once for all products that share them, and brought together from the ranks that computed them.

use std::{iter, ops::Range};

use kernels::{
    Buffer, Input, Isa, Matrix, Product, Quantized, elementwise, matmul, matmul_group,
    vocab::{self, Found, Wanted},
};
use plan::model::TensorId;

use super::{
    adapter::{Adapted, LowRank},
    weights::Linear,
};
use crate::{Observed, collective::CollectiveError, columns, compute::Compute, ranks::Ranks};

/// One input in blocks of 32 and of 256, as far as they are needed.
#[derive(Debug)]
struct Blocks([Quantized; 2]);

impl Blocks {
    fn new() -> Self {
        Self([Quantized::new(32), Quantized::new(256)])
    }

    fn of(&mut self, block: usize) -> &mut Quantized {
        &mut self.0[usize::from(block == 256)]
    }

    /// `x`, `[tokens, k]`, in the form that `matrices` take, all the same.
    fn input<'a, 'm>(
        &'a mut self,
        compute: &Compute,
        matrices: impl Iterator<Item = &'m Matrix> + Clone,
        x: &'a [f32],
        tokens: usize,
    ) -> Input<'a> {
        let Some((matrix, block)) = matrices.clone().find_map(|matrix| Some((matrix, matrix.activation_block()?))) else {
            return Input::F32(x);
        };
        let quantized = self.of(block);
        let isa = compute.isa.for_products(tokens, matrices.map(Matrix::dtype));
        quantized.quantize(&compute.pool, isa, x, tokens, matrix.k());
        Input::Quantized(quantized)
    }
}

/// Buffers for inputs.
#[derive(Debug)]
pub(super) struct Inputs {
    whole: Blocks,
    /// This rank's columns alone, before they are gathered.
    own: Blocks,
    exported: Vec<u8>,
    gathered_bytes: Vec<u8>,
    parts: Vec<Range<usize>>,
    gathered: Buffer<f32>,
    floats: Buffer<f32>,
    low_rank: LowRank,
    /// Sums of the squares of what goes in, where they are wanted.
    pub(super) observed: Option<Observed>,
}

/// A product and its output.
pub(super) type Into<'a> = (&'a Linear, &'a mut [f32]);

impl Inputs {
    /// Buffers for `tokens` tokens, whose inputs from several ranks have at most `width` values (0: there is one rank).
    pub(super) fn new(tokens: usize, width: usize) -> Self {
        Self {
            whole: Blocks::new(),
            own: Blocks::new(),
            exported: Vec::new(),
            gathered_bytes: Vec::new(),
            parts: Vec::new(),
            gathered: Buffer::zeroed(tokens * width),
            floats: Buffer::zeroed(tokens * width),
            low_rank: LowRank::default(),
            observed: None,
        }
    }

    /// Multiplies `x`, `[tokens, k]`, with several matrices, and adds their biases and what adapters change.
    pub(super) fn multiply<const N: usize>(
        &mut self,
        compute: &Compute,
        x: &[f32],
        tokens: usize,
        adapted: &[Adapted],
        mut into: [Into<'_>; N],
    ) {
        for (linear, _) in &into {
            self.observe(linear.id, &linear.matrix, x, tokens);
        }
        let block = |(linear, _): &Into<'_>| linear.matrix.activation_block();
        into.sort_by_key(block);
        for group in into.chunk_by_mut(|a, b| block(a) == block(b)) {
            let input = self.whole.input(compute, group.iter().map(|(linear, _)| &linear.matrix), x, tokens);
            let products = group.iter_mut().map(|(linear, out)| {
                let weights = &linear.matrix;
                Product { weights, rows: 0..weights.rows(), out }
            });
            let mut products: Vec<Product<'_>> = products.collect();
            matmul_group(&compute.pool, compute.isa, &mut products, input, tokens);
            for (linear, out) in group.iter_mut() {
                add_bias(compute, out, &linear.bias);
            }
            self.low_rank.add(compute, adapted, input, tokens, group);
        }
    }

    /// Multiplies `x`, `[tokens, k]`, with the first `rows` rows of the vocabulary, which begin at token `first_id`, and looks for what is wanted of
    /// each token's logits; `kept` gets those that are to be kept.
    pub(super) fn vocabulary(
        &mut self,
        compute: &Compute,
        x: &[f32],
        (id, matrix): (TensorId, &Matrix),
        (rows, first_id): (usize, u32),
        wanted: &[Wanted<'_>],
        kept: &mut [f32],
    ) -> Vec<Found> {
        self.observe(id, matrix, x, wanted.len());
        let input = self.whole.input(compute, iter::once(matrix), x, wanted.len());
        vocab::product(&compute.pool, compute.isa, (matrix, rows, first_id), input, wanted, kept)
    }

    /// Multiplies `x`, `[tokens, k]`, with some rows of a matrix, ascending: `[tokens, rows]`.
    pub(super) fn multiply_rows(
        &mut self,
        compute: &Compute,
        x: &[f32],
        tokens: usize,
        (id, matrix): (TensorId, &Matrix),
        rows: &[usize],
    ) -> Vec<f32> {
        self.observe(id, matrix, x, tokens);
        let runs: Vec<Range<usize>> = rows.chunk_by(|a, b| a + 1 == *b).map(|run| run[0]..run[run.len() - 1] + 1).collect();
        let mut results = vec![0.0; tokens * rows.len()];
        let mut left = &mut results[..];
        let mut products = Vec::with_capacity(runs.len());
        for run in runs {
            let (own, behind) = left.split_at_mut(tokens * run.len());
            left = behind;
            products.push(Product { weights: matrix, rows: run, out: own });
        }
        let input = self.whole.input(compute, iter::once(matrix), x, tokens);
        matmul_group(&compute.pool, compute.isa, &mut products, input, tokens);
        let mut by_token = vec![0.0; tokens * rows.len()];
        let mut first = 0;
        for Product { rows: run, out, .. } in &products {
            for (own, all) in out.chunks_exact(run.len()).zip(by_token.chunks_exact_mut(rows.len())) {
                all[first..first + run.len()].copy_from_slice(own);
            }
            first += run.len();
        }
        by_token
    }

    /// Multiplies an input whose columns are spread over the ranks: `own`, `[tokens, columns[rank]]`, is this rank's part.
    ///
    /// It is exchanged quantized where the product quantizes its input and no rank's columns cut a block; else as floats, and each rank
    /// quantizes the whole.
    pub(super) fn multiply_gathered(
        &mut self,
        compute: &Compute,
        ranks: &mut Ranks<'_>,
        own: &[f32],
        columns: &[Range<usize>],
        (tokens, adapted): (usize, &[Adapted]),
        (linear, out): Into<'_>,
    ) -> Result<(), CollectiveError> {
        let matrix = &linear.matrix;
        let k = matrix.k();
        if !ranks.many() {
            self.observe(linear.id, matrix, own, tokens);
        }
        let input = match matrix.activation_block() {
            Some(block) if ranks.many() && columns.iter().all(|c| c.end.is_multiple_of(block)) => {
                let isa = compute.isa.for_products(tokens, [matrix.dtype()]);
                self.gather_quantized(compute, ranks, own, columns, tokens, (block, isa))?;
                Input::Quantized(self.whole.of(block))
            }
            _ => {
                let x = if ranks.many() {
                    let (own_columns, whole) = (&columns[ranks.rank()], &mut self.floats[..tokens * k]);
                    let gathered = &mut self.gathered[..tokens * k];
                    gathered[tokens * own_columns.start..tokens * own_columns.end].copy_from_slice(own);
                    ranks.all_gather_columns(gathered, columns, tokens, whole)?;
                    &*whole
                } else {
                    own
                };
                self.whole.input(compute, iter::once(matrix), x, tokens)
            }
        };
        matmul(&compute.pool, compute.isa, matrix, 0..matrix.rows(), input, tokens, out);
        add_bias(compute, out, &linear.bias);
        self.low_rank.add(compute, adapted, input, tokens, &mut [(linear, out)]);
        Ok(())
    }

    /// Notes what goes into a product, where that is wanted.
    fn observe(&mut self, id: TensorId, matrix: &Matrix, x: &[f32], tokens: usize) {
        if let Some(observed) = &mut self.observed {
            columns::add(observed, id, matrix.k(), &x[..tokens * matrix.k()]);
        }
    }

    /// Quantizes this rank's columns and makes `whole` of those of all ranks.
    fn gather_quantized(
        &mut self,
        compute: &Compute,
        ranks: &mut Ranks<'_>,
        own: &[f32],
        columns: &[Range<usize>],
        tokens: usize,
        (block, isa): (usize, Isa),
    ) -> Result<(), CollectiveError> {
        let own_columns = columns[ranks.rank()].clone();
        let k = columns.last().map_or(0, |c| c.end);
        let part = self.own.of(block);
        part.quantize(&compute.pool, isa, own, tokens, own_columns.len());
        self.exported.clear();
        part.export(0..tokens, 0..own_columns.len(), &mut self.exported);
        // Bytes of the columns from 0 up to a border between blocks.
        let bytes = |columns: usize| part.exported_bytes(tokens, columns);
        let total = bytes(k);
        if self.gathered_bytes.len() < total {
            self.gathered_bytes.resize(total, 0);
        }
        let gathered = &mut self.gathered_bytes[..total];
        gathered[bytes(own_columns.start)..bytes(own_columns.end)].copy_from_slice(&self.exported);
        self.parts.clear();
        self.parts.extend(columns.iter().map(|c| bytes(c.start)..bytes(c.end)));
        ranks.all_gather(gathered, &self.parts, 1)?;
        let whole = self.whole.of(block);
        whole.resize(isa, tokens, k);
        for (columns, part) in columns.iter().zip(&self.parts) {
            whole.import(isa, 0..tokens, columns.clone(), &gathered[part.clone()]);
        }
        Ok(())
    }
}

fn add_bias(compute: &Compute, out: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        elementwise::add_bias(&compute.pool, compute.isa, out, bias);
    }
}
