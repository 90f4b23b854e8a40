//! Which slice of each dimension each rank of a stage owns.

use std::ops::Range;

use super::balanced;
use crate::{
    model::{ModelHeader, Role, TensorId},
    shard::{Splits, VOCAB_TILE},
};

/// Rows that kernels compute together; ranks get multiples of it where there are enough rows.
const ROW_UNIT: usize = 16;

/// Splits of the stage with `layers` over `ranks` ranks; `ranks` is at most the number of query heads. `lent`: tiles of the vocabulary that the
/// first stage multiplies in place of the last.
pub(super) fn splits(header: &ModelHeader, layers: &Range<usize>, ranks: usize, lent: usize) -> Splits {
    let c = &header.config;
    let group = c.heads / c.kv_heads;
    let heads = balanced(c.heads, ranks, 1);
    let kv_heads = heads.iter().map(|h| if h.is_empty() { 0..0 } else { h.start / group..(h.end - 1) / group + 1 }).collect();
    let row_unit = |len: usize| if len >= ROW_UNIT * ranks { ROW_UNIT } else { 1 };
    let here = |id: &TensorId| id.layer.is_some_and(|l| layers.contains(&(l as usize)));
    let block = |down: Role| {
        let products = header.tensors.iter().filter(|(id, _)| id.role == down && here(id));
        products.filter_map(|(_, t)| t.dtype.activation_block()).max()
    };
    let shared = c.experts.map_or(0, |e| e.shared_ffn());
    let vocab = balanced(c.vocab, ranks, VOCAB_TILE);
    Splits {
        kv_heads,
        hidden: balanced(c.hidden, ranks, row_unit(c.hidden)),
        ffn: balanced(c.ffn, ranks, block(Role::Down).unwrap_or_else(|| row_unit(c.ffn))),
        experts: c.experts.map_or_else(Vec::new, |e| balanced(e.count, ranks, 1)),
        shared: match shared {
            0 => Vec::new(),
            width => balanced(width, ranks, block(Role::SharedDown).unwrap_or_else(|| row_unit(width))),
        },
        cuts: if lent > 0 { cuts(&vocab, lent) } else { Vec::new() },
        vocab,
        heads,
    }
}

/// Where `lent` tiles end that are spread over the ranks as their rows are.
fn cuts(vocab: &[Range<usize>], lent: usize) -> Vec<usize> {
    let all = vocab.last().map_or(0, |rows| rows.end.div_ceil(VOCAB_TILE)).max(1);
    let lent_before = |tile: usize| (lent as u128 * tile as u128 / all as u128) as usize;
    let cut = |rows: &Range<usize>| {
        let tiles = lent_before(rows.end.div_ceil(VOCAB_TILE)) - lent_before(rows.start.div_ceil(VOCAB_TILE));
        (rows.start + tiles * VOCAB_TILE).min(rows.end)
    };
    vocab.iter().map(cut).collect()
}
