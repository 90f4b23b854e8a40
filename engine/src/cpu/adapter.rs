//! Low-rank adapters: `y = W x + scale · B (A x)` for the rows of a step that run with one.
//!
//! `A` is whole on every rank and reads what `W` reads: where `W` takes a quantized input, the values of that. `B` has the rows that this rank
//! has of `W`. Rows of one adapter are multiplied together; what becomes of a row does not depend on the others.

use std::{collections::HashMap, ops::Range, sync::Arc};

use kernels::{Buffer, Input, Isa, Matrix, MatrixBuilder, Pool, elementwise, matmul};
use plan::{
    adapter::{AdapterShard, PairSlice, RowOrder},
    model::{ModelConfig, TensorId},
    shard::{Shard, TensorSlice},
};

use super::{input::Into, weights::weight_type};
use crate::{LoadShardError, WeightReader, compute::Compute};

/// One rank's part of an adapter, loaded.
#[derive(Debug)]
pub struct Adapter {
    pairs: HashMap<TensorId, Pair>,
    /// Whose part it is: layers and rank, and rows of each pair are checked against them.
    layers: Range<usize>,
    rank: usize,
    bytes: u64,
}

/// What is added to one product.
#[derive(Debug)]
struct Pair {
    /// `[rank, in]`.
    a: Matrix,
    /// `[own rows, rank]`.
    b: Matrix,
    scale: f32,
}

/// The rows of a step that run with an adapter, ascending.
#[derive(Clone, Debug)]
pub(crate) struct Adapted {
    pub(crate) adapter: Arc<Adapter>,
    pub(crate) rows: Vec<usize>,
}

impl Adapter {
    /// Loads what the worker of `shard` holds of an adapter, through `reader`, whose files are the adapter's.
    ///
    /// # Errors
    /// If bytes cannot be read, or the adapter is not for this shard of the model.
    pub fn load(config: &ModelConfig, shard: &Shard, part: &AdapterShard, reader: &dyn WeightReader) -> Result<Self, LoadShardError> {
        let pool = Pool::new(1);
        let mut pairs = HashMap::with_capacity(part.pairs.len());
        for pair in &part.pairs {
            check(config, shard, pair)?;
            let a = matrix(&pair.a, RowOrder::Same, reader, &pool)?;
            let b = matrix(&pair.b, pair.order, reader, &pool)?;
            pairs.insert(pair.id, Pair { a, b, scale: pair.scale });
        }
        let bytes = pairs.values().map(|p| (p.a.bytes() + p.b.bytes()) as u64).sum();
        Ok(Self { pairs, layers: shard.layers.clone(), rank: shard.rank, bytes })
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it was loaded for a rank with these layers.
    pub(crate) fn is_for(&self, layers: &Range<usize>, rank: usize) -> bool {
        self.layers == *layers && self.rank == rank
    }
}

/// Checks a pair against the model and the plan before anything of it is read.
fn check(config: &ModelConfig, shard: &Shard, pair: &PairSlice) -> Result<(), LoadShardError> {
    let wrong = |slice: &TensorSlice, got: String, expected: String| LoadShardError::Shape {
        name: slice.tensor.name.clone(),
        got,
        expected,
        stage: shard.stage,
        rank: shard.rank,
    };
    let here = pair.id.layer.is_some_and(|layer| shard.layers.contains(&(layer as usize)));
    let (&[out, input], true) = (&config.shape(pair.id.role)[..], here) else {
        return Err(wrong(&pair.a, format!("place {:?}", pair.id), format!("a matrix of layers {:?}", shard.layers)));
    };
    let rank = pair.a.tensor.shape.first().copied().unwrap_or(0);
    for (slice, shape) in [(&pair.a, [rank, input]), (&pair.b, [out, rank])] {
        if slice.tensor.shape != shape || rank == 0 {
            return Err(wrong(slice, format!("shape {:?}", slice.tensor.shape), format!("{shape:?} of a rank of at least 1")));
        }
        if slice.tensor.dtype.block_len() != 1
            || slice.tensor.stored.is_some()
            || slice.tensor.column_stride.is_some()
            || slice.tensor.turned.is_some()
        {
            return Err(wrong(slice, format!("type {:?}", slice.tensor.dtype), "F32, F16 or BF16 by rows".to_owned()));
        }
    }
    let rows = shard.splits.rows(config, pair.id.role, shard.rank);
    if pair.a.rows != (0..rank) || pair.b.rows != rows {
        let got = format!("rows {:?} and {:?}", pair.a.rows, pair.b.rows);
        return Err(wrong(&pair.b, got, format!("{:?} and {rows:?}", 0..rank)));
    }
    let unit = pair.order.unit();
    if unit == 0 || !rows.start.is_multiple_of(unit) || !rows.end.is_multiple_of(unit) {
        return Err(wrong(&pair.b, format!("rows {rows:?}"), format!("whole heads of {unit}")));
    }
    Ok(())
}

/// Reads a slice, its rows in the model's order.
fn matrix(slice: &TensorSlice, order: RowOrder, reader: &dyn WeightReader, pool: &Pool) -> Result<Matrix, LoadShardError> {
    let pack = |error: kernels::MatrixError| LoadShardError::Pack { name: slice.tensor.name.clone(), detail: error.to_string() };
    let (rows, k) = (slice.rows.len(), slice.tensor.shape.get(1).copied().unwrap_or(0));
    let mut bytes = vec![0; slice.len() as usize];
    reader.read(slice.tensor.file, slice.bytes.clone(), &mut bytes).map_err(|source| LoadShardError::Read {
        name: slice.tensor.name.clone(),
        offset: slice.bytes.start,
        len: slice.len(),
        source,
    })?;
    if order != RowOrder::Same && rows > 0 {
        let row = bytes.len() / rows;
        bytes = (0..rows).flat_map(|r| bytes[order.stored(r) * row..][..row].iter().copied()).collect();
    }
    // Floats stay as they are stored, whatever the instructions.
    let mut builder = MatrixBuilder::new(Isa::Scalar, weight_type(slice.tensor.dtype), rows, k).map_err(pack)?;
    builder.push(&bytes, pool).map_err(pack)?;
    builder.finish().map_err(pack)
}

/// Buffers of the products of adapters; they grow as needed.
#[derive(Debug, Default)]
pub(super) struct LowRank {
    inputs: Buffer<f32>,
    inner: Buffer<f32>,
    sums: Buffer<f32>,
}

impl LowRank {
    /// Adds what adapters change of products of one input of `tokens` rows, to rows that run with one.
    pub(super) fn add(&mut self, compute: &Compute, adapted: &[Adapted], input: Input<'_>, tokens: usize, into: &mut [Into<'_>]) {
        let (pool, isa) = (&compute.pool, compute.isa);
        for Adapted { adapter, rows } in adapted {
            let changed = into.iter().any(|(linear, _)| adapter.pairs.contains_key(&linear.id));
            let (Some((linear, _)), true, false) = (into.first(), changed, rows.is_empty()) else { continue };
            let (n, k) = (rows.len(), linear.matrix.k());
            let x = match input {
                Input::F32(x) if n == tokens => x,
                Input::F32(x) => {
                    let gathered = self.inputs.first(n * k);
                    for (to, &row) in gathered.chunks_exact_mut(k).zip(rows) {
                        to.copy_from_slice(&x[row * k..(row + 1) * k]);
                    }
                    gathered
                }
                Input::Quantized(x) => {
                    let gathered = self.inputs.first(n * k);
                    pool.for_rows(gathered, k, 4, |first, out| {
                        for (&row, out) in rows[first..].iter().zip(out.chunks_exact_mut(k)) {
                            x.dequantize(row, out);
                        }
                    });
                    gathered
                }
            };
            for (linear, out) in into.iter_mut() {
                let Some(Pair { a, b, scale }) = adapter.pairs.get(&linear.id) else { continue };
                let (inner, width) = (self.inner.first(n * a.rows()), b.rows());
                matmul(pool, isa, a, 0..a.rows(), Input::F32(x), n, inner);
                let sums = self.sums.first(n * width);
                matmul(pool, isa, b, 0..width, Input::F32(inner), n, sums);
                for (sum, &row) in sums.chunks_exact(width).zip(rows) {
                    elementwise::add_scaled(isa, &mut out[row * width..(row + 1) * width], sum, *scale);
                }
            }
        }
    }
}
