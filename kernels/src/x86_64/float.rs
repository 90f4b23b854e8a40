//! Dot products of float rows with f32 inputs: four rows and up to three or four columns at a time, 16 lanes each.
#![expect(unsafe_code, reason = "vector instructions and loads by pointer")]

use std::arch::x86_64::*;

use crate::scalar::blocks;
use crate::scalar::dot::fold;
use crate::{Avx2, Avx512, WeightType};

/// The 16 partial sums of `R` rows and `C` columns.
type Lanes<const R: usize, const C: usize> = [[[f32; 16]; C]; R];

/// Dot products of `rows` (up to 4 stored rows of `k` values) with columns `x`, `[columns, k]`: calls `store(row, column, result)`.
pub(crate) fn multiply512(_: Avx512, dtype: WeightType, rows: &[&[u8]], k: usize, x: &[f32], store: impl FnMut(usize, usize, f32)) {
    // SAFETY: the token proves the features; `tiles` checks the lengths.
    tiles(dtype, rows, k, x, store, |lanes, tile| unsafe { lanes512(lanes, tile) });
}

/// As [`multiply512`], in 256-bit vectors.
pub(crate) fn multiply256(_: Avx2, dtype: WeightType, rows: &[&[u8]], k: usize, x: &[f32], store: impl FnMut(usize, usize, f32)) {
    // SAFETY: the token proves the features; `tiles` checks the lengths.
    tiles(dtype, rows, k, x, store, |lanes, tile| unsafe { lanes256(lanes, tile) });
}

/// Rows and columns of a tile.
const R: usize = 4;
const C: usize = 4;

/// Pointers to whole runs of 16 values; missing rows and columns repeat the first.
struct Tile {
    dtype: WeightType,
    rows: [*const u8; R],
    columns: [*const f32; C],
    /// Runs of 16 values.
    runs: usize,
    /// Bytes from a row to where the rows after these are.
    next: usize,
    /// Whether only the first column counts.
    single: bool,
}

fn tiles(
    dtype: WeightType,
    rows: &[&[u8]],
    k: usize,
    x: &[f32],
    mut store: impl FnMut(usize, usize, f32),
    compute: impl Fn(&mut Lanes<R, C>, &Tile),
) {
    let Some(row_bytes) = dtype.row_bytes(k) else { return };
    assert!(!rows.is_empty() && rows.len() <= R && rows.iter().all(|row| row.len() == row_bytes));
    if k == 0 {
        return;
    }
    let tail = k / 16 * 16;
    let mut weights = [0.0; 16];
    for (group, columns) in x.chunks(C * k).enumerate() {
        let n = columns.len() / k;
        let column = |c: usize| &columns[c * k..(c + 1) * k];
        let tile = Tile {
            dtype,
            rows: std::array::from_fn(|r| rows[if r < rows.len() { r } else { 0 }].as_ptr()),
            columns: std::array::from_fn(|c| column(if c < n { c } else { 0 }).as_ptr()),
            runs: k / 16,
            next: R * row_bytes,
            single: n == 1,
        };
        let mut lanes = [[[0.0; 16]; C]; R];
        compute(&mut lanes, &tile);
        for (r, row) in rows.iter().enumerate() {
            if tail < k {
                blocks::floats(dtype, &row[dtype.block_bytes() * tail..], &mut weights[..k - tail]);
            }
            for c in 0..n {
                let mut lanes = lanes[r][c];
                for ((lane, w), x) in lanes.iter_mut().zip(&weights[..k - tail]).zip(&column(c)[tail..]) {
                    *lane = w.mul_add(*x, *lane);
                }
                store(r, group * C + c, fold(lanes));
            }
        }
    }
}

/// Eight weights from position `i` on.
#[inline(always)]
unsafe fn eight(dtype: WeightType, row: *const u8, i: usize) -> __m256 {
    // SAFETY: the caller's row has them.
    unsafe {
        match dtype {
            WeightType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(row.add(2 * i).cast())),
            WeightType::BF16 => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(row.add(2 * i).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
            _ => _mm256_loadu_ps(row.add(4 * i).cast()),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lanes256(lanes: &mut Lanes<R, C>, tile: &Tile) {
    // SAFETY: the pointers lead to `runs` whole runs, as `tiles` made them.
    unsafe {
        for half in 0..2 {
            // Two rows at a time: 8 sums, 2 weights, an input.
            for pair in 0..R / 2 {
                let mut acc = [[_mm256_setzero_ps(); C]; 2];
                let columns = if tile.single { 1 } else { C };
                for run in 0..tile.runs {
                    let at = 16 * run + 8 * half;
                    let w = [eight(tile.dtype, tile.rows[2 * pair], at), eight(tile.dtype, tile.rows[2 * pair + 1], at)];
                    if tile.single {
                        if half == 0 {
                            for row in &tile.rows[2 * pair..2 * pair + 2] {
                                _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(tile.next + tile.dtype.block_bytes() * at).cast());
                            }
                        }
                        let x = _mm256_loadu_ps(tile.columns[0].add(at));
                        acc[0][0] = _mm256_fmadd_ps(w[0], x, acc[0][0]);
                        acc[1][0] = _mm256_fmadd_ps(w[1], x, acc[1][0]);
                    } else {
                        for c in 0..C {
                            let x = _mm256_loadu_ps(tile.columns[c].add(at));
                            acc[0][c] = _mm256_fmadd_ps(w[0], x, acc[0][c]);
                            acc[1][c] = _mm256_fmadd_ps(w[1], x, acc[1][c]);
                        }
                    }
                }
                for c in 0..columns {
                    for r in 0..2 {
                        _mm256_storeu_ps(lanes[2 * pair + r][c][8 * half..].as_mut_ptr(), acc[r][c]);
                    }
                }
            }
        }
    }
}

/// Sixteen weights from position `i` on.
#[inline(always)]
unsafe fn sixteen(dtype: WeightType, row: *const u8, i: usize) -> __m512 {
    // SAFETY: the caller's row has them.
    unsafe {
        match dtype {
            WeightType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(row.add(2 * i).cast())),
            WeightType::BF16 => {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(row.add(2 * i).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
            _ => _mm512_loadu_ps(row.add(4 * i).cast()),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn lanes512(lanes: &mut Lanes<R, C>, tile: &Tile) {
    // SAFETY: the pointers lead to `runs` whole runs, as `tiles` made them.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); C]; R];
        for run in 0..tile.runs {
            let at = 16 * run;
            if tile.single {
                let x = _mm512_loadu_ps(tile.columns[0].add(at));
                for r in 0..R {
                    _mm_prefetch::<_MM_HINT_T1>(tile.rows[r].wrapping_add(tile.next + tile.dtype.block_bytes() * at).cast());
                    acc[r][0] = _mm512_fmadd_ps(sixteen(tile.dtype, tile.rows[r], at), x, acc[r][0]);
                }
            } else {
                let x: [__m512; C] = std::array::from_fn(|c| _mm512_loadu_ps(tile.columns[c].add(at)));
                for r in 0..R {
                    let w = sixteen(tile.dtype, tile.rows[r], at);
                    for c in 0..C {
                        acc[r][c] = _mm512_fmadd_ps(w, x[c], acc[r][c]);
                    }
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                _mm512_storeu_ps(lanes[r][c].as_mut_ptr(), acc[r][c]);
            }
        }
    }
}
