//! Sixteen lanes of f32 as one value, on every instruction set: one text per algorithm, the same bits everywhere.
//!
//! A kernel is a type with [`Kernel::run`], generic over [`Simd`]; [`vectorize`] compiles it once per instruction set. Every operation
//! here rounds once, to nearest even, and lanes never meet except in [`Simd::fold_add`] and [`Simd::fold_max`], whose order is fixed.

use crate::isa::Isa;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 lanes; a value of the type proves that the CPU has the instructions.
pub(crate) trait Simd: Copy + Send + Sync {
    /// The vector.
    type F: Copy;
    /// Vectors that fit into the register file beside a few operands: the size of register tiles.
    const TILE: usize;
    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// Lanes from memory.
    fn load(self, x: &[f32; LANES]) -> Self::F;
    /// Lanes from memory, widened exactly.
    fn load_f16(self, x: &[u16; LANES]) -> Self::F;
    /// Lanes from memory, widened exactly.
    fn load_i8(self, x: &[i8; LANES]) -> Self::F;
    /// Lanes to memory.
    fn store(self, x: &mut [f32; LANES], v: Self::F);
    /// Lanes to memory, rounded to f16.
    fn store_f16(self, x: &mut [u16; LANES], v: Self::F);
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` when either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: `b` when either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Rounded to an integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `2^n` for integral `n` in `-126..=127`.
    fn exp2(self, n: Self::F) -> Self::F;
    /// Lanes `first .. end` of `a`, the others `other`.
    fn keep(self, a: Self::F, other: Self::F, first: usize, end: usize) -> Self::F;
    /// Lanes `2i` and `2i + 1` exchanged.
    fn swap_pairs(self, a: Self::F) -> Self::F;
    /// Bit `i` says whether `a > b` in lane `i`; never where either is NaN.
    fn above(self, a: Self::F, b: Self::F) -> u16;

    /// Fewer than 16 values from memory; the other lanes are 0.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        for (lane, &value) in lanes.iter_mut().zip(x) {
            *lane = value;
        }
        self.load(&lanes)
    }

    /// Writes the first lanes to fewer than 16 places.
    #[inline(always)]
    fn store_part(self, x: &mut [f32], v: Self::F) {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        for (value, &lane) in x.iter_mut().zip(&lanes) {
            *value = lane;
        }
    }

    /// Sum of the lanes: halves are added 16 → 8 → 4 → 2 → 1.
    #[inline(always)]
    fn fold_add(self, v: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    /// Largest lane, by the rule of [`Simd::max`], folded in the order of [`Simd::fold_add`].
    #[inline(always)]
    fn fold_max(self, v: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                let (a, b) = (lanes[i], lanes[i + half]);
                lanes[i] = if a > b { a } else { b };
            }
        }
        lanes[0]
    }
}

/// A computation written once for every instruction set; `run` is to be `#[inline(always)]`.
pub(crate) trait Kernel {
    /// Result.
    type Output;
    /// The computation.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` compiled for `isa`.
#[inline]
pub(crate) fn vectorize<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        Isa::Scalar => portable(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(proof) => x86_64::avx2(proof, kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni(proof) => x86_64::avx2(proof.avx2(), kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(proof) => x86_64::avx512(proof, kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx(proof) => x86_64::avx512(proof.avx512(), kernel),
        #[cfg(not(target_arch = "x86_64"))]
        _ => portable(kernel),
    }
}

/// Runs `kernel` as specified, compiled once.
#[inline(never)]
fn portable<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Portable)
}

/// Plain arrays: the specification.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// Applies `op` lane by lane.
#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], op: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| op(a[i], b[i]))
}

impl Simd for Portable {
    type F = [f32; LANES];
    const TILE: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::F {
        x.map(|bits| half::f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F {
        x.map(f32::from)
    }
    #[inline(always)]
    fn store(self, x: &mut [f32; LANES], v: Self::F) {
        *x = v;
    }
    #[inline(always)]
    fn store_f16(self, x: &mut [u16; LANES], v: Self::F) {
        *x = v.map(|lane| half::f16::from_f32(lane).to_bits());
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn exp2(self, n: Self::F) -> Self::F {
        n.map(|n| f32::from_bits((((n as i32) + 127) << 23) as u32))
    }
    #[inline(always)]
    fn keep(self, a: Self::F, other: Self::F, first: usize, end: usize) -> Self::F {
        std::array::from_fn(|i| if i >= first && i < end { a[i] } else { other[i] })
    }
    #[inline(always)]
    fn swap_pairs(self, a: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i ^ 1])
    }
    #[inline(always)]
    fn above(self, a: Self::F, b: Self::F) -> u16 {
        (0..LANES).fold(0, |mask, i| mask | u16::from(a[i] > b[i]) << i)
    }
}

/// AVX2 (two registers) and AVX-512 (one).
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions; each type holds the proof that the CPU has them")]
mod x86_64 {
    use std::arch::x86_64::*;

    use super::{Kernel, LANES, Simd};
    use crate::isa::{Avx2, Avx512};

    /// The number of each lane.
    const LANE_INDEX: [i32; LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

    /// Runs `kernel` with AVX2 code.
    #[inline]
    pub(super) fn avx2<K: Kernel>(_proof: Avx2, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<K: Kernel>(kernel: K) -> K::Output {
            kernel.run(Two(()))
        }
        // SAFETY: the proof says that the CPU has AVX2, FMA and F16C.
        unsafe { inner(kernel) }
    }

    /// Runs `kernel` with AVX-512 code.
    #[inline]
    pub(super) fn avx512<K: Kernel>(_proof: Avx512, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn inner<K: Kernel>(kernel: K) -> K::Output {
            kernel.run(One(()))
        }
        // SAFETY: the proof says that the CPU has AVX-512 F, BW, DQ and VL, which include AVX2, FMA and F16C.
        unsafe { inner(kernel) }
    }

    /// Two AVX2 registers; made only inside [`avx2`].
    #[derive(Clone, Copy)]
    pub(super) struct Two(());

    /// One AVX-512 register; made only inside [`avx512`].
    #[derive(Clone, Copy)]
    pub(super) struct One(());

    impl Simd for Two {
        type F = (__m256, __m256);
        const TILE: usize = 4;

        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            // SAFETY: `Two` is made only where the CPU has AVX2, FMA and F16C.
            let v = unsafe { _mm256_set1_ps(x) };
            (v, v)
        }
        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> Self::F {
            // SAFETY: as in `splat`; both loads lie within the 16 values.
            unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
        }
        #[inline(always)]
        fn load_f16(self, x: &[u16; LANES]) -> Self::F {
            // SAFETY: as in `splat`; the loads lie within the 16 values.
            unsafe { (_mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())), _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(8).cast()))) }
        }
        #[inline(always)]
        fn load_i8(self, x: &[i8; LANES]) -> Self::F {
            // SAFETY: as in `splat`; the loads lie within the 16 values.
            unsafe {
                let half = |at: usize| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().add(at).cast())));
                (half(0), half(8))
            }
        }
        #[inline(always)]
        fn store(self, x: &mut [f32; LANES], v: Self::F) {
            // SAFETY: as in `splat`; both stores lie within the 16 values.
            unsafe {
                _mm256_storeu_ps(x.as_mut_ptr(), v.0);
                _mm256_storeu_ps(x.as_mut_ptr().add(8), v.1);
            }
        }
        #[inline(always)]
        fn store_f16(self, x: &mut [u16; LANES], v: Self::F) {
            // SAFETY: as in `splat`; both stores lie within the 16 values.
            unsafe {
                _mm_storeu_si128(x.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
                _mm_storeu_si128(x.as_mut_ptr().add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
            }
        }
        #[inline(always)]
        fn add(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn sub(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn mul(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn div(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
        }
        #[inline(always)]
        fn max(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn min(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn round(self, a: Self::F) -> Self::F {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            // SAFETY: as in `splat`.
            unsafe { (_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1)) }
        }
        #[inline(always)]
        fn exp2(self, n: Self::F) -> Self::F {
            #[inline(always)]
            fn half(n: __m256) -> __m256 {
                // SAFETY: called with values of `Two` only.
                unsafe {
                    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
                }
            }
            (half(n.0), half(n.1))
        }
        #[inline(always)]
        fn keep(self, a: Self::F, other: Self::F, first: usize, end: usize) -> Self::F {
            let (first, end) = (first.min(LANES) as i32, end.min(LANES) as i32);
            // SAFETY: as in `splat`; both loads lie within the constant.
            unsafe {
                let half = |a, other, at: usize| {
                    let index = _mm256_loadu_si256(LANE_INDEX.as_ptr().add(at).cast());
                    let below = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), index);
                    let inside = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), index));
                    _mm256_blendv_ps(other, a, _mm256_castsi256_ps(inside))
                };
                (half(a.0, other.0, 0), half(a.1, other.1, 8))
            }
        }
        #[inline(always)]
        fn swap_pairs(self, a: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { (_mm256_permute_ps::<0b10_11_00_01>(a.0), _mm256_permute_ps::<0b10_11_00_01>(a.1)) }
        }
        #[inline(always)]
        fn above(self, a: Self::F, b: Self::F) -> u16 {
            // SAFETY: as in `splat`.
            let (low, high) = unsafe {
                (_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a.0, b.0)), _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a.1, b.1)))
            };
            (low | high << 8) as u16
        }
    }

    impl Simd for One {
        type F = __m512;
        const TILE: usize = 16;

        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            // SAFETY: `One` is made only where the CPU has AVX-512 F, BW, DQ and VL.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> Self::F {
            // SAFETY: as in `splat`; the load is the 16 values.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        #[inline(always)]
        fn load_f16(self, x: &[u16; LANES]) -> Self::F {
            // SAFETY: as in `splat`; the load is the 16 values.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        }
        #[inline(always)]
        fn load_i8(self, x: &[i8; LANES]) -> Self::F {
            // SAFETY: as in `splat`; the load is the 16 values.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn store(self, x: &mut [f32; LANES], v: Self::F) {
            // SAFETY: as in `splat`; the store is the 16 values.
            unsafe { _mm512_storeu_ps(x.as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn store_f16(self, x: &mut [u16; LANES], v: Self::F) {
            // SAFETY: as in `splat`; the store is the 16 values.
            unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
        }
        #[inline(always)]
        fn add(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn max(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        fn min(self, a: Self::F, b: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        fn round(self, a: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
        }
        #[inline(always)]
        fn exp2(self, n: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe {
                let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
            }
        }
        #[inline(always)]
        fn keep(self, a: Self::F, other: Self::F, first: usize, end: usize) -> Self::F {
            let below = |n: usize| (1u32 << n.min(LANES)) - 1;
            let mask = (below(end) & !below(first)) as u16;
            // SAFETY: as in `splat`.
            unsafe { _mm512_mask_blend_ps(mask, other, a) }
        }
        #[inline(always)]
        fn swap_pairs(self, a: Self::F) -> Self::F {
            // SAFETY: as in `splat`.
            unsafe { _mm512_permute_ps::<0b10_11_00_01>(a) }
        }
        #[inline(always)]
        fn above(self, a: Self::F, b: Self::F) -> u16 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) }
        }
    }
}
