//! One vector of a whole sequence's hidden states.

use crate::{
    Isa,
    simd::{Kernel, LANES, Simd, vectorize},
};

/// Shorter vectors than this are divided by it instead of their length, as PyTorch's `normalize` does.
const LEAST_LENGTH: f32 = 1e-12;

/// The mean of the rows of `x`, `[rows, out.len()]`: each value is a sum in the order of rows, begun at 0, divided by their number.
///
/// # Panics
/// If `x` is not at least one whole row.
pub fn mean(isa: Isa, x: &[f32], out: &mut [f32]) {
    let width = out.len();
    assert!(width > 0 && !x.is_empty() && x.len().is_multiple_of(width), "{} values are not whole rows of {width}", x.len());
    vectorize(isa, Mean(x, out));
}

/// Divides `x` by its Euclidean length, or by 1e-12 where that is more. The sum of squares runs in 16 lanes of fused multiply-adds, folded in
/// a fixed order.
pub fn normalize(isa: Isa, x: &mut [f32]) {
    vectorize(isa, Normalize(x));
}

struct Mean<'a>(&'a [f32], &'a mut [f32]);

impl Kernel for Mean<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(x, out) = self;
        let width = out.len();
        let count = s.splat((x.len() / width) as f32);
        let (chunks, tail) = out.as_chunks_mut::<LANES>();
        for (i, chunk) in chunks.iter_mut().enumerate() {
            let mut sum = s.splat(0.0);
            for row in x.chunks_exact(width) {
                sum = s.add(sum, s.load(&row.as_chunks::<LANES>().0[i]));
            }
            s.store(chunk, s.div(sum, count));
        }
        if !tail.is_empty() {
            let mut sum = s.splat(0.0);
            for row in x.chunks_exact(width) {
                sum = s.add(sum, s.load_part(row.as_chunks::<LANES>().1));
            }
            s.store_part(tail, s.div(sum, count));
        }
    }
}

struct Normalize<'a>(&'a mut [f32]);

impl Kernel for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (chunks, tail) = self.0.as_chunks_mut::<LANES>();
        let mut squares = s.splat(0.0);
        for chunk in chunks.iter() {
            let x = s.load(chunk);
            squares = s.fma(x, x, squares);
        }
        let last = s.load_part(tail);
        squares = s.fma(last, last, squares);
        let length = s.fold_add(squares).sqrt();
        let length = s.splat(if length > LEAST_LENGTH { length } else { LEAST_LENGTH });
        for chunk in chunks {
            let unit = s.div(s.load(chunk), length);
            s.store(chunk, unit);
        }
        s.store_part(tail, s.div(last, length));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, noise};

    #[test]
    fn every_isa_gives_the_specified_bits() {
        for width in [1, 15, 16, 17, 40, 384] {
            for rows in [1, 2, 7, 130] {
                let x = noise(1, rows * width);
                let run = |isa| {
                    let mut out = vec![f32::NAN; width];
                    mean(isa, &x, &mut out);
                    let means = bits(&out);
                    normalize(isa, &mut out);
                    (means, bits(&out))
                };
                let spec = run(Isa::Scalar);
                for isa in Isa::available() {
                    assert_eq!(run(isa), spec, "{isa}, {rows} rows of {width}");
                }
                let value = |raw: u32| f64::from(f32::from_bits(raw));
                for (i, &got) in spec.0.iter().enumerate() {
                    let want = x.iter().skip(i).step_by(width).map(|&x| f64::from(x)).sum::<f64>() / rows as f64;
                    assert!((value(got) - want).abs() < 1e-5);
                }
                let length = spec.1.iter().map(|&x| value(x).powi(2)).sum::<f64>();
                assert!((length - 1.0).abs() < 1e-6, "length {length}");
            }
        }
        let mut nothing = [0.0; 3];
        normalize(Isa::Scalar, &mut nothing);
        assert_eq!(nothing, [0.0; 3]);
    }
}
