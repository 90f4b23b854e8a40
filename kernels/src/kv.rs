//! The paged key-value cache of one layer.
//!
//! A block holds 16 consecutive positions of one sequence. Keys lie as `[kv_head][dimension][16 positions]`, so that a query meets 16 keys
//! in the lanes of one vector; values as `[kv_head][16 positions][dimension]`, each row padded to whole vectors. Keys and values may have
//! different numbers of dimensions. Entries of 8 bits have scales: those of 32 dimensions lie together for the 16 positions of a block.

use std::ops::Range;

mod q8;

use crate::{
    Isa,
    memory::{AlignedBytes, Number},
    simd::{Kernel, LANES, Simd, vectorize},
};

/// Positions in a block.
pub const KV_BLOCK: usize = LANES;

/// Entry of a block table that has no block: it was freed, or is not there yet.
pub const ABSENT: u32 = u32::MAX;

/// Dimensions of a head that share a scale, where entries have one.
pub const KV_SCALED: usize = 2 * LANES;

/// How entries are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// As computed.
    F32,
    /// Rounded to nearest even.
    F16,
    /// As whole multiples, -127 to 127, of a scale `d` for 32 dimensions of a head: `d = f16(min(max |x| / 127, 65504))`, the multiple is
    /// `x / d` rounded to nearest even (0 where `d` is 0), and the entry counts as their product.
    Q8,
}

impl KvType {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Q8];

    /// Size of an entry, its scale aside.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Q8 => 1,
        }
    }

    /// Scales of a head of `dim` dimensions at a position.
    fn scales(self, dim: usize) -> usize {
        if self == Self::Q8 { dim.div_ceil(KV_SCALED) } else { 0 }
    }
}

/// Consecutive tokens of one sequence, and where its keys and values lie.
#[derive(Clone, Copy, Debug)]
pub struct KvSpan<'a> {
    /// Block of positions `16 i .. 16 i + 16` at `i`; [`ABSENT`], or anything, for those that no token of the span sees.
    pub table: &'a [u32],
    /// Position of the first token.
    pub first_position: usize,
    /// Number of tokens.
    pub tokens: usize,
}

/// Why a block was not imported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// The bytes are not one block of this cache's shape.
    #[error("a block has {expected} bytes, got {got}")]
    Size {
        /// Bytes of a block.
        expected: usize,
        /// Bytes handed over.
        got: usize,
    },
}

/// Keys and values of one layer, in blocks of 16 positions. Memory is taken from the system as blocks are first written.
#[derive(Debug)]
pub struct KvCache {
    dtype: KvType,
    blocks: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    keys: AlignedBytes,
    values: AlignedBytes,
    /// f16, `[block][kv_head][scales][16 positions]`.
    key_scales: AlignedBytes,
    value_scales: AlignedBytes,
}

impl KvCache {
    /// A cache of `blocks` blocks, zero at first; a head has `head_dim` values of keys and `value_dim` of values.
    ///
    /// # Panics
    /// If there are no heads, they have no dimensions, or the size overflows.
    pub fn new(dtype: KvType, blocks: usize, kv_heads: usize, (head_dim, value_dim): (usize, usize)) -> Self {
        assert!(kv_heads > 0 && head_dim > 0 && value_dim > 0, "{kv_heads} heads of {head_dim} and {value_dim}");
        let bytes = |width: usize, size: usize| {
            AlignedBytes::zeroed(blocks.checked_mul(kv_heads * width * KV_BLOCK * size).expect("the size of a cache fits usize"))
        };
        Self {
            dtype,
            blocks,
            kv_heads,
            head_dim,
            value_dim,
            keys: bytes(head_dim, dtype.bytes()),
            values: bytes(value_dim.next_multiple_of(LANES), dtype.bytes()),
            key_scales: bytes(dtype.scales(head_dim), size_of::<u16>()),
            value_scales: bytes(dtype.scales(value_dim), size_of::<u16>()),
        }
    }

    /// How entries are stored.
    pub fn dtype(&self) -> KvType {
        self.dtype
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Number of key-value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Values of a head of the keys.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Values of a head of the values.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Size of the whole cache, `blocks · kv_heads · 16 · (head_dim + value_dim)` entries (values' heads rounded up to whole vectors of 16)
    /// and their scales.
    pub fn bytes(&self) -> usize {
        self.keys.len() + self.values.len() + self.key_scales.len() + self.value_scales.len()
    }

    /// Stores the keys, `[tokens, kv_heads, head_dim]`, and values, `[tokens, kv_heads, value_dim]`, of the tokens of all spans.
    ///
    /// # Panics
    /// If the sizes differ, or a token has no block in its table.
    pub fn write(&mut self, isa: Isa, spans: &[KvSpan<'_>], keys: &[f32], values: &[f32]) {
        let tokens: usize = spans.iter().map(|span| span.tokens).sum();
        let (heads, head_dim, value_dim) = (self.kv_heads, self.head_dim, self.value_dim);
        assert_eq!(keys.len(), tokens * heads * head_dim, "keys of {tokens} tokens of {heads} heads of {head_dim}");
        assert_eq!(values.len(), tokens * heads * value_dim, "values of {tokens} tokens of {heads} heads of {value_dim}");
        match self.dtype {
            KvType::F32 => vectorize(isa, Write::<f32> { cache: self.parts(), spans, keys, values }),
            KvType::F16 => vectorize(isa, Write::<u16> { cache: self.parts(), spans, keys, values }),
            KvType::Q8 => vectorize(isa, Write::<i8> { cache: self.parts(), spans, keys, values }),
        }
    }

    /// Makes block `to` equal to block `from`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let (from, to) = (self.index(from), self.index(to));
        for bytes in [&mut self.keys, &mut self.values, &mut self.key_scales, &mut self.value_scales] {
            let size = bytes.len() / self.blocks;
            bytes.copy_within(from * size..(from + 1) * size, to * size);
        }
    }

    /// Size of an exported block.
    pub fn exported_bytes(&self) -> usize {
        let of = |dim: usize| dim * self.dtype.bytes() + self.dtype.scales(dim) * size_of::<u16>();
        self.kv_heads * KV_BLOCK * (of(self.head_dim) + of(self.value_dim))
    }

    /// Appends a block to `out` in a layout that does not depend on how heads are spread over ranks: for each head keys, `[16][head_dim]`,
    /// then values, `[16][value_dim]`, entries little-endian; then, where entries have scales, those of keys, `[16][scales]`, and of values. The blocks of several ranks, in the order of their heads, are the block of one that has all heads.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn export_block(&self, block: u32, out: &mut Vec<u8>) {
        let block = self.index(block);
        match self.dtype {
            KvType::F32 => self.export(block, out, |entry: f32, out| out.extend(entry.to_le_bytes())),
            KvType::F16 => self.export(block, out, |entry: u16, out| out.extend(entry.to_le_bytes())),
            KvType::Q8 => self.export(block, out, |entry: i8, out| out.extend(entry.to_le_bytes())),
        }
    }

    /// Stores what [`KvCache::export_block`] gave.
    ///
    /// # Errors
    /// If `bytes` has another size than a block.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn import_block(&mut self, block: u32, bytes: &[u8]) -> Result<(), KvError> {
        let block = self.index(block);
        if bytes.len() != self.exported_bytes() {
            return Err(KvError::Size { expected: self.exported_bytes(), got: bytes.len() });
        }
        match self.dtype {
            KvType::F32 => self.import(block, bytes, f32::from_le_bytes),
            KvType::F16 => self.import(block, bytes, u16::from_le_bytes),
            KvType::Q8 => self.import(block, bytes, i8::from_le_bytes),
        }
        Ok(())
    }

    fn export<E: Entry>(&self, block: usize, out: &mut Vec<u8>, put: impl Fn(E, &mut Vec<u8>)) {
        for head in 0..self.kv_heads {
            let (keys, values) = self.head::<E>(block, head);
            for slot in 0..KV_BLOCK {
                keys.iter().for_each(|lanes| put(lanes[slot], out));
            }
            for row in values.chunks_exact(self.value_dim.div_ceil(LANES)) {
                row.as_flattened()[..self.value_dim].iter().for_each(|&entry| put(entry, out));
            }
            let (keys, values) = self.scales(block, head);
            for scales in [keys, values] {
                (0..KV_BLOCK).for_each(|slot| scales.iter().for_each(|lanes| out.extend(lanes[slot].to_le_bytes())));
            }
        }
    }

    fn import<E: Entry, const N: usize>(&mut self, block: usize, bytes: &[u8], entry: impl Fn([u8; N]) -> E) {
        let (head_dim, value_dim, kv_heads) = (self.head_dim, self.value_dim, self.kv_heads);
        let mut parts = self.parts::<E>();
        for (head, bytes) in bytes.chunks_exact(bytes.len() / kv_heads).enumerate() {
            let (entries, mut rest) = bytes.split_at(KV_BLOCK * (head_dim + value_dim) * N);
            let (new_keys, new_values) = entries.as_chunks::<N>().0.split_at(KV_BLOCK * head_dim);
            let Head { keys, values, key_scales, value_scales } = parts.head(block, head);
            for (slot, new) in new_keys.chunks_exact(head_dim).enumerate() {
                keys.iter_mut().zip(new).for_each(|(lanes, &bytes)| lanes[slot] = entry(bytes));
            }
            for (row, new) in values.chunks_exact_mut(value_dim.div_ceil(LANES)).zip(new_values.chunks_exact(value_dim)) {
                row.as_flattened_mut().iter_mut().zip(new).for_each(|(value, &bytes)| *value = entry(bytes));
            }
            for scales in [key_scales, value_scales] {
                let (new, later) = rest.split_at(scales.len() * KV_BLOCK * size_of::<u16>());
                rest = later;
                let count = scales.len();
                for (at, &bytes) in new.as_chunks().0.iter().enumerate() {
                    scales[at % count][at / count] = u16::from_le_bytes(bytes);
                }
            }
        }
    }

    fn index(&self, block: u32) -> usize {
        assert!((block as usize) < self.blocks, "block {block} of {}", self.blocks);
        block as usize
    }

    /// Keys (`[head_dim]` vectors of 16 positions) and values (`[16]` rows of whole vectors) of a head in a block.
    #[inline(always)]
    pub(crate) fn head<E: Entry>(&self, block: usize, head: usize) -> (&[[E; LANES]], &[[E; LANES]]) {
        let (keys, values) = places(block, head, self.kv_heads, (self.head_dim, self.value_dim));
        (&self.keys.numbers().as_chunks().0[keys], &self.values.numbers().as_chunks().0[values])
    }

    /// Scales of a head's keys and values in a block, each for 16 positions; none where entries have none.
    #[inline(always)]
    pub(crate) fn scales(&self, block: usize, head: usize) -> (&[[u16; LANES]], &[[u16; LANES]]) {
        let (keys, values) =
            scale_places(block, head, self.kv_heads, (self.dtype.scales(self.head_dim), self.dtype.scales(self.value_dim)));
        (&self.key_scales.numbers().as_chunks().0[keys], &self.value_scales.numbers().as_chunks().0[values])
    }

    fn parts<E: Entry>(&mut self) -> Parts<'_, E> {
        Parts {
            blocks: self.blocks,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            value_dim: self.value_dim,
            scales: (self.dtype.scales(self.head_dim), self.dtype.scales(self.value_dim)),
            keys: self.keys.numbers_mut().as_chunks_mut().0,
            values: self.values.numbers_mut().as_chunks_mut().0,
            key_scales: self.key_scales.numbers_mut().as_chunks_mut().0,
            value_scales: self.value_scales.numbers_mut().as_chunks_mut().0,
        }
    }
}

/// Where the vectors of a head's keys and values lie.
#[inline(always)]
fn places(block: usize, head: usize, kv_heads: usize, (head_dim, value_dim): (usize, usize)) -> (Range<usize>, Range<usize>) {
    let at = block * kv_heads + head;
    let row = value_dim.div_ceil(LANES) * KV_BLOCK;
    (at * head_dim..(at + 1) * head_dim, at * row..(at + 1) * row)
}

/// Where the vectors of the scales of a head's keys and values lie.
#[inline(always)]
fn scale_places(block: usize, head: usize, kv_heads: usize, (keys, values): (usize, usize)) -> (Range<usize>, Range<usize>) {
    let at = block * kv_heads + head;
    (at * keys..(at + 1) * keys, at * values..(at + 1) * values)
}

/// The vectors of a cache, to be written.
struct Parts<'a, E> {
    blocks: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    /// Vectors of scales of a head of keys, and of values.
    scales: (usize, usize),
    keys: &'a mut [[E; LANES]],
    values: &'a mut [[E; LANES]],
    key_scales: &'a mut [[u16; LANES]],
    value_scales: &'a mut [[u16; LANES]],
}

/// The vectors of a head in a block.
struct Head<'a, E> {
    keys: &'a mut [[E; LANES]],
    values: &'a mut [[E; LANES]],
    key_scales: &'a mut [[u16; LANES]],
    value_scales: &'a mut [[u16; LANES]],
}

impl<E> Parts<'_, E> {
    #[inline(always)]
    fn head(&mut self, block: usize, head: usize) -> Head<'_, E> {
        let (keys, values) = places(block, head, self.kv_heads, (self.head_dim, self.value_dim));
        let (key_scales, value_scales) = scale_places(block, head, self.kv_heads, self.scales);
        Head {
            keys: &mut self.keys[keys],
            values: &mut self.values[values],
            key_scales: &mut self.key_scales[key_scales],
            value_scales: &mut self.value_scales[value_scales],
        }
    }
}

/// A stored key or value.
pub(crate) trait Entry: Number + Default + Send + Sync {
    /// Whether it counts times a scale.
    const SCALED: bool;
    /// Sixteen of them, widened exactly.
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F;
}

/// One that new keys and values become.
trait Stored: Entry {
    /// Stores a token's key and value of a head at `slot` of its block.
    fn put<S: Simd>(s: S, head: Head<'_, Self>, slot: usize, key: &[f32], value: &[f32]);
}

/// One that is stored by itself.
trait Rounded: Entry {
    /// Sixteen of them, rounded.
    fn store<S: Simd>(s: S, to: &mut [Self; LANES], v: S::F);
}

impl Entry for f32 {
    const SCALED: bool = false;
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load(from)
    }
}

impl Rounded for f32 {
    #[inline(always)]
    fn store<S: Simd>(s: S, to: &mut [Self; LANES], v: S::F) {
        s.store(to, v);
    }
}

/// The bits of an f16.
impl Entry for u16 {
    const SCALED: bool = false;
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load_f16(from)
    }
}

impl Rounded for u16 {
    #[inline(always)]
    fn store<S: Simd>(s: S, to: &mut [Self; LANES], v: S::F) {
        s.store_f16(to, v);
    }
}

struct Write<'a, E> {
    cache: Parts<'a, E>,
    spans: &'a [KvSpan<'a>],
    keys: &'a [f32],
    values: &'a [f32],
}

impl<E: Stored> Kernel for Write<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (head_dim, value_dim, kv_heads) = (self.cache.head_dim, self.cache.value_dim, self.cache.kv_heads);
        let mut rows = self.keys.chunks_exact(head_dim).zip(self.values.chunks_exact(value_dim));
        for span in self.spans {
            for position in span.first_position..span.first_position + span.tokens {
                let (block, slot) = (block_of(span, position, self.cache.blocks), position % KV_BLOCK);
                for (head, (new_key, new_value)) in (0..kv_heads).zip(&mut rows) {
                    E::put(s, self.cache.head(block, head), slot, new_key, new_value);
                }
            }
        }
    }
}

impl<E: Rounded> Stored for E {
    #[inline(always)]
    fn put<S: Simd>(s: S, head: Head<'_, Self>, slot: usize, key: &[f32], value: &[f32]) {
        for (keys, new) in head.keys.chunks_mut(LANES).zip(key.chunks(LANES)) {
            let entries = rounded::<S, E>(s, new);
            for (lanes, entry) in keys.iter_mut().zip(entries) {
                lanes[slot] = entry;
            }
        }
        let width = value.len().div_ceil(LANES);
        for (values, new) in head.values[slot * width..(slot + 1) * width].iter_mut().zip(value.chunks(LANES)) {
            *values = rounded::<S, E>(s, new);
        }
    }
}

/// Up to 16 values as entries; the rest is 0.
#[inline(always)]
fn rounded<S: Simd, E: Rounded>(s: S, values: &[f32]) -> [E; LANES] {
    let mut entries = [E::default(); LANES];
    let v = match values.as_array() {
        Some(lanes) => s.load(lanes),
        None => s.load_part(values),
    };
    E::store(s, &mut entries, v);
    entries
}

/// The block of `position`.
///
/// # Panics
/// If the table has none.
#[inline(always)]
pub(crate) fn block_of(span: &KvSpan<'_>, position: usize, blocks: usize) -> usize {
    let block = span.table.get(position / KV_BLOCK).map_or(usize::MAX, |&block| block as usize);
    assert!(block < blocks, "position {position} has block {block} of {blocks}");
    block
}
