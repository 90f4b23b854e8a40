//! Softmax sums, the largest logits and draws over a vocabulary.
//!
//! Sums run in fixed tiles of 1,024 rows, counted from row 0 of the vocabulary: a tile's `(max, sum)` is formed alone, in 16 lanes (lane `c`
//! sums rows `c, c + 16, …` in this order) folded in a fixed order, and tiles are merged in row order, in f64, against the maximum of all.
//! So whoever owns whole tiles can hand over their [`TileSum`]s, and any split gives the same bits. A logit of minus infinity is a token
//! that cannot come.

mod likeliest;
mod product;

pub use likeliest::{Candidate, argmax, merge_top_k, top_k};
pub use product::{Found, Wanted, product};

use crate::{
    Isa, Pool,
    math::{exp, exp_f32, exp_f64, ln_f64},
    simd::{Kernel, LANES, Simd, vectorize},
};

/// Rows of a tile.
pub const VOCAB_TILE: usize = 1024;

/// A tile's part of a softmax sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TileSum {
    /// Largest logit `m` of the tile.
    pub max: f32,
    /// Sum of `e^(factor (x - m))` over the tile; 0 when every logit is minus infinity.
    pub sum: f32,
}

/// Sums every tile of `logits`, whose first row is the first of a tile: `tiles[i]` is that of rows `1024 i ..`, the last may be short.
///
/// `factor` is the inverse of the temperature, 1 for log-probabilities.
///
/// # Panics
/// If `tiles` is not one for each begun tile.
pub fn tile_sums(pool: &Pool, isa: Isa, logits: &[f32], factor: f32, tiles: &mut [TileSum]) {
    assert_eq!(tiles.len(), logits.len().div_ceil(VOCAB_TILE), "tiles of {} logits", logits.len());
    pool.for_rows(tiles, 1, 8, |first, tiles| {
        for (tile, logits) in tiles.iter_mut().zip(logits[first * VOCAB_TILE..].chunks(VOCAB_TILE)) {
            *tile = vectorize(isa, Sum { logits, factor });
        }
    });
}

struct Sum<'a> {
    logits: &'a [f32],
    factor: f32,
}

impl Kernel for Sum<'_> {
    type Output = TileSum;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> TileSum {
        let (chunks, tail) = self.logits.as_chunks::<LANES>();
        let lowest = s.splat(f32::NEG_INFINITY);
        // Lanes past the end are minus infinity: they are no maximum, and add 0.
        let last = s.keep(s.load_part(tail), lowest, 0, tail.len());
        let mut max = lowest;
        for chunk in chunks {
            max = s.max(s.load(chunk), max);
        }
        let max = s.fold_max(s.max(last, max));
        if max == f32::NEG_INFINITY && self.logits.iter().all(|&x| x == f32::NEG_INFINITY) {
            return TileSum { max, sum: 0.0 };
        }
        let (top, factor) = (s.splat(max), s.splat(self.factor));
        let mut sum = s.splat(0.0);
        for chunk in chunks {
            sum = s.add(sum, exp(s, s.mul(s.sub(s.load(chunk), top), factor)));
        }
        if !tail.is_empty() {
            sum = s.add(sum, s.keep(exp(s, s.mul(s.sub(last, top), factor)), s.splat(0.0), 0, tail.len()));
        }
        TileSum { max, sum: s.fold_add(sum) }
    }
}

/// Whether no logit is NaN or infinity, so that every [`TileSum`] is a number. Minus infinity is a token that cannot come.
pub fn bounded(pool: &Pool, isa: Isa, logits: &[f32]) -> bool {
    let mut parts: Vec<(&[f32], bool)> =
        (0..pool.threads()).map(|part| (&logits[crate::split(logits.len(), pool.threads(), part, VOCAB_TILE)], false)).collect();
    pool.for_each(&mut parts, |(logits, bounded)| *bounded = vectorize(isa, Bounded(logits)));
    parts.iter().all(|(_, bounded)| *bounded)
}

struct Bounded<'a>(&'a [f32]);

impl Kernel for Bounded<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let (chunks, tail) = self.0.as_chunks::<LANES>();
        let (least, zero) = (s.splat(f32::MIN), s.splat(0.0));
        // The least number stands for minus infinity, NaN stays; zero times NaN or infinity is NaN, and a NaN stays in its sum.
        let mut sum = zero;
        for chunk in chunks {
            sum = s.fma(s.max(least, s.load(chunk)), zero, sum);
        }
        sum = s.fma(s.max(least, s.load_part(tail)), zero, sum);
        !s.fold_add(sum).is_nan()
    }
}

/// The softmax sum of a whole vocabulary: `sum · e^(factor · max)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Total {
    /// Largest logit.
    pub max: f32,
    /// Sum of `e^(factor (x - max))`.
    pub sum: f64,
    /// Inverse of the temperature.
    pub factor: f32,
}

impl Total {
    /// Merges all tiles of a vocabulary, in row order.
    pub fn of(tiles: &[TileSum], factor: f32) -> Self {
        let max = tiles.iter().fold(f32::NEG_INFINITY, |max, tile| if tile.max > max { tile.max } else { max });
        let mut total = Self { max, sum: 0.0, factor };
        total.sum = tiles.iter().fold(0.0, |sum, tile| sum + total.weight(tile));
        total
    }

    /// A tile's part of `sum`; 0 for a tile of minus infinities.
    pub fn weight(&self, tile: &TileSum) -> f64 {
        if tile.sum == 0.0 {
            0.0
        } else {
            f64::from(tile.sum) * exp_f64(f64::from(self.factor) * (f64::from(tile.max) - f64::from(self.max)))
        }
    }

    /// `ln Σ e^(factor · x)`.
    pub fn log_sum_exp(&self) -> f64 {
        f64::from(self.factor) * f64::from(self.max) + ln_f64(self.sum)
    }

    /// Natural logarithm of the probability of a token whose logit is `x`.
    pub fn log_probability(&self, x: f32) -> f64 {
        f64::from(self.factor) * (f64::from(x) - f64::from(self.max)) - ln_f64(self.sum)
    }

    /// The tile in which `point`, in `0 .. 1` of the whole, falls, and where in that tile, in `0 .. 1`; tiles as given to [`Total::of`].
    /// `None` if no token can come.
    pub fn tile_at(&self, tiles: &[TileSum], point: f64) -> Option<(usize, f64)> {
        let mut left = point * self.sum;
        let mut last = None;
        for (i, tile) in tiles.iter().enumerate() {
            let weight = self.weight(tile);
            if weight > 0.0 {
                if left < weight {
                    return Some((i, left / weight));
                }
                left -= weight;
                last = Some((i, 1.0));
            }
        }
        // What rounding left over belongs to the last tile.
        last
    }
}

/// The row of a tile on which `point`, in `0 .. 1` of the tile's softmax sum, falls; `None` if every logit is minus infinity.
pub fn row_at(logits: &[f32], factor: f32, point: f64) -> Option<usize> {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
    let weight = |x: f32| if x == f32::NEG_INFINITY { 0.0 } else { f64::from(exp_f32((x - max) * factor)) };
    let mut left = point * logits.iter().map(|&x| weight(x)).sum::<f64>();
    let mut last = None;
    for (i, &x) in logits.iter().enumerate() {
        let weight = weight(x);
        if weight > 0.0 {
            if left < weight {
                return Some(i);
            }
            left -= weight;
            last = Some(i);
        }
    }
    last
}
