//! Products of one tile of 16 rows with one panel of up to 12 columns, 512-bit vectors with VNNI.
//!
//! Lane r of every vector is row r of the tile. Weights are unsigned bytes, biased where the type has signed values; the accumulators begin
//! at −bias · Σ a, so that the sums come out exact. The inner functions have no target features of their own: they are always inlined into
//! `tile32` and `tile256`, which have them.
#![expect(unsafe_code, reason = "vector instructions and loads by pointer")]

use std::arch::x86_64::*;

use crate::Avx512;
use crate::WeightType;
use crate::layout::{
    LINE, Layout, Q2_K_LINES, Q2_K_SCALES, Q3_K_BITS, Q3_K_LINES, Q4_K_LINES, Q4_K_MINS, Q4_K_SCALES, Q5_K_BITS, Q6_K_LINES,
};
use crate::matmul::Results;
use crate::quantized::{PANEL, Panel};
use crate::scalar::blocks;

use super::{Ahead, ask_ahead, expanded_bytes};

/// Calls a kernel with its last generic argument, the number of columns, made a constant: 1..=12.
macro_rules! columns {
    ($n:expr, $kernel:ident::<$($generic:tt),+>($($argument:expr),+)) => {
        match $n {
            1 => $kernel::<$($generic),+, 1>($($argument),+),
            2 => $kernel::<$($generic),+, 2>($($argument),+),
            3 => $kernel::<$($generic),+, 3>($($argument),+),
            4 => $kernel::<$($generic),+, 4>($($argument),+),
            5 => $kernel::<$($generic),+, 5>($($argument),+),
            6 => $kernel::<$($generic),+, 6>($($argument),+),
            7 => $kernel::<$($generic),+, 7>($($argument),+),
            8 => $kernel::<$($generic),+, 8>($($argument),+),
            9 => $kernel::<$($generic),+, 9>($($argument),+),
            10 => $kernel::<$($generic),+, 10>($($argument),+),
            11 => $kernel::<$($generic),+, 11>($($argument),+),
            12 => $kernel::<$($generic),+, 12>($($argument),+),
            _ => unreachable!("panels hold 1 to 12 tokens"),
        }
    };
}

/// Expands the weights of a tile to bytes, a line for every four values of k, in order.
pub(crate) fn expand<A: Ahead>(_: Avx512, layout: &Layout, tile: &[u8], out: &mut [u8]) {
    assert!(tile.len() == layout.tile() && out.len() == expanded_bytes(layout));
    let body = tile[layout.front..].as_ptr();
    // SAFETY: the token proves the features; the lengths were checked, and every line read or written lies in a block of `tile` or `out`.
    unsafe {
        match layout.dtype {
            WeightType::Q4_0 | WeightType::Q4_1 => expand32::<Q4, A, 0>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q5_0 | WeightType::Q5_1 => expand32::<Q5, A, 0>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::IQ4_NL => expand32::<Iq4, A, 0>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::MXFP4 => expand32::<Mx4, A, 0>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q2_K => expand256::<Q2K, A>(body, layout, out.as_mut_ptr()),
            WeightType::Q3_K => expand256::<Q3K, A>(body, layout, out.as_mut_ptr()),
            WeightType::Q5_K => expand256::<Q5K, A>(body, layout, out.as_mut_ptr()),
            WeightType::Q4_K => expand256::<Q4K, A>(body, layout, out.as_mut_ptr()),
            WeightType::Q6_K => expand256::<Q6K, A>(body, layout, out.as_mut_ptr()),
            _ => {}
        }
    }
}

/// Multiplies a tile with the columns of a panel. `expanded`: what [`expand`] made of the tile, if it did.
pub(crate) fn multiply<A: Ahead>(_: Avx512, layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
    let k = layout.blocks * layout.dtype.block_len();
    assert!(tile.len() == layout.tile() && (1..=PANEL).contains(&panel.n) && panel.q.len() == panel.n * k);
    assert!(expanded.is_none_or(|bytes| bytes.len() == expanded_bytes(layout)));
    // The other parts of a panel have the sizes that belong to `q`: `Quantized` sees to that.
    let (front, body) = (tile.as_ptr(), tile[layout.front..].as_ptr());
    let bytes = expanded.map(<[u8]>::as_ptr);
    // SAFETY: the token proves the features, and the lengths were checked above; a block of the tile, of the expanded tile and of the panel
    // is read for each of `layout.blocks`.
    unsafe {
        let (n, blocks) = (panel.n, layout.blocks);
        let (by_128, by_16) = (Bias { offsets: panel.offsets, shift: 0 }, Bias { offsets: panel.sums, shift: 0 });
        let by_8 = Bias { shift: 1, ..by_16 };
        match (layout.dtype, bytes) {
            (WeightType::Q8_0, _) => columns!(n, tile32::<Bytes, Plain, A>(front, body, blocks, panel, by_128, out)),
            (WeightType::Q4_0, Some(bytes)) => columns!(n, tile32::<Bytes, Plain, A>(front, bytes, blocks, panel, by_8, out)),
            (WeightType::Q4_0, None) => columns!(n, tile32::<Q4, Plain, A>(front, body, blocks, panel, by_8, out)),
            (WeightType::Q4_1 | WeightType::Q5_1, Some(bytes)) => {
                columns!(n, tile32::<Bytes, WithMin, A>(front, bytes, blocks, panel, by_16, out));
            }
            (WeightType::Q4_1, None) => columns!(n, tile32::<Q4, WithMin, A>(front, body, blocks, panel, by_16, out)),
            (WeightType::Q5_0, Some(bytes)) => columns!(n, tile32::<Bytes, Plain, A>(front, bytes, blocks, panel, by_16, out)),
            (WeightType::Q5_0, None) => columns!(n, tile32::<Q5, Plain, A>(front, body, blocks, panel, by_16, out)),
            (WeightType::Q5_1, None) => columns!(n, tile32::<Q5, WithMin, A>(front, body, blocks, panel, by_16, out)),
            (WeightType::IQ4_NL, Some(bytes)) => columns!(n, tile32::<Bytes, Plain, A>(front, bytes, blocks, panel, by_128, out)),
            (WeightType::IQ4_NL, None) => columns!(n, tile32::<Iq4, Plain, A>(front, body, blocks, panel, by_128, out)),
            (WeightType::MXFP4, Some(bytes)) => columns!(n, tile32::<Bytes, Exponent, A>(front, bytes, blocks, panel, by_128, out)),
            (WeightType::MXFP4, None) => columns!(n, tile32::<Mx4, Exponent, A>(front, body, blocks, panel, by_128, out)),
            (WeightType::Q2_K, Some(bytes)) => columns!(n, tile256::<Q2K, A, true>(front, body, bytes, blocks, panel, out)),
            (WeightType::Q2_K, None) => columns!(n, tile256::<Q2K, A, false>(front, body, body, blocks, panel, out)),
            (WeightType::Q3_K, Some(bytes)) => columns!(n, tile256::<Q3K, A, true>(front, body, bytes, blocks, panel, out)),
            (WeightType::Q3_K, None) => columns!(n, tile256::<Q3K, A, false>(front, body, body, blocks, panel, out)),
            (WeightType::Q4_K, Some(bytes)) => columns!(n, tile256::<Q4K, A, true>(front, body, bytes, blocks, panel, out)),
            (WeightType::Q4_K, None) => columns!(n, tile256::<Q4K, A, false>(front, body, body, blocks, panel, out)),
            (WeightType::Q5_K, Some(bytes)) => columns!(n, tile256::<Q5K, A, true>(front, body, bytes, blocks, panel, out)),
            (WeightType::Q5_K, None) => columns!(n, tile256::<Q5K, A, false>(front, body, body, blocks, panel, out)),
            (WeightType::Q6_K, Some(bytes)) => columns!(n, tile256::<Q6K, A, true>(front, body, bytes, blocks, panel, out)),
            (WeightType::Q6_K, None) => columns!(n, tile256::<Q6K, A, false>(front, body, body, blocks, panel, out)),
            _ => unreachable!("float weights have no tiles"),
        }
    }
}

/// Broadcast of the four bytes at `at`.
#[inline(always)]
unsafe fn four(at: *const i8) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_set1_epi32(at.cast::<i32>().read_unaligned()) }
}

#[inline(always)]
unsafe fn line(at: *const u8) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_loadu_si512(at.cast()) }
}

#[inline(always)]
pub(super) unsafe fn halves(at: *const u8) -> __m512 {
    // SAFETY: the caller's.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
}

/// Weights in blocks of 32, as unsigned bytes.
pub(super) trait Weights32 {
    /// Bytes of a block of a tile.
    const BODY: usize;
    /// Which chunks (four k each) share lines: `i` and `i + 4`, or neighbours.
    const APART: bool;
    /// Two chunks of the block at `body`, i in 0..4: `i` and `i + 4` if APART, else `2i` and `2i + 1`.
    unsafe fn pair(body: *const u8, i: usize) -> [__m512i; 2];
}

/// A line of bytes for each chunk: Q8_0, or anything expanded.
pub(super) struct Bytes;
/// Packed nibbles.
pub(super) struct Q4;
/// Packed nibbles and fifth bits.
pub(super) struct Q5;
/// Nibbles that stand for the values of a table.
pub(super) struct Iq4;
pub(super) struct Mx4;

impl Weights32 for Q4 {
    const BODY: usize = 4 * LINE;
    const APART: bool = true;

    #[inline(always)]
    unsafe fn pair(body: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's block has 4 lines.
        unsafe {
            let (low, nibbles) = (_mm512_set1_epi8(15), line(body.add(i * LINE)));
            [_mm512_and_si512(nibbles, low), _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low)]
        }
    }
}

/// The values that nibbles stand for, + 128.
#[inline(always)]
unsafe fn look_up(table: &[i8; 16], nibbles: [__m512i; 2]) -> [__m512i; 2] {
    // SAFETY: the table has 16 bytes.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        let biased = _mm512_xor_si512(table, _mm512_set1_epi8(-128));
        [_mm512_shuffle_epi8(biased, nibbles[0]), _mm512_shuffle_epi8(biased, nibbles[1])]
    }
}

impl Weights32 for Iq4 {
    const BODY: usize = 4 * LINE;
    const APART: bool = true;

    #[inline(always)]
    unsafe fn pair(body: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's block has 4 lines.
        unsafe { look_up(&blocks::IQ4_NL, Q4::pair(body, i)) }
    }
}

impl Weights32 for Mx4 {
    const BODY: usize = 4 * LINE;
    const APART: bool = true;

    #[inline(always)]
    unsafe fn pair(body: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's block has 4 lines.
        unsafe { look_up(&blocks::MXFP4, Q4::pair(body, i)) }
    }
}

/// What the accumulators of a block begin with: −bias · Σ a, which is `offsets >> shift`.
#[derive(Clone, Copy)]
struct Bias<'a> {
    offsets: &'a [i32],
    shift: u32,
}

/// The numbers in front of each block.
pub(super) trait Front {
    /// Bytes a block.
    const BYTES: usize;
    /// Whether a number is added to all values of a block, so that they have no bias; the panel's offsets must be −16 · Σ a.
    const MINS: bool;
    /// Scales of the 16 rows.
    unsafe fn scales(front: *const u8) -> __m512;
}

/// f16 scales.
pub(super) struct Plain;
/// f16 scales, then what is added.
pub(super) struct WithMin;
/// The exponents of MXFP4.
pub(super) struct Exponent;

impl Front for Plain {
    const BYTES: usize = 32;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn scales(front: *const u8) -> __m512 {
        // SAFETY: the caller's.
        unsafe { halves(front) }
    }
}

impl Front for WithMin {
    const BYTES: usize = 64;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales(front: *const u8) -> __m512 {
        // SAFETY: the caller's.
        unsafe { halves(front) }
    }
}

impl Front for Exponent {
    const BYTES: usize = 16;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn scales(front: *const u8) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let e = _mm512_cvtepu8_epi32(_mm_loadu_si128(front.cast()));
            let one = _mm512_set1_epi32(1);
            let small = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), _mm512_min_epi32(e, one));
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32::<23>(_mm512_sub_epi32(e, one)), small))
        }
    }
}

impl Weights32 for Bytes {
    const BODY: usize = 8 * LINE;
    const APART: bool = false;

    #[inline(always)]
    unsafe fn pair(body: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's block has 8 lines.
        unsafe { [line(body.add(2 * i * LINE)), line(body.add((2 * i + 1) * LINE))] }
    }
}

impl Weights32 for Q5 {
    const BODY: usize = 5 * LINE;
    const APART: bool = true;

    #[inline(always)]
    unsafe fn pair(body: *const u8, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller's block has 5 lines.
        unsafe {
            let (low, bit) = (_mm512_set1_epi8(15), _mm512_set1_epi8(16));
            let (high, nibbles) = (line(body), line(body.add((i + 1) * LINE)));
            // 0xEA: (a & b) | c, with c the nibble and a & b the fifth bit, which is bit i of `high` for the first chunk, i + 4 for the second.
            let first = _mm512_sllv_epi32(high, _mm512_set1_epi32(4 - i as i32));
            let second = _mm512_srlv_epi32(high, _mm512_set1_epi32(i as i32));
            [
                _mm512_ternarylogic_epi32::<0xEA>(first, bit, _mm512_and_si512(nibbles, low)),
                _mm512_ternarylogic_epi32::<0xEA>(second, bit, _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low)),
            ]
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
unsafe fn tile32<W: Weights32, F: Front, A: Ahead, const N: usize>(
    mut front: *const u8,
    mut body: *const u8,
    blocks: usize,
    panel: &Panel<'_>,
    bias: Bias<'_>,
    out: &mut Results,
) {
    // SAFETY: the caller's promise of sizes: for each block F::BYTES at `front`, W::BODY at `body`, and of the panel 32 · N values, N scales
    // and N offsets.
    unsafe {
        let (mut q, mut scales, mut offsets) = (panel.q.as_ptr(), panel.scales.as_ptr(), bias.offsets.as_ptr());
        let mut acc = [_mm512_setzero_ps(); N];
        let shift = _mm512_set1_epi32(bias.shift as i32);
        // The scales before the blocks of the next tile are asked for too: a step ahead of a block and its scales, from where the tile begins.
        let mut next = front;
        for _ in 0..blocks {
            ask_ahead::<A>(next, (W::BODY + F::BYTES).div_ceil(LINE));
            next = next.wrapping_add(W::BODY + F::BYTES);
            let mut sums = [_mm512_setzero_si512(); N];
            if !F::MINS {
                for c in 0..N {
                    sums[c] = _mm512_srav_epi32(_mm512_set1_epi32(*offsets.add(c)), shift);
                }
            }
            // A single column gets a second chain of sums, so that it does not wait for itself.
            let mut more = [_mm512_setzero_si512(); N];
            for i in 0..4 {
                let [low, high] = W::pair(body, i);
                let (first, second) = if W::APART { (i, i + 4) } else { (2 * i, 2 * i + 1) };
                for c in 0..N {
                    sums[c] = _mm512_dpbusd_epi32(sums[c], low, four(q.add(4 * (first * N + c))));
                }
                for c in 0..N {
                    let a = four(q.add(4 * (second * N + c)));
                    if N <= 2 {
                        more[c] = _mm512_dpbusd_epi32(more[c], high, a);
                    } else {
                        sums[c] = _mm512_dpbusd_epi32(sums[c], high, a);
                    }
                }
            }
            let (d, m) = (F::scales(front), if F::MINS { halves(front.add(32)) } else { _mm512_setzero_ps() });
            for c in 0..N {
                let sum = if N <= 2 { _mm512_add_epi32(sums[c], more[c]) } else { sums[c] };
                let d_a = _mm512_set1_ps(*scales.add(c));
                acc[c] = _mm512_fmadd_ps(_mm512_mul_ps(d, d_a), _mm512_cvtepi32_ps(sum), acc[c]);
                if F::MINS {
                    // The offset is −16 times the sum.
                    let less = _mm512_srai_epi32::<4>(_mm512_set1_epi32(*offsets.add(c)));
                    acc[c] = _mm512_fnmadd_ps(_mm512_mul_ps(m, d_a), _mm512_cvtepi32_ps(less), acc[c]);
                }
            }
            (front, body) = (front.add(F::BYTES), body.add(W::BODY));
            (q, scales, offsets) = (q.add(32 * N), scales.add(N), offsets.add(N));
        }
        for c in 0..N {
            _mm512_storeu_ps(out[c].as_mut_ptr(), acc[c]);
        }
    }
}

/// Weights in blocks of 256, as unsigned bytes.
pub(super) trait Weights256 {
    /// Bytes of a block of a tile.
    const BODY: usize;
    /// Values that share a scale.
    const RUN: usize;
    /// Whether every run has a minimum; else the bytes are biased, and the panel's offsets correct it.
    const MINS: bool;
    /// The bias is the offsets' 32, shifted right by this.
    const SHIFT: u32 = 0;
    /// Scales of the 16 rows for run `j`.
    unsafe fn scales(body: *const u8, j: usize) -> __m512i;

    /// Minima times the sums of their runs, for column `c` of block `b`: by default two bytes a row for each pair of runs of 32.
    #[inline(always)]
    unsafe fn mins(body: *const u8, panel: &Panel<'_>, b: usize, c: usize) -> __m512i {
        // SAFETY: the caller's block and column.
        unsafe {
            let mut mins = _mm512_setzero_si512();
            for p in 0..4 {
                let m = _mm512_cvtepu8_epi16(_mm256_loadu_si256(body.add(Q4_K_MINS + 32 * p).cast()));
                mins = _mm512_dpwssd_epi32(mins, m, _mm512_set1_epi32(*panel.sums.as_ptr().add((b * 4 + p) * panel.n + c)));
            }
            mins
        }
    }
    /// Chunk `i` (four k) of group `G` of the block, eight chunks a group, eight groups a block.
    unsafe fn chunk<const G: usize>(body: *const u8, i: usize) -> __m512i;
}

pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

impl Weights256 for Q5K {
    const BODY: usize = 45 * LINE;
    const RUN: usize = 32;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales(body: *const u8, j: usize) -> __m512i {
        // SAFETY: the caller's block has 8 runs.
        unsafe { Q4K::scales(body, j) }
    }

    #[inline(always)]
    unsafe fn chunk<const G: usize>(body: *const u8, i: usize) -> __m512i {
        // SAFETY: the caller's block has 32 lines of nibbles and 8 of fifth bits.
        unsafe {
            let bits = line(body.add(Q5_K_BITS + i * LINE));
            // Bit G of every byte moves to bit 4.
            let bits = if G < 4 {
                _mm512_sllv_epi32(bits, _mm512_set1_epi32(4 - G as i32))
            } else {
                _mm512_srlv_epi32(bits, _mm512_set1_epi32(G as i32 - 4))
            };
            _mm512_ternarylogic_epi32::<0xEA>(bits, _mm512_set1_epi8(16), Q4K::chunk::<G>(body, i))
        }
    }
}

/// Two bits of every byte of a line of `qs`, for chunk `i` of group `G`: lines of a half follow each other, fields are shifts.
#[inline(always)]
unsafe fn two_bits<const G: usize>(lines: *const u8, i: usize) -> __m512i {
    // SAFETY: the caller's block has 16 lines.
    unsafe {
        let line = line(lines.add((G / 4 * 8 + i) * LINE));
        _mm512_and_si512(_mm512_srlv_epi32(line, _mm512_set1_epi32((G % 4 * 2) as i32)), _mm512_set1_epi8(3))
    }
}

impl Weights256 for Q2K {
    const BODY: usize = 21 * LINE;
    const RUN: usize = 16;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales(body: *const u8, j: usize) -> __m512i {
        // SAFETY: the caller's block has 16 runs.
        unsafe {
            let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(body.add(Q2_K_SCALES + 16 * j).cast()));
            _mm512_and_si512(both, _mm512_set1_epi32(15))
        }
    }

    #[inline(always)]
    unsafe fn mins(body: *const u8, panel: &Panel<'_>, b: usize, c: usize) -> __m512i {
        // SAFETY: the caller's block has 16 runs, and its panel an offset, −32 · Σ a, for each.
        unsafe {
            let mut mins = _mm512_setzero_si512();
            for j in 0..16 {
                let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(body.add(Q2_K_SCALES + 16 * j).cast()));
                let sum = -(*panel.offsets.as_ptr().add((b * 16 + j) * panel.n + c) >> 5);
                mins = _mm512_add_epi32(mins, _mm512_mullo_epi32(_mm512_srli_epi32::<4>(both), _mm512_set1_epi32(sum)));
            }
            mins
        }
    }

    #[inline(always)]
    unsafe fn chunk<const G: usize>(body: *const u8, i: usize) -> __m512i {
        // SAFETY: the caller's.
        unsafe { two_bits::<G>(body.add(Q2_K_LINES), i) }
    }
}

impl Weights256 for Q3K {
    const BODY: usize = 28 * LINE;
    const RUN: usize = 16;
    const MINS: bool = false;
    // The bias is 4.
    const SHIFT: u32 = 3;

    #[inline(always)]
    unsafe fn scales(body: *const u8, j: usize) -> __m512i {
        // SAFETY: the caller's block has 16 runs.
        unsafe { Q6K::scales(body, j) }
    }

    #[inline(always)]
    unsafe fn chunk<const G: usize>(body: *const u8, i: usize) -> __m512i {
        // SAFETY: the caller's block has 8 lines of bits and 16 of `qs`.
        unsafe {
            let bits = line(body.add(Q3_K_BITS + i * LINE));
            // Bit G of every byte moves to bit 2.
            let bits = if G < 3 {
                _mm512_sllv_epi32(bits, _mm512_set1_epi32(2 - G as i32))
            } else {
                _mm512_srlv_epi32(bits, _mm512_set1_epi32(G as i32 - 2))
            };
            _mm512_ternarylogic_epi32::<0xEA>(bits, _mm512_set1_epi8(4), two_bits::<G>(body.add(Q3_K_LINES), i))
        }
    }
}

impl Weights256 for Q4K {
    const BODY: usize = 37 * LINE;
    const RUN: usize = 32;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales(body: *const u8, j: usize) -> __m512i {
        // SAFETY: the caller's block has 8 runs.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(body.add(Q4_K_SCALES + 16 * j).cast())) }
    }

    #[inline(always)]
    unsafe fn chunk<const G: usize>(body: *const u8, i: usize) -> __m512i {
        // SAFETY: the caller's block has 32 lines of nibbles.
        unsafe {
            let nibbles = line(body.add(Q4_K_LINES + (G / 2 * 8 + i) * LINE));
            let shifted = if G.is_multiple_of(2) { nibbles } else { _mm512_srli_epi16::<4>(nibbles) };
            _mm512_and_si512(shifted, _mm512_set1_epi8(15))
        }
    }
}

impl Weights256 for Q6K {
    const BODY: usize = 52 * LINE;
    const RUN: usize = 16;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn scales(body: *const u8, j: usize) -> __m512i {
        // SAFETY: the caller's block has 16 runs.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(body.add(16 * j).cast())) }
    }

    #[inline(always)]
    unsafe fn chunk<const G: usize>(body: *const u8, i: usize) -> __m512i {
        // SAFETY: the caller's block has 2 · 8 · 3 lines.
        unsafe {
            let lines = body.add(Q6_K_LINES + (G / 4 * 24 + i * 3) * LINE);
            let (low, high) = (line(lines.add(G % 2 * LINE)), line(lines.add(2 * LINE)));
            let low = if G % 4 < 2 { low } else { _mm512_srli_epi16::<4>(low) };
            let high = match G % 4 {
                0 => _mm512_slli_epi16::<4>(high),
                1 => _mm512_slli_epi16::<2>(high),
                2 => high,
                _ => _mm512_srli_epi16::<2>(high),
            };
            _mm512_ternarylogic_epi32::<0xEA>(high, _mm512_set1_epi8(0x30), _mm512_and_si512(low, _mm512_set1_epi8(15)))
        }
    }
}

/// Calls a function for group `$group`, its last generic argument made a constant.
macro_rules! group {
    ($group:expr, $function:ident::<$($generic:tt),+>$arguments:tt) => {
        match $group {
            0 => $function::<$($generic),+, 0>$arguments,
            1 => $function::<$($generic),+, 1>$arguments,
            2 => $function::<$($generic),+, 2>$arguments,
            3 => $function::<$($generic),+, 3>$arguments,
            4 => $function::<$($generic),+, 4>$arguments,
            5 => $function::<$($generic),+, 5>$arguments,
            6 => $function::<$($generic),+, 6>$arguments,
            _ => $function::<$($generic),+, 7>$arguments,
        }
    };
}
pub(super) use group;

/// `EXPANDED`: the weights are lines of bytes at `bytes`, else they are unpacked from `body`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
unsafe fn tile256<W: Weights256, A: Ahead, const EXPANDED: bool, const N: usize>(
    front: *const u8,
    body: *const u8,
    bytes: *const u8,
    blocks: usize,
    panel: &Panel<'_>,
    out: &mut Results,
) {
    // SAFETY: the caller's promise of sizes: for each block 32 bytes at `front` (none with minima), W::BODY at `body`, 64 lines at `bytes` if
    // EXPANDED, and of the panel 256 · N values, N scales, 16 · N offsets and 4 · N pairs of sums.
    unsafe {
        for c in 0..N {
            out[c] = [0.0; 16];
        }
        for b in 0..blocks {
            let (body, bytes) = (body.add(b * W::BODY), bytes.add(b * 64 * LINE));
            let (q, offsets) = (panel.q.as_ptr().add(b * 256 * N), panel.offsets.as_ptr().add(b * 16 * N));
            let mut total = [_mm512_setzero_si512(); N];
            if EXPANDED {
                for j in 0..256 / W::RUN {
                    let lines = bytes.add(j * W::RUN / 4 * LINE);
                    run::<W, N>(&mut total, body, q, offsets, j, |i| line(lines.add(i * LINE)));
                }
            } else {
                for g in 0..8 {
                    group!(g, runs::<W, A, N>(&mut total, body, q, offsets));
                }
            }
            let d = halves(if W::MINS { body } else { front.add(32 * b) });
            for c in 0..N {
                let d_a = _mm512_set1_ps(*panel.scales.as_ptr().add(b * N + c));
                let mut acc = _mm512_loadu_ps(out[c].as_ptr());
                acc = _mm512_fmadd_ps(_mm512_mul_ps(d, d_a), _mm512_cvtepi32_ps(total[c]), acc);
                if W::MINS {
                    let mins = W::mins(body, panel, b, c);
                    acc = _mm512_fnmadd_ps(_mm512_mul_ps(halves(body.add(32)), d_a), _mm512_cvtepi32_ps(mins), acc);
                }
                _mm512_storeu_ps(out[c].as_mut_ptr(), acc);
            }
        }
    }
}

/// Adds to `total` the runs of group `G` of a block, unpacked.
#[inline(always)]
unsafe fn runs<W: Weights256, A: Ahead, const N: usize, const G: usize>(
    total: &mut [__m512i; N],
    body: *const u8,
    q: *const i8,
    offsets: *const i32,
) {
    // A share of the lines ahead.
    let lines = W::BODY / LINE / 8 + 1;
    ask_ahead::<A>(body.wrapping_add(G * lines * LINE), lines);
    for j in G * 32 / W::RUN..(G + 1) * 32 / W::RUN {
        let first = j * W::RUN / 4 - 8 * G;
        // SAFETY: the caller's block.
        unsafe { run::<W, N>(total, body, q, offsets, j, |i| W::chunk::<G>(body, first + i)) };
    }
}

/// Adds run `j` of a block to `total`, times its scales; `weights`: its chunks, counted from its first.
#[inline(always)]
unsafe fn run<W: Weights256, const N: usize>(
    total: &mut [__m512i; N],
    body: *const u8,
    q: *const i8,
    offsets: *const i32,
    j: usize,
    weights: impl Fn(usize) -> __m512i,
) {
    // SAFETY: the caller's block.
    unsafe {
        let mut sums = [_mm512_setzero_si512(); N];
        if !W::MINS {
            for c in 0..N {
                let offset = _mm512_set1_epi32(*offsets.add(j * N + c));
                sums[c] = _mm512_srav_epi32(offset, _mm512_set1_epi32(W::SHIFT as i32));
            }
        }
        for i in 0..W::RUN / 4 {
            let w = weights(i);
            for c in 0..N {
                sums[c] = _mm512_dpbusd_epi32(sums[c], w, four(q.add(4 * ((j * W::RUN / 4 + i) * N + c))));
            }
        }
        let scales = W::scales(body, j);
        for c in 0..N {
            total[c] = _mm512_add_epi32(total[c], _mm512_mullo_epi32(sums[c], scales));
        }
    }
}

/// `BIAS`: what is taken from every byte.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn expand32<W: Weights32, A: Ahead, const BIAS: u8>(body: *const u8, blocks: usize, out: *mut u8) {
    // SAFETY: the caller's promise: W::BODY bytes at `body` and 8 lines at `out` for each block.
    unsafe {
        let bias = _mm512_set1_epi8(BIAS.cast_signed());
        for b in 0..blocks {
            ask_ahead::<A>(body.wrapping_add(b * W::BODY), W::BODY / LINE);
            for i in 0..4 {
                let lines = W::pair(body.add(b * W::BODY), i);
                let at = if W::APART { [i, i + 4] } else { [2 * i, 2 * i + 1] };
                for (line, at) in lines.into_iter().zip(at) {
                    _mm512_storeu_si512(out.add((8 * b + at) * LINE).cast(), _mm512_sub_epi8(line, bias));
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn expand256<W: Weights256, A: Ahead>(body: *const u8, layout: &Layout, out: *mut u8) {
    // SAFETY: the caller's promise: W::BODY bytes at `body` and 64 lines at `out` for each block.
    unsafe {
        for b in 0..layout.blocks {
            for g in 0..8 {
                group!(g, expand_group::<W, A>(body.add(b * W::BODY), out.add(64 * b * LINE)));
            }
        }
    }
}

/// Expands group `G` of a block to `out`, where the block begins.
#[inline(always)]
unsafe fn expand_group<W: Weights256, A: Ahead, const G: usize>(body: *const u8, out: *mut u8) {
    // SAFETY: the caller's block.
    unsafe {
        for i in 0..8 {
            if 8 * G + i < W::BODY / LINE {
                ask_ahead::<A>(body.wrapping_add((8 * G + i) * LINE), 1);
            }
            _mm512_storeu_si512(out.add((8 * G + i) * LINE).cast(), W::chunk::<G>(body, i));
        }
    }
}
