//! Low-rank adapters: what is added to which products of a model, and what each rank holds of it.
//!
//! `y = W x + scale · B (A x)`: Hu et al. 2021, arXiv:2106.09685. `A`, `[rank, in]`, is whole on every rank and reads what `W` reads;
//! `B`, `[out, rank]`, is split by output rows as `W` is. So nothing is summed across ranks.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    model::{ModelConfig, ModelFile, TensorId, TensorInfo},
    shard::{Shard, Splits, TensorSlice},
};

/// An adapter, as its headers describe it, checked against the shape of its model.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterHeader {
    /// Its weight files.
    pub files: Vec<ModelFile>,
    /// What is added to which product, ascending by identity; at most one pair for each.
    pub pairs: Vec<Pair>,
}

/// What is added to one product.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The matrix of the product.
    pub id: TensorId,
    /// `[rank, in]`.
    pub a: TensorInfo,
    /// `[out, rank]`: of a tensor that serves several products stored together, the rows of this one.
    pub b: TensorInfo,
    /// Factor of the sum.
    pub scale: f32,
    /// Which stored row of `b` is which row of the product.
    pub order: RowOrder,
}

/// Where a worker finds an adapter, and which one it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterSource {
    /// Source: `file:…`, `hf://…`, `http(s)://…`.
    pub uri: String,
    /// `sha256:<hex>` of its one weight file, when pinned.
    pub digest: Option<String>,
    /// See [`AdapterHeader::numerics`].
    pub numerics: String,
}

impl AdapterSource {
    /// The source of an adapter whose header was read.
    pub fn new(uri: &str, digest: Option<&str>, header: &AdapterHeader) -> Self {
        let numerics = header.numerics(digest.unwrap_or(uri));
        Self { uri: uri.to_owned(), digest: digest.map(str::to_owned), numerics }
    }

    /// What tells its weights apart from others: their digest or, when unpinned, their source.
    pub fn identity(&self) -> &str {
        self.digest.as_deref().unwrap_or(&self.uri)
    }
}

/// The order in which the rows of a matrix of heads are stored, seen from that of the model.
///
/// GGUF keeps the two rows of a rotated pair of llama's heads side by side, other files half a head apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RowOrder {
    /// The same.
    #[default]
    Same,
    /// The model has pairs side by side in heads of `head_dim` rows, the file half a head apart.
    ToAdjacent {
        /// Rows of a head; even.
        head_dim: usize,
    },
    /// The model has pairs half a head apart in heads of `head_dim` rows, the file side by side.
    ToHalves {
        /// Rows of a head; even.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The stored row that is row `row` of the product; both are of the same head.
    pub fn stored(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::ToAdjacent { head_dim } => {
                let place = row % head_dim;
                row - place + place % 2 * (head_dim / 2) + place / 2
            }
            Self::ToHalves { head_dim } => {
                let (place, half) = (row % head_dim, head_dim / 2);
                row - place + place % half * 2 + place / half
            }
        }
    }

    /// Rows that change places among themselves alone.
    pub fn unit(self) -> usize {
        match self {
            Self::Same => 1,
            Self::ToAdjacent { head_dim } | Self::ToHalves { head_dim } => head_dim,
        }
    }
}

/// One rank's part of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterShard {
    /// Its pairs, ascending by identity.
    pub pairs: Vec<PairSlice>,
}

/// One rank's part of a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct PairSlice {
    /// The matrix of the product.
    pub id: TensorId,
    /// All of `A`.
    pub a: TensorSlice,
    /// The rows of `B` that the rank has of the product.
    pub b: TensorSlice,
    /// Factor of the sum.
    pub scale: f32,
    /// The order of `b`'s rows; a rank has whole units of it.
    pub order: RowOrder,
}

impl AdapterHeader {
    /// What rank `rank` of the stage with `layers` holds. Products of which it has no row are left out.
    pub fn shard(&self, config: &ModelConfig, layers: &Range<usize>, splits: &Splits, rank: usize) -> AdapterShard {
        let here = self.pairs.iter().filter(|pair| pair.id.layer.is_some_and(|layer| layers.contains(&(layer as usize))));
        let slice = |pair: &Pair| {
            let rows = splits.rows(config, pair.id.role, rank);
            let rank_of_pair = pair.a.shape.first().copied().unwrap_or(0);
            PairSlice {
                id: pair.id,
                a: TensorSlice::new(pair.id, &pair.a, 0..rank_of_pair),
                b: TensorSlice::new(pair.id, &pair.b, rows),
                scale: pair.scale,
                order: pair.order,
            }
        };
        AdapterShard { pairs: here.map(slice).filter(|pair| !pair.b.is_empty()).collect() }
    }

    /// What the worker of `shard` holds.
    pub fn of(&self, config: &ModelConfig, shard: &Shard) -> AdapterShard {
        self.shard(config, &shard.layers, &shard.splits, shard.rank)
    }

    /// The numerics id of the adapter: with equal ids of replica and adapter, equal ids and seeds give equal bits.
    ///
    /// It covers the weights (`identity`: their digest or, when unpinned, their source), which products they change, by what factors, and
    /// the stored types.
    pub fn numerics(&self, identity: &str) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("adapter\n{identity}\n"));
        for Pair { id, a, b, scale, order } in &self.pairs {
            hash.update(format!("{id:?} {:?} {:?} {:?} {:?} {:08x} {order:?}\n", a.dtype, a.shape, b.dtype, b.shape, scale.to_bits()));
        }
        hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
    }
}

impl AdapterShard {
    /// Bytes of its weights, in files and in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.pairs.iter().map(|pair| pair.a.len() + pair.b.len()).sum()
    }

    /// Bytes that a step of `tokens` tokens needs beside those of the model: inputs, `A x` and the sums of one product, as f32.
    pub fn working_bytes(&self, tokens: usize) -> u64 {
        let width = |pair: &PairSlice| {
            let input = pair.a.tensor.shape.last().copied().unwrap_or(0);
            input + pair.a.rows.len() + pair.b.rows.len()
        };
        let width = self.pairs.iter().map(width).max().unwrap_or(0);
        (tokens as u64).saturating_mul(width as u64).saturating_mul(4)
    }
}

#[cfg(test)]
mod tests {
    use super::RowOrder;

    #[test]
    fn orders_are_permutations_of_each_head_and_undo_each_other() {
        let (to, back) = (RowOrder::ToAdjacent { head_dim: 6 }, RowOrder::ToHalves { head_dim: 6 });
        assert_eq!((0..6).map(|r| to.stored(r)).collect::<Vec<_>>(), [0, 3, 1, 4, 2, 5]);
        assert_eq!((6..12).map(|r| back.stored(r)).collect::<Vec<_>>(), [6, 8, 10, 7, 9, 11]);
        for row in 0..18 {
            assert_eq!((to.stored(back.stored(row)), back.stored(to.stored(row))), (row, row));
            assert_eq!(RowOrder::Same.stored(row), row);
        }
    }
}
