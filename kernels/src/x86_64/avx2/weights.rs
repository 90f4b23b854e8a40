//! How the lines of each weight type become bytes, halves of 256 bits.
#![expect(unsafe_code, reason = "vector instructions and loads by pointer")]

use std::arch::x86_64::*;

use crate::layout::{LINE, Q2_K_LINES, Q2_K_SCALES, Q3_K_BITS, Q3_K_LINES, Q4_K_LINES, Q4_K_MINS, Q4_K_SCALES, Q5_K_BITS, Q6_K_LINES};
use crate::quantized::Panel;
use crate::scalar::blocks;

/// Broadcast of the four bytes at `at`.
#[inline(always)]
pub(super) unsafe fn four(at: *const i8) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_set1_epi32(at.cast::<i32>().read_unaligned()) }
}

#[inline(always)]
pub(super) unsafe fn line(at: *const u8) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

#[inline(always)]
pub(super) unsafe fn halves(at: *const u8) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
}

/// How half-lines of a type are unpacked.
pub(super) trait Weights {
    /// Bytes of a block of a tile, and chunks of four k in it.
    const BODY: usize;
    const CHUNKS: usize;
    /// Half-line `half` of chunk `c` of the block at `body`, as unsigned bytes (signed values: + 128).
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i;
}

/// Weights in blocks of 32.
pub(super) trait Weights32: Weights {
    /// Whether the bytes are signed and must be multiplied by magnitude and sign.
    const SIGNED: bool = false;
    /// Whether a number is added to all values of a block, so that they have no bias.
    const MINS: bool = false;
    /// Whether the bytes' bias is 8, in place of 16.
    const EIGHT: bool = false;
    /// Chunks whose 16-bit sums cannot overflow together.
    const SAFE: usize;
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
pub(super) trait Weights256: Weights {
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

pub(super) struct Q8;
pub(super) struct Q4;
pub(super) struct Q5;
pub(super) struct Iq4;
pub(super) struct Mx4;
/// The same lines with two numbers in front of each block.
pub(super) struct WithMin<W>(W);
pub(super) type Q4Min = WithMin<Q4>;
pub(super) type Q5Min = WithMin<Q5>;
pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;

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
    const SAFE: usize = 1;
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

impl Weights32 for Q5 {
    // 4 · 2 · 31 · 127 = 31496.
    const SAFE: usize = 4;
}

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

impl Weights32 for Q4 {
    const EIGHT: bool = true;
    // 8 · 2 · 15 · 127 = 30480.
    const SAFE: usize = 8;
}

impl<W: Weights> Weights for WithMin<W> {
    const BODY: usize = W::BODY;
    const CHUNKS: usize = W::CHUNKS;

    #[inline(always)]
    unsafe fn chunk(body: *const u8, half: usize, c: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { W::chunk(body, half, c) }
    }
}

impl<W: Weights32> Weights32 for WithMin<W> {
    const SAFE: usize = W::SAFE;
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
    const SAFE: usize = 1;
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

    const SAFE: usize = 1;
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
