//! The interleaved layout of quantized matrices: tiles of 16 rows.
//!
//! A tile begins with its block scales (f16, 16 rows together, block by block; padded to 64 bytes), then come the blocks. In a block every
//! line of 64 bytes holds four bytes of each of the 16 rows, so that one vector multiplies four consecutive k of 16 rows (or, halved, of
//! 8), and a lane of the accumulator is a row of the matrix. Per block:
//!
//! - Q8_0: 8 lines, q + 128, four k each.
//! - Q5_0: 1 line of fifth bits (byte 4r + t, bit c belongs to k = 4c + t of row r); 4 lines of nibbles as in the file (line i: low k = 4i + t,
//!   high k = 16 + 4i + t).
//! - Q4_K: 1 line of d and dmin (f16, 16 rows each); scales, a byte a row, for each of the 8 runs; minima of two runs, two bytes a row, for
//!   each of the 4 pairs of runs; 32 lines of nibbles as in the file.
//! - Q6_K: 4 lines of scales, a byte a row, for each of the 16 runs; then for each half of 128 values and i in 0..8 one line of `ql[4i..]`,
//!   one of `ql[32 + 4i..]` and one of `qh[4i..]`.
//!
//! The bytes are those of the file but for Q4_K's scales, which are expanded from 6 bits to 8 (2.8 % of the matrix).

use crate::WeightType;
use crate::scalar::blocks::q4_k_scales;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Bytes of a vector line.
pub(crate) const LINE: usize = 64;
/// Offsets in a Q4_K block.
pub(crate) const Q4_K_SCALES: usize = LINE;
pub(crate) const Q4_K_MINS: usize = 3 * LINE;
pub(crate) const Q4_K_LINES: usize = 5 * LINE;
/// Offset in a Q6_K block.
pub(crate) const Q6_K_LINES: usize = 4 * LINE;

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
            WeightType::Q5_0 => (2 * ROWS, 5),
            WeightType::Q4_K => (0, 37),
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
        let zeros = vec![0; if stored.len() < ROWS * row_bytes { row_bytes } else { 0 }];
        let (front, body) = tile.split_at_mut(self.front);
        for r in 0..ROWS {
            let row = stored.get(r * row_bytes..(r + 1) * row_bytes).unwrap_or(&zeros);
            let blocks = row.chunks_exact(self.dtype.block_bytes()).zip(body.chunks_exact_mut(self.body));
            for (b, (block, body)) in blocks.enumerate() {
                let scale = |front: &mut [u8], at: usize| front[2 * (ROWS * b + r)..][..2].copy_from_slice(&block[at..at + 2]);
                match self.dtype {
                    WeightType::Q5_0 => {
                        scale(front, 0);
                        spread_fifth_bits([block[2], block[3], block[4], block[5]], &mut body[4 * r..4 * r + 4]);
                        interleave(&block[6..22], &mut body[LINE..], r, 0);
                    }
                    WeightType::Q4_K => {
                        body[2 * r..2 * r + 2].copy_from_slice(&block[..2]);
                        body[32 + 2 * r..34 + 2 * r].copy_from_slice(&block[2..4]);
                        let (scales, mins) = q4_k_scales(&block[4..16]);
                        for j in 0..8 {
                            body[Q4_K_SCALES + ROWS * j + r] = scales[j];
                            body[Q4_K_MINS + 2 * ROWS * (j / 2) + 2 * r + j % 2] = mins[j];
                        }
                        interleave(&block[16..144], &mut body[Q4_K_LINES..], r, 0);
                    }
                    WeightType::Q6_K => {
                        scale(front, 208);
                        for j in 0..16 {
                            body[ROWS * j + r] = block[192 + j];
                        }
                        for (i, line) in body[Q6_K_LINES..].chunks_exact_mut(LINE).enumerate() {
                            line[4 * r..4 * r + 4].copy_from_slice(&block[q6_k_source(i)..][..4]);
                        }
                    }
                    _ => {
                        scale(front, 0);
                        interleave(&block[2..34], body, r, 0x80);
                    }
                }
            }
        }
    }

    /// Takes row `r` of a tile out again, as it was stored.
    pub(crate) fn unpack(&self, tile: &[u8], r: usize, stored: &mut [u8]) {
        let (front, body) = tile.split_at(self.front);
        let blocks = stored.chunks_exact_mut(self.dtype.block_bytes()).zip(body.chunks_exact(self.body));
        for (b, (block, body)) in blocks.enumerate() {
            let scale = |block: &mut [u8], at: usize| block[at..at + 2].copy_from_slice(&front[2 * (ROWS * b + r)..][..2]);
            match self.dtype {
                WeightType::Q5_0 => {
                    scale(block, 0);
                    block[2..6].copy_from_slice(&gather_fifth_bits(&body[4 * r..4 * r + 4]));
                    deinterleave(&body[LINE..], &mut block[6..22], r, 0);
                }
                WeightType::Q4_K => {
                    block[..2].copy_from_slice(&body[2 * r..2 * r + 2]);
                    block[2..4].copy_from_slice(&body[32 + 2 * r..34 + 2 * r]);
                    let scale = |j: usize| body[Q4_K_SCALES + ROWS * j + r];
                    let min = |j: usize| body[Q4_K_MINS + 2 * ROWS * (j / 2) + 2 * r + j % 2];
                    for j in 0..4 {
                        block[4 + j] = scale(j) | (scale(j + 4) >> 4) << 6;
                        block[8 + j] = min(j) | (min(j + 4) >> 4) << 6;
                        block[12 + j] = (scale(j + 4) & 15) | (min(j + 4) & 15) << 4;
                    }
                    deinterleave(&body[Q4_K_LINES..], &mut block[16..144], r, 0);
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
    for (line, chunk) in lines.chunks_exact_mut(LINE).zip(from.as_chunks::<4>().0) {
        line[4 * r..4 * r + 4].copy_from_slice(&chunk.map(|byte| byte ^ flip));
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
        *to = (0..8).map(|c| ((high >> (4 * c + t) & 1) << c) as u8).sum();
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
        for dtype in [WeightType::Q8_0, WeightType::Q5_0, WeightType::Q4_K, WeightType::Q6_K] {
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
