//! Rows of weights from one stored type to another.

use std::ops::Range;

use half::{bf16, f16};

use crate::scalar::{blocks, requantize};
use crate::{Isa, Matrix, MatrixBuilder, Pool, WeightType};

/// Why rows cannot be converted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// No conversion to that type.
    #[error("nothing is converted to {to}")]
    Type {
        /// The type.
        to: WeightType,
    },
    /// The rows are not whole blocks of both types, or `rows` is not whole rows.
    #[error("rows of {k} values are not whole blocks of {from} and {to}")]
    Blocks {
        /// Values of a row.
        k: usize,
        /// Type of the rows.
        from: WeightType,
        /// Type wanted.
        to: WeightType,
    },
    /// The importance is not a number for each value, at least 0.
    #[error("importance of {len} values came for rows of {k}, expected as many finite numbers, none of them below 0")]
    Importance {
        /// Numbers given.
        len: usize,
        /// Values of a row.
        k: usize,
    },
    /// A value that no block can hold.
    #[error("row {row} holds a value that is not finite, or too large for {to}")]
    Value {
        /// The row, from 0.
        row: usize,
        /// Type wanted.
        to: WeightType,
    },
}

impl WeightType {
    /// Whether [`convert_rows`] makes this type.
    pub const fn can_be_made(self) -> bool {
        !matches!(self, Self::MXFP4)
    }

    /// Whether [`convert_rows`] makes use of importance for this type.
    pub const fn heeds_importance(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::BF16 | Self::Q8_0 | Self::MXFP4)
    }

    /// Whether a scale is always searched for.
    const fn is_searched(self) -> bool {
        self.block_len() == 256 || matches!(self, Self::IQ4_NL)
    }
}

/// The least that the error of a value counts, beside the mean of its row: what a text does not need, another may.
const LEAST_IMPORTANCE: f64 = 1e-4;

/// Converts rows of `k` values, in parallel; `importance`, `[k]`, says how much the error of each value counts beside the others, where the
/// type heeds it.
///
/// A row's bytes depend on the row and the importance alone: not on the rows beside it, the threads or the machine. Floats are rounded to
/// nearest, halves to even.
///
/// # Errors
/// If nothing is converted to `to`, rows are not whole blocks, a value does not fit, or the importance is not one of such rows.
pub fn convert_rows(
    pool: &Pool,
    (from, to): (WeightType, WeightType),
    k: usize,
    rows: &[u8],
    importance: Option<&[f32]>,
) -> Result<Vec<u8>, ConvertError> {
    if !to.can_be_made() {
        return Err(ConvertError::Type { to });
    }
    let wrong = || ConvertError::Blocks { k, from, to };
    let (row, made) = from.row_bytes(k).zip(to.row_bytes(k)).filter(|&(row, made)| row > 0 && made > 0).ok_or_else(wrong)?;
    if !rows.len().is_multiple_of(row) {
        return Err(wrong());
    }
    let importance = match importance {
        Some(given) if given.len() != k || !given.iter().all(|v| v.is_finite() && *v >= 0.0) => {
            return Err(ConvertError::Importance { len: given.len(), k });
        }
        Some(given) => beside_the_mean(given),
        None => None,
    };
    let importance = importance.as_deref();
    let mut out = vec![0; rows.len() / row * made];
    pool.for_rows(&mut out, made, 1, |first, out| {
        let mut values = vec![0.0; k];
        for (i, out) in out.chunks_exact_mut(made).enumerate() {
            blocks::dequantize(from, &rows[(first + i) * row..(first + i + 1) * row], &mut values);
            encode(to, &values, importance, out);
        }
    });
    match out.chunks_exact(made).position(|row| !holds(to, row, k)) {
        Some(row) => Err(ConvertError::Value { row, to }),
        None => Ok(out),
    }
}

/// Some rows of a packed matrix in another type, packed too: what [`convert_rows`] makes of them without importance.
///
/// # Errors
/// If nothing is converted to `to`, rows are not whole blocks of it, or a value does not fit; [`ConvertError::Value`] counts from the first of
/// `rows`.
///
/// # Panics
/// If the matrix has no such rows.
pub fn convert_matrix(pool: &Pool, isa: Isa, matrix: &Matrix, rows: Range<usize>, to: WeightType) -> Result<Matrix, ConvertError> {
    if !to.can_be_made() {
        return Err(ConvertError::Type { to });
    }
    assert!(rows.start <= rows.end && rows.end <= matrix.rows(), "rows {rows:?} of {}", matrix.rows());
    let k = matrix.k();
    let wrong = ConvertError::Blocks { k, from: matrix.dtype(), to };
    let made = to.row_bytes(k).filter(|&made| made > 0).ok_or_else(|| wrong.clone())?;
    let mut builder = MatrixBuilder::new(isa, to, rows.len(), k).map_err(|_| wrong.clone())?;
    builder.fill(pool, |own, out| {
        let mut values = vec![0.0; k];
        for (row, out) in own.zip(out.chunks_exact_mut(made)) {
            matrix.row(rows.start + row, &mut values);
            encode(to, &values, None, out);
            if !holds(to, out, k) {
                return Err(ConvertError::Value { row, to });
            }
        }
        Ok(())
    })?;
    builder.finish().map_err(|_| wrong)
}

/// Importance as a part of the row's mean; `None` where nothing of the row has any.
fn beside_the_mean(given: &[f32]) -> Option<Vec<f32>> {
    let mean = given.iter().copied().map(f64::from).sum::<f64>() / given.len() as f64;
    (mean > 0.0).then(|| given.iter().map(|v| (f64::from(*v) / mean).max(LEAST_IMPORTANCE) as f32).collect())
}

/// The values of rows of `k` values.
///
/// # Panics
/// If `rows` is not whole rows.
pub fn dequantize_rows(dtype: WeightType, k: usize, rows: &[u8]) -> Vec<f32> {
    let row = dtype.row_bytes(k).filter(|&bytes| bytes > 0 && rows.len().is_multiple_of(bytes));
    let row = row.unwrap_or_else(|| panic!("{} bytes are not whole rows of {k} values of {dtype}", rows.len()));
    let mut values = vec![0.0; rows.len() / row * k];
    for (values, row) in values.chunks_exact_mut(k).zip(rows.chunks_exact(row)) {
        blocks::dequantize(dtype, row, values);
    }
    values
}

fn encode(to: WeightType, values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    match to {
        WeightType::F32 => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, v)| *out = v.to_le_bytes()),
        WeightType::F16 => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, v)| *out = f16::from_f32(*v).to_le_bytes()),
        WeightType::BF16 => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(out, v)| *out = bf16::from_f32(*v).to_le_bytes()),
        _ => {
            let len = to.block_len();
            for (b, (x, block)) in values.chunks_exact(len).zip(out.chunks_exact_mut(to.block_bytes())).enumerate() {
                // Past this, the squares of the search for a scale would overflow.
                let small = x.iter().all(|x| x.abs() <= f32::from(f16::MAX));
                if small || !to.is_searched() && x.iter().all(|x| x.is_finite()) {
                    let importance = importance.filter(|_| small).map(|given| &given[b * len..(b + 1) * len]);
                    requantize::quantize(to, x, importance, block);
                } else {
                    // Its scale is not a number, which `holds` sees.
                    block.fill(0xff);
                }
            }
        }
    }
}

/// Whether every number of a converted row is finite.
fn holds(to: WeightType, row: &[u8], k: usize) -> bool {
    let half = |block: &[u8], at: usize| blocks::half_at(block, at).is_finite();
    let mut all = row.chunks_exact(to.block_bytes());
    match to {
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => {
            let mut values = vec![0.0; k];
            blocks::dequantize(to, row, &mut values);
            values.iter().all(|v| v.is_finite())
        }
        WeightType::Q6_K => all.all(|block| half(block, 208)),
        WeightType::Q3_K => all.all(|block| half(block, 108)),
        WeightType::Q2_K => all.all(|block| half(block, 80) && half(block, 82)),
        WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => all.all(|block| half(block, 0) && half(block, 2)),
        _ => all.all(|block| half(block, 0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_packed_matrix_are_converted_as_rows_are() {
        let (pool, rows, k) = (Pool::new(2), 53, 256);
        let values: Vec<u8> = normal(rows * k, 0.5).iter().flat_map(|v| v.to_le_bytes()).collect();
        for isa in Isa::available() {
            for from in [WeightType::Q8_0, WeightType::Q6_K, WeightType::F16] {
                let stored = convert_rows(&pool, (WeightType::F32, from), k, &values, None).unwrap();
                let matrix = Matrix::pack(isa, from, rows, k, &stored, &pool).unwrap();
                let some = 7..41;
                let made = convert_matrix(&pool, isa, &matrix, some.clone(), WeightType::Q4_0).unwrap();
                let bytes = from.row_bytes(k).unwrap();
                let of_stored = &stored[some.start * bytes..some.end * bytes];
                let expected = convert_rows(&pool, (from, WeightType::Q4_0), k, of_stored, None).unwrap();
                let row = WeightType::Q4_0.row_bytes(k).unwrap();
                for (i, expected) in expected.chunks_exact(row).enumerate() {
                    made.with_stored_row(i, |stored| assert_eq!(stored, expected, "{from} {isa} row {i}"));
                }
                assert_eq!(
                    convert_matrix(&pool, isa, &matrix, some, WeightType::MXFP4).unwrap_err(),
                    ConvertError::Type { to: WeightType::MXFP4 }
                );
            }
        }
        let narrow = Matrix::pack(Isa::Scalar, WeightType::F32, 2, 40, &[0; 320], &pool).unwrap();
        let refused = convert_matrix(&pool, Isa::Scalar, &narrow, 0..2, WeightType::Q4_0).unwrap_err();
        assert_eq!(refused, ConvertError::Blocks { k: 40, from: WeightType::F32, to: WeightType::Q4_0 });
        let large = [f32::MAX; 64].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let large = Matrix::pack(Isa::Scalar, WeightType::F32, 2, 32, &large, &pool).unwrap();
        let refused = convert_matrix(&pool, Isa::Scalar, &large, 1..2, WeightType::Q4_0).unwrap_err();
        assert_eq!(refused, ConvertError::Value { row: 0, to: WeightType::Q4_0 });
    }

    fn normal(n: usize, size: f32) -> Vec<f32> {
        let mut state = 5_u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * size).collect()
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    /// Root of the mean square of the error, by that of the values.
    fn error(to: WeightType, x: &[f32], importance: Option<&[f32]>) -> f32 {
        let pool = Pool::new(2);
        let made = convert_rows(&pool, (WeightType::F32, to), importance.map_or(512, <[f32]>::len), &bytes(x), importance).unwrap();
        let got = dequantize_rows(to, 512, &made);
        let weight = |i: usize| importance.map_or(1.0, |given| given[i % given.len()]);
        let off: f32 = got.iter().zip(x).enumerate().map(|(i, (a, b))| weight(i) * (a - b) * (a - b)).sum();
        (off / x.iter().enumerate().map(|(i, x)| weight(i) * x * x).sum::<f32>()).sqrt()
    }

    #[test]
    fn conversion_loses_what_the_bits_cannot_hold() {
        let x = normal(8 * 512, 0.02);
        let most = [
            (WeightType::F32, 0.0),
            (WeightType::F16, 4e-4),
            (WeightType::BF16, 3e-3),
            (WeightType::Q8_0, 7e-3),
            (WeightType::Q6_K, 2.1e-2),
            (WeightType::Q5_1, 4.4e-2),
            (WeightType::Q5_K, 4.3e-2),
            (WeightType::Q5_0, 5e-2),
            (WeightType::Q4_K, 8.5e-2),
            (WeightType::Q4_1, 9.3e-2),
            (WeightType::IQ4_NL, 9e-2),
            (WeightType::Q4_0, 0.11),
            (WeightType::Q3_K, 0.19),
            (WeightType::Q2_K, 0.33),
        ];
        for (to, most) in most {
            let off = error(to, &x, None);
            assert!(off <= most && off >= most / 2.5, "{to}: {off}, expected about {most}");
        }
    }

    #[test]
    fn importance_moves_the_error_to_where_it_counts_less() {
        let x = normal(8 * 512, 0.02);
        let importance: Vec<f32> = (0..512).map(|i| if i % 4 == 0 { 3e4 } else { 1e2 }).collect();
        for to in WeightType::ALL.into_iter().filter(|to| to.heeds_importance()) {
            let made = |given: Option<&[f32]>| convert_rows(&Pool::new(1), (WeightType::F32, to), 512, &bytes(&x), given).unwrap();
            let counted = |made: &[u8]| {
                let got = dequantize_rows(to, 512, made);
                got.iter().zip(&x).enumerate().map(|(i, (a, b))| f64::from(importance[i % 512] * (a - b) * (a - b))).sum::<f64>()
            };
            let (with, without) = (counted(&made(Some(&importance))), counted(&made(None)));
            assert!(with < without, "{to}: {with}, without {without}");
            // Control: importance of other columns does not help. (Without any, some types are made in the plainest way, which a search betters.)
            let others: Vec<f32> = (0..512).map(|i| if i % 4 == 1 { 3e4 } else { 1e2 }).collect();
            let misled = counted(&made(Some(&others)));
            assert!(misled > with, "{to}: {misled}, with its own {with}");
            if !matches!(to, WeightType::Q4_1 | WeightType::Q5_1) {
                assert!(misled > without, "{to}: {misled}, without {without}");
            }
            // It is how they stand beside each other that counts, and where none has any it is as if nothing were known.
            let scaled: Vec<f32> = importance.iter().map(|v| v * 2.0_f32.powi(60)).collect();
            assert!(made(Some(&scaled)) == made(Some(&importance)), "{to}");
            assert!(made(Some(&[0.0; 512])) == made(None), "{to}");
        }
        for to in [WeightType::Q8_0, WeightType::F16] {
            let made = |given: Option<&[f32]>| convert_rows(&Pool::new(1), (WeightType::F32, to), 512, &bytes(&x), given).unwrap();
            assert!(made(Some(&importance)) == made(None), "{to}");
        }
    }

    #[test]
    fn blocks_bear_any_importance() {
        let mut x = normal(2 * 512, 1.0);
        x[..32].fill(0.0);
        x[32..64].fill(0.25);
        x[64..96].copy_from_slice(&[6e4; 32]);
        let near = |to: WeightType, made: &[u8]| {
            let got = dequantize_rows(to, 512, made);
            got.chunks(256).zip(x.chunks(256)).all(|(got, x)| {
                let peak = x.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
                got.iter().all(|value| value.abs() <= 1.5 * peak)
            })
        };
        for importance in [[f32::MAX; 512], [f32::MIN_POSITIVE / 2.0; 512], std::array::from_fn(|i| if i == 77 { f32::MAX } else { 0.0 })] {
            for to in WeightType::ALL.into_iter().filter(|to| to.heeds_importance()) {
                let made = convert_rows(&Pool::new(1), (WeightType::F32, to), 512, &bytes(&x), Some(&importance)).unwrap();
                assert!(near(to, &made), "{to}");
            }
        }
    }

    #[test]
    fn importance_of_other_rows_is_refused() {
        let row = bytes(&[0.5; 512]);
        let made = |given: &[f32]| convert_rows(&Pool::new(1), (WeightType::F32, WeightType::Q4_K), 512, &row, Some(given));
        assert_eq!(made(&[1.0; 256]), Err(ConvertError::Importance { len: 256, k: 512 }));
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let mut given = [1.0; 512];
            given[100] = bad;
            assert_eq!(made(&given), Err(ConvertError::Importance { len: 512, k: 512 }));
        }
        assert!(made(&[1.0; 512]).is_ok());
    }

    #[test]
    fn rows_do_not_depend_on_pieces_or_threads() {
        let x = bytes(&normal(9 * 512, 1.0));
        let importance: Vec<f32> = normal(512, 3.0).iter().map(|v| v * v).collect();
        for to in WeightType::ALL.into_iter().filter(|to| to.can_be_made()) {
            for given in [Some(&importance[..]), None] {
                let made = |threads, rows: &[u8]| convert_rows(&Pool::new(threads), (WeightType::F32, to), 512, rows, given).unwrap();
                let pieces: Vec<u8> = x.chunks(4 * 512 * 2).flat_map(|rows| made(1, rows)).collect();
                assert!(made(3, &x) == pieces, "{to}");
            }
            let whole = convert_rows(&Pool::new(3), (WeightType::F32, to), 512, &x, None).unwrap();
            // What is already so stays so, where the type's own values are what it makes of them.
            if matches!(to, WeightType::F32 | WeightType::F16 | WeightType::BF16) {
                assert!(convert_rows(&Pool::new(1), (to, to), 512, &whole, None).unwrap() == whole);
            }
        }
    }

    #[test]
    fn what_no_block_can_hold_is_refused() {
        let pool = Pool::new(1);
        for to in WeightType::ALL.into_iter().filter(|to| to.can_be_made()) {
            for (at, bad) in [(0, f32::NAN), (300, f32::INFINITY), (511, -1e38)] {
                let mut x = vec![0.5; 1024];
                x[512 + at] = bad;
                let made = convert_rows(&pool, (WeightType::F32, to), 512, &bytes(&x), None);
                let fits = bad == -1e38 && matches!(to, WeightType::F32 | WeightType::BF16);
                assert_eq!(made.is_err(), !fits, "{to} {bad}");
                assert!(fits || made == Err(ConvertError::Value { row: 1, to }));
            }
            assert!(convert_rows(&pool, (WeightType::F32, to), 512, &bytes(&[0.0; 512]), None).is_ok());
        }
        let to = WeightType::MXFP4;
        assert_eq!(convert_rows(&pool, (WeightType::F32, to), 256, &[], None), Err(ConvertError::Type { to }));
        assert!(convert_rows(&pool, (WeightType::F32, WeightType::Q4_K), 32, &[0; 128], None).is_err());
    }
}
