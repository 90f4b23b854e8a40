//! Products on every instruction set, for sizes around every border the kernels have.

use crate::inputs::{Kind, activations, weights};
use crate::vector_isas;
use kernels::{Input, Isa, Matrix, Pool, Product, Quantized, WeightType, matmul, matmul_group};
use std::ops::Range;

struct Case<'a> {
    dtype: WeightType,
    rows: usize,
    k: usize,
    stored: &'a [u8],
    tokens: usize,
    x: &'a [f32],
}

impl Case<'_> {
    /// The product on `isa`, the matrix packed for `packed`.
    fn product(&self, pool: &Pool, packed: Isa, isa: Isa, rows: Range<usize>) -> Vec<u32> {
        let matrix = Matrix::pack(packed, self.dtype, self.rows, self.k, self.stored, pool).unwrap();
        let mut out = vec![f32::NAN; self.tokens * rows.len()];
        match matrix.activation_block() {
            None => matmul(pool, isa, &matrix, rows, Input::F32(self.x), self.tokens, &mut out),
            Some(block) => {
                let mut x = Quantized::new(block);
                x.quantize(pool, isa, self.x, self.tokens, self.k);
                matmul(pool, isa, &matrix, rows, Input::Quantized(&x), self.tokens, &mut out);
            }
        }
        out.into_iter().map(f32::to_bits).collect()
    }
}

fn ks(dtype: WeightType) -> Vec<usize> {
    match dtype.activation_block() {
        None => vec![1, 15, 16, 17, 32, 100],
        Some(32) => vec![32, 64, 96, 640],
        Some(block) => vec![block, 3 * block],
    }
}

#[test]
fn vector_products_equal_scalar_bit_for_bit() {
    let pools: Vec<Pool> = (1..=3).map(Pool::new).collect();
    let isas = vector_isas();
    for dtype in WeightType::ALL {
        for kind in Kind::ALL {
            for k in ks(dtype) {
                for rows in [0, 1, 15, 16, 17, 33] {
                    let tokens: &[usize] =
                        if rows == 17 { &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 25, 31, 33, 34, 48, 70] } else { &[1, 7, 13] };
                    let stored = weights(dtype, kind, rows, k, (rows * k) as u64);
                    for &tokens in tokens {
                        let x = activations(kind, tokens, k, (tokens + k) as u64);
                        let case = Case { dtype, rows, k, stored: &stored, tokens, x: &x };
                        let expected = case.product(&pools[0], Isa::Scalar, Isa::Scalar, 0..rows);
                        for &isa in &isas {
                            let pool = &pools[(rows + tokens) % 3];
                            let got = case.product(pool, isa, isa, 0..rows);
                            assert!(got == expected, "{dtype} {kind:?} [{rows}, {k}] × {tokens} on {isa}, {} threads", pool.threads());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_changed_weight_or_input_changes_the_bits() {
    let pool = Pool::new(1);
    for dtype in WeightType::ALL {
        let (rows, k, tokens) = (17, 512, 2);
        let stored = weights(dtype, Kind::Ordinary, rows, k, 7);
        let x = activations(Kind::Ordinary, tokens, k, 7);
        for isa in Isa::available() {
            let case = Case { dtype, rows, k, stored: &stored, tokens, x: &x };
            let expected = case.product(&pool, isa, isa, 0..rows);
            let mut other = stored.clone();
            let at = other.len() - 30;
            other[at] ^= 0x11;
            assert_ne!(Case { stored: &other, ..case }.product(&pool, isa, isa, 0..rows), expected, "{dtype} on {isa}");
            let mut other = x.clone();
            other[k + 3] += 0.1;
            assert_ne!(Case { x: &other, ..case }.product(&pool, isa, isa, 0..rows), expected, "{dtype} on {isa}");
        }
    }
}

#[test]
fn rows_are_independent_of_range_packing_and_group() {
    let pool = Pool::new(3);
    for dtype in WeightType::ALL {
        let (rows, k, tokens) = (70, 256, 5);
        let stored = weights(dtype, Kind::Ordinary, rows, k, 3);
        let x = activations(Kind::Ordinary, tokens, k, 3);
        let case = Case { dtype, rows, k, stored: &stored, tokens, x: &x };
        let whole = case.product(&pool, Isa::Scalar, Isa::Scalar, 0..rows);
        for isa in Isa::available() {
            for packed in Isa::available() {
                for range in [0..70, 3..4, 5..37, 16..48, 69..70, 33..33] {
                    let expected: Vec<u32> =
                        (0..tokens).flat_map(|token| whole[token * rows + range.start..token * rows + range.end].to_vec()).collect();
                    assert!(
                        case.product(&pool, packed, isa, range.clone()) == expected,
                        "{dtype} rows {range:?} on {isa} packed for {packed}"
                    );
                }
            }
            let matrix = Matrix::pack(isa, dtype, rows, k, &stored, &pool).unwrap();
            let mut quantized = Quantized::new(matrix.activation_block().unwrap_or(32));
            quantized.quantize(&pool, isa, &x, tokens, k);
            let input = if matrix.activation_block().is_some() { Input::Quantized(&quantized) } else { Input::F32(&x) };
            let (mut all, mut some) = (vec![0.0; tokens * rows], vec![0.0; tokens * 20]);
            let mut products =
                [Product { weights: &matrix, rows: 0..rows, out: &mut all }, Product { weights: &matrix, rows: 7..27, out: &mut some }];
            matmul_group(&pool, isa, &mut products, input, tokens);
            assert!(all.iter().zip(&whole).all(|(a, b)| a.to_bits() == *b));
            assert!((0..tokens).all(|t| some[t * 20..(t + 1) * 20] == all[t * rows + 7..t * rows + 27]));
        }
    }
}

#[test]
fn products_are_close_to_those_of_the_dequantized_rows() {
    let pool = Pool::new(1);
    for dtype in WeightType::ALL {
        let (rows, k, isa) = (16, 1024, Isa::best());
        let stored = weights(dtype, Kind::Ordinary, rows, k, 11);
        let x = activations(Kind::Ordinary, 1, k, 11);
        let got = Case { dtype, rows, k, stored: &stored, tokens: 1, x: &x }.product(&pool, isa, isa, 0..rows);
        let matrix = Matrix::pack(isa, dtype, rows, k, &stored, &pool).unwrap();
        let plain = Matrix::pack(Isa::Scalar, dtype, rows, k, &stored, &pool).unwrap();
        for (r, got) in got.into_iter().map(f32::from_bits).enumerate() {
            let (mut row, mut other) = (vec![0.0; k], vec![0.0; k]);
            matrix.row(r, &mut row);
            plain.row(r, &mut other);
            assert_eq!(row, other);
            let exact: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let size: f64 = row.iter().zip(&x).map(|(w, x)| (f64::from(*w) * f64::from(*x)).powi(2)).sum::<f64>().sqrt();
            assert!((f64::from(got) - exact).abs() < 0.05 * size, "{dtype} row {r}: {got} for {exact}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let pool = Pool::new(1);
    let isa = Isa::best();
    let matrix = Matrix::pack(isa, WeightType::Q8_0, 16, 32, &[0; 16 * 34], &pool).unwrap();
    let refused = |input: Input<'_>, rows: Range<usize>, len: usize| {
        let mut out = vec![0.0; len];
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| matmul(&pool, isa, &matrix, rows, input, 1, &mut out))).is_err()
    };
    let quantized = |block: usize, k: usize| {
        let mut x = Quantized::new(block);
        x.quantize(&pool, isa, &vec![1.0; k], 1, k);
        x
    };
    assert!(!refused(Input::Quantized(&quantized(32, 32)), 0..16, 16));
    assert!(refused(Input::Quantized(&quantized(32, 64)), 0..16, 16));
    assert!(refused(Input::Quantized(&quantized(256, 256)), 0..16, 16));
    assert!(refused(Input::F32(&[1.0; 32]), 0..16, 16));
    assert!(refused(Input::Quantized(&quantized(32, 32)), 0..17, 17));
    assert!(refused(Input::Quantized(&quantized(32, 32)), 0..16, 15));
}
