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
/// 32-value types, for each block in the order of k: `acc = fma(d_w · d_a, Σ q·a, acc)`, and where a value is added to all of the block
/// `acc = fma(m · d_a, Σ a, acc)`. 256-value types: `acc = fma(d · d_a, Σ_j scale_j · Σ q·a, acc)`, and with minima then
/// `acc = fma(−(dmin · d_a), Σ_j min_j · Σ a, acc)`. The integer sums are exact.
#[inline(always)]
pub(crate) fn quantized(dtype: WeightType, row: &[u8], activation: Activation<'_>) -> f32 {
    let mut acc = 0.0_f32;
    let blocks = row.chunks_exact(dtype.block_bytes()).zip(activation.q.chunks_exact(dtype.block_len())).zip(activation.scales);
    for ((block, a), d_a) in blocks {
        if dtype.block_len() == 32 {
            let mut q = [0; 32];
            let head = blocks::of_32(dtype, block, &mut q);
            acc = (head.d * d_a).mul_add(product(&q, a) as f32, acc);
            if let Some(m) = head.m {
                acc = (m * d_a).mul_add(sum(a) as f32, acc);
            }
            continue;
        }
        let mut q = [0; 256];
        let head = blocks::of_256(dtype, block, &mut q);
        let runs = || q.chunks_exact(head.run).zip(a.chunks_exact(head.run));
        let isum: i32 = runs().zip(head.scales).map(|((q, a), scale)| i32::from(scale) * product(q, a)).sum();
        acc = (head.d * d_a).mul_add(isum as f32, acc);
        if let Some((dmin, mins)) = head.mins {
            let msum: i32 = runs().zip(mins).map(|((_, a), min)| i32::from(min) * sum(a)).sum();
            acc = (-(dmin * d_a)).mul_add(msum as f32, acc);
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
