//! Quantization of activations, 256-bit vectors.
#![expect(unsafe_code, reason = "vector instructions and loads by pointer")]

use std::arch::x86_64::*;

use crate::Avx2;

/// As `scalar::quantize::quantize_block`, for 32 or 256 values.
pub(crate) fn quantize_block(_: Avx2, x: &[f32], q: &mut [i8]) -> f32 {
    assert!(x.len() == q.len() && x.len().is_multiple_of(32));
    // SAFETY: the token proves the features; the lengths are equal and whole runs of 32.
    unsafe { block(x, q) }
}

/// Sums of the runs of 16 values of 32 or 256, the rest 0.
pub(crate) fn run_sums(_: Avx2, q: &[i8]) -> [i32; 16] {
    // SAFETY: the token proves the features.
    unsafe { sums(q) }
}

#[target_feature(enable = "avx2")]
unsafe fn sums(q: &[i8]) -> [i32; 16] {
    let mut out = [0; 16];
    for (q, out) in q.chunks(128).zip(out.as_chunks_mut::<8>().0) {
        // SAFETY: loads of 32 values that are there, and a store of 8 sums.
        unsafe {
            let mut fours = [_mm256_setzero_si256(); 4];
            for (fours, q) in fours.iter_mut().zip(q.as_chunks::<32>().0) {
                let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256(q.as_ptr().cast()));
                *fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            }
            // Sums of the first runs of all four in the low half, of the second ones in the high half.
            let runs = _mm256_hadd_epi32(_mm256_hadd_epi32(fours[0], fours[1]), _mm256_hadd_epi32(fours[2], fours[3]));
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(runs, order));
        }
    }
    out
}

#[target_feature(enable = "avx2,fma")]
unsafe fn block(x: &[f32], q: &mut [i8]) -> f32 {
    // SAFETY: every load and store lies in a run of 32 values of `x` or `q`.
    unsafe {
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        let mut max = [_mm256_setzero_si256(); 4];
        for run in x.as_chunks::<32>().0 {
            for (i, max) in max.iter_mut().enumerate() {
                let bits = _mm256_and_si256(_mm256_loadu_si256(run.as_ptr().add(8 * i).cast()), magnitude);
                *max = _mm256_max_epi32(*max, bits);
            }
        }
        let max = _mm256_max_epi32(_mm256_max_epi32(max[0], max[1]), _mm256_max_epi32(max[2], max[3]));
        let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
        let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
        let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
        let amax = f32::from_bits(_mm_cvtsi128_si32(max).cast_unsigned());
        let inverse = 127.0 / amax;
        if !amax.is_finite() || !inverse.is_finite() {
            q.fill(0);
            return if amax.is_finite() { 0.0 } else { amax };
        }
        let inverse = _mm256_set1_ps(inverse);
        for (x, q) in x.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<32>().0) {
            // Conversion rounds half to even.
            let part = |i: usize| _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr().add(8 * i)), inverse));
            let low = _mm256_packs_epi32(part(0), part(1));
            let high = _mm256_packs_epi32(part(2), part(3));
            // Packing works within halves of 128 bits: put groups of four back in order.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
            _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes);
        }
        amax / 127.0
    }
}
