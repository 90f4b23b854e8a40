//! What the machine can do: read bandwidth of memory, and 8-bit multiplications. Measured figures stand beside these.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "vector instructions"))]

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::memory::AlignedBytes;
use crate::pool::split;
use crate::{Isa, Pool};

/// Bytes read per pass: far more than any cache holds for long.
const BYTES: usize = 256 << 20;

/// Memory to read again and again.
#[derive(Debug)]
pub struct Memory(AlignedBytes);

impl Memory {
    /// 256 MiB, which each of the pool's threads touches its own part of first, as the packing of a matrix does.
    pub fn new(pool: &Pool) -> Self {
        let mut buffer = AlignedBytes::zeroed(BYTES);
        pool.for_rows(&mut buffer, 4096, 1, |_, part| part.fill(1));
        Self(buffer)
    }

    /// Bytes per second that a pool's threads together read: the best of `passes` passes with the loads of each instruction set of this
    /// CPU, since wider ones keep more under way.
    pub fn read_bandwidth(&self, pool: &Pool, passes: usize) -> f64 {
        let mut best = f64::INFINITY;
        // AVX-VNNI loads as AVX2 does, and AMX comes with AVX-512.
        let ways: Vec<Isa> = Isa::available().into_iter().filter(|isa| !matches!(isa, Isa::AvxVnni(_) | Isa::Amx(_))).collect();
        for &isa in std::iter::repeat_n(&ways, passes).flatten() {
            let total = AtomicU64::new(0);
            let start = Instant::now();
            pool.run(&|thread| {
                total.fetch_add(read(isa, &self.0[split(BYTES, pool.threads(), thread, 4096)]), Ordering::Relaxed);
            });
            best = best.min(start.elapsed().as_secs_f64());
            black_box(total.into_inner());
        }
        BYTES as f64 / best
    }
}

/// A sum over all words of whole lines, for which each is loaded.
fn read(isa: Isa, part: &[u8]) -> u64 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the features.
        Isa::Avx512(_) => unsafe { read512(part) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the features.
        Isa::Avx2(_) => unsafe { words256(part) },
        _ => words(part),
    }
}

#[inline(always)]
fn words(part: &[u8]) -> u64 {
    let mut sums = [0_u64; 16];
    for line in part.as_chunks::<128>().0 {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn words256(part: &[u8]) -> u64 {
    words(part)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn read512(part: &[u8]) -> u64 {
    use std::arch::x86_64::*;

    let mut sums = [_mm512_setzero_si512(); 4];
    for lines in part.as_chunks::<256>().0 {
        for (sum, line) in sums.iter_mut().zip(lines.as_chunks::<64>().0) {
            // SAFETY: the 64 bytes of a line.
            *sum = _mm512_add_epi64(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
        }
    }
    _mm512_reduce_add_epi64(sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi64(a, b))) as u64
}

/// Multiplications and additions per second of 8-bit values that the pool's threads together do in registers with `isa`: the best of
/// `passes` short passes.
pub fn int8_peak(pool: &Pool, isa: Isa, passes: usize) -> f64 {
    let rounds = 200_000;
    let mut best = f64::INFINITY;
    for _ in 0..passes {
        let start = Instant::now();
        pool.run(&|thread| {
            black_box(multiply(isa, rounds, black_box(thread as i32)));
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    let products = match isa {
        Isa::Scalar => 1,
        Isa::Avx2(_) => MADDUBS * 32,
        Isa::AvxVnni(_) => 12 * 32,
        Isa::Avx512(_) => 12 * 64,
        Isa::Amx(_) => TILES * 16 * 16 * 64,
    };
    (rounds * products * pool.threads()) as f64 / best
}

/// Accumulators of the AVX2 probe, which with as many operands fill the registers.
const MADDUBS: usize = 6;

/// Accumulators of the probe of the matrix unit.
const TILES: usize = 4;

/// Dependent only through accumulators, like the kernels.
fn multiply(isa: Isa, rounds: usize, seed: i32) -> i32 {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the features.
        Isa::Avx512(_) => unsafe { vnni(rounds, seed) },
        #[cfg(target_arch = "x86_64")]
        Isa::Amx(proof) => {
            crate::x86_64::amx::products(proof, rounds);
            seed
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the features.
        Isa::AvxVnni(_) => unsafe { vnni256(rounds, seed) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token proves the features.
        Isa::Avx2(_) => unsafe { maddubs(rounds, seed) },
        _ => (0..rounds as i32).fold(seed, |acc, i| black_box(i).wrapping_mul(seed).wrapping_add(acc)),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn vnni(rounds: usize, seed: i32) -> i32 {
    use std::arch::x86_64::*;

    let (a, b) = (_mm512_set1_epi32(seed), _mm512_set1_epi32(seed + 1));
    let mut acc = [_mm512_setzero_si512(); 12];
    for _ in 0..rounds {
        for acc in &mut acc {
            *acc = _mm512_dpbusd_epi32(*acc, a, b);
        }
    }
    _mm512_reduce_add_epi32(acc.into_iter().fold(a, |a, b| _mm512_add_epi32(a, b)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn vnni256(rounds: usize, seed: i32) -> i32 {
    use std::arch::x86_64::*;

    let (a, b) = (_mm256_set1_epi32(seed), _mm256_set1_epi32(seed + 1));
    let mut acc = [_mm256_setzero_si256(); 12];
    for _ in 0..rounds {
        for acc in &mut acc {
            *acc = _mm256_dpbusd_avx_epi32(*acc, a, b);
        }
    }
    let sum = acc.into_iter().fold(a, |a, b| _mm256_add_epi32(a, b));
    _mm256_extract_epi32::<0>(sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn maddubs(rounds: usize, seed: i32) -> i32 {
    use std::arch::x86_64::*;

    // Different operands for each accumulator, one of them new in each round, so that no product is computed once for several.
    let b: [__m256i; MADDUBS] = std::array::from_fn(|i| _mm256_set1_epi32(seed + 1 + i as i32));
    let (mut a, one) = (_mm256_set1_epi32(seed), _mm256_set1_epi8(1));
    let mut acc = [_mm256_setzero_si256(); MADDUBS];
    for _ in 0..rounds {
        a = _mm256_add_epi8(a, one);
        for (acc, b) in acc.iter_mut().zip(b) {
            *acc = _mm256_add_epi16(*acc, _mm256_maddubs_epi16(a, b));
        }
    }
    let sum = acc.into_iter().fold(a, |a, b| _mm256_add_epi32(a, b));
    _mm256_extract_epi32::<0>(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_measure_something() {
        let pool = Pool::new(1);
        for isa in Isa::available() {
            assert!(int8_peak(&pool, isa, 1) > 0.0);
        }
        assert!(Memory::new(&pool).read_bandwidth(&pool, 1) > 0.0);
    }
}
