//! The interleaved layout of quantized matrices: tiles of 16 rows.
//!
//! A tile begins with its block scales (f16, 16 rows together, block by block; padded to 64 bytes), then come the blocks. In a block every
//! line of 64 bytes holds four bytes of each of the 16 rows, so that one vector multiplies four consecutive k of 16 rows (or, halved, of
//! 8), and a lane of the accumulator is a row of the matrix. Per block:
//!
//! - Q8_0: 8 lines, q + 128, four k each.
//! - Q4_0, Q4_1, IQ4_NL, MXFP4: 4 lines of nibbles as in the file (line i: low k = 4i + t, high k = 16 + 4i + t).
//! - Q5_0, Q5_1: 1 line of fifth bits (byte 4r + t, bit c belongs to k = 4c + t of row r); then as Q4_0.
//! - Q4_K: 1 line of d and dmin (f16, 16 rows each); scales, a byte a row, for each of the 8 runs; minima of two runs, two bytes a row, for
//!   each of the 4 pairs of runs; 32 lines of nibbles as in the file.
//! - Q5_K: as Q4_K, then 8 lines of fifth bits as in the file.
//! - Q2_K: 1 line of d and dmin; 4 lines of scales and minima as in the file, a byte a row, for each of the 16 runs; 16 lines of `qs`.
//! - Q3_K: 4 lines of scales, a signed byte a row, for each of the 16 runs; 8 lines of `hmask`; 16 lines of `qs`.
//! - Q6_K: 4 lines of scales, a byte a row, for each of the 16 runs; then for each half of 128 values and i in 0..8 one line of `ql[4i..]`,
//!   one of `ql[32 + 4i..]` and one of `qh[4i..]`.
//!
//! Q4_1 and Q5_1 have two numbers in front for each block: 16 scales, then what is added to the values of 16 rows. MXFP4's scales in front
//! are the file's bytes. Sizes are those of the file but for scales that are expanded from 6 bits to 8: 2.8 % of a Q4_K matrix, 2.3 % of
//! Q5_K, 1.8 % of Q3_K.

use crate::WeightType;
use crate::scalar::blocks::{q3_k_scales, q4_k_scales};

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Bytes of a vector line.
pub(crate) const LINE: usize = 64;
/// Offsets in a Q4_K block.
pub(crate) const Q4_K_SCALES: usize = LINE;
pub(crate) const Q4_K_MINS: usize = 3 * LINE;
pub(crate) const Q4_K_LINES: usize = 5 * LINE;
/// Offset of a Q5_K block's fifth bits.
pub(crate) const Q5_K_BITS: usize = 37 * LINE;
/// Offset in a Q6_K block.
pub(crate) const Q6_K_LINES: usize = 4 * LINE;
/// Offsets in a Q2_K block.
pub(crate) const Q2_K_SCALES: usize = LINE;
pub(crate) const Q2_K_LINES: usize = 5 * LINE;
/// Offsets in a Q3_K block.
pub(crate) const Q3_K_BITS: usize = 4 * LINE;
pub(crate) const Q3_K_LINES: usize = 12 * LINE;

/// Sizes of the tiles of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) dtype: WeightType,
    /// Blocks of a row.
    pub(crate) blocks: usize,
    /// Bytes before the blocks of a tile.
    pub(crate) front: usize,
    /// Bytes of a block of a tile.
    pub(crate) body: usize,
}

impl Layout {
    /// The layout of rows of `k` values; `None` for float types, which stay as they are.
    pub(crate) fn new(dtype: WeightType, k: usize) -> Option<Self> {
        let (front, lines) = match dtype {
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => return None,
            WeightType::Q8_0 => (2 * ROWS, 8),
            WeightType::Q4_0 | WeightType::IQ4_NL => (2 * ROWS, 4),
            WeightType::Q4_1 => (4 * ROWS, 4),
            WeightType::Q5_0 => (2 * ROWS, 5),
            WeightType::Q5_1 => (4 * ROWS, 5),
            WeightType::MXFP4 => (ROWS, 4),
            WeightType::Q2_K => (0, 21),
            WeightType::Q3_K => (2 * ROWS, 28),
            WeightType::Q4_K => (0, 37),
            WeightType::Q5_K => (0, 45),
            WeightType::Q6_K => (2 * ROWS, 52),
        };
        let blocks = k / dtype.block_len();
        Some(Self { dtype, blocks, front: (front * blocks).next_multiple_of(LINE), body: lines * LINE })
    }

    /// Bytes of a tile.
    pub(crate) fn tile(&self) -> usize {
        self.front + self.blocks * self.body
    }

    /// Packs up to 16 stored rows into a tile; missing rows become zero.
    pub(crate) fn pack(&self, stored: &[u8], tile: &mut [u8]) {
        let row_bytes = self.blocks * self.dtype.block_bytes();
        if row_bytes == 0 {
            return;
        }
        let (front, body) = tile.split_at_mut(self.front);
        let block_bytes = self.dtype.block_bytes();
        let zeros = vec![0; block_bytes];
        // Block by block, since rows of a tile may be more than the first cache holds.
        for (b, body) in body.chunks_exact_mut(self.body).enumerate() {
            for r in 0..ROWS {
                let at = r * row_bytes + b * block_bytes;
                self.pack_block(b, r, stored.get(at..at + block_bytes).unwrap_or(&zeros), front, body);
            }
        }
    }

    /// Puts block `b` of row `r` into a tile: its numbers in front, the rest into the body of the block.
    fn pack_block(&self, b: usize, r: usize, block: &[u8], front: &mut [u8], body: &mut [u8]) {
        let mut scale = |at: usize| front[2 * (ROWS * b + r)..][..2].copy_from_slice(&block[at..at + 2]);
        match self.dtype {
            WeightType::Q4_0 | WeightType::IQ4_NL => {
                scale(0);
                interleave(&block[2..18], body, r, 0);
            }
            WeightType::Q4_1 | WeightType::Q5_1 => {
                front[4 * ROWS * b + 2 * r..][..2].copy_from_slice(&block[..2]);
                front[4 * ROWS * b + 2 * (ROWS + r)..][..2].copy_from_slice(&block[2..4]);
                if self.dtype == WeightType::Q4_1 {
                    interleave(&block[4..20], body, r, 0);
                } else {
                    spread_fifth_bits([block[4], block[5], block[6], block[7]], &mut body[4 * r..4 * r + 4]);
                    interleave(&block[8..24], &mut body[LINE..], r, 0);
                }
            }
            WeightType::Q5_0 => {
                scale(0);
                spread_fifth_bits([block[2], block[3], block[4], block[5]], &mut body[4 * r..4 * r + 4]);
                interleave(&block[6..22], &mut body[LINE..], r, 0);
            }
            WeightType::MXFP4 => {
                front[ROWS * b + r] = block[0];
                interleave(&block[1..17], body, r, 0);
            }
            WeightType::Q2_K => {
                body[2 * r..2 * r + 2].copy_from_slice(&block[80..82]);
                body[32 + 2 * r..34 + 2 * r].copy_from_slice(&block[82..84]);
                for j in 0..16 {
                    body[Q2_K_SCALES + ROWS * j + r] = block[j];
                }
                interleave(&block[16..80], &mut body[Q2_K_LINES..], r, 0);
            }
            WeightType::Q3_K => {
                scale(108);
                for (j, scale) in q3_k_scales(&block[96..108]).into_iter().enumerate() {
                    body[ROWS * j + r] = scale.cast_unsigned();
                }
                interleave(&block[..96], &mut body[Q3_K_BITS..], r, 0);
            }
            WeightType::Q4_K | WeightType::Q5_K => {
                body[2 * r..2 * r + 2].copy_from_slice(&block[..2]);
                body[32 + 2 * r..34 + 2 * r].copy_from_slice(&block[2..4]);
                let (scales, mins) = q4_k_scales(&block[4..16]);
                for j in 0..8 {
                    body[Q4_K_SCALES + ROWS * j + r] = scales[j];
                    body[Q4_K_MINS + 2 * ROWS * (j / 2) + 2 * r + j % 2] = mins[j];
                }
                let nibbles = if self.dtype == WeightType::Q5_K {
                    interleave(&block[16..48], &mut body[Q5_K_BITS..], r, 0);
                    &block[48..176]
                } else {
                    &block[16..144]
                };
                interleave(nibbles, &mut body[Q4_K_LINES..], r, 0);
            }
            WeightType::Q6_K => {
                scale(208);
                for j in 0..16 {
                    body[ROWS * j + r] = block[192 + j];
                }
                let halves = body[Q6_K_LINES..].chunks_exact_mut(24 * LINE).zip(block[..128].chunks_exact(64));
                for ((lines, ql), qh) in halves.zip(block[128..192].chunks_exact(32)) {
                    interleave_thirds(&ql[..32], lines, r);
                    interleave_thirds(&ql[32..], &mut lines[LINE..], r);
                    interleave_thirds(qh, &mut lines[2 * LINE..], r);
                }
            }
            _ => {
                scale(0);
                interleave(&block[2..34], body, r, 0x80);
            }
        }
    }

    /// Takes row `r` of a tile out again, as it was stored.
    pub(crate) fn unpack(&self, tile: &[u8], r: usize, stored: &mut [u8]) {
        let (front, body) = tile.split_at(self.front);
        let blocks = stored.chunks_exact_mut(self.dtype.block_bytes()).zip(body.chunks_exact(self.body));
        for (b, (block, body)) in blocks.enumerate() {
            self.unpack_block(b, r, front, body, block);
        }
    }

    /// Takes block `b` of row `r` out of a tile.
    fn unpack_block(&self, b: usize, r: usize, front: &[u8], body: &[u8], block: &mut [u8]) {
        let scale = |block: &mut [u8], at: usize| block[at..at + 2].copy_from_slice(&front[2 * (ROWS * b + r)..][..2]);
        match self.dtype {
            WeightType::Q4_0 | WeightType::IQ4_NL => {
                scale(block, 0);
                deinterleave(body, &mut block[2..18], r, 0);
            }
            WeightType::Q4_1 | WeightType::Q5_1 => {
                block[..2].copy_from_slice(&front[4 * ROWS * b + 2 * r..][..2]);
                block[2..4].copy_from_slice(&front[4 * ROWS * b + 2 * (ROWS + r)..][..2]);
                if self.dtype == WeightType::Q4_1 {
                    deinterleave(body, &mut block[4..20], r, 0);
                } else {
                    block[4..8].copy_from_slice(&gather_fifth_bits(&body[4 * r..4 * r + 4]));
                    deinterleave(&body[LINE..], &mut block[8..24], r, 0);
                }
            }
            WeightType::Q5_0 => {
                scale(block, 0);
                block[2..6].copy_from_slice(&gather_fifth_bits(&body[4 * r..4 * r + 4]));
                deinterleave(&body[LINE..], &mut block[6..22], r, 0);
            }
            WeightType::MXFP4 => {
                block[0] = front[ROWS * b + r];
                deinterleave(body, &mut block[1..17], r, 0);
            }
            WeightType::Q2_K => {
                block[80..82].copy_from_slice(&body[2 * r..2 * r + 2]);
                block[82..84].copy_from_slice(&body[32 + 2 * r..34 + 2 * r]);
                for j in 0..16 {
                    block[j] = body[Q2_K_SCALES + ROWS * j + r];
                }
                deinterleave(&body[Q2_K_LINES..], &mut block[16..80], r, 0);
            }
            WeightType::Q3_K => {
                scale(block, 108);
                let stored = |k: usize| body[ROWS * k + r].wrapping_add(32);
                for k in 0..8 {
                    block[96 + k] = (stored(k) & 15) | stored(k + 8) << 4;
                }
                for k in 0..4 {
                    block[104 + k] = (0..4).map(|part| (stored(4 * part + k) >> 4) << (2 * part)).sum();
                }
                deinterleave(&body[Q3_K_BITS..], &mut block[..96], r, 0);
            }
            WeightType::Q4_K | WeightType::Q5_K => {
                block[..2].copy_from_slice(&body[2 * r..2 * r + 2]);
                block[2..4].copy_from_slice(&body[32 + 2 * r..34 + 2 * r]);
                let scale = |j: usize| body[Q4_K_SCALES + ROWS * j + r];
                let min = |j: usize| body[Q4_K_MINS + 2 * ROWS * (j / 2) + 2 * r + j % 2];
                for j in 0..4 {
                    block[4 + j] = scale(j) | (scale(j + 4) >> 4) << 6;
                    block[8 + j] = min(j) | (min(j + 4) >> 4) << 6;
                    block[12 + j] = (scale(j + 4) & 15) | (min(j + 4) & 15) << 4;
                }
                let nibbles = if self.dtype == WeightType::Q5_K {
                    deinterleave(&body[Q5_K_BITS..], &mut block[16..48], r, 0);
                    &mut block[48..176]
                } else {
                    &mut block[16..144]
                };
                deinterleave(&body[Q4_K_LINES..], nibbles, r, 0);
            }
            WeightType::Q6_K => {
                scale(block, 208);
                for j in 0..16 {
                    block[192 + j] = body[ROWS * j + r];
                }
                for (i, line) in body[Q6_K_LINES..].chunks_exact(LINE).enumerate() {
                    block[q6_k_source(i)..][..4].copy_from_slice(&line[4 * r..4 * r + 4]);
                }
            }
            _ => {
                scale(block, 0);
                deinterleave(body, &mut block[2..34], r, 0x80);
            }
        }
    }
}

/// Where line `i` of a Q6_K block comes from.
fn q6_k_source(i: usize) -> usize {
    let (half, i, part) = (i / 24, i % 24 / 3, i % 3);
    match part {
        2 => 128 + 32 * half + 4 * i,
        _ => 64 * half + 32 * part + 4 * i,
    }
}

fn interleave(from: &[u8], lines: &mut [u8], r: usize, flip: u8) {
    assert!(r < ROWS, "row {r} of a tile");
    for (line, chunk) in lines.as_chunks_mut::<LINE>().0.iter_mut().zip(from.as_chunks::<4>().0) {
        line.as_chunks_mut::<4>().0[r] = chunk.map(|byte| byte ^ flip);
    }
}

/// As [`interleave`], into the first of every three lines.
fn interleave_thirds(from: &[u8], lines: &mut [u8], r: usize) {
    assert!(r < ROWS, "row {r} of a tile");
    for (line, chunk) in lines.as_chunks_mut::<LINE>().0.iter_mut().step_by(3).zip(from.as_chunks::<4>().0) {
        line.as_chunks_mut::<4>().0[r] = *chunk;
    }
}

fn deinterleave(lines: &[u8], to: &mut [u8], r: usize, flip: u8) {
    for (line, chunk) in lines.chunks_exact(LINE).zip(to.as_chunks_mut::<4>().0) {
        for (to, from) in chunk.iter_mut().zip(&line[4 * r..4 * r + 4]) {
            *to = from ^ flip;
        }
    }
}

/// Byte t, bit c of the result is bit 4c + t of `high`.
fn spread_fifth_bits(high: [u8; 4], to: &mut [u8]) {
    let high = u32::from_le_bytes(high);
    for (t, to) in to.iter_mut().enumerate() {
        // Every fourth bit, drawn together: by twos, by fours, by eights.
        let bits = high >> t & 0x1111_1111;
        let bits = (bits | bits >> 3) & 0x0303_0303;
        let bits = (bits | bits >> 6) & 0x000f_000f;
        *to = (bits | bits >> 12) as u8;
    }
}

fn gather_fifth_bits(from: &[u8]) -> [u8; 4] {
    let mut high = 0_u32;
    for (t, byte) in from.iter().enumerate() {
        for c in 0..8 {
            high |= u32::from(byte >> c & 1) << (4 * c + t);
        }
    }
    high.to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacking_gives_back_what_was_packed() {
        for dtype in WeightType::ALL.into_iter().filter(|dtype| dtype.activation_block().is_some()) {
            for (rows, blocks) in [(1, 1), (16, 3), (15, 2)] {
                let layout = Layout::new(dtype, blocks * dtype.block_len()).unwrap();
                let row_bytes = blocks * dtype.block_bytes();
                let mut state = 1_u32;
                let mut byte = || {
                    state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                    (state >> 24) as u8
                };
                let stored: Vec<u8> = (0..rows * row_bytes).map(|_| byte()).collect();
                let mut tile = vec![0; layout.tile()];
                layout.pack(&stored, &mut tile);
                let mut row = vec![0; row_bytes];
                for r in 0..rows {
                    layout.unpack(&tile, r, &mut row);
                    assert_eq!(row, stored[r * row_bytes..(r + 1) * row_bytes], "{dtype} row {r} of {rows}");
                }
                if rows < ROWS {
                    layout.unpack(&tile, rows, &mut row);
                    assert!(row.iter().all(|&byte| byte == 0));
                }
            }
        }
    }
}
