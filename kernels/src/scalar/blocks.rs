//! Stored weight blocks as integers and scales, read from the layout of the file format, and their float values.

use crate::WeightType;
use half::{bf16, f16};

/// Little-endian half-precision number at `at`.
pub(crate) fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Q8_0: `f16 d; i8 q[32]`. Returns d; value i is d · `q[i]`.
pub(crate) fn q8_0(block: &[u8], q: &mut [i8; 32]) -> f32 {
    for (q, &byte) in q.iter_mut().zip(&block[2..34]) {
        *q = byte.cast_signed();
    }
    half_at(block, 0)
}

/// Q5_0: `f16 d; u32 qh; u8 qs[16]`. Returns d; value i is d · `q[i]`, q in −16..16.
pub(crate) fn q5_0(block: &[u8], q: &mut [i8; 32]) -> f32 {
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for j in 0..16 {
        let byte = block[6 + j];
        let fifth = |i: usize| ((high >> i & 1) << 4) as i8;
        q[j] = ((byte & 15).cast_signed() | fifth(j)) - 16;
        q[j + 16] = ((byte >> 4).cast_signed() | fifth(j + 16)) - 16;
    }
    half_at(block, 0)
}

/// Scales of a Q4_K block.
pub(crate) struct Q4K {
    pub(crate) d: f32,
    pub(crate) dmin: f32,
    /// Scale of each run of 32 values, 0..64.
    pub(crate) scales: [u8; 8],
    /// Minimum of each run of 32 values, 0..64.
    pub(crate) mins: [u8; 8],
}

/// The 6-bit scales and minima of a Q4_K block: `u8 scales[12]`.
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

/// Q4_K: `f16 d; f16 dmin; u8 scales[12]; u8 qs[128]`. Value i is d · scale · `q[i]` − dmin · min, q in 0..16.
pub(crate) fn q4_k(block: &[u8], q: &mut [i8; 256]) -> Q4K {
    let (scales, mins) = q4_k_scales(&block[4..16]);
    for g in 0..4 {
        for l in 0..32 {
            let byte = block[16 + 32 * g + l];
            q[64 * g + l] = (byte & 15).cast_signed();
            q[64 * g + 32 + l] = (byte >> 4).cast_signed();
        }
    }
    Q4K { d: half_at(block, 0), dmin: half_at(block, 2), scales, mins }
}

/// Q6_K: `u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d`. Returns d and the scale of each run of 16 values; value i is
/// d · scale · `q[i]`, q in −32..32.
pub(crate) fn q6_k(block: &[u8], q: &mut [i8; 256]) -> (f32, [i8; 16]) {
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
    let mut scales = [0; 16];
    for (scale, &byte) in scales.iter_mut().zip(&block[192..208]) {
        *scale = byte.cast_signed();
    }
    (half_at(block, 208), scales)
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
        WeightType::Q8_0 | WeightType::Q5_0 => {
            for (block, out) in blocks.zip(out.as_chunks_mut::<32>().0) {
                let mut q = [0; 32];
                let d = if dtype == WeightType::Q8_0 { q8_0(block, &mut q) } else { q5_0(block, &mut q) };
                for (out, q) in out.iter_mut().zip(q) {
                    *out = d * f32::from(q);
                }
            }
        }
        WeightType::Q4_K => {
            for (block, out) in blocks.zip(out.as_chunks_mut::<256>().0) {
                let mut q = [0; 256];
                let head = q4_k(block, &mut q);
                for (i, (out, q)) in out.iter_mut().zip(q).enumerate() {
                    let (scale, min) = (head.d * f32::from(head.scales[i / 32]), head.dmin * f32::from(head.mins[i / 32]));
                    *out = scale * f32::from(q) - min;
                }
            }
        }
        WeightType::Q6_K => {
            for (block, out) in blocks.zip(out.as_chunks_mut::<256>().0) {
                let mut q = [0; 256];
                let (d, scales) = q6_k(block, &mut q);
                for (i, (out, q)) in out.iter_mut().zip(q).enumerate() {
                    *out = d * f32::from(scales[i / 16]) * f32::from(q);
                }
            }
        }
    }
}
