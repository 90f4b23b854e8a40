//! Vector kernels for x86-64. Each equals `scalar/` bit for bit.
#![expect(clippy::needless_range_loop, reason = "rows and columns of register tiles are numbers, as in the formulas")]

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod float;
pub(crate) mod quantize;

use std::arch::x86_64::{__cpuid, _MM_HINT_NTA, _MM_HINT_T1, _mm_prefetch};
use std::marker::PhantomData;
use std::sync::LazyLock;

use crate::layout::{LINE, Layout, ROWS};
use crate::matmul::{Results, Tiles};
use crate::quantized::Panel;
use crate::{Avx2, Avx512, AvxVnni, WeightType};

/// Tile kernels in 512-bit vectors.
pub(crate) struct Avx512Tiles<A>(Avx512, PhantomData<A>);
/// Tile kernels in 256-bit vectors, with 8-bit dot products where the CPU has them.
pub(crate) struct Avx2Tiles<A>(Avx2, Option<AvxVnni>, PhantomData<A>);

impl<A: Ahead> Avx512Tiles<A> {
    pub(crate) fn new(proof: Avx512) -> Self {
        Self(proof, PhantomData)
    }
}

impl<A: Ahead> Avx2Tiles<A> {
    pub(crate) fn new(proof: Avx2, fours: Option<AvxVnni>) -> Self {
        Self(proof, fours, PhantomData)
    }
}

/// How far ahead of its use a line of weights is asked for, in bytes, by measurement (`docs/performance.md`). Constants of a kernel: looked up, they
/// cost it registers.
pub(crate) trait Ahead {
    /// Into the second-level cache, since the few misses that the first level can have under way would bound the bandwidth.
    const FAR: usize;
    /// From there into the first level, past which what is read once need not stay.
    const NEAR: usize;
}

/// As far as memory takes (Zen 4 and 5).
pub(crate) struct FarAhead;
/// A page: the processor's own prefetcher, which stops at pages, so begins early with the next one (Granite Rapids).
pub(crate) struct PageAhead;

impl Ahead for FarAhead {
    const FAR: usize = 16 << 10;
    const NEAR: usize = 4 << 10;
}

impl Ahead for PageAhead {
    const FAR: usize = 4 << 10;
    const NEAR: usize = 1 << 10;
}

/// Whether Intel made this CPU, whose memory is asked a page ahead.
pub(crate) fn is_intel() -> bool {
    static IS: LazyLock<bool> = LazyLock::new(|| {
        let vendor = __cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
    });
    *IS
}

/// Asks for the lines that will be read when those from `line` on, `count` of them, have been.
#[inline(always)]
#[expect(unsafe_code, reason = "instructions without effect on what is computed")]
fn ask_ahead<A: Ahead>(line: *const u8, count: usize) {
    for i in 0..count {
        let line = line.wrapping_add(i * LINE);
        // SAFETY: any address may be asked for; nothing is read.
        unsafe {
            _mm_prefetch::<_MM_HINT_NTA>(line.wrapping_add(A::NEAR).cast());
            _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(A::FAR).cast());
        }
    }
}

/// Bytes of an expanded tile: one for every weight; Q8_0 is never expanded.
fn expanded_bytes(layout: &Layout) -> usize {
    if layout.dtype == WeightType::Q8_0 { 0 } else { layout.blocks * layout.dtype.block_len() * ROWS }
}

impl<A: Ahead> Tiles for Avx512Tiles<A> {
    type Ready = ();

    fn expanded_bytes(&self, layout: &Layout) -> usize {
        expanded_bytes(layout)
    }

    fn wants_expanded(&self, _layout: &Layout, panels: usize, _columns: usize) -> bool {
        panels > 3
    }

    fn expand(&self, layout: &Layout, tile: &[u8], out: &mut [u8]) {
        avx512::expand::<A>(self.0, layout, tile, out);
    }

    fn ready(&self, _layout: &Layout, _columns: usize) {}

    fn multiply(&self, (): &(), layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
        if layout.dtype == WeightType::Q8_0 && panel.n == 1 {
            // Bound by memory, where loads of 32 bytes stream faster than those of 64 (Zen 4, one thread: 22 GB/s and 19 GB/s).
            avx2::multiply::<A>(self.0.avx2(), layout, tile, expanded, panel, out);
        } else {
            avx512::multiply::<A>(self.0, layout, tile, expanded, panel, out);
        }
    }
}

impl<A: Ahead> Tiles for Avx2Tiles<A> {
    type Ready = ();

    fn expanded_bytes(&self, layout: &Layout) -> usize {
        expanded_bytes(layout)
    }

    fn wants_expanded(&self, layout: &Layout, panels: usize, columns: usize) -> bool {
        panels > 1 || columns > avx2::most_unpacked(layout.dtype, self.1.is_some())
    }

    fn expand(&self, layout: &Layout, tile: &[u8], out: &mut [u8]) {
        avx2::expand::<A>(self.0, layout, tile, out);
    }

    fn ready(&self, _layout: &Layout, _columns: usize) {}

    fn multiply(&self, (): &(), layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
        match self.1 {
            // One column of Q4_K: in pairs a scale costs less (115 and 150 GMAC/s).
            Some(proof) if (layout.dtype, panel.n) != (WeightType::Q4_K, 1) => {
                avx2::multiply_vnni::<A>(proof, layout, tile, expanded, panel, out)
            }
            _ => avx2::multiply::<A>(self.0, layout, tile, expanded, panel, out),
        }
    }
}
