//! Entries of 8 bits.

use super::{Entry, Head, KV_BLOCK, KV_SCALED, KvCache, KvSpan, Parts, block_of};
use crate::{
    Isa,
    simd::{Kernel, LANES, Simd, vectorize},
};

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

impl KvCache {
    /// As [`KvCache::write`], whose checks were done.
    pub(super) fn write_q8(&mut self, isa: Isa, spans: &[KvSpan<'_>], keys: &[f32], values: &[f32]) {
        vectorize(isa, Write { cache: self.parts(), spans, keys, values });
    }
}

struct Write<'a> {
    cache: Parts<'a, i8>,
    spans: &'a [KvSpan<'a>],
    keys: &'a [f32],
    values: &'a [f32],
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (head_dim, value_dim, kv_heads) = (self.cache.head_dim, self.cache.value_dim, self.cache.kv_heads);
        let width = value_dim.div_ceil(LANES);
        let mut rows = self.keys.chunks_exact(head_dim).zip(self.values.chunks_exact(value_dim));
        for span in self.spans {
            for position in span.first_position..span.first_position + span.tokens {
                let (block, slot) = (block_of(span, position, self.cache.blocks), position % KV_BLOCK);
                for (head, (new_key, new_value)) in (0..kv_heads).zip(&mut rows) {
                    let Head { keys, values, key_scales, value_scales } = self.cache.head(block, head);
                    for ((keys, scales), new) in keys.chunks_mut(KV_SCALED).zip(key_scales).zip(new_key.chunks(KV_SCALED)) {
                        let (entries, scale) = multiples(s, new);
                        keys.iter_mut().zip(entries.as_flattened()).for_each(|(lanes, &entry)| lanes[slot] = entry);
                        scales[slot] = scale;
                    }
                    let values = values[slot * width..(slot + 1) * width].chunks_mut(KV_SCALED / LANES);
                    for ((values, scales), new) in values.zip(value_scales).zip(new_value.chunks(KV_SCALED)) {
                        let (entries, scale) = multiples(s, new);
                        values.iter_mut().zip(entries).for_each(|(value, entries)| *value = entries);
                        scales[slot] = scale;
                    }
                }
            }
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
