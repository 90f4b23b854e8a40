//! Vector kernels for x86-64. Each equals `scalar/` bit for bit.
#![expect(clippy::needless_range_loop, reason = "rows and columns of register tiles are numbers, as in the formulas")]

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod float;
pub(crate) mod quantize;

use std::arch::x86_64::{_MM_HINT_NTA, _MM_HINT_T1, _mm_prefetch};

use crate::layout::{LINE, Layout, ROWS};
use crate::matmul::{Results, Tiles};
use crate::quantized::Panel;
use crate::{Avx2, Avx512, AvxVnni, WeightType};

/// Tile kernels in 512-bit vectors.
pub(crate) struct Avx512Tiles(pub(crate) Avx512);
/// Tile kernels in 256-bit vectors, with 8-bit dot products where the CPU has them.
pub(crate) struct Avx2Tiles(pub(crate) Avx2, pub(crate) Option<AvxVnni>);

/// How far ahead of its use a line of weights is asked for, in bytes: into the second-level cache, since the few misses the first level can
/// have under way would bound the bandwidth (Zen 4: 15 GB/s a core with either distance there, 19–22 GB/s so).
const AHEAD: usize = 16 << 10;
/// From there into the first level, past which what is read once need not stay (Zen 5, two cores, Q4_K for one column: 39 GB/s without this
/// and 47 with it where memory gives 53, 54 and 65 where it gives 76).
const SOON: usize = 4 << 10;

/// Asks for the lines that will be read when those from `line` on, `count` of them, have been.
#[inline(always)]
#[expect(unsafe_code, reason = "instructions without effect on what is computed")]
fn ask_ahead(line: *const u8, count: usize) {
    for i in 0..count {
        let line = line.wrapping_add(i * LINE);
        // SAFETY: any address may be asked for; nothing is read.
        unsafe {
            _mm_prefetch::<_MM_HINT_NTA>(line.wrapping_add(SOON).cast());
            _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(AHEAD).cast());
        }
    }
}

/// Bytes of an expanded tile: one for every weight; Q8_0 is never expanded.
fn expanded_bytes(layout: &Layout) -> usize {
    if layout.dtype == WeightType::Q8_0 { 0 } else { layout.blocks * layout.dtype.block_len() * ROWS }
}

impl Tiles for Avx512Tiles {
    type Ready = ();

    fn expanded_bytes(&self, layout: &Layout) -> usize {
        expanded_bytes(layout)
    }

    fn wants_expanded(&self, _layout: &Layout, panels: usize, _columns: usize) -> bool {
        panels > 3
    }

    fn expand(&self, layout: &Layout, tile: &[u8], out: &mut [u8]) {
        avx512::expand(self.0, layout, tile, out);
    }

    fn ready(&self, _layout: &Layout, _columns: usize) {}

    fn multiply(&self, (): &(), layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
        if layout.dtype == WeightType::Q8_0 && panel.n == 1 {
            // Bound by memory, where loads of 32 bytes stream faster than those of 64 (Zen 4, one thread: 22 GB/s and 19 GB/s).
            avx2::multiply(self.0.avx2(), layout, tile, expanded, panel, out);
        } else {
            avx512::multiply(self.0, layout, tile, expanded, panel, out);
        }
    }
}

impl Tiles for Avx2Tiles {
    type Ready = ();

    fn expanded_bytes(&self, layout: &Layout) -> usize {
        expanded_bytes(layout)
    }

    fn wants_expanded(&self, layout: &Layout, panels: usize, columns: usize) -> bool {
        panels > 1 || columns > avx2::most_unpacked(layout.dtype, self.1.is_some())
    }

    fn expand(&self, layout: &Layout, tile: &[u8], out: &mut [u8]) {
        avx2::expand(self.0, layout, tile, out);
    }

    fn ready(&self, _layout: &Layout, _columns: usize) {}

    fn multiply(&self, (): &(), layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
        match self.1 {
            // One column of Q4_K: in pairs a scale costs less (115 and 150 GMAC/s).
            Some(proof) if (layout.dtype, panel.n) != (WeightType::Q4_K, 1) => {
                avx2::multiply_vnni(proof, layout, tile, expanded, panel, out)
            }
            _ => avx2::multiply(self.0, layout, tile, expanded, panel, out),
        }
    }
}
