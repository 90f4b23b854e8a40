//! Root-mean-square norms and layer norms over rows.

use crate::{
    Isa, Pool,
    simd::{Kernel, LANES, Simd, vectorize},
};

/// Fewer values than this are computed by the caller alone.
const PARALLEL_FROM: usize = 16 << 10;

/// Scales each row of `x` by the inverse of its root mean square.
///
/// `y[r, i] = (x[r, i] · (1 / sqrt(mean_i(x[r, i]²) + eps))) · weight[i]`: Zhang & Sennrich 2019, arXiv:1910.07467.
/// `x`, `y`: `[rows, n]`; `weight`: `[n]`. The sum of squares runs in 16 fixed lanes folded in a fixed order, so results do not depend on
/// the number of rows or threads.
///
/// # Panics
/// If `weight` is empty, or `x` and `y` differ in length or are not whole rows.
pub fn rms_norm(pool: &Pool, isa: Isa, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "values of input and output");
    each_row(pool, y, weight.len(), |first, rows| {
        let x = &x[first * weight.len()..][..rows.len()];
        vectorize(isa, Rows { x: Some(x), weight, eps, y: rows, add: false });
    });
}

/// As [`rms_norm`], in place.
///
/// # Panics
/// If `weight` is empty or `x` is not whole rows.
pub fn rms_norm_in_place(pool: &Pool, isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    each_row(pool, x, weight.len(), |_, rows| vectorize(isa, Rows { x: None, weight, eps, y: rows, add: false }));
}

/// Adds the norm of each row of `x` to `y`: `y[r, i] += norm(x)[r, i]`, the product with the weight rounded before the sum.
///
/// # Panics
/// If `weight` is empty, or `x` and `y` differ in length or are not whole rows.
pub fn add_rms_norm(pool: &Pool, isa: Isa, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "values of input and output");
    each_row(pool, y, weight.len(), |first, rows| {
        let x = &x[first * weight.len()..][..rows.len()];
        vectorize(isa, Rows { x: Some(x), weight, eps, y: rows, add: true });
    });
}

/// Centres each row of `x` and scales it to unit variance.
///
/// `y[r, i] = (x[r, i] - mean_r) · (1 / sqrt(mean_i((x[r, i] - mean_r)²) + eps)) · weight[i] + bias[i]`, the last product and sum rounded once:
/// Ba et al. 2016, arXiv:1607.06450. `x`, `y`: `[rows, n]`; `weight`, `bias`: `[n]`. Both sums run in 16 fixed lanes folded in a fixed order.
///
/// # Panics
/// If `weight` is empty, `weight` and `bias` differ in length, or `x` and `y` differ in length or are not whole rows.
pub fn layer_norm(pool: &Pool, isa: Isa, x: &[f32], (weight, bias): (&[f32], &[f32]), eps: f32, y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "values of input and output");
    assert_eq!(weight.len(), bias.len(), "values of weight and bias");
    each_row(pool, y, weight.len(), |first, rows| {
        let x = &x[first * weight.len()..][..rows.len()];
        vectorize(isa, LayerRows { x, weight, bias, eps, y: rows });
    });
}

fn each_row(pool: &Pool, y: &mut [f32], n: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
    assert!(n > 0, "a norm needs a weight");
    assert!(y.len().is_multiple_of(n), "{} values are not whole rows of {n}", y.len());
    if y.len() < PARALLEL_FROM {
        fill(0, y);
    } else {
        pool.for_rows(y, n, 1, fill);
    }
}

struct Rows<'a> {
    /// Input; `None`: `y` itself.
    x: Option<&'a [f32]>,
    weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
    add: bool,
}

impl Kernel for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.weight.len();
        for (r, y) in self.y.chunks_exact_mut(n).enumerate() {
            let scale = match self.x {
                Some(x) => inverse_rms(s, &x[r * n..][..n], self.eps),
                None => inverse_rms(s, y, self.eps),
            };
            let scale = s.splat(scale);
            let normed = |x, weight| s.mul(s.mul(x, scale), weight);
            let (weights, weights_tail) = self.weight.as_chunks::<LANES>();
            let (y, y_tail) = y.as_chunks_mut::<LANES>();
            let (x, x_tail) = match self.x {
                Some(x) => {
                    let (x, tail) = x[r * n..][..n].as_chunks::<LANES>();
                    (Some(x), Some(tail))
                }
                None => (None, None),
            };
            for (i, (y, weight)) in y.iter_mut().zip(weights).enumerate() {
                let old = s.load(y);
                let value = normed(x.map_or(old, |x| s.load(&x[i])), s.load(weight));
                s.store(y, if self.add { s.add(old, value) } else { value });
            }
            if !y_tail.is_empty() {
                let old = s.load_part(y_tail);
                let value = normed(x_tail.map_or(old, |x| s.load_part(x)), s.load_part(weights_tail));
                s.store_part(y_tail, if self.add { s.add(old, value) } else { value });
            }
        }
    }
}

struct LayerRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for LayerRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.weight.len();
        let (weights, weights_tail) = self.weight.as_chunks::<LANES>();
        let (biases, biases_tail) = self.bias.as_chunks::<LANES>();
        for (x, y) in self.x.chunks_exact(n).zip(self.y.chunks_exact_mut(n)) {
            let (chunks, tail) = x.as_chunks::<LANES>();
            let (y, y_tail) = y.as_chunks_mut::<LANES>();
            let zero = s.splat(0.0);
            let mut sum = zero;
            for chunk in chunks {
                sum = s.add(sum, s.load(chunk));
            }
            sum = s.add(sum, s.load_part(tail));
            let mean = s.splat(s.fold_add(sum) / n as f32);
            let mut squares = zero;
            for chunk in chunks {
                let centred = s.sub(s.load(chunk), mean);
                squares = s.fma(centred, centred, squares);
            }
            let centred_tail = s.keep(s.sub(s.load_part(tail), mean), zero, 0, tail.len());
            squares = s.fma(centred_tail, centred_tail, squares);
            let scale = s.splat(1.0 / (s.fold_add(squares) / n as f32 + self.eps).sqrt());
            for (((x, y), weight), bias) in chunks.iter().zip(y).zip(weights).zip(biases) {
                let unit = s.mul(s.sub(s.load(x), mean), scale);
                s.store(y, s.fma(unit, s.load(weight), s.load(bias)));
            }
            if !tail.is_empty() {
                let value = s.fma(s.mul(centred_tail, scale), s.load_part(weights_tail), s.load_part(biases_tail));
                s.store_part(y_tail, value);
            }
        }
    }
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut sum = s.splat(0.0);
    for chunk in chunks {
        let v = s.load(chunk);
        sum = s.fma(v, v, sum);
    }
    if !tail.is_empty() {
        let v = s.load_part(tail);
        sum = s.fma(v, v, sum);
    }
    1.0 / (s.fold_add(sum) / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, noise};

    #[test]
    fn every_isa_and_thread_count_gives_the_specified_bits() {
        for n in [1, 15, 16, 17, 40, 640] {
            for rows in [0, 1, 3, 60] {
                let (x, weight, y) = (noise(1, rows * n), noise(2, n), noise(3, rows * n));
                let run = |isa, threads, eps| {
                    let pool = Pool::new(threads);
                    let mut out = vec![0.0; x.len()];
                    rms_norm(&pool, isa, &x, &weight, eps, &mut out);
                    let mut in_place = x.clone();
                    rms_norm_in_place(&pool, isa, &mut in_place, &weight, eps);
                    assert_eq!(bits(&out), bits(&in_place));
                    let mut added = y.clone();
                    add_rms_norm(&pool, isa, &x, &weight, eps, &mut added);
                    (bits(&out), bits(&added))
                };
                let spec = run(Isa::Scalar, 1, 1e-6);
                for isa in Isa::available() {
                    for threads in [1, 3] {
                        assert_eq!(run(isa, threads, 1e-6), spec, "{isa}, {rows} rows of {n}, {threads} threads");
                    }
                }
                assert!(rows == 0 || run(Isa::best(), 1, 1e-3) != spec, "another epsilon must show");
                for r in 0..rows {
                    let mean = x[r * n..][..n].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
                    for i in 0..n {
                        let want = f64::from(x[r * n + i]) / (mean + 1e-6).sqrt() * f64::from(weight[i]);
                        assert!((f64::from(f32::from_bits(spec.0[r * n + i])) - want).abs() < 1e-5);
                    }
                }
            }
        }
    }
    #[test]
    fn every_isa_and_thread_count_gives_the_specified_bits_of_layer_norms() {
        for n in [1, 15, 16, 17, 40, 640] {
            for rows in [0, 1, 3, 60] {
                let (x, weight, bias) = (noise(1, rows * n), noise(2, n), noise(3, n));
                let run = |isa, threads, eps| {
                    let mut out = vec![0.0; x.len()];
                    layer_norm(&Pool::new(threads), isa, &x, (&weight, &bias), eps, &mut out);
                    bits(&out)
                };
                let spec = run(Isa::Scalar, 1, 1e-5);
                for isa in Isa::available() {
                    for threads in [1, 3] {
                        assert_eq!(run(isa, threads, 1e-5), spec, "{isa}, {rows} rows of {n}, {threads} threads");
                    }
                }
                assert!(rows == 0 || n == 1 || run(Isa::best(), 1, 1e-3) != spec, "another epsilon must show");
                for r in 0..rows {
                    let row = &x[r * n..][..n];
                    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
                    let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n as f64;
                    for i in 0..n {
                        let unit = (f64::from(row[i]) - mean) / (variance + 1e-5).sqrt();
                        let want = unit * f64::from(weight[i]) + f64::from(bias[i]);
                        assert!((f64::from(f32::from_bits(spec[r * n + i])) - want).abs() < 1e-5);
                    }
                }
            }
        }
    }
}
