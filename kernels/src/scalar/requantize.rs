//! From floats to blocks: how weights are quantized.
//!
//! A block depends on its own values and their importance alone, so rows may be converted anywhere, in any pieces, on any machine: the same
//! bytes. Without importance the simple types are ggml's; the others, and with importance all but Q8_0, search for the scale that fits best.

mod fit;
mod runs;

use half::f16;

use crate::WeightType;
use crate::scalar::blocks::{IQ4_NL, half_at};

use self::fit::{Offset, Weights, inverse, nearest, peak};

fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
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

/// Quantizes one block of values into `block`, which is zero. `importance`: how much the error of each value counts, where that is known.
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
            let q = match importance {
                None => {
                    let d = peak(x) / -half;
                    let id = inverse(d);
                    put_half(block, 0, d);
                    std::array::from_fn(|i| (x[i] * id + (half + 0.5)).trunc().clamp(0.0, 2.0 * half - 1.0) as u8)
                }
                Some(_) => {
                    put_half(block, 0, fit::scale(x, &Weights::new(x, importance), -half, (-half, half - 1.0)));
                    let id = inverse(half_at(block, 0));
                    std::array::from_fn(|i| (nearest(x[i] * id).clamp(-half, half - 1.0) + half) as u8)
                }
            };
            if dtype == WeightType::Q4_0 { put_nibbles(block, &q, 2, None) } else { put_nibbles(block, &q, 6, Some(2)) }
        }
        WeightType::Q4_1 | WeightType::Q5_1 => {
            let levels = if dtype == WeightType::Q4_1 { 15.0 } else { 31.0 };
            let q = match importance {
                None => {
                    let (low, high) = x.iter().fold((f32::MAX, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)));
                    let d = (high - low) / levels;
                    let id = inverse(d);
                    put_half(block, 0, d);
                    put_half(block, 2, low);
                    std::array::from_fn(|i| ((x[i] - low) * id + 0.5).trunc().clamp(0.0, levels) as u8)
                }
                Some(_) => {
                    let (d, min) = fit::line(x, &Weights::new(x, importance), levels, Offset::Any);
                    put_half(block, 0, d);
                    put_half(block, 2, -min);
                    let (id, low) = (inverse(half_at(block, 0)), half_at(block, 2));
                    std::array::from_fn(|i| nearest((x[i] - low) * id).clamp(0.0, levels) as u8)
                }
            };
            if dtype == WeightType::Q4_1 { put_nibbles(block, &q, 4, None) } else { put_nibbles(block, &q, 8, Some(4)) }
        }
        WeightType::IQ4_NL => {
            put_half(block, 0, fit::scale_of_table(x, &Weights::new(x, importance), &IQ4_NL));
            let id = inverse(half_at(block, 0));
            put_nibbles(block, &std::array::from_fn(|i| fit::nearest_of(&IQ4_NL, x[i] * id)), 2, None);
        }
        WeightType::Q2_K | WeightType::Q4_K | WeightType::Q5_K => runs::with_minima(dtype, x, importance, block),
        WeightType::Q3_K => runs::three_bits(x, importance, block),
        WeightType::Q6_K => runs::six_bits(x, importance, block),
        _ => unreachable!("nothing is converted to {dtype}"),
    }
}
