//! The product of a vocabulary, of whose logits no more is kept than what is wanted: they are looked at where they are made, in the cache.
//!
//! A step of 32 tokens with 262,144 rows makes 33 MB of logits. To write them to memory and read them again takes as long as a fifth of the
//! product.
#![expect(unsafe_code, reason = "threads write disjoint columns of what is kept")]

use std::sync::{Mutex, PoisonError};

use super::{Bounded, Candidate, Sum, TileSum, VOCAB_TILE, likeliest::Likeliest, merge_top_k};
use crate::{Input, Isa, Matrix, Pool, matmul::matmul_pieces, pool::Disjoint, simd::vectorize};

/// Rows that are multiplied before their logits are looked at, where whole tiles are not needed.
const PIECE: usize = 256;

/// What is wanted of a token's logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted<'a> {
    /// The softmax sums of all tiles, at this factor (see [`tile_sums`](super::tile_sums)).
    pub sums: Option<f32>,
    /// So many of the likeliest.
    pub top: usize,
    /// The logits of these rows.
    pub rows: &'a [u32],
    /// All of them, as they are.
    pub kept: bool,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The sums of all tiles; none where they were not wanted.
    pub tiles: Vec<TileSum>,
    /// Whether no logit is NaN or infinity.
    pub bounded: bool,
    /// The likeliest, in order.
    pub likeliest: Vec<Candidate>,
    /// The logit of each row that was wanted; 0 of one that is not there.
    pub logits: Vec<f32>,
}

/// What a thread found.
struct Part {
    tiles: Vec<(usize, TileSum)>,
    bounded: bool,
    likeliest: Likeliest,
    /// Which of the wanted rows, and its logit.
    logits: Vec<(usize, f32)>,
}

impl Part {
    fn new(wanted: &Wanted<'_>) -> Self {
        Self { tiles: Vec::new(), bounded: true, likeliest: Likeliest::new(wanted.top), logits: Vec::new() }
    }

    /// Looks at the logits of rows from `first` on, `first_id` among all.
    fn look(&mut self, isa: Isa, wanted: &Wanted<'_>, (first, first_id): (usize, u32), logits: &[f32]) {
        match wanted.sums {
            Some(factor) => {
                let tile = vectorize(isa, Sum { logits, factor });
                self.bounded &= !tile.sum.is_nan();
                self.tiles.push((first / VOCAB_TILE, tile));
            }
            None => self.bounded &= vectorize(isa, Bounded(logits)),
        }
        self.likeliest.look(isa, logits, first_id);
        for (at, &row) in wanted.rows.iter().enumerate() {
            if let Some(&logit) = row.checked_sub(first_id).and_then(|row| logits.get(row as usize)) {
                self.logits.push((at, logit));
            }
        }
    }
}

/// Multiplies the first `rows` rows of a vocabulary with an input for each of `wanted`, and looks for what is wanted of each. Row `first_id` of
/// all is its first, and the first of a tile.
///
/// `kept` gets the logits of those that are to be kept, `[kept, rows]`. The bits are those of [`matmul`](crate::matmul()) and of the functions
/// for logits in memory.
///
/// # Panics
/// As [`matmul`](crate::matmul()), or if `kept` has another size.
pub fn product(
    pool: &Pool,
    isa: Isa,
    (weights, rows, first_id): (&Matrix, usize, u32),
    input: Input<'_>,
    wanted: &[Wanted<'_>],
    kept: &mut [f32],
) -> Vec<Found> {
    let mut count = 0;
    let places: Vec<Option<usize>> = wanted
        .iter()
        .map(|wanted| {
            count += usize::from(wanted.kept);
            wanted.kept.then(|| count - 1)
        })
        .collect();
    assert_eq!(kept.len(), count * rows, "logits of {count} tokens and {rows} rows");
    let kept = Disjoint::new(kept);
    let parts: Vec<Mutex<Vec<Part>>> = (0..pool.threads()).map(|_| Mutex::new(wanted.iter().map(Part::new).collect())).collect();
    let piece = if wanted.iter().any(|wanted| wanted.sums.is_some()) { VOCAB_TILE } else { PIECE };
    matmul_pieces(pool, isa, (weights, rows), input, wanted.len(), piece, |thread, piece, logits| {
        let mut parts = parts[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = wanted.iter().zip(&places).zip(parts.iter_mut());
        for (((wanted, place), part), logits) in tokens.zip(logits.chunks_exact(piece.len())) {
            part.look(isa, wanted, (piece.start, first_id + piece.start as u32), logits);
            if let Some(place) = place {
                // SAFETY: every piece is given to one thread.
                unsafe { kept.slice(place * rows + piece.start..place * rows + piece.end) }.copy_from_slice(logits);
            }
        }
    });
    let mut parts: Vec<_> = parts.into_iter().map(|parts| parts.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter()).collect();
    wanted.iter().map(|wanted| merged(wanted, rows, parts.iter_mut().filter_map(Iterator::next))).collect()
}

/// What all threads found of a token.
fn merged(wanted: &Wanted<'_>, rows: usize, parts: impl Iterator<Item = Part>) -> Found {
    let tiles = if wanted.sums.is_some() { rows.div_ceil(VOCAB_TILE) } else { 0 };
    let mut found = Found {
        tiles: vec![TileSum { max: f32::NEG_INFINITY, sum: 0.0 }; tiles],
        bounded: true,
        likeliest: Vec::new(),
        logits: vec![0.0; wanted.rows.len()],
    };
    let mut lists = Vec::new();
    for part in parts {
        for (tile, sum) in part.tiles {
            found.tiles[tile] = sum;
        }
        for (at, logit) in part.logits {
            found.logits[at] = logit;
        }
        found.bounded &= part.bounded;
        lists.push(part.likeliest.found());
    }
    found.likeliest = merge_top_k(lists, wanted.top);
    found
}
