//! Entries of 8 bits.

use super::{Entry, Head, KV_SCALED, Stored};
use crate::simd::{LANES, Simd};

/// Largest multiple.
const MOST: f32 = 127.0;
/// Largest finite f16.
const LARGEST: f32 = 65504.0;

/// A multiple of a scale.
impl Entry for i8 {
    const SCALED: bool = true;
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load_i8(from)
    }
}

impl Stored for i8 {
    #[inline(always)]
    fn put<S: Simd>(s: S, head: Head<'_, Self>, slot: usize, key: &[f32], value: &[f32]) {
        for ((keys, scales), new) in head.keys.chunks_mut(KV_SCALED).zip(head.key_scales).zip(key.chunks(KV_SCALED)) {
            let (entries, scale) = multiples(s, new);
            keys.iter_mut().zip(entries.as_flattened()).for_each(|(lanes, &entry)| lanes[slot] = entry);
            scales[slot] = scale;
        }
        let width = value.len().div_ceil(LANES);
        let values = head.values[slot * width..(slot + 1) * width].chunks_mut(KV_SCALED / LANES);
        for ((values, scales), new) in values.zip(head.value_scales).zip(value.chunks(KV_SCALED)) {
            let (entries, scale) = multiples(s, new);
            values.iter_mut().zip(entries).for_each(|(value, entries)| *value = entries);
            scales[slot] = scale;
        }
    }
}

/// Up to 32 values as multiples of a scale, and the scale's bits; the rest is 0.
#[inline(always)]
fn multiples<S: Simd>(s: S, values: &[f32]) -> ([[i8; LANES]; 2], u16) {
    let mut lanes = [[0.0; LANES]; 2];
    lanes.as_flattened_mut().iter_mut().zip(values).for_each(|(lane, &value)| *lane = value);
    let (a, b, zero) = (s.load(&lanes[0]), s.load(&lanes[1]), s.splat(0.0));
    let size = |v| s.max(v, s.sub(zero, v));
    let top = s.fold_max(s.max(size(a), size(b)));
    let mut bits = [0; LANES];
    s.store_f16(&mut bits, s.min(s.splat(top / MOST), s.splat(LARGEST)));
    let mut entries = [[0; LANES]; 2];
    // Nothing is a multiple of nothing.
    if bits[0] != 0 {
        let scale = s.load_f16(&bits);
        for (entries, v) in entries.iter_mut().zip([a, b]) {
            let multiple = s.round(s.div(v, scale));
            s.store(&mut lanes[0], s.max(s.min(multiple, s.splat(MOST)), s.splat(-MOST)));
            *entries = lanes[0].map(|multiple| multiple as i8);
        }
    }
    (entries, bits[0])
}
