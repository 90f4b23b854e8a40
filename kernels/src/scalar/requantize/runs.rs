//! Blocks of 256 values: runs with scales of their own, which are integers of a common scale.

use super::{
    fit::{Offset, Weights, inverse, line, nearest, peak, scale, scale_of_scales},
    put_half,
};
use crate::WeightType;
use crate::scalar::blocks::half_at;

/// Q2_K: sixteen runs of 16 with scales and minima of 4 bits. Q4_K and Q5_K: eight runs of 32 with scales and minima of 6 bits.
pub(super) fn with_minima(dtype: WeightType, x: &[f32], importance: Option<&[f32]>, block: &mut [u8]) {
    let (run, levels, most, at) = match dtype {
        WeightType::Q2_K => (16, 3.0, 15.0, 80),
        WeightType::Q4_K => (32, 15.0, 63.0, 0),
        _ => (32, 31.0, 63.0, 0),
    };
    let (mut scales, mut mins, mut sums) = ([0.0_f32; 16], [0.0_f32; 16], [0.0_f32; 16]);
    for (j, x) in x.chunks_exact(run).enumerate() {
        let weights = Weights::new(x, importance.map(|given| &given[run * j..run * (j + 1)]));
        (scales[j], mins[j]) = line(x, &weights, levels, Offset::AtLeastZero);
        sums[j] = weights.sum();
    }
    let whole = |values: &[f32; 16]| match (dtype, importance) {
        (WeightType::Q4_K | WeightType::Q5_K, None) => values.iter().fold(0.0_f32, |most, &value| most.max(value)) / most,
        _ => scale_of_scales(values, sums, most, (0.0, most)),
    };
    let (scale_id, min_id) = (inverse(whole(&scales)), inverse(whole(&mins)));
    put_half(block, at, whole(&scales));
    put_half(block, at + 2, whole(&mins));
    let (d, dmin) = (half_at(block, at), half_at(block, at + 2));
    let integer = |value: f32, id: f32| nearest(value * id).clamp(0.0, most) as u8;
    let scales = scales.map(|scale| integer(scale, scale_id));
    let mins = mins.map(|min| integer(min, min_id));
    let q = |i: usize| {
        let id = inverse(d * f32::from(scales[i / run]));
        nearest((x[i] + dmin * f32::from(mins[i / run])) * id).clamp(0.0, levels) as u8
    };
    if dtype == WeightType::Q2_K {
        for (j, (scale, min)) in scales.into_iter().zip(mins).enumerate() {
            block[j] = scale | min << 4;
        }
        for i in 0..256 {
            block[16 + 32 * (i / 128) + i % 32] |= q(i) << (2 * (i / 32 % 4));
        }
        return;
    }
    for j in 0..4 {
        block[4 + j] = scales[j] | (scales[j + 4] >> 4) << 6;
        block[8 + j] = mins[j] | (mins[j + 4] >> 4) << 6;
        block[12 + j] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
    let five = dtype == WeightType::Q5_K;
    for i in 0..256 {
        let (j, q) = (i / 32, q(i));
        block[if five { 48 } else { 16 } + 32 * (i / 64) + i % 32] |= (q & 15) << (4 * (j % 2));
        if five {
            block[16 + i % 32] |= (q >> 4) << j;
        }
    }
}

/// Scales of sixteen runs of 16 values, with which integers in −half..half come closest, and how much each counts.
fn signed(x: &[f32], importance: Option<&[f32]>, half: f32) -> ([f32; 16], [f32; 16]) {
    let (mut scales, mut sums) = ([0.0; 16], [0.0; 16]);
    for (j, x) in x.chunks_exact(16).enumerate() {
        let weights = Weights::new(x, importance.map(|given| &given[16 * j..16 * j + 16]));
        scales[j] = scale(x, &weights, -half, (-half, half - 1.0));
        sums[j] = weights.sum();
    }
    (scales, sums)
}

/// Q3_K: sixteen runs of 16 with signed scales of 6 bits.
pub(super) fn three_bits(x: &[f32], importance: Option<&[f32]>, block: &mut [u8]) {
    let (scales, sums) = signed(x, importance, 4.0);
    let whole = scale_of_scales(&scales, sums, -32.0, (-32.0, 31.0));
    put_half(block, 108, whole);
    let (d, id) = (half_at(block, 108), inverse(whole));
    for (j, scale) in scales.into_iter().enumerate() {
        let scale = nearest(scale * id).clamp(-32.0, 31.0);
        let stored = (scale as i8 + 32).cast_unsigned();
        block[96 + j % 8] |= (stored & 15) << (4 * (j / 8));
        block[104 + j % 4] |= (stored >> 4) << (2 * (j / 4));
        let id = inverse(d * scale);
        for (i, x) in x.iter().enumerate().skip(16 * j).take(16) {
            let q = (nearest(x * id).clamp(-4.0, 3.0) as i8 + 4).cast_unsigned();
            block[32 + 32 * (i / 128) + i % 32] |= (q & 3) << (2 * (i / 32 % 4));
            block[i % 32] |= (q >> 2) << (i / 32);
        }
    }
}

/// Q6_K: sixteen runs of 16 with signed scales of 8 bits.
pub(super) fn six_bits(x: &[f32], importance: Option<&[f32]>, block: &mut [u8]) {
    let (scales, sums) = signed(x, importance, 32.0);
    let whole = match importance {
        None => peak(&scales) / -128.0,
        Some(_) => scale_of_scales(&scales, sums, -128.0, (-128.0, 127.0)),
    };
    put_half(block, 208, whole);
    let (d, id) = (half_at(block, 208), inverse(whole));
    for (j, scale) in scales.into_iter().enumerate() {
        let scale = nearest(scale * id).clamp(-128.0, 127.0) as i8;
        block[192 + j] = scale.cast_unsigned();
        let id = inverse(d * f32::from(scale));
        for (i, x) in x.iter().enumerate().skip(16 * j).take(16) {
            let q = (nearest(x * id).clamp(-32.0, 31.0) as i8 + 32).cast_unsigned();
            let (half, field, l) = (i / 128, i / 32 % 4, i % 32);
            block[64 * half + 32 * (field % 2) + l] |= (q & 15) << (4 * (field / 2));
            block[128 + 32 * half + l] |= (q >> 4) << (2 * field);
        }
    }
}
