//! Products of one tile of 16 rows with one panel of up to 12 columns, 256-bit vectors.
//!
//! A vector holds half a tile: lane r of half h is row 8h + r. With few columns both halves go together, so that a tile is read from memory
//! once; with more, each half runs over at most six at a time, unpacked anew for each six or expanded to bytes before. Bytes are multiplied
//! in pairs into 16-bit sums, as many of them as cannot overflow, before they are widened (with the scale of the run, where there is one);
//! with AVX-VNNI, in fours into 32-bit sums that begin at what the weights' bias makes too much. The inner functions have no target features
//! of their own: they are always inlined into one that has.
#![expect(unsafe_code, reason = "vector instructions and loads by pointer")]

use std::arch::x86_64::*;
use std::marker::PhantomData;

use crate::layout::{LINE, Layout};
use crate::matmul::Results;
use crate::quantized::{PANEL, Panel};
use crate::{Avx2, AvxVnni, WeightType};

use super::{Ahead, FarAhead, ask_ahead, expanded_bytes};
use weights::{Iq4, Mx4, Q2K, Q3K, Q4, Q4K, Q4Min, Q5, Q5K, Q5Min, Q6K, Q8, Weights, Weights32, Weights256, four, halves, line};

mod weights;

/// Columns that a kernel takes, at most.
const MOST: usize = 6;

/// Calls a kernel with its last two generic arguments, halves and columns, made constants.
macro_rules! columns {
    ($n:expr, $dot:ident::$kernel:ident::<$($generic:tt),+; $halves:tt>($($argument:expr),+)) => {
        match $n {
            1 => $dot::$kernel::<$($generic),+, $halves, 1>($($argument),+),
            2 => $dot::$kernel::<$($generic),+, $halves, 2>($($argument),+),
            3 => $dot::$kernel::<$($generic),+, $halves, 3>($($argument),+),
            4 => $dot::$kernel::<$($generic),+, $halves, 4>($($argument),+),
            5 => $dot::$kernel::<$($generic),+, $halves, 5>($($argument),+),
            6 => $dot::$kernel::<$($generic),+, $halves, 6>($($argument),+),
            _ => unreachable!("columns are split into 1 to 6"),
        }
    };
}
/// Columns of a lone panel that are multiplied with what is unpacked on the way, at most; for more of them it is written first. Found by
/// measurement: what is unpacked by much is so twice above [`MOST`] columns.
pub(super) fn most_unpacked(dtype: WeightType, fours: bool) -> usize {
    match (dtype, fours) {
        (WeightType::Q5_K, false) | (WeightType::Q3_K | WeightType::Q6_K, true) => 3,
        (WeightType::Q2_K | WeightType::Q5_K, true) => 4,
        (WeightType::Q2_K | WeightType::Q3_K | WeightType::Q6_K, false) => MOST,
        _ => PANEL,
    }
}

/// Expands the weights of a tile to bytes, a line for every four values of k, in order.
pub(crate) fn expand<A: Ahead>(_: Avx2, layout: &Layout, tile: &[u8], out: &mut [u8]) {
    assert!(tile.len() == layout.tile() && out.len() == expanded_bytes(layout));
    let body = tile[layout.front..].as_ptr();
    // SAFETY: the token proves the features; the lengths were checked, and every line read or written lies in a block of `tile` or `out`.
    unsafe {
        match layout.dtype {
            WeightType::Q4_0 | WeightType::Q4_1 => expand_all::<Q4, A>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q5_0 | WeightType::Q5_1 => expand_all::<Q5, A>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::IQ4_NL => expand_all::<Iq4, A>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::MXFP4 => expand_all::<Mx4, A>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q2_K => expand_all::<Q2K, A>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q3_K => expand_all::<Q3K, A>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q4_K => expand_all::<Q4K, A>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q5_K => expand_all::<Q5K, A>(body, layout.blocks, out.as_mut_ptr()),
            WeightType::Q6_K => expand_all::<Q6K, A>(body, layout.blocks, out.as_mut_ptr()),
            _ => {}
        }
    }
}

/// Multiplies a tile with the columns of a panel. `expanded`: what [`expand`] made of the tile, if it did.
pub(crate) fn multiply<A: Ahead>(_: Avx2, layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
    multiply_by::<Pairs<A>>(layout, tile, expanded, panel, out);
}

/// As [`multiply`], in fours.
pub(crate) fn multiply_vnni<A: Ahead>(
    _: AvxVnni,
    layout: &Layout,
    tile: &[u8],
    expanded: Option<&[u8]>,
    panel: &Panel<'_>,
    out: &mut Results,
) {
    multiply_by::<Fours<A>>(layout, tile, expanded, panel, out);
}

/// As [`multiply`]; the CPU must have the instructions of `D`, for which the callers hold a proof.
fn multiply_by<D: Dot>(layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results) {
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
    };
    let (halves, columns) = match expanded {
        None if layout.dtype == WeightType::Q8_0 && panel.n <= 3 => (2, 3),
        None if layout.dtype != WeightType::Q8_0 => D::unpacked(layout.dtype, panel.n),
        _ => (D::HALVES, D::COLUMNS),
    };
    let groups = panel.n.div_ceil(columns);
    for half in (0..2).step_by(halves) {
        for group in 0..groups {
            let columns = crate::pool::split(panel.n, groups, group, 1);
            let tile = at(half, columns.start, columns.len());
            // SAFETY: the caller's token proves the features, and the lengths were checked above.
            unsafe {
                match (expanded, halves) {
                    (None, 1) => halves_of::<D, false, 1>(layout.dtype, tile, out),
                    (None, _) => halves_of::<D, false, 2>(layout.dtype, tile, out),
                    (_, 1) => halves_of::<D::Expanded, true, 1>(layout.dtype, tile, out),
                    _ => halves_of::<D::Expanded, true, 2>(layout.dtype, tile, out),
                }
            }
        }
    }
}

/// `H` halves of a tile with up to six columns, expanded or as it is unpacked.
#[inline(always)]
unsafe fn halves_of<D: Dot, const EXPANDED: bool, const H: usize>(dtype: WeightType, tile: Tile<'_>, out: &mut Results) {
    // SAFETY: the caller's.
    unsafe {
        match dtype {
            WeightType::Q8_0 => columns!(tile.n, D::tile32::<Q8, EXPANDED; H>(tile, out)),
            WeightType::Q4_0 => columns!(tile.n, D::tile32::<Q4, EXPANDED; H>(tile, out)),
            WeightType::Q4_1 => columns!(tile.n, D::tile32::<Q4Min, EXPANDED; H>(tile, out)),
            WeightType::Q5_0 => columns!(tile.n, D::tile32::<Q5, EXPANDED; H>(tile, out)),
            WeightType::Q5_1 => columns!(tile.n, D::tile32::<Q5Min, EXPANDED; H>(tile, out)),
            WeightType::IQ4_NL => columns!(tile.n, D::tile32::<Iq4, EXPANDED; H>(tile, out)),
            WeightType::MXFP4 => columns!(tile.n, D::tile32::<Mx4, EXPANDED; H>(tile, out)),
            WeightType::Q2_K => columns!(tile.n, D::tile256::<Q2K, EXPANDED; H>(tile, out)),
            WeightType::Q3_K => columns!(tile.n, D::tile256::<Q3K, EXPANDED; H>(tile, out)),
            WeightType::Q5_K => columns!(tile.n, D::tile256::<Q5K, EXPANDED; H>(tile, out)),
            WeightType::Q4_K => columns!(tile.n, D::tile256::<Q4K, EXPANDED; H>(tile, out)),
            WeightType::Q6_K => columns!(tile.n, D::tile256::<Q6K, EXPANDED; H>(tile, out)),
            _ => unreachable!("float weights have no tiles"),
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
}

/// What weights' bias of 16 makes too much, for one of 8 where that is theirs.
#[inline(always)]
unsafe fn of_bias<W: Weights32>(offset: __m256i) -> __m256i {
    // SAFETY: the caller's.
    unsafe { if W::EIGHT { _mm256_srai_epi32::<1>(offset) } else { offset } }
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

/// How unsigned and signed bytes are multiplied.
trait Dot {
    /// How far ahead lines are asked for.
    type Ahead: Ahead;
    /// The same for expanded tiles, for which nothing is asked.
    type Expanded: Dot;
    /// Whether four products are added to a 32-bit sum at once.
    const FOURS: bool;
    /// Halves of a tile that go together with many columns: sums of both fit into the registers where pairs need none beside them.
    const HALVES: usize = if Self::FOURS { 2 } else { 1 };
    /// Columns of them, at most.
    const COLUMNS: usize = if Self::FOURS { 4 } else { 6 };

    /// Halves of a tile, and columns at most, that go together where `columns` columns are multiplied with what is unpacked. With both halves
    /// what is read of the columns serves twice, and each line is read once; with one there are registers for more columns, so that less is
    /// unpacked twice. Found by measurement.
    fn unpacked(dtype: WeightType, columns: usize) -> (usize, usize) {
        match (dtype, columns) {
            (WeightType::Q4_K, _) if !Self::FOURS => (1, MOST),
            (WeightType::Q5_K, ..=3) if !Self::FOURS => (2, 3),
            (_, 1) => (2, 1),
            (WeightType::Q5_0 | WeightType::Q5_1, ..=3) if Self::FOURS => (2, 3),
            (WeightType::Q4_0 | WeightType::Q4_1 | WeightType::IQ4_NL | WeightType::MXFP4 | WeightType::Q2_K, _) if Self::FOURS => (2, 4),
            _ => (1, MOST),
        }
    }

    /// `sums` and the products of four bytes each.
    unsafe fn fours(sums: __m256i, w: __m256i, a: __m256i) -> __m256i;

    /// [`tile32`], compiled for these instructions.
    unsafe fn tile32<W: Weights32, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results);

    /// [`tile256`], compiled for these instructions.
    unsafe fn tile256<W: Weights256, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results);
}

/// AVX2: in pairs, into 16 bits.
struct Pairs<A>(PhantomData<A>);

/// AVX-VNNI.
struct Fours<A>(PhantomData<A>);

impl<A: Ahead> Dot for Pairs<A> {
    type Ahead = A;
    type Expanded = Pairs<FarAhead>;
    const FOURS: bool = false;

    #[inline(always)]
    unsafe fn fours(_: __m256i, _: __m256i, _: __m256i) -> __m256i {
        unreachable!("kernels of pairs have their own sums")
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile32<W: Weights32, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results) {
        // SAFETY: the caller's.
        unsafe { tile32::<Self, W, EXPANDED, H, N>(tile, out) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile256<W: Weights256, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results) {
        // SAFETY: the caller's.
        unsafe { tile256::<Self, W, EXPANDED, H, N>(tile, out) }
    }
}

impl<A: Ahead> Dot for Fours<A> {
    type Ahead = A;
    type Expanded = Fours<FarAhead>;
    const FOURS: bool = true;

    #[inline(always)]
    unsafe fn fours(sums: __m256i, w: __m256i, a: __m256i) -> __m256i {
        // SAFETY: the caller's.
        unsafe { _mm256_dpbusd_avx_epi32(sums, w, a) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn tile32<W: Weights32, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results) {
        // SAFETY: the caller's.
        unsafe { tile32::<Self, W, EXPANDED, H, N>(tile, out) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn tile256<W: Weights256, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results) {
        // SAFETY: the caller's.
        unsafe { tile256::<Self, W, EXPANDED, H, N>(tile, out) }
    }
}

/// `H` halves of the tile with `N` columns.
#[inline(always)]
unsafe fn tile32<D: Dot, W: Weights32, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results) {
    // SAFETY: the caller's promise of sizes: for each block its numbers at `front`, W::BODY at `body`, 8 lines at `bytes` if EXPANDED, and of
    // the panel 32 values, a scale and an offset for each of its n columns.
    unsafe {
        let n = tile.panel.n;
        let (offsets, biases) = (tile.panel.sums.as_ptr().add(tile.column), tile.panel.offsets.as_ptr().add(tile.column));
        let ones = _mm256_set1_epi16(1);
        let mut acc = [[_mm256_setzero_ps(); N]; H];
        // A share of what is ahead with every block, the scales before the blocks of the next tile among it.
        let mut next = tile.front;
        let first = !EXPANDED && (tile.half, tile.column) == (0, 0);
        for b in 0..tile.blocks {
            if first {
                ask_ahead::<D::Ahead>(next, (W::BODY + W::FRONT).div_ceil(LINE));
                next = next.wrapping_add(W::BODY + W::FRONT);
            }
            let q = tile.panel.q.as_ptr().add(b * 32 * n + 4 * tile.column);
            let mut sums = [[_mm256_setzero_si256(); N]; H];
            if (D::FOURS || !W::SIGNED) && !W::MINS {
                for c in 0..N {
                    // −bias · Σ a: of 128 where bytes stand for signed ones, else of 16 or less.
                    let offset = if W::SIGNED { *biases.add(b * n + c) } else { *offsets.add(b * n + c) };
                    let offset = of_bias::<W>(_mm256_set1_epi32(offset));
                    for h in 0..H {
                        sums[h][c] = offset;
                    }
                }
            }
            if D::FOURS {
                for i in 0..8 {
                    for h in 0..H {
                        let w = chunk::<W, EXPANDED>(&tile, b, tile.half + h, i);
                        for c in 0..N {
                            sums[h][c] = D::fours(sums[h][c], w, four(q.add(4 * (i * n + c))));
                        }
                    }
                }
            } else if W::SIGNED {
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
                for part in 0..8 / W::SAFE {
                    for h in 0..H {
                        let mut pairs = [_mm256_setzero_si256(); N];
                        for i in W::SAFE * part..W::SAFE * (part + 1) {
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
#[inline(always)]
unsafe fn tile256<D: Dot, W: Weights256, const EXPANDED: bool, const H: usize, const N: usize>(tile: Tile<'_>, out: &mut Results) {
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
                if !EXPANDED {
                    // A share of the lines ahead with every run.
                    let lines = W::BODY / LINE * W::RUN / 256 + 1;
                    ask_ahead::<D::Ahead>(body.wrapping_add(j * lines * LINE), lines);
                }
                for h in 0..H {
                    let half = tile.half + h;
                    let scales = W::scales(body, half, j);
                    if D::FOURS {
                        let mut sums = [_mm256_setzero_si256(); N];
                        if !W::MINS {
                            for c in 0..N {
                                sums[c] = _mm256_set1_epi32(*offsets.add(j * n + c) >> W::SHIFT);
                            }
                        }
                        for i in j * chunks..(j + 1) * chunks {
                            let w = chunk::<W, EXPANDED>(&tile, b, half, i);
                            for c in 0..N {
                                sums[c] = D::fours(sums[c], w, four(q.add(4 * (i * n + c))));
                            }
                        }
                        for c in 0..N {
                            total[h][c] = _mm256_add_epi32(total[h][c], _mm256_mullo_epi32(sums[c], scales));
                        }
                        continue;
                    }
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
unsafe fn expand_all<W: Weights, A: Ahead>(body: *const u8, blocks: usize, out: *mut u8) {
    // SAFETY: the caller's promise: W::BODY bytes at `body` and W::CHUNKS lines at `out` for each block.
    unsafe {
        for b in 0..blocks {
            for c in 0..W::CHUNKS {
                if c < W::BODY / LINE {
                    ask_ahead::<A>(body.wrapping_add(b * W::BODY + c * LINE), 1);
                }
                for half in 0..2 {
                    let bytes = W::chunk(body.add(b * W::BODY), half, c);
                    _mm256_storeu_si256(out.add((b * W::CHUNKS + c) * LINE + half * 32).cast(), bytes);
                }
            }
        }
    }
}
