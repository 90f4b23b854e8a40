//! Products of one tile of 16 rows with one panel of up to 12 columns, 256-bit vectors.
//!
//! A vector holds half a tile: lane r of half h is row 8h + r. Up to three columns both halves go together, so that a tile is read from
//! memory once; above, the weights are first expanded to bytes, and each half runs over at most six columns at a time. Bytes are multiplied
//! in pairs into 16-bit sums, as many of them as cannot overflow, before they are widened (with the scale of the run, where there is one).
#![expect(unsafe_code, reason = "vector instructions and loads by pointer")]

use std::arch::x86_64::*;

use crate::Avx2;
use crate::WeightType;
use crate::layout::{
    LINE, Layout, Q2_K_LINES, Q2_K_SCALES, Q3_K_BITS, Q3_K_LINES, Q4_K_LINES, Q4_K_MINS, Q4_K_SCALES, Q5_K_BITS, Q6_K_LINES,
};
use crate::matmul::Results;
use crate::quantized::{PANEL, Panel};
use crate::scalar::blocks;

use super::{ask_ahead, expanded_bytes};

/// Up to this many columns, both halves of a tile are multiplied as they are unpacked.
pub(super) const FUSED: usize = 3;
/// Columns of half a tile, at most.
const COLUMNS: usize = 6;
/// Calls a kernel with its last two generic arguments, halves and columns, made constants.
macro_rules! columns {
    ($n:expr, $kernel:ident::<$($generic:tt),+; $halves:tt>($($argument:expr),+)) => {
        match $n {
            1 => $kernel::<$($generic),+, $halves, 1>($($argument),+),
            2 => $kernel::<$($generic),+, $halves, 2>($($argument),+),
            3 => $kernel::<$($generic),+, $halves, 3>($($argument),+),
            4 => $kernel::<$($generic),+, $halves, 4>($($argument),+),
            5 => $kernel::<$($generic),+, $halves, 5>($($argument),+),
            6 => $kernel::<$($generic),+, $halves, 6>($($argument),+),
            _ => unreachable!("columns are split into 1 to 6"),
        }
    };
}
/// As `columns`, for the whole tile and 1..=3 columns.
macro_rules! few_columns {
    ($n:expr, $kernel:ident::<$($generic:tt),+>($($argument:expr),+)) => {
        match $n {
            1 => $kernel::<$($generic),+, 2, 1>($($argument),+),
            2 => $kernel::<$($generic),+, 2, 2>($($argument),+),
            3 => $kernel::<$($generic),+, 2, 3>($($argument),+),
            _ => unreachable!("more columns are multiplied by halves"),
        }
    };
}

/// Expands the weights of a tile to bytes, a line for every four values of k, in order.
pub(crate) fn expand(_: Avx2, layout: &Layout, tile: &[u8], out: &mut [u8]) {
    assert!(tile.len() == layout.tile() && out.len() == expanded_bytes(layout));
    let body = tile[layout.front..].as_ptr();
    // SAFETY: the token proves the features; the lengths were checked, and every line read or written lies in a block of `tile` or `out`.
    unsafe {
        match layout.dtype {
            WeightType::Q4_0 | WeightType::Q4_1 => expand_all::<Q4>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q5_0 | WeightType::Q5_1 => expand_all::<Q5>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::IQ4_NL => expand_all::<Iq4>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::MXFP4 => expand_all::<Mx4>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q2_K => expand_all::<Q2K>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q3_K => expand_all::<Q3K>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q4_K => expand_all::<Q4K>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q5_K => expand_all::<Q5K>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q6_K => expand_all::<Q6K>(body, layout.blocks, out.as_mut_ptr()),
            _ => {}
        }
    }
}

/// Multiplies a tile with the columns of a panel. `expanded`: what [`expand`] made of the tile, if it did.
pub(crate) fn multiply(_: Avx2, layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
    let k = layout.blocks * layout.dtype.block_len();
    assert!(tile.len() == layout.tile() && (1..=PANEL).contains(&panel.n) && panel.q.len() == panel.n * k);
    assert!(expanded.is_none_or(|bytes| bytes.len() == expanded_bytes(layout)));
    // The other parts of a panel have the sizes that belong to `q`: `Quantized` sees to that.
    let (front, body) = (tile.as_ptr(), tile[layout.front..].as_ptr());
    let at = |half: usize, column: usize, n: usize| Tile {
        front,
        body,
        bytes: expanded.map_or(body, <[u8]>::as_ptr),
        blocks: layout.blocks,
        panel,
        half,
        column,
        n,
        shift: u32::from(layout.dtype == WeightType::Q4_0),
    };
    if panel.n <= FUSED && expanded.is_none() {
        let tile = at(0, 0, panel.n);
        // SAFETY: the token proves the features, and the lengths were checked above.
        unsafe {
            match layout.dtype {
                WeightType::Q8_0 => few_columns!(panel.n, tile32::<Q8, false>(tile, out)),
                WeightType::Q4_0 => few_columns!(panel.n, tile32::<Q4, false>(tile, out)),
                WeightType::Q4_1 => few_columns!(panel.n, tile32::<Q4Min, false>(tile, out)),
                WeightType::Q5_0 => few_columns!(panel.n, tile32::<Q5, false>(tile, out)),
                WeightType::Q5_1 => few_columns!(panel.n, tile32::<Q5Min, false>(tile, out)),
                WeightType::IQ4_NL => few_columns!(panel.n, tile32::<Iq4, false>(tile, out)),
                WeightType::MXFP4 => few_columns!(panel.n, tile32::<Mx4, false>(tile, out)),
                WeightType::Q2_K => few_columns!(panel.n, tile256::<Q2K, false>(tile, out)),
                WeightType::Q3_K => few_columns!(panel.n, tile256::<Q3K, false>(tile, out)),
                WeightType::Q5_K => few_columns!(panel.n, tile256::<Q5K, false>(tile, out)),
                WeightType::Q4_K => few_columns!(panel.n, tile256::<Q4K, false>(tile, out)),
                WeightType::Q6_K => few_columns!(panel.n, tile256::<Q6K, false>(tile, out)),
                _ => unreachable!("float weights have no tiles"),
            }
        }
        return;
    }
    let groups = panel.n.div_ceil(COLUMNS);
    for half in 0..2 {
        for group in 0..groups {
            let columns = crate::pool::split(panel.n, groups, group, 1);
            let tile = at(half, columns.start, columns.len());
            // SAFETY: the token proves the features, and the lengths were checked above; that all but Q8_0 are expanded
            // here is checked below.
            unsafe {
                match layout.dtype {
                    WeightType::Q8_0 => columns!(tile.n, tile32::<Q8, false; 1>(tile, out)),
                    _ if expanded.is_none() => unreachable!("more than {FUSED} columns are multiplied expanded"),
                    // What is expanded has lost what told these apart but for the numbers in front.
                    WeightType::Q4_0 | WeightType::Q5_0 => columns!(tile.n, tile32::<Q5, true; 1>(tile, out)),
                    WeightType::Q4_1 | WeightType::Q5_1 => columns!(tile.n, tile32::<Q5Min, true; 1>(tile, out)),
                    WeightType::IQ4_NL => columns!(tile.n, tile32::<Q8, true; 1>(tile, out)),
                    WeightType::MXFP4 => columns!(tile.n, tile32::<Mx4, true; 1>(tile, out)),
                    WeightType::Q2_K => columns!(tile.n, tile256::<Q2K, true; 1>(tile, out)),
                    WeightType::Q3_K => columns!(tile.n, tile256::<Q3K, true; 1>(tile, out)),
                    WeightType::Q5_K => columns!(tile.n, tile256::<Q5K, true; 1>(tile, out)),
                    WeightType::Q4_K => columns!(tile.n, tile256::<Q4K, true; 1>(tile, out)),
                    WeightType::Q6_K => columns!(tile.n, tile256::<Q6K, true; 1>(tile, out)),
                    _ => unreachable!("float weights have no tiles"),
                }
            }
        }
    }
}

/// What a kernel multiplies: a tile, or half of it, with columns `column..column + n` of a panel.
#[derive(Clone, Copy)]
struct Tile<'a> {
    front: *const u8,
    body: *const u8,
    bytes: *const u8,
    blocks: usize,
    panel: &'a Panel<'a>,
    half: usize,
    column: usize,
    n: usize,
    /// Blocks of 32: the weights' bias is the panel's 16, shifted right by this.
    shift: u32,
}

/// Broadcast of the four bytes at `at`.
#[inline(always)]
unsafe fn four(at: *const i8) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_set1_epi32(at.cast::<i32>().read_unaligned()) }
}

#[inline(always)]
unsafe fn line(at: *const u8) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

#[inline(always)]
unsafe fn halves(at: *const u8) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
}

/// How half-lines of a type are unpacked.
trait Weights {
    /// Bytes of a block of a tile, and chunks of four k in it.
    const BODY: usize;
    const CHUNKS: usize;
    /// Half-line `half` of chunk `c` of the block at `body`, as unsigned bytes (signed values: + 128).
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i;
}

/// Weights in blocks of 32.
trait Weights32: Weights {
    /// Whether the bytes are signed and must be multiplied by magnitude and sign.
    const SIGNED: bool = false;
    /// Whether a number is added to all values of a block, so that they have no bias.
    const MINS: bool = false;
    /// Bytes of the numbers in front for each block.
    const FRONT: usize = if Self::MINS { 64 } else { 32 };

    /// Scales of the 8 rows of `half` in block `b`.
    #[inline(always)]
    unsafe fn scales(front: *const u8, b: usize, half: usize) -> __m256 {
        // SAFETY: the caller's tile has this block.
        unsafe { halves(front.add(Self::FRONT * b + 16 * half)) }
    }
}

/// Weights in blocks of 256.
trait Weights256: Weights {
    /// Values that share a scale.
    const RUN: usize;
    /// Chunks whose 16-bit sums cannot overflow together.
    const SAFE: usize;
    /// Whether every run has a minimum; else the bytes are biased, and the panel's offsets correct it.
    const MINS: bool;
    /// The bias is the offsets' 32, shifted right by this.
    const SHIFT: u32 = 0;
    /// Scales of the 8 rows of `half` for run `j`.
    unsafe fn scales(body: *const u8, half: usize, j: usize) -> __m256i;

    /// Minima times the sums of their runs, for column `column` of block `b`: by default two bytes a row for each pair of runs of 32.
    #[inline(always)]
    unsafe fn mins(body: *const u8, half: usize, panel: &Panel<'_>, b: usize, column: usize) -> __m256i {
        // SAFETY: the caller's block and column.
        unsafe {
            let mut mins = _mm256_setzero_si256();
            for p in 0..4 {
                let m = _mm256_cvtepu8_epi16(_mm_loadu_si128(body.add(Q4_K_MINS + 32 * p + 16 * half).cast()));
                let a = _mm256_set1_epi32(*panel.sums.as_ptr().add((b * 4 + p) * panel.n + column));
                mins = _mm256_add_epi32(mins, _mm256_madd_epi16(m, a));
            }
            mins
        }
    }
}

struct Q8;
struct Q4;
struct Q5;
struct Iq4;
struct Mx4;
/// The same lines with two numbers in front of each block.
struct WithMin<W>(W);
type Q4Min = WithMin<Q4>;
type Q5Min = WithMin<Q5>;
struct Q2K;
struct Q3K;
struct Q4K;
struct Q5K;
struct Q6K;

impl Weights for Q8 {
    const BODY: usize = 8 * LINE;
    const CHUNKS: usize = 8;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 8 lines.
        unsafe { line(body.add(c * LINE + half * 32)) }
    }
}

impl Weights32 for Q8 {
    const SIGNED: bool = true;
}

impl Weights for Q5 {
    const BODY: usize = 5 * LINE;
    const CHUNKS: usize = 8;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 5 lines.
        unsafe {
            let (bits, nibbles) = (line(body.add(half * 32)), line(body.add((c % 4 + 1) * LINE + half * 32)));
            let nibbles = if c < 4 { nibbles } else { _mm256_srli_epi16::<4>(nibbles) };
            // Bit c of every byte moves to bit 4.
            let bits = if c < 4 {
                _mm256_sll_epi16(bits, _mm_cvtsi32_si128(4 - c as i32))
            } else {
                _mm256_srl_epi16(bits, _mm_cvtsi32_si128(c as i32 - 4))
            };
            _mm256_or_si256(_mm256_and_si256(nibbles, _mm256_set1_epi8(15)), _mm256_and_si256(bits, _mm256_set1_epi8(16)))
        }
    }
}

impl Weights32 for Q5 {}

impl Weights for Q4 {
    const BODY: usize = 4 * LINE;
    const CHUNKS: usize = 8;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 4 lines.
        unsafe {
            let nibbles = line(body.add(c % 4 * LINE + half * 32));
            _mm256_and_si256(if c < 4 { nibbles } else { _mm256_srli_epi16::<4>(nibbles) }, _mm256_set1_epi8(15))
        }
    }
}

impl Weights32 for Q4 {}

impl<W: Weights> Weights for WithMin<W> {
    const BODY: usize = W::BODY;
    const CHUNKS: usize = W::CHUNKS;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { W::chunk(body, half, c) }
    }
}

impl<W: Weights> Weights32 for WithMin<W> {
    const MINS: bool = true;
}

/// The values that nibbles stand for, + 128.
#[inline(always)]
unsafe fn look_up(table: &[i8; 16], nibbles: __m256i) -> __m256i {
    // SAFETY: the table has 16 bytes.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        _mm256_xor_si256(_mm256_shuffle_epi8(table, nibbles), _mm256_set1_epi8(-128))
    }
}

impl Weights for Iq4 {
    const BODY: usize = 4 * LINE;
    const CHUNKS: usize = 8;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 4 lines.
        unsafe { look_up(&blocks::IQ4_NL, Q4::chunk(body, half, c)) }
    }
}

impl Weights32 for Iq4 {
    const SIGNED: bool = true;
}

impl Weights for Mx4 {
    const BODY: usize = 4 * LINE;
    const CHUNKS: usize = 8;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 4 lines.
        unsafe { look_up(&blocks::MXFP4, Q4::chunk(body, half, c)) }
    }
}

impl Weights32 for Mx4 {
    const FRONT: usize = 16;

    const SIGNED: bool = true;

    #[inline(always)]
    unsafe fn scales(front: *const u8, b: usize, half: usize) -> __m256 {
        // SAFETY: the caller's tile has this block, with a byte for each of 16 rows.
        unsafe {
            let e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(front.add(Self::FRONT * b + 8 * half).cast()));
            let one = _mm256_set1_epi32(1);
            let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), _mm256_min_epi32(e, one));
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32::<23>(_mm256_sub_epi32(e, one)), small))
        }
    }
}

impl Weights for Q4K {
    const BODY: usize = 37 * LINE;
    const CHUNKS: usize = 64;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 32 lines of nibbles.
        unsafe {
            let nibbles = line(body.add(Q4_K_LINES + (c / 16 * 8 + c % 8) * LINE + half * 32));
            let shifted = if (c / 8).is_multiple_of(2) { nibbles } else { _mm256_srli_epi16::<4>(nibbles) };
            _mm256_and_si256(shifted, _mm256_set1_epi8(15))
        }
    }
}

impl Weights256 for Q4K {
    const RUN: usize = 32;
    // 8 · 2 · 15 · 127 = 30480.
    const SAFE: usize = 8;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales(body: *const u8, half: usize, j: usize) -> __m256i {
        // SAFETY: the caller's block has 8 runs.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(body.add(Q4_K_SCALES + 16 * j + 8 * half).cast())) }
    }
}

impl Weights for Q5K {
    const BODY: usize = 45 * LINE;
    const CHUNKS: usize = 64;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 32 lines of nibbles and 8 of fifth bits.
        unsafe {
            let bits = line(body.add(Q5_K_BITS + c % 8 * LINE + half * 32));
            // Bit c / 8 of every byte moves to bit 4.
            let bits = if c < 32 {
                _mm256_sll_epi16(bits, _mm_cvtsi32_si128(4 - (c / 8) as i32))
            } else {
                _mm256_srl_epi16(bits, _mm_cvtsi32_si128((c / 8) as i32 - 4))
            };
            _mm256_or_si256(Q4K::chunk(body, half, c), _mm256_and_si256(bits, _mm256_set1_epi8(16)))
        }
    }
}

impl Weights256 for Q5K {
    const RUN: usize = 32;
    // 4 · 2 · 31 · 127 = 31496.
    const SAFE: usize = 4;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales(body: *const u8, half: usize, j: usize) -> __m256i {
        // SAFETY: the caller's block has 8 runs.
        unsafe { Q4K::scales(body, half, j) }
    }
}

/// Two bits of every byte of a line of `qs`, for chunk `c`: lines of a half follow each other, fields are shifts.
#[inline(always)]
unsafe fn two_bits(lines: *const u8, half: usize, c: usize) -> __m256i {
    // SAFETY: the caller's block has 16 lines.
    unsafe {
        let line = line(lines.add((c / 32 * 8 + c % 8) * LINE + half * 32));
        _mm256_and_si256(_mm256_srl_epi16(line, _mm_cvtsi32_si128((c / 8 % 4 * 2) as i32)), _mm256_set1_epi8(3))
    }
}

impl Weights for Q2K {
    const BODY: usize = 21 * LINE;
    const CHUNKS: usize = 64;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { two_bits(body.add(Q2_K_LINES), half, c) }
    }
}

impl Weights256 for Q2K {
    const RUN: usize = 16;
    // 4 · 2 · 3 · 127 = 3048.
    const SAFE: usize = 4;
    const MINS: bool = true;

    #[inline(always)]
    unsafe fn scales(body: *const u8, half: usize, j: usize) -> __m256i {
        // SAFETY: the caller's block has 16 runs.
        unsafe {
            let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(body.add(Q2_K_SCALES + 16 * j + 8 * half).cast()));
            _mm256_and_si256(both, _mm256_set1_epi32(15))
        }
    }

    #[inline(always)]
    unsafe fn mins(body: *const u8, half: usize, panel: &Panel<'_>, b: usize, column: usize) -> __m256i {
        // SAFETY: the caller's block has 16 runs, and its panel an offset, −32 · Σ a, for each.
        unsafe {
            let mut mins = _mm256_setzero_si256();
            for j in 0..16 {
                let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(body.add(Q2_K_SCALES + 16 * j + 8 * half).cast()));
                let sum = -(*panel.offsets.as_ptr().add((b * 16 + j) * panel.n + column) >> 5);
                mins = _mm256_add_epi32(mins, _mm256_mullo_epi32(_mm256_srli_epi32::<4>(both), _mm256_set1_epi32(sum)));
            }
            mins
        }
    }
}

impl Weights for Q3K {
    const BODY: usize = 28 * LINE;
    const CHUNKS: usize = 64;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 8 lines of bits and 16 of `qs`.
        unsafe {
            let bits = line(body.add(Q3_K_BITS + c % 8 * LINE + half * 32));
            // Bit c / 8 of every byte moves to bit 2.
            let bits = if c < 24 {
                _mm256_sll_epi16(bits, _mm_cvtsi32_si128(2 - (c / 8) as i32))
            } else {
                _mm256_srl_epi16(bits, _mm_cvtsi32_si128((c / 8) as i32 - 2))
            };
            _mm256_or_si256(two_bits(body.add(Q3_K_LINES), half, c), _mm256_and_si256(bits, _mm256_set1_epi8(4)))
        }
    }
}

impl Weights256 for Q3K {
    const RUN: usize = 16;
    // 4 · 2 · 7 · 127 = 7112.
    const SAFE: usize = 4;
    const MINS: bool = false;
    // The bias is 4.
    const SHIFT: u32 = 3;

    #[inline(always)]
    unsafe fn scales(body: *const u8, half: usize, j: usize) -> __m256i {
        // SAFETY: the caller's block has 16 runs.
        unsafe { Q6K::scales(body, half, j) }
    }
}

impl Weights for Q6K {
    const BODY: usize = 52 * LINE;
    const CHUNKS: usize = 64;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's block has 2 · 8 · 3 lines.
        unsafe {
            let (part, field, i) = (c / 32, c / 8 % 4, c % 8);
            let lines = body.add(Q6_K_LINES + (part * 24 + i * 3) * LINE + half * 32);
            let (low, high) = (line(lines.add(field % 2 * LINE)), line(lines.add(2 * LINE)));
            let low = if field < 2 { low } else { _mm256_srli_epi16::<4>(low) };
            let high = match field {
                0 => _mm256_slli_epi16::<4>(high),
                1 => _mm256_slli_epi16::<2>(high),
                2 => high,
                _ => _mm256_srli_epi16::<2>(high),
            };
            _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)), _mm256_and_si256(high, _mm256_set1_epi8(0x30)))
        }
    }
}

impl Weights256 for Q6K {
    const RUN: usize = 16;
    // 2 · 2 · 63 · 127 = 32004.
    const SAFE: usize = 2;
    const MINS: bool = false;

    #[inline(always)]
    unsafe fn scales(body: *const u8, half: usize, j: usize) -> __m256i {
        // SAFETY: the caller's block has 16 runs.
        unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(body.add(16 * j + 8 * half).cast())) }
    }
}

/// Half-line `c`, expanded or to be unpacked.
#[inline(always)]
unsafe fn chunk<W: Weights, const EXPANDED: bool>(tile: &Tile<'_>, block: usize, half: usize, c: usize) -> __m256i {
    // SAFETY: the caller's tile has this block.
    unsafe {
        if EXPANDED {
            line(tile.bytes.add((block * W::CHUNKS + c) * LINE + half * 32))
        } else {
            W::chunk(tile.body.add(block * W::BODY), half, c)
        }
    }
}

/// `H` halves of the tile with `N` columns.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile32<W: Weights32, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results) {
    // SAFETY: the caller's promise of sizes: for each block its numbers at `front`, W::BODY at `body`, 8 lines at `bytes` if EXPANDED, and of
    // the panel 32 values, a scale and an offset for each of its n columns.
    unsafe {
        let n = tile.panel.n;
        let offsets = tile.panel.sums.as_ptr().add(tile.column);
        let ones = _mm256_set1_epi16(1);
        let mut acc = [[_mm256_setzero_ps(); N]; H];
        // A share of what is ahead with every block, the scales before the blocks of the next tile among it.
        let mut next = tile.front;
        let first = !EXPANDED && (H == 2 || (tile.half, tile.column) == (0, 0));
        for b in 0..tile.blocks {
            if first {
                ask_ahead(next, (W::BODY + W::FRONT).div_ceil(LINE));
                next = next.wrapping_add(W::BODY + W::FRONT);
            }
            let q = tile.panel.q.as_ptr().add(b * 32 * n + 4 * tile.column);
            let mut sums = [[_mm256_setzero_si256(); N]; H];
            if !W::SIGNED && !W::MINS {
                for c in 0..N {
                    for h in 0..H {
                        sums[h][c] = _mm256_set1_epi32(*offsets.add(b * n + c) >> tile.shift);
                    }
                }
            }
            if W::SIGNED {
                for i in 0..8 {
                    for h in 0..H {
                        let w = _mm256_xor_si256(chunk::<W, EXPANDED>(&tile, b, tile.half + h, i), _mm256_set1_epi8(-128));
                        let magnitude = _mm256_abs_epi8(w);
                        for c in 0..N {
                            // |w| ≤ 128 and |a| ≤ 127: 2 · 128 · 127 = 32512.
                            let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four(q.add(4 * (i * n + c))), w));
                            sums[h][c] = _mm256_add_epi32(sums[h][c], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                }
            } else {
                for part in 0..2 {
                    for h in 0..H {
                        // 4 · 2 · 31 · 127 = 31496.
                        let mut pairs = [_mm256_setzero_si256(); N];
                        for i in 4 * part..4 * part + 4 {
                            let w = chunk::<W, EXPANDED>(&tile, b, tile.half + h, i);
                            for c in 0..N {
                                pairs[c] = _mm256_add_epi16(pairs[c], _mm256_maddubs_epi16(w, four(q.add(4 * (i * n + c)))));
                            }
                        }
                        for c in 0..N {
                            sums[h][c] = _mm256_add_epi32(sums[h][c], _mm256_madd_epi16(pairs[c], ones));
                        }
                    }
                }
            }
            for h in 0..H {
                let d = W::scales(tile.front, b, tile.half + h);
                for c in 0..N {
                    let d_a = _mm256_set1_ps(*tile.panel.scales.as_ptr().add(b * n + tile.column + c));
                    acc[h][c] = _mm256_fmadd_ps(_mm256_mul_ps(d, d_a), _mm256_cvtepi32_ps(sums[h][c]), acc[h][c]);
                    if W::MINS {
                        let m = halves(tile.front.add(64 * b + 32 + 16 * (tile.half + h)));
                        let sum = _mm256_set1_ps(-(*offsets.add(b * n + c) >> 4) as f32);
                        acc[h][c] = _mm256_fmadd_ps(_mm256_mul_ps(m, d_a), sum, acc[h][c]);
                    }
                }
            }
        }
        for h in 0..H {
            for c in 0..N {
                _mm256_storeu_ps(out[tile.column + c][8 * (tile.half + h)..][..8].as_mut_ptr(), acc[h][c]);
            }
        }
    }
}

/// `H` halves of the tile with `N` columns.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile256<W: Weights256, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results) {
    // SAFETY: the caller's promise of sizes: for each block 32 bytes at `front` (none with minima), W::BODY at `body`, 64 lines at `bytes` if
    // EXPANDED, and of the panel 256 values, a scale, 16 offsets and 4 pairs of sums for each of its n columns.
    unsafe {
        let n = tile.panel.n;
        let mut acc = [[_mm256_setzero_ps(); N]; H];
        for b in 0..tile.blocks {
            let body = tile.body.add(b * W::BODY);
            let q = tile.panel.q.as_ptr().add(b * 256 * n + 4 * tile.column);
            let offsets = tile.panel.offsets.as_ptr().add(b * 16 * n + tile.column);
            let chunks = W::RUN / 4;
            let mut total = [[_mm256_setzero_si256(); N]; H];
            for j in 0..256 / W::RUN {
                if H == 2 {
                    // A share of the lines ahead with every run.
                    let lines = W::BODY / LINE * W::RUN / 256 + 1;
                    ask_ahead(body.wrapping_add(j * lines * LINE), lines);
                }
                for h in 0..H {
                    let half = tile.half + h;
                    let scales = W::scales(body, half, j);
                    // The scale in both 16-bit halves of a lane: the pair sums of a row get the same one.
                    let both = _mm256_blend_epi16::<0xAA>(scales, _mm256_slli_epi32::<16>(scales));
                    for part in 0..chunks / W::SAFE {
                        let mut pairs = [_mm256_setzero_si256(); N];
                        for i in 0..W::SAFE {
                            let i = j * chunks + part * W::SAFE + i;
                            let w = chunk::<W, EXPANDED>(&tile, b, half, i);
                            for c in 0..N {
                                pairs[c] = _mm256_add_epi16(pairs[c], _mm256_maddubs_epi16(w, four(q.add(4 * (i * n + c)))));
                            }
                        }
                        for c in 0..N {
                            total[h][c] = _mm256_add_epi32(total[h][c], _mm256_madd_epi16(pairs[c], both));
                        }
                    }
                    if !W::MINS {
                        for c in 0..N {
                            let offset = _mm256_set1_epi32(*offsets.add(j * n + c) >> W::SHIFT);
                            total[h][c] = _mm256_add_epi32(total[h][c], _mm256_mullo_epi32(scales, offset));
                        }
                    }
                }
            }
            for h in 0..H {
                let half = tile.half + h;
                let d = halves(if W::MINS { body.add(16 * half) } else { tile.front.add(32 * b + 16 * half) });
                for c in 0..N {
                    let d_a = _mm256_set1_ps(*tile.panel.scales.as_ptr().add(b * n + tile.column + c));
                    acc[h][c] = _mm256_fmadd_ps(_mm256_mul_ps(d, d_a), _mm256_cvtepi32_ps(total[h][c]), acc[h][c]);
                    if W::MINS {
                        let mins = W::mins(body, half, tile.panel, b, tile.column + c);
                        let scale = _mm256_mul_ps(halves(body.add(32 + 16 * half)), d_a);
                        acc[h][c] = _mm256_fnmadd_ps(scale, _mm256_cvtepi32_ps(mins), acc[h][c]);
                    }
                }
            }
        }
        for h in 0..H {
            for c in 0..N {
                _mm256_storeu_ps(out[tile.column + c][8 * (tile.half + h)..][..8].as_mut_ptr(), acc[h][c]);
            }
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn expand_all<W: Weights>(body: *const u8, blocks: usize, out: *mut u8) {
    // SAFETY: the caller's promise: W::BODY bytes at `body` and W::CHUNKS lines at `out` for each block.
    unsafe {
        for b in 0..blocks {
            for c in 0..W::CHUNKS {
                if c < W::BODY / LINE {
                    ask_ahead(body.wrapping_add(b * W::BODY + c * LINE), 1);
                }
                for half in 0..2 {
                    let bytes = W::chunk(body.add(b * W::BODY), half, c);
                    _mm256_storeu_si256(out.add((b * W::CHUNKS + c) * LINE + half * 32).cast(), bytes);
                }
            }
        }
    }
}
