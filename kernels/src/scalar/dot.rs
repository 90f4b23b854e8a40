//! Dot products of one stored weight row with one activation, as the specification defines their bits.

use super::blocks;
use crate::WeightType;

/// A quantized activation of one token: `q` in blocks, one scale a block.
#[derive(Clone, Copy)]
pub(crate) struct Activation<'a> {
    pub(crate) q: &'a [i8],
    pub(crate) scales: &'a [f32],
}

fn product(weights: &[i8], activation: &[i8]) -> i32 {
    weights.iter().zip(activation).map(|(&w, &a)| i32::from(w) * i32::from(a)).sum()
}

fn sum(activation: &[i8]) -> i32 {
    activation.iter().copied().map(i32::from).sum()
}

/// Dot product of a quantized row, as stored, with a quantized activation.
///
/// 32-value types, for each block in the order of k: `acc = fma(d_w · d_a, Σ q·a, acc)`. 256-value types:
/// `acc = fma(d · d_a, Σ_j scale_j · Σ q·a, acc)`, and with minima then `acc = fma(−(dmin · d_a), Σ_j min_j · Σ a, acc)`. The integer
/// sums are exact.
#[inline(always)]
pub(crate) fn quantized(dtype: WeightType, row: &[u8], activation: Activation<'_>) -> f32 {
    let mut acc = 0.0_f32;
    let blocks = row.chunks_exact(dtype.block_bytes()).zip(activation.q.chunks_exact(dtype.block_len())).zip(activation.scales);
    for ((block, a), d_a) in blocks {
        match dtype {
            WeightType::Q4_K => {
                let mut q = [0; 256];
                let head = blocks::q4_k(block, &mut q);
                let (mut isum, mut msum) = (0, 0);
                for (j, (q, a)) in q.chunks_exact(32).zip(a.chunks_exact(32)).enumerate() {
                    isum += i32::from(head.scales[j]) * product(q, a);
                    msum += i32::from(head.mins[j]) * sum(a);
                }
                acc = (head.d * d_a).mul_add(isum as f32, acc);
                acc = (-(head.dmin * d_a)).mul_add(msum as f32, acc);
            }
            WeightType::Q6_K => {
                let mut q = [0; 256];
                let (d, scales) = blocks::q6_k(block, &mut q);
                let groups = q.chunks_exact(16).zip(a.chunks_exact(16)).zip(scales);
                let isum: i32 = groups.map(|((q, a), scale)| i32::from(scale) * product(q, a)).sum();
                acc = (d * d_a).mul_add(isum as f32, acc);
            }
            _ => {
                let mut q = [0; 32];
                let d = if dtype == WeightType::Q8_0 { blocks::q8_0(block, &mut q) } else { blocks::q5_0(block, &mut q) };
                acc = (d * d_a).mul_add(product(&q, a) as f32, acc);
            }
        }
    }
    acc
}

/// Dot product of two f32 vectors: lane l of 16 accumulates the k ≡ l (mod 16) in order, then the lanes fold 16→8→4→2→1, lane l taking
/// lane l + half.
#[inline(always)]
pub(crate) fn float(weights: &[f32], x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    for (w, x) in weights.chunks(16).zip(x.chunks(16)) {
        for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
            *lane = w.mul_add(*x, *lane);
        }
    }
    fold(lanes)
}

/// Sum of 16 lanes, halves added until one is left.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}
