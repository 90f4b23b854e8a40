//! From floats to blocks: how weights are quantized.
//!
//! A block depends on its own values and their importance alone, so rows may be converted anywhere, in any pieces, on any machine: the same
//! bytes. The simple types are ggml's; those with scales of scales search for the scale that fits best, weighted by importance.

use half::f16;

use crate::WeightType;
use crate::scalar::blocks::half_at;

/// A value that rounds to a whole number, halves away from zero.
fn nearest(x: f32) -> f32 {
    x.round()
}

/// 1 / x, or 0.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// The value of the largest magnitude; the first of equals.
fn peak(x: &[f32]) -> f32 {
    x.iter().copied().reduce(|peak, x| if x.abs() > peak.abs() { x } else { peak }).unwrap_or(0.0)
}

/// Nibbles (and fifth bits at `high`) of 32 integers.
fn put_nibbles(block: &mut [u8], q: &[u8; 32], at: usize, high: Option<usize>) {
    for j in 0..16 {
        block[at + j] = (q[j] & 15) | (q[j + 16] & 15) << 4;
    }
    if let Some(high) = high {
        for (i, q) in q.iter().enumerate() {
            block[high + i / 8] |= (q >> 4 & 1) << (i % 8);
        }
    }
}

/// Quantizes one block of values into `block`, which is zero. `importance`: how much the error of each value counts.
pub(crate) fn quantize(dtype: WeightType, x: &[f32], importance: Option<&[f32]>, block: &mut [u8]) {
    match dtype {
        WeightType::Q8_0 => {
            let d = peak(x).abs() / 127.0;
            let id = inverse(d);
            put_half(block, 0, d);
            for (to, x) in block[2..].iter_mut().zip(x) {
                *to = (nearest(x * id) as i8).cast_unsigned();
            }
        }
        WeightType::Q4_0 | WeightType::Q5_0 => {
            let half = if dtype == WeightType::Q4_0 { 8.0 } else { 16.0 };
            let d = peak(x) / -half;
            let id = inverse(d);
            put_half(block, 0, d);
            let q = std::array::from_fn(|i| (x[i] * id + (half + 0.5)).trunc().clamp(0.0, 2.0 * half - 1.0) as u8);
            if dtype == WeightType::Q4_0 { put_nibbles(block, &q, 2, None) } else { put_nibbles(block, &q, 6, Some(2)) }
        }
        WeightType::Q4_1 | WeightType::Q5_1 => {
            let levels = if dtype == WeightType::Q4_1 { 15.0 } else { 31.0 };
            let (low, high) = x.iter().fold((f32::MAX, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)));
            let d = (high - low) / levels;
            let id = inverse(d);
            put_half(block, 0, d);
            put_half(block, 2, low);
            let q = std::array::from_fn(|i| ((x[i] - low) * id + 0.5).trunc().clamp(0.0, levels) as u8);
            if dtype == WeightType::Q4_1 { put_nibbles(block, &q, 4, None) } else { put_nibbles(block, &q, 8, Some(4)) }
        }
        WeightType::Q4_K | WeightType::Q5_K => with_minima(dtype, x, importance, block),
        WeightType::Q6_K => six_bits(x, importance, block),
        _ => unreachable!("nothing is converted to {dtype}"),
    }
}

/// How much the errors of a run's values count: by default more for larger ones.
fn weights(x: &[f32], importance: Option<&[f32]>) -> [f32; 32] {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let size = mean.sqrt();
    let mut weights = [0.0; 32];
    for (i, (weight, x)) in weights.iter_mut().zip(x).enumerate() {
        *weight = importance.map_or(size + x.abs(), |given| given[i]);
    }
    weights
}

/// Scale and minimum with which `levels + 1` integers come closest to `x`, as `scale · q − minimum`, both at least 0.
fn fit_with_minimum(x: &[f32], weights: &[f32], levels: f32) -> (f32, f32) {
    let (low, high) = x.iter().fold((0.0_f32, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)));
    if high <= low {
        return (0.0, -low);
    }
    let error = |scale: f32, min: f32| {
        let id = inverse(scale);
        x.iter()
            .zip(weights)
            .map(|(x, w)| {
                let q = nearest((x + min) * id).clamp(0.0, levels);
                let off = scale * q - min - x;
                w * off * off
            })
            .sum::<f32>()
    };
    let mut best = ((high - low) / levels, -low);
    let mut least = error(best.0, best.1);
    for step in 0..=20 {
        let id = (levels - 1.0 + 0.1 * step as f32) / (high - low);
        // The line through the integers that this scale gives, by least squares.
        let (mut w, mut l, mut l2, mut xl, mut xs) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (x, weight) in x.iter().zip(weights) {
            let q = nearest((x - low) * id).clamp(0.0, levels);
            w += weight;
            l += weight * q;
            l2 += weight * q * q;
            xl += weight * q * x;
            xs += weight * x;
        }
        let determinant = w * l2 - l * l;
        if determinant <= 0.0 {
            continue;
        }
        let (mut scale, mut min) = ((w * xl - xs * l) / determinant, (l * xs - l2 * xl) / determinant);
        if min < 0.0 {
            (scale, min) = (xl / l2, 0.0);
        }
        if scale <= 0.0 || !scale.is_finite() {
            continue;
        }
        let off = error(scale, min);
        if off < least {
            (least, best) = (off, (scale, min));
        }
    }
    best
}

/// Q4_K and Q5_K: eight runs of 32 with scales and minima of 6 bits.
fn with_minima(dtype: WeightType, x: &[f32], importance: Option<&[f32]>, block: &mut [u8]) {
    let levels = if dtype == WeightType::Q4_K { 15.0 } else { 31.0 };
    let (mut scales, mut mins) = ([0.0_f32; 8], [0.0_f32; 8]);
    for (j, run) in x.chunks_exact(32).enumerate() {
        let weights = weights(run, importance.map(|given| &given[32 * j..32 * j + 32]));
        (scales[j], mins[j]) = fit_with_minimum(run, &weights, levels);
    }
    let most = |values: &[f32; 8]| values.iter().fold(0.0_f32, |most, &value| most.max(value));
    let (scale_id, min_id) = (inverse(most(&scales) / 63.0), inverse(most(&mins) / 63.0));
    put_half(block, 0, most(&scales) / 63.0);
    put_half(block, 2, most(&mins) / 63.0);
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let six = |value: f32, id: f32| nearest(value * id).clamp(0.0, 63.0) as u8;
    let scales = scales.map(|scale| six(scale, scale_id));
    let mins = mins.map(|min| six(min, min_id));
    for j in 0..4 {
        block[4 + j] = scales[j] | (scales[j + 4] >> 4) << 6;
        block[8 + j] = mins[j] | (mins[j + 4] >> 4) << 6;
        block[12 + j] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
    let five = dtype == WeightType::Q5_K;
    for (i, &x) in x.iter().enumerate() {
        let j = i / 32;
        let id = inverse(d * f32::from(scales[j]));
        let q = nearest((x + dmin * f32::from(mins[j])) * id).clamp(0.0, levels) as u8;
        block[if five { 48 } else { 16 } + 32 * (i / 64) + i % 32] |= (q & 15) << (4 * (j % 2));
        if five {
            block[16 + i % 32] |= (q >> 4) << j;
        }
    }
}

/// Scale with which integers in −32..32 come closest to `x`.
fn fit(x: &[f32], weights: &[f32]) -> f32 {
    let peak = peak(x);
    if peak.abs() < 1e-15 {
        return 0.0;
    }
    let (mut best, mut most) = (0.0, 0.0);
    for step in -9_i32..=9 {
        let id = -(32.0 + 0.1 * step as f32) / peak;
        let (mut xl, mut l2) = (0.0, 0.0);
        for (x, weight) in x.iter().zip(weights) {
            let q = nearest(x * id).clamp(-32.0, 31.0);
            xl += weight * x * q;
            l2 += weight * q * q;
        }
        // What the best scale for these integers takes off the error.
        if l2 > 0.0 && xl * xl > most * l2 {
            (most, best) = (xl * xl / l2, xl / l2);
        }
    }
    best
}

/// Q6_K: sixteen runs of 16 with signed scales of 8 bits.
fn six_bits(x: &[f32], importance: Option<&[f32]>, block: &mut [u8]) {
    let mut scales = [0.0_f32; 16];
    for (j, run) in x.chunks_exact(16).enumerate() {
        let weights = weights(run, importance.map(|given| &given[16 * j..16 * j + 16]));
        scales[j] = fit(run, &weights);
    }
    let peak = peak(&scales);
    put_half(block, 208, peak / -128.0);
    let (d, id) = (half_at(block, 208), inverse(peak / -128.0));
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
