//! Products of tiles with panels by the matrix unit, which sums 8-bit products of 16 rows, up to 16 columns and 64 values of k at once; all
//! else in 512-bit vectors.
//!
//! Its sums of a panel lie as the vectors': a row of 16 lanes for each column. Q8_0 is multiplied as it is stored; other weights are expanded
//! for it. In blocks of 32, to signed bytes. In blocks of 256, to their products with the scales of their runs, so that a block has one sum: a
//! product fits into 16 bits, whose low and high bytes are planes of their own. That is exact: 256 · 255 · 127 and 256 · 16 · 127 · 256 are
//! below 2^31.
#![expect(unsafe_code, reason = "instructions of the matrix unit and of vectors, and loads by pointer")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use crate::layout::{LINE, Layout, ROWS};
use crate::matmul::{Results, Tiles};
use crate::quantized::{Panel, WIDE_PANEL};
use crate::{Amx, WeightType};

use super::avx512::{Exponent, Front, Iq4, Mx4, Plain, Q2K, Q3K, Q4, Q4K, Q5, Q5K, Q6K, Weights256, WithMin, expand32, group, halves};
use super::{PageAhead, ask_ahead};

/// Tile kernels of the matrix unit, for panels whose values lie token after token.
pub(crate) struct AmxTiles(pub(crate) Amx);

/// Lines of 64 bytes of a block of 256, in each of its two planes.
const PLANE: usize = 64 * LINE;

/// Calls a kernel with its last generic argument, the number of columns, made a constant.
macro_rules! by_columns {
    ($n:expr, $kernel:ident::<$($generic:tt),+>$arguments:tt) => {
        by_columns!(@ $n, $kernel, ($($generic),+), $arguments, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16)
    };
    (@ $n:expr, $kernel:ident, $generics:tt, $arguments:tt, $($columns:literal)+) => {
        match $n {
            $($columns => by_columns!(@@ $kernel, $generics, $columns, $arguments),)+
            _ => unreachable!("panels hold 1 to 16 tokens"),
        }
    };
    (@@ $kernel:ident, ($($generic:tt),+), $columns:literal, $arguments:tt) => { $kernel::<$($generic,)+ $columns>$arguments };
}

impl Tiles for AmxTiles {
    type Ready = Unit;

    fn expanded_bytes(&self, layout: &Layout) -> usize {
        let planes = match layout.dtype {
            WeightType::Q8_0 => 0,
            dtype if dtype.block_len() == 256 => 2,
            _ => 1,
        };
        layout.blocks * layout.dtype.block_len() * ROWS * planes
    }

    fn wants_expanded(&self, _layout: &Layout, _panels: usize, _columns: usize) -> bool {
        true
    }

    fn expand(&self, layout: &Layout, tile: &[u8], out: &mut [u8]) {
        assert!(tile.len() == layout.tile() && out.len() == self.expanded_bytes(layout));
        let (body, blocks, out) = (tile[layout.front..].as_ptr(), layout.blocks, out.as_mut_ptr());
        // SAFETY: the token proves the features; the lengths were checked, and every line read or written lies in a block of `tile` or `out`.
        unsafe {
            match layout.dtype {
                WeightType::Q4_0 => expand32::<Q4, PageAhead, 8>(body, blocks, out),
                WeightType::Q4_1 => expand32::<Q4, PageAhead, 0>(body, blocks, out),
                WeightType::Q5_0 => expand32::<Q5, PageAhead, 16>(body, blocks, out),
                WeightType::Q5_1 => expand32::<Q5, PageAhead, 0>(body, blocks, out),
                WeightType::IQ4_NL => expand32::<Iq4, PageAhead, 128>(body, blocks, out),
                WeightType::MXFP4 => expand32::<Mx4, PageAhead, 128>(body, blocks, out),
                WeightType::Q2_K => expand256::<Q2K>(body, blocks, out),
                WeightType::Q3_K => expand256::<Q3K>(body, blocks, out),
                WeightType::Q4_K => expand256::<Q4K>(body, blocks, out),
                WeightType::Q5_K => expand256::<Q5K>(body, blocks, out),
                WeightType::Q6_K => expand256::<Q6K>(body, blocks, out),
                WeightType::Q8_0 => {}
                WeightType::F32 | WeightType::F16 | WeightType::BF16 => unreachable!("float weights have no tiles"),
            }
        }
    }

    fn ready(&self, layout: &Layout, columns: usize) -> Unit {
        Unit::new(self.0, columns, layout.dtype.block_len().min(64))
    }

    fn multiply(&self, unit: &Unit, layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
        let expanded = expanded.unwrap_or_default();
        let k = layout.blocks * layout.dtype.block_len();
        assert!(tile.len() == layout.tile() && expanded.len() == self.expanded_bytes(layout) && panel.q.len() == panel.n * k);
        assert!((unit.columns, unit.k) == (panel.n, layout.dtype.block_len().min(64)));
        // The other parts of a panel have the sizes that belong to `q`: `Quantized` sees to that.
        let (n, blocks, front, body, bytes) = (panel.n, layout.blocks, tile.as_ptr(), tile[layout.front..].as_ptr(), expanded.as_ptr());
        // SAFETY: the token proves the features, the unit is set up for this panel, and the lengths were checked above; a block of the tile, of
        // the expanded tile and of the panel is read for each of `layout.blocks`.
        unsafe {
            match layout.dtype {
                WeightType::Q8_0 => by_columns!(n, tile32::<Plain, true>(front, body, blocks, panel, out)),
                WeightType::Q4_0 | WeightType::Q5_0 | WeightType::IQ4_NL => {
                    by_columns!(n, tile32::<Plain, false>(front, bytes, blocks, panel, out));
                }
                WeightType::Q4_1 | WeightType::Q5_1 => by_columns!(n, tile32::<WithMin, false>(front, bytes, blocks, panel, out)),
                WeightType::MXFP4 => by_columns!(n, tile32::<Exponent, false>(front, bytes, blocks, panel, out)),
                WeightType::Q2_K => by_columns!(n, tile256::<Q2K>(front, body, bytes, blocks, panel, out)),
                WeightType::Q3_K => by_columns!(n, tile256::<Q3K>(front, body, bytes, blocks, panel, out)),
                WeightType::Q4_K => by_columns!(n, tile256::<Q4K>(front, body, bytes, blocks, panel, out)),
                WeightType::Q5_K => by_columns!(n, tile256::<Q5K>(front, body, bytes, blocks, panel, out)),
                WeightType::Q6_K => by_columns!(n, tile256::<Q6K>(front, body, bytes, blocks, panel, out)),
                WeightType::F32 | WeightType::F16 | WeightType::BF16 => unreachable!("float weights have no tiles"),
            }
        }
    }
}

/// The unit, set up in this thread: registers 0, 1, 5 and 6 for sums `[columns, 16]`, 2 for activations `[columns, k]`, 3 and 4 for weights
/// `[k / 4, 16, 4]`. Given back when dropped, so that nothing of it is saved when threads change.
///
/// The compiler knows nothing of these registers and puts nothing there, so that their content lives from one `asm!` to the next.
pub(crate) struct Unit {
    columns: usize,
    k: usize,
    /// Of this thread.
    thread: PhantomData<*const ()>,
}

/// What `ldtilecfg` reads: the table of palette 1, bytes of a row and rows by register.
#[repr(C, align(64))]
#[derive(Default)]
struct Config {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Unit {
    fn new(_: Amx, columns: usize, k: usize) -> Self {
        assert!((1..=ROWS).contains(&columns) && (k == 32 || k == 64));
        let (n, lines) = (columns as u8, (k / 4) as u8);
        let mut config = Config { palette: 1, ..Config::default() };
        let (sums, weights) = ((n, 64), (lines, 64));
        for (register, (rows, row_bytes)) in [sums, sums, (n, k as u16), weights, weights, sums, sums].into_iter().enumerate() {
            (config.rows[register], config.row_bytes[register]) = (rows, row_bytes);
        }
        // SAFETY: the token proves that the CPU has the unit and the process may use it; the table is one that it takes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        Self { columns, k, thread: PhantomData }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: there is a unit, since this was made.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Sums of a panel, row by row of 16 lanes; as many rows as were stored.
#[repr(C, align(64))]
struct Sums(MaybeUninit<[i32; WIDE_PANEL * ROWS]>);

impl Sums {
    const NONE: Self = Self(MaybeUninit::uninit());

    /// The lanes of column `c`.
    #[inline(always)]
    unsafe fn column(&self, c: usize) -> __m512i {
        // SAFETY: the caller's: the column was stored.
        unsafe { _mm512_load_si512(self.0.as_ptr().cast::<__m512i>().add(c)) }
    }
}

/// `sums`: of the columns of 32 values at `rows` with eight lines, of signed or unsigned bytes.
#[inline(always)]
unsafe fn block32<const UNSIGNED: bool>(rows: *const i8, lines: *const u8, sums: &mut Sums) {
    // SAFETY: the caller's promise: the unit is set up for columns of 32 values, and reads and writes as much.
    unsafe {
        macro_rules! multiply {
            ($product:literal) => {
                asm!(
                    "tilezero tmm0",
                    "tileloadd tmm2, [{rows} + {k}]",
                    "tileloadd tmm3, [{lines} + {line}]",
                    $product,
                    "tilestored [{sums} + {line}], tmm0",
                    rows = in(reg) rows, k = in(reg) 32_usize, lines = in(reg) lines, line = in(reg) LINE, sums = in(reg) sums,
                    options(nostack, preserves_flags),
                )
            };
        }
        if UNSIGNED { multiply!("tdpbsud tmm0, tmm2, tmm3") } else { multiply!("tdpbssd tmm0, tmm2, tmm3") }
    }
}

/// `low` and `high`: of the columns of 256 values at `rows` with the planes at `planes`.
#[inline(always)]
unsafe fn block256(rows: *const i8, planes: *const u8, low: &mut Sums, high: &mut Sums) {
    // SAFETY: the caller's promise: the unit is set up for columns of 64 values, and reads and writes as much.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, preserves_flags));
        for part in 0..4 {
            let (rows, lines) = (rows.add(64 * part), planes.add(16 * LINE * part));
            asm!(
                "tileloadd tmm2, [{rows} + {k}]",
                "tileloadd tmm3, [{low} + {line}]",
                "tileloadd tmm4, [{high} + {line}]",
                "tdpbsud tmm0, tmm2, tmm3",
                "tdpbssd tmm1, tmm2, tmm4",
                rows = in(reg) rows, k = in(reg) 256_usize, low = in(reg) lines, high = in(reg) lines.add(PLANE), line = in(reg) LINE,
                options(nostack, readonly, preserves_flags),
            );
        }
        asm!(
            "tilestored [{low} + {line}], tmm0",
            "tilestored [{high} + {line}], tmm1",
            low = in(reg) low, high = in(reg) high, line = in(reg) LINE,
            options(nostack, preserves_flags),
        );
    }
}

/// `STORED`: the lines are those of the tile itself, whose bytes are 128 more than what they stand for; else expanded ones.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn tile32<F: Front, const STORED: bool, const N: usize>(
    front: *const u8,
    lines: *const u8,
    blocks: usize,
    panel: &Panel<'_>,
    out: &mut Results,
) {
    // SAFETY: the caller's promise of sizes: for each block F::BYTES at `front`, 8 lines at `lines`, and of the panel 32 · N values, N scales,
    // N offsets and N sums.
    unsafe {
        let mut sums = Sums::NONE;
        let mut acc = [_mm512_setzero_ps(); N];
        for b in 0..blocks {
            let lines = lines.add(b * 8 * LINE);
            if STORED {
                // The scales before the blocks of the next tile are asked for too: a step ahead of a block and its scales, from where the tile begins.
                ask_ahead::<PageAhead>(front.wrapping_add(b * (8 * LINE + F::BYTES)), (8 * LINE + F::BYTES).div_ceil(LINE));
            }
            block32::<STORED>(panel.q.as_ptr().add(b * 32 * N), lines, &mut sums);
            let (front, scales, offsets) = (front.add(b * F::BYTES), panel.scales.as_ptr().add(b * N), panel.offsets.as_ptr().add(b * N));
            let (d, m) = (F::scales(front), if F::MINS { halves(front.add(32)) } else { _mm512_setzero_ps() });
            for c in 0..N {
                let d_a = _mm512_set1_ps(*scales.add(c));
                let sum = if STORED { _mm512_add_epi32(sums.column(c), _mm512_set1_epi32(*offsets.add(c))) } else { sums.column(c) };
                acc[c] = _mm512_fmadd_ps(_mm512_mul_ps(d, d_a), _mm512_cvtepi32_ps(sum), acc[c]);
                if F::MINS {
                    // −16 times the sum of the column's values.
                    let less = _mm512_srai_epi32::<4>(_mm512_set1_epi32(*panel.sums.as_ptr().add(b * N + c)));
                    acc[c] = _mm512_fnmadd_ps(_mm512_mul_ps(m, d_a), _mm512_cvtepi32_ps(less), acc[c]);
                }
            }
        }
        for c in 0..N {
            _mm512_storeu_ps(out[c].as_mut_ptr(), acc[c]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
unsafe fn tile256<W: Weights256, const N: usize>(
    front: *const u8,
    body: *const u8,
    bytes: *const u8,
    blocks: usize,
    panel: &Panel<'_>,
    out: &mut Results,
) {
    // SAFETY: the caller's promise of sizes: for each block 32 bytes at `front` (none with minima), W::BODY at `body`, two planes at `bytes`,
    // and of the panel 256 · N values, N scales, 16 · N offsets and 4 · N pairs of sums.
    unsafe {
        let (mut low, mut high) = (Sums::NONE, Sums::NONE);
        let mut acc = [_mm512_setzero_ps(); N];
        for b in 0..blocks {
            block256(panel.q.as_ptr().add(b * 256 * N), bytes.add(b * 2 * PLANE), &mut low, &mut high);
            let (body, scales) = (body.add(b * W::BODY), panel.scales.as_ptr().add(b * N));
            let d = halves(if W::MINS { body } else { front.add(32 * b) });
            for c in 0..N {
                let d_a = _mm512_set1_ps(*scales.add(c));
                let total = _mm512_add_epi32(low.column(c), _mm512_slli_epi32::<8>(high.column(c)));
                acc[c] = _mm512_fmadd_ps(_mm512_mul_ps(d, d_a), _mm512_cvtepi32_ps(total), acc[c]);
                if W::MINS {
                    let mins = W::mins(body, panel, b, c);
                    acc[c] = _mm512_fnmadd_ps(_mm512_mul_ps(halves(body.add(32)), d_a), _mm512_cvtepi32_ps(mins), acc[c]);
                }
            }
        }
        for c in 0..N {
            _mm512_storeu_ps(out[c].as_mut_ptr(), acc[c]);
        }
    }
}

/// Low and high bytes of weights times the scales of their runs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn expand256<W: Weights256>(body: *const u8, blocks: usize, out: *mut u8) {
    // SAFETY: the caller's promise: W::BODY bytes at `body` and two planes at `out` for each block.
    unsafe {
        for b in 0..blocks {
            for g in 0..8 {
                group!(g, expand_group::<W>(body.add(b * W::BODY), out.add(2 * b * PLANE)));
            }
        }
    }
}

/// Expands group `G` of a block to `out`, where the block's planes begin.
#[inline(always)]
unsafe fn expand_group<W: Weights256, const G: usize>(body: *const u8, out: *mut u8) {
    // SAFETY: the caller's block.
    unsafe {
        let even = _mm512_set1_epi16(0xff);
        let bias = _mm512_set1_epi16(if W::MINS { 0 } else { 32 >> W::SHIFT });
        for i in 0..8 {
            if 8 * G + i < W::BODY / LINE {
                ask_ahead::<PageAhead>(body.wrapping_add((8 * G + i) * LINE), 1);
            }
            let scales = W::scales(body, (8 * G + i) * 4 / W::RUN);
            // In both halves of a lane, whose row they are of.
            let scales = _mm512_mask_blend_epi16(0xAAAA_AAAA, scales, _mm512_slli_epi32::<16>(scales));
            let weights = W::chunk::<G>(body, i);
            let [a, b] = [_mm512_and_si512(weights, even), _mm512_srli_epi16::<8>(weights)]
                .map(|weights| _mm512_mullo_epi16(_mm512_sub_epi16(weights, bias), scales));
            let low = _mm512_or_si512(_mm512_and_si512(a, even), _mm512_slli_epi16::<8>(b));
            let high = _mm512_or_si512(_mm512_srli_epi16::<8>(a), _mm512_andnot_si512(even, b));
            let at = out.add((8 * G + i) * LINE);
            _mm512_storeu_si512(at.cast(), low);
            _mm512_storeu_si512(at.add(PLANE).cast(), high);
        }
    }
}

/// The probe: `rounds` times four full products, dependent only through their sums.
pub(crate) fn products(proof: Amx, rounds: usize) {
    let unit = Unit::new(proof, ROWS, 64);
    // SAFETY: the unit is set up; its registers are zero at first.
    unsafe {
        for _ in 0..rounds {
            asm!(
                "tdpbssd tmm0, tmm2, tmm3",
                "tdpbssd tmm1, tmm2, tmm4",
                "tdpbssd tmm5, tmm2, tmm3",
                "tdpbssd tmm6, tmm2, tmm4",
                options(nostack, nomem, preserves_flags)
            );
        }
    }
    drop(unit);
}
