//! Rotary position embedding: Su et al. 2021, arXiv:2104.09864.
//!
//! Pair `i` of a head at position `p` is turned by the angle `p · base^(-2i / dims) / divisor_i`. Angles, sines and cosines are computed in
//! f64 by this crate's own functions and rounded once to f32; then `(a, b)` becomes `(fma(b, -sin, a cos), fma(a, sin, b cos))`.

use std::{ops::Range, sync::OnceLock};

use crate::{
    Isa, Pool,
    math::{ln_f64, pow_f64, sin_cos_f64},
    simd::{Kernel, LANES, Simd, vectorize},
};

/// Fewer values than this are computed by the caller alone.
const PARALLEL_FROM: usize = 16 << 10;
/// Positions whose sines are computed together, when the first of them is needed.
const CHUNK: usize = 64;

/// Which two values of a head a rotation turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Pairs `(2i, 2i + 1)`.
    Adjacent,
    /// Pairs `(i, i + dims / 2)`.
    Halves,
}

/// How frequencies are stretched for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divisor of every frequency.
        factor: f64,
    },
    /// Llama 3.1: with wavelength `2π / frequency`, the divisor is 1 below `original_context / high_freq_factor`, `factor` above
    /// `original_context / low_freq_factor`, and `1 / ((1 - s) / factor + s)` between, where
    /// `s = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)`.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching, in tokens.
        original_context: f64,
    },
    /// YaRN: pairs that turn more than `beta_fast` times in `original_context` positions keep their frequency, those that turn less than
    /// `beta_slow` times have it divided by `factor`, with a ramp between: Peng et al. 2023, arXiv:2309.00071, section 3.2.
    Yarn {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Context length before stretching, in tokens.
        original_context: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which a frequency is divided.
        beta_slow: f64,
        /// The ramp begins and ends at whole pairs.
        truncate: bool,
    },
    /// The divisor of each pair, `[dims / 2]`.
    Divisors(Vec<f32>),
}

/// Sines and cosines of every position, computed as far as they are asked for; to be shared by all layers that rotate alike.
#[derive(Debug)]
pub struct RopeTable {
    layout: RopeLayout,
    dims: usize,
    /// Angle per position of each pair.
    frequencies: Vec<f64>,
    /// Factor of cosines and sines.
    amplitude: f64,
    /// Per 64 positions `[64, 2, width]`: cosines, then sines, in the order in which `layout` meets them.
    chunks: Vec<OnceLock<Box<[f32]>>>,
    positions: usize,
}

impl RopeTable {
    /// A table for positions below `positions`, turning the first `dims` values of each head.
    ///
    /// # Panics
    /// If `dims` is odd or 0, `base` is not positive, or `scaling` gives divisors for another number of pairs.
    pub fn new(layout: RopeLayout, dims: usize, base: f64, scaling: &RopeScaling, positions: usize) -> Self {
        assert!(dims > 0 && dims.is_multiple_of(2), "{dims} rotated values are not pairs");
        assert!(base > 0.0, "base {base} of rotary frequencies");
        if let RopeScaling::Divisors(divisors) = scaling {
            assert_eq!(divisors.len(), dims / 2, "divisors of {dims} rotated values");
        }
        let divisors = divisors(dims, base, scaling);
        let frequencies = divisors.iter().enumerate().map(|(i, divisor)| frequency(dims, base, i) / divisor).collect();
        let chunks = (0..positions.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        Self { layout, dims, frequencies, amplitude: 1.0, chunks, positions }
    }

    /// The same table with every cosine and sine multiplied by `amplitude`, before they are rounded.
    #[must_use]
    pub fn with_amplitude(self, amplitude: f64) -> Self {
        let chunks = self.chunks.iter().map(|_| OnceLock::new()).collect();
        Self { amplitude, chunks, ..self }
    }

    /// Number of values of each head that are turned.
    pub fn dims(&self) -> usize {
        self.dims
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Turns `x`, `[tokens, heads, head_dim]`, token `t` being at `positions[t]`: of each head the `dims` values from `first` on; the others
    /// stay.
    ///
    /// # Panics
    /// If a head has no `dims` values from `first` on, `x` is not whole heads of `positions.len()` tokens, or a position is not in the
    /// table.
    pub fn apply(&self, pool: &Pool, isa: Isa, x: &mut [f32], (head_dim, first): (usize, usize), positions: &[u32]) {
        assert!(first + self.dims <= head_dim, "{} rotated values from {first} on of a head of {head_dim}", self.dims);
        if positions.is_empty() {
            assert!(x.is_empty(), "{} values of no token", x.len());
            return;
        }
        let width = x.len() / positions.len();
        assert!(width * positions.len() == x.len() && width.is_multiple_of(head_dim), "{} values of {} tokens", x.len(), positions.len());
        if width == 0 {
            return;
        }
        let turned = first..first + self.dims;
        let turn = |token: usize, x: &mut [f32]| {
            for (x, &position) in x.chunks_exact_mut(width).zip(&positions[token..]) {
                let (cos, sin) = self.row(position as usize);
                vectorize(isa, Turn { x, head_dim, turned: turned.clone(), layout: self.layout, cos, sin });
            }
        };
        if x.len() < PARALLEL_FROM {
            turn(0, x);
        } else {
            pool.for_rows(x, width, 1, turn);
        }
    }

    /// Cosines and sines of `position`, as many as `layout` needs.
    fn row(&self, position: usize) -> (&[f32], &[f32]) {
        assert!(position < self.positions, "position {position} of {}", self.positions);
        let chunk = self.chunks[position / CHUNK].get_or_init(|| self.chunk(position / CHUNK * CHUNK));
        let width = chunk.len() / CHUNK / 2;
        chunk[position % CHUNK * 2 * width..][..2 * width].split_at(width)
    }

    fn turn(&self, angle: f64) -> (f64, f64) {
        let (sin, cos) = sin_cos_f64(angle);
        (sin * self.amplitude, cos * self.amplitude)
    }

    fn chunk(&self, first: usize) -> Box<[f32]> {
        let mut chunk = Vec::with_capacity(CHUNK * 2 * self.dims);
        for position in first..first + CHUNK {
            let turns: Vec<(f64, f64)> = self.frequencies.iter().map(|f| self.turn(position as f64 * f)).collect();
            match self.layout {
                RopeLayout::Halves => {
                    chunk.extend(turns.iter().map(|&(_, cos)| cos as f32));
                    chunk.extend(turns.iter().map(|&(sin, _)| sin as f32));
                }
                RopeLayout::Adjacent => {
                    chunk.extend(turns.iter().flat_map(|&(_, cos)| [cos as f32; 2]));
                    chunk.extend(turns.iter().flat_map(|&(sin, _)| [-sin as f32, sin as f32]));
                }
            }
        }
        chunk.into_boxed_slice()
    }
}

/// The base that stretches `trained` positions to `length`, at least `trained`, with the factor of a model's "dynamic" scaling:
/// `base · (factor · length / trained - (factor - 1))^(dims / (dims - 2))`.
///
/// The method is bloc97's NTK-aware scaling as transformers computes it; there the length is that of each batch, here it is one for all.
///
/// # Panics
/// If `dims` is less than 4.
pub fn dynamic_base(base: f64, dims: usize, factor: f64, trained: f64, length: f64) -> f64 {
    assert!(dims >= 4, "{dims} rotated values have no stretched base");
    let stretch = factor * length.max(trained) / trained - (factor - 1.0);
    base * pow_f64(stretch, dims as f64 / (dims - 2) as f64)
}

/// What `scaling` divides the frequency of each pair by, `[dims / 2]`.
///
/// # Panics
/// If `scaling` gives divisors for another number of pairs.
pub fn divisors(dims: usize, base: f64, scaling: &RopeScaling) -> Vec<f64> {
    let ramp = ramp(dims, base, scaling);
    (0..dims / 2).map(|i| divisor(scaling, i, frequency(dims, base, i), ramp)).collect()
}

/// Angle per position of pair `i`, unscaled.
fn frequency(dims: usize, base: f64, i: usize) -> f64 {
    pow_f64(base, -((2 * i) as f64) / dims as f64)
}

fn ramp(dims: usize, base: f64, scaling: &RopeScaling) -> (f64, f64) {
    match scaling {
        RopeScaling::Yarn { original_context, beta_fast, beta_slow, truncate, .. } => {
            yarn_ramp(dims, base, *original_context, (*beta_fast, *beta_slow), *truncate)
        }
        _ => (0.0, 0.0),
    }
}

/// The pairs between which YaRN's ramp runs.
fn yarn_ramp(dims: usize, base: f64, original_context: f64, (fast, slow): (f64, f64), truncate: bool) -> (f64, f64) {
    // The pair that turns `turns` times in the original context.
    let pair = |turns: f64| dims as f64 * ln_f64(original_context / (turns * std::f64::consts::TAU)) / (2.0 * ln_f64(base));
    let (low, high) = if truncate { (pair(fast).floor(), pair(slow).ceil()) } else { (pair(fast), pair(slow)) };
    let (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
    (low, if low == high { high + 0.001 } else { high })
}

/// What the frequency of pair `i` is divided by. `ramp` is [`yarn_ramp`]'s.
fn divisor(scaling: &RopeScaling, i: usize, frequency: f64, ramp: (f64, f64)) -> f64 {
    match scaling {
        RopeScaling::None => 1.0,
        RopeScaling::Linear { factor } => *factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let wavelength = std::f64::consts::TAU / frequency;
            if wavelength < original_context / high_freq_factor {
                1.0
            } else if wavelength > original_context / low_freq_factor {
                *factor
            } else {
                let s = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                1.0 / ((1.0 - s) / factor + s)
            }
        }
        RopeScaling::Yarn { factor, .. } => {
            let divided = ((i as f64 - ramp.0) / (ramp.1 - ramp.0)).clamp(0.0, 1.0);
            1.0 / (divided / factor + (1.0 - divided))
        }
        RopeScaling::Divisors(divisors) => f64::from(divisors[i]),
    }
}

/// Turns the heads of one token.
struct Turn<'a> {
    x: &'a mut [f32],
    head_dim: usize,
    /// The values of each head that are turned.
    turned: Range<usize>,
    layout: RopeLayout,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for head in self.x.chunks_exact_mut(self.head_dim) {
            let head = &mut head[self.turned.clone()];
            match self.layout {
                RopeLayout::Halves => {
                    let (a, rest) = head.split_at_mut(self.cos.len());
                    halves(s, a, rest, self.cos, self.sin);
                }
                RopeLayout::Adjacent => adjacent(s, head, self.cos, self.sin),
            }
        }
    }
}

/// `a cos - b sin` as defined above; `b`'s new value is `turned(b, a, cos, -sin)`.
#[inline(always)]
fn turned<S: Simd>(s: S, a: S::F, b: S::F, cos: S::F, minus_sin: S::F) -> S::F {
    s.fma(b, minus_sin, s.mul(a, cos))
}

#[inline(always)]
fn halves<S: Simd>(s: S, a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) {
    let minus = s.splat(-1.0);
    let (a, a_tail) = a.as_chunks_mut::<LANES>();
    let (b, b_tail) = b.as_chunks_mut::<LANES>();
    let (cos, cos_tail) = cos.as_chunks::<LANES>();
    let (sin, sin_tail) = sin.as_chunks::<LANES>();
    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let (x, y, cos, sin) = (s.load(a), s.load(b), s.load(cos), s.load(sin));
        s.store(a, turned(s, x, y, cos, s.mul(sin, minus)));
        s.store(b, turned(s, y, x, cos, sin));
    }
    if !a_tail.is_empty() {
        let (x, y, cos, sin) = (s.load_part(a_tail), s.load_part(b_tail), s.load_part(cos_tail), s.load_part(sin_tail));
        s.store_part(a_tail, turned(s, x, y, cos, s.mul(sin, minus)));
        s.store_part(b_tail, turned(s, y, x, cos, sin));
    }
}

/// `cos` holds each cosine twice, `sin` each sine negated and as it is.
#[inline(always)]
fn adjacent<S: Simd>(s: S, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (x, x_tail) = x.as_chunks_mut::<LANES>();
    let (cos, cos_tail) = cos.as_chunks::<LANES>();
    let (sin, sin_tail) = sin.as_chunks::<LANES>();
    for ((x, cos), sin) in x.iter_mut().zip(cos).zip(sin) {
        let v = s.load(x);
        s.store(x, turned(s, v, s.swap_pairs(v), s.load(cos), s.load(sin)));
    }
    if !x_tail.is_empty() {
        let v = s.load_part(x_tail);
        s.store_part(x_tail, turned(s, v, s.swap_pairs(v), s.load_part(cos_tail), s.load_part(sin_tail)));
    }
}
