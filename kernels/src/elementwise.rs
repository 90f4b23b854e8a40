//! Gates, sums, biases and factors.

use crate::{
    Isa, Pool,
    math::{erf, exp, tanh_f64},
    simd::{Kernel, LANES, Simd, vectorize},
};

/// Fewer values than this are computed by the caller alone.
const PARALLEL_FROM: usize = 16 << 10;
/// Values a thread takes at a time.
const GRAIN: usize = 1024;

/// Activation of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x / (1 + e^-2u)`, `u = sqrt(2/π) (x + 0.044715 x³)`, which is `0.5 x (1 + tanh u)`: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt(2)))`: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    Gelu,
}

/// `gate[i] = activation(gate[i]) · up[i]`.
///
/// # Panics
/// If the lengths differ.
pub fn gate(pool: &Pool, isa: Isa, activation: Gate, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "values of gate and up");
    spread(pool, gate, |first, gate| {
        let up = &up[first..first + gate.len()];
        match activation {
            Gate::Silu => vectorize(isa, Binary(gate, up, Silu)),
            Gate::GeluTanh => vectorize(isa, Binary(gate, up, GeluTanh)),
            Gate::Gelu => vectorize(isa, Binary(gate, up, Gelu)),
        }
    });
}

/// `x[i] = activation(x[i])`.
pub fn activate(pool: &Pool, isa: Isa, activation: Gate, x: &mut [f32]) {
    spread(pool, x, |_, x| match activation {
        Gate::Silu => vectorize(isa, Unary(x, Silu)),
        Gate::GeluTanh => vectorize(isa, Unary(x, GeluTanh)),
        Gate::Gelu => vectorize(isa, Unary(x, Gelu)),
    });
}

/// `x[i] += y[i]`.
///
/// # Panics
/// If the lengths differ.
pub fn add(pool: &Pool, isa: Isa, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "values of both terms");
    spread(pool, x, |first, x| vectorize(isa, Binary(x, &y[first..first + x.len()], Add)));
}

/// `x[r, i] += bias[i]` for rows of `bias.len()` values.
///
/// # Panics
/// If `bias` is empty or `x` is not whole rows.
pub fn add_bias(pool: &Pool, isa: Isa, x: &mut [f32], bias: &[f32]) {
    assert!(!bias.is_empty(), "a bias has no values");
    pool.for_rows(x, bias.len(), 16, |_, rows| {
        for row in rows.chunks_exact_mut(bias.len()) {
            vectorize(isa, Binary(row, bias, Add));
        }
    });
}

/// `sum[i] = fma(x[i], factor, sum[i])`.
///
/// # Panics
/// If the lengths differ.
pub fn add_scaled(isa: Isa, sum: &mut [f32], x: &[f32], factor: f32) {
    assert_eq!(sum.len(), x.len(), "values of both terms");
    vectorize(isa, Binary(sum, x, AddScaled(factor)));
}

/// `x[i] *= factor`.
pub fn scale(pool: &Pool, isa: Isa, x: &mut [f32], factor: f32) {
    spread(pool, x, |_, x| vectorize(isa, Scale(x, factor)));
}

/// `x[i] = tanh x[i]`, computed in f64 and rounded once; for few values.
pub fn tanh(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = tanh_f64(f64::from(*x)) as f32);
}

/// `x[i] = max(x[i], 0)`, NaN for NaN; for few values.
pub fn relu(x: &mut [f32]) {
    x.iter_mut().filter(|x| **x < 0.0).for_each(|x| *x = 0.0);
}

fn spread(pool: &Pool, x: &mut [f32], fill: impl Fn(usize, &mut [f32]) + Sync) {
    if x.len() < PARALLEL_FROM {
        fill(0, x);
    } else {
        pool.for_rows(x, 1, GRAIN, fill);
    }
}

/// A function of two vectors.
trait Op: Copy {
    fn apply<S: Simd>(self, s: S, x: S::F, y: S::F) -> S::F;
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct Gelu;
#[derive(Clone, Copy)]
struct Add;
#[derive(Clone, Copy)]
struct AddScaled(f32);

/// `x / (1 + e^minus_t)`.
#[inline(always)]
fn logistic_gate<S: Simd>(s: S, x: S::F, minus_t: S::F) -> S::F {
    s.div(x, s.add(s.splat(1.0), exp(s, minus_t)))
}

impl Op for Silu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, y: S::F) -> S::F {
        s.mul(logistic_gate(s, x, s.sub(s.splat(0.0), x)), y)
    }
}

impl Op for GeluTanh {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, y: S::F) -> S::F {
        const MINUS_TWO_SQRT_2_OVER_PI: f32 = -1.595_769;
        let poly = s.fma(s.mul(x, x), s.splat(0.044_715 * MINUS_TWO_SQRT_2_OVER_PI), s.splat(MINUS_TWO_SQRT_2_OVER_PI));
        s.mul(logistic_gate(s, x, s.mul(x, poly)), y)
    }
}

impl Op for Gelu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, y: S::F) -> S::F {
        let half = s.mul(x, s.splat(0.5));
        s.mul(s.fma(half, erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2))), half), y)
    }
}

impl Op for Add {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, y: S::F) -> S::F {
        s.add(x, y)
    }
}

impl Op for AddScaled {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, y: S::F) -> S::F {
        s.fma(y, s.splat(self.0), x)
    }
}

/// An operation whose second operand is 1.
struct Unary<'a, O>(&'a mut [f32], O);

impl<O: Op> Kernel for Unary<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(x, op) = self;
        let one = s.splat(1.0);
        let (x, tail) = x.as_chunks_mut::<LANES>();
        for x in x {
            let value = op.apply(s, s.load(x), one);
            s.store(x, value);
        }
        if !tail.is_empty() {
            let value = op.apply(s, s.load_part(tail), one);
            s.store_part(tail, value);
        }
    }
}

struct Binary<'a, O>(&'a mut [f32], &'a [f32], O);

impl<O: Op> Kernel for Binary<'_, O> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(x, y, op) = self;
        let (x, x_tail) = x.as_chunks_mut::<LANES>();
        let (y, y_tail) = y.as_chunks::<LANES>();
        for (x, y) in x.iter_mut().zip(y) {
            let value = op.apply(s, s.load(x), s.load(y));
            s.store(x, value);
        }
        if !x_tail.is_empty() {
            let value = op.apply(s, s.load_part(x_tail), s.load_part(y_tail));
            s.store_part(x_tail, value);
        }
    }
}

struct Scale<'a>(&'a mut [f32], f32);

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.1);
        let (x, tail) = self.0.as_chunks_mut::<LANES>();
        for x in x {
            let value = s.mul(s.load(x), factor);
            s.store(x, value);
        }
        for x in tail {
            *x *= self.1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, noise};

    #[test]
    fn every_isa_and_thread_count_gives_the_specified_bits() {
        for n in [1, 15, 16, 17, 33, 40_000] {
            let mut x = noise(1, n);
            x.iter_mut().for_each(|x| *x *= 12.0);
            let y = noise(2, n);
            let bias = if n.is_multiple_of(4) { n / 4 } else { n };
            let run = |isa, threads| {
                let pool = Pool::new(threads);
                let apply = |f: &dyn Fn(&mut Vec<f32>)| {
                    let mut out = x.clone();
                    f(&mut out);
                    bits(&out)
                };
                [
                    apply(&|out| gate(&pool, isa, Gate::Silu, out, &y)),
                    apply(&|out| gate(&pool, isa, Gate::GeluTanh, out, &y)),
                    apply(&|out| add(&pool, isa, out, &y)),
                    apply(&|out| scale(&pool, isa, out, 1.7)),
                    apply(&|out| add_bias(&pool, isa, out, &y[..bias])),
                    apply(&|out| add_scaled(isa, out, &y, 1.7)),
                    apply(&|out| activate(&pool, isa, Gate::Silu, out)),
                    apply(&|out| activate(&pool, isa, Gate::GeluTanh, out)),
                    apply(&|out| gate(&pool, isa, Gate::Gelu, out, &y)),
                    apply(&|out| activate(&pool, isa, Gate::Gelu, out)),
                ]
            };
            let spec = run(Isa::Scalar, 1);
            for isa in Isa::available() {
                for threads in [1, 3] {
                    assert_eq!(run(isa, threads), spec, "{isa}, {n} values, {threads} threads");
                }
            }
            assert!(spec[0] != spec[1] && (n == 1 || spec[1] != spec[8]), "another gate must show");
            let ones = |gate_of| {
                let mut out = x.clone();
                gate(&Pool::new(1), Isa::Scalar, gate_of, &mut out, &vec![1.0; n]);
                bits(&out)
            };
            assert_eq!((&spec[6], &spec[7]), (&ones(Gate::Silu), &ones(Gate::GeluTanh)), "activations are gates of 1");
            assert_eq!(spec[9], ones(Gate::Gelu), "activations are gates of 1");
            for i in 0..n {
                let (x, y) = (f64::from(x[i]), f64::from(y[i]));
                let silu = x / (1.0 + (-x).exp()) * y;
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                let gelu = 0.5 * x * (1.0 + u.tanh()) * y;
                let close = |got: u32, want: f64| (f64::from(f32::from_bits(got)) - want).abs() < 2e-6 * want.abs().max(1.0);
                assert!(close(spec[0][i], silu) && close(spec[1][i], gelu), "gates of {x} and {y}");
                // The two forms of GELU are never further apart than 5e-4.
                assert!((f64::from(f32::from_bits(spec[8][i])) - gelu).abs() < 5e-4 * y.abs() + 2e-6, "GELU of {x} times {y}");
            }
        }
    }
}
