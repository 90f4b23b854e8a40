//! Stored weight blocks as integers and scales, read from the layout of the file format, and their float values.

use crate::WeightType;
use half::{bf16, f16};

/// Little-endian half-precision number at `at`.
pub(crate) fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// How the integers of a 32-value block become values: value i is d · `q[i]` + m.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Head32 {
    pub(crate) d: f32,
    /// Added to every value, where the type has it.
    pub(crate) m: Option<f32>,
}

/// IQ4_NL's values of the sixteen nibbles.
pub(crate) const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// MXFP4's values of the sixteen nibbles, doubled.
pub(crate) const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of 2^(e − 127), the unit of MXFP4's doubled values.
pub(crate) fn mxfp4_scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// Nibbles in the order of values: the low ones, then the high ones.
fn nibbles(bytes: &[u8], value: impl Fn(usize, u8) -> i8, q: &mut [i8; 32]) {
    for (j, byte) in bytes.iter().take(16).enumerate() {
        q[j] = value(j, byte & 15);
        q[j + 16] = value(j + 16, byte >> 4);
    }
}

/// Any block of 32 values, as the format says:
/// Q8_0 `f16 d; i8 q[32]`, Q4_0 and IQ4_NL `f16 d; u8 qs[16]`, Q4_1 `f16 d; f16 m; u8 qs[16]`, Q5_0 `f16 d; u32 qh; u8 qs[16]`,
/// Q5_1 `f16 d; f16 m; u32 qh; u8 qs[16]`, MXFP4 `u8 e; u8 qs[16]`.
pub(crate) fn of_32(dtype: WeightType, block: &[u8], q: &mut [i8; 32]) -> Head32 {
    let fifth = |at: usize, i: usize| (block[at + i / 8] >> (i % 8) & 1) << 4;
    let mut m = None;
    match dtype {
        WeightType::Q4_0 => nibbles(&block[2..], |_, n| n.cast_signed() - 8, q),
        WeightType::Q4_1 => nibbles(&block[4..], |_, n| n.cast_signed(), q),
        WeightType::Q5_0 => nibbles(&block[6..], |i, n| (n | fifth(2, i)).cast_signed() - 16, q),
        WeightType::Q5_1 => nibbles(&block[8..], |i, n| (n | fifth(4, i)).cast_signed(), q),
        WeightType::IQ4_NL => nibbles(&block[2..], |_, n| IQ4_NL[usize::from(n)], q),
        WeightType::MXFP4 => {
            nibbles(&block[1..], |_, n| MXFP4[usize::from(n)], q);
            return Head32 { d: mxfp4_scale(block[0]), m };
        }
        _ => q.iter_mut().zip(&block[2..34]).for_each(|(q, &byte)| *q = byte.cast_signed()),
    }
    if matches!(dtype, WeightType::Q4_1 | WeightType::Q5_1) {
        m = Some(half_at(block, 2));
    }
    Head32 { d: half_at(block, 0), m }
}

/// How the integers of a 256-value block become values: value i is d · scale · `q[i]`, less dmin · min where the type has minima.
pub(crate) struct Head256 {
    pub(crate) d: f32,
    /// Values that share a scale and a minimum.
    pub(crate) run: usize,
    /// One of each run; those past the last run are zero.
    pub(crate) scales: [i8; 16],
    /// `dmin`, and one minimum of each run.
    pub(crate) mins: Option<(f32, [u8; 16])>,
}

/// The 6-bit scales and minima of a Q4_K or Q5_K block: `u8 scales[12]`.
pub(crate) fn q4_k_scales(s: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for j in 0..4 {
        scales[j] = s[j] & 63;
        mins[j] = s[j + 4] & 63;
    }
    for j in 4..8 {
        scales[j] = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        mins[j] = (s[j + 4] >> 4) | (s[j] >> 6) << 4;
    }
    (scales, mins)
}

/// The 16 scales of a Q3_K block, −32..32: `u8 scales[12]`, low four bits of each, then the high two.
pub(crate) fn q3_k_scales(s: &[u8]) -> [i8; 16] {
    std::array::from_fn(|k| {
        let low = if k < 8 { s[k] & 15 } else { s[k - 8] >> 4 };
        (low | (s[8 + k % 4] >> (2 * (k / 4)) & 3) << 4).cast_signed() - 32
    })
}

/// Any block of 256 values, as the format says:
/// Q2_K `u8 scales[16]; u8 qs[64]; f16 d; f16 dmin`, Q3_K `u8 hmask[32]; u8 qs[64]; u8 scales[12]; f16 d`,
/// Q4_K `f16 d; f16 dmin; u8 scales[12]; u8 qs[128]`, Q5_K `f16 d; f16 dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]`,
/// Q6_K `u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d`.
pub(crate) fn of_256(dtype: WeightType, block: &[u8], q: &mut [i8; 256]) -> Head256 {
    match dtype {
        WeightType::Q2_K => {
            for (i, q) in q.iter_mut().enumerate() {
                *q = (block[16 + 32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4)) & 3).cast_signed();
            }
            let scales = std::array::from_fn(|j| (block[j] & 15).cast_signed());
            let mins = std::array::from_fn(|j| block[j] >> 4);
            Head256 { d: half_at(block, 80), run: 16, scales, mins: Some((half_at(block, 82), mins)) }
        }
        WeightType::Q3_K => {
            for (i, q) in q.iter_mut().enumerate() {
                let low = block[32 + 32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4)) & 3;
                let high = block[i % 32] >> (i / 32) & 1;
                *q = (low | high << 2).cast_signed() - 4;
            }
            Head256 { d: half_at(block, 108), run: 16, scales: q3_k_scales(&block[96..108]), mins: None }
        }
        WeightType::Q6_K => {
            for n in 0..2 {
                let (ql, qh) = (&block[64 * n..64 * n + 64], &block[128 + 32 * n..160 + 32 * n]);
                for l in 0..32 {
                    let value = |low: u8, high: u8| (low | (high & 3) << 4).cast_signed() - 32;
                    q[128 * n + l] = value(ql[l] & 15, qh[l]);
                    q[128 * n + 32 + l] = value(ql[l + 32] & 15, qh[l] >> 2);
                    q[128 * n + 64 + l] = value(ql[l] >> 4, qh[l] >> 4);
                    q[128 * n + 96 + l] = value(ql[l + 32] >> 4, qh[l] >> 6);
                }
            }
            let scales = std::array::from_fn(|j| block[192 + j].cast_signed());
            Head256 { d: half_at(block, 208), run: 16, scales, mins: None }
        }
        _ => {
            let (five, low) = if dtype == WeightType::Q5_K { (true, &block[48..176]) } else { (false, &block[16..144]) };
            for (i, q) in q.iter_mut().enumerate() {
                let nibble = low[32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2)) & 15;
                let fifth = if five { block[16 + i % 32] >> (i / 32) & 1 } else { 0 };
                *q = (nibble | fifth << 4).cast_signed();
            }
            let (run_scales, run_mins) = q4_k_scales(&block[4..16]);
            let (mut scales, mut mins) = ([0; 16], [0; 16]);
            for j in 0..8 {
                (scales[j], mins[j]) = (run_scales[j].cast_signed(), run_mins[j]);
            }
            Head256 { d: half_at(block, 0), run: 32, scales, mins: Some((half_at(block, 2), mins)) }
        }
    }
}

/// Values of a float row, `row` as stored.
pub(crate) fn floats(dtype: WeightType, row: &[u8], out: &mut [f32]) {
    match dtype {
        WeightType::F16 => {
            for (out, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        WeightType::BF16 => {
            for (out, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *out = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        _ => {
            for (out, bytes) in out.iter_mut().zip(row.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
    }
}

/// Values of a stored row of any type, computed as the format says, each product rounded to f32.
pub(crate) fn dequantize(dtype: WeightType, row: &[u8], out: &mut [f32]) {
    let blocks = row.chunks_exact(dtype.block_bytes());
    match dtype {
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => floats(dtype, row, out),
        _ if dtype.block_len() == 32 => {
            for (block, out) in blocks.zip(out.as_chunks_mut::<32>().0) {
                let mut q = [0; 32];
                let Head32 { d, m } = of_32(dtype, block, &mut q);
                for (out, q) in out.iter_mut().zip(q) {
                    let value = d * f32::from(q);
                    *out = m.map_or(value, |m| value + m);
                }
            }
        }
        _ => {
            for (block, out) in blocks.zip(out.as_chunks_mut::<256>().0) {
                let mut q = [0; 256];
                let head = of_256(dtype, block, &mut q);
                for (i, (out, q)) in out.iter_mut().zip(q).enumerate() {
                    let value = head.d * f32::from(head.scales[i / head.run]) * f32::from(q);
                    *out = head.mins.map_or(value, |(dmin, mins)| value - dmin * f32::from(mins[i / head.run]));
                }
            }
        }
    }
}
