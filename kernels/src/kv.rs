//! The paged key-value cache of one layer.
//!
//! A block holds 16 consecutive positions of one sequence. Keys lie as `[kv_head][dimension][16 positions]`, so that a query meets 16 keys
//! in the lanes of one vector; values as `[kv_head][16 positions][dimension]`, each row padded to whole vectors. Keys and values may have
//! different numbers of dimensions.

use std::ops::Range;

use crate::{
    Isa,
    memory::{AlignedBytes, Number},
    simd::{Kernel, LANES, Simd, vectorize},
};

/// Positions in a block.
pub const KV_BLOCK: usize = LANES;

/// Entry of a block table that has no block: it was freed, or is not there yet.
pub const ABSENT: u32 = u32::MAX;

/// How entries are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// As computed.
    F32,
    /// Rounded to nearest even.
    F16,
}

impl KvType {
    /// Size of an entry.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
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
}

impl KvCache {
    /// A cache of `blocks` blocks, zero at first; a head has `head_dim` values of keys and `value_dim` of values.
    ///
    /// # Panics
    /// If there are no heads, they have no dimensions, or the size overflows.
    pub fn new(dtype: KvType, blocks: usize, kv_heads: usize, (head_dim, value_dim): (usize, usize)) -> Self {
        assert!(kv_heads > 0 && head_dim > 0 && value_dim > 0, "{kv_heads} heads of {head_dim} and {value_dim}");
        let bytes = |width: usize| blocks.checked_mul(kv_heads * width * KV_BLOCK * dtype.bytes()).expect("the size of a cache fits usize");
        let (keys, values) = (bytes(head_dim), bytes(value_dim.next_multiple_of(LANES)));
        Self { dtype, blocks, kv_heads, head_dim, value_dim, keys: AlignedBytes::zeroed(keys), values: AlignedBytes::zeroed(values) }
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

    /// Size of the whole cache, `blocks · kv_heads · 16 · (head_dim + value_dim)` entries (values' heads rounded up to whole vectors of 16).
    pub fn bytes(&self) -> usize {
        self.keys.len() + self.values.len()
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
        }
    }

    /// Makes block `to` equal to block `from`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let (from, to) = (self.index(from), self.index(to));
        for bytes in [&mut self.keys, &mut self.values] {
            let size = bytes.len() / self.blocks;
            bytes.copy_within(from * size..(from + 1) * size, to * size);
        }
    }

    /// Size of an exported block.
    pub fn exported_bytes(&self) -> usize {
        self.kv_heads * KV_BLOCK * (self.head_dim + self.value_dim) * self.dtype.bytes()
    }

    /// Appends a block to `out` in a layout that does not depend on how heads are spread over ranks: for each head keys, `[16][head_dim]`,
    /// then values, `[16][value_dim]`, entries little-endian. The blocks of several ranks, in the order of their heads, are the block of one that has all heads.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn export_block(&self, block: u32, out: &mut Vec<u8>) {
        let block = self.index(block);
        match self.dtype {
            KvType::F32 => self.export(block, out, |entry: f32, out| out.extend(entry.to_le_bytes())),
            KvType::F16 => self.export(block, out, |entry: u16, out| out.extend(entry.to_le_bytes())),
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
            KvType::F32 => self.import(block, bytes.as_chunks().0, f32::from_le_bytes),
            KvType::F16 => self.import(block, bytes.as_chunks().0, u16::from_le_bytes),
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
        }
    }

    fn import<E: Entry, const N: usize>(&mut self, block: usize, entries: &[[u8; N]], entry: impl Fn([u8; N]) -> E) {
        let (head_dim, value_dim, kv_heads) = (self.head_dim, self.value_dim, self.kv_heads);
        let mut parts = self.parts::<E>();
        for (head, entries) in entries.chunks_exact(KV_BLOCK * (head_dim + value_dim)).enumerate().take(kv_heads) {
            let (new_keys, new_values) = entries.split_at(KV_BLOCK * head_dim);
            let (keys, values) = parts.head(block, head);
            for (slot, new) in new_keys.chunks_exact(head_dim).enumerate() {
                keys.iter_mut().zip(new).for_each(|(lanes, &bytes)| lanes[slot] = entry(bytes));
            }
            for (row, new) in values.chunks_exact_mut(value_dim.div_ceil(LANES)).zip(new_values.chunks_exact(value_dim)) {
                row.as_flattened_mut().iter_mut().zip(new).for_each(|(value, &bytes)| *value = entry(bytes));
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

    fn parts<E: Entry>(&mut self) -> Parts<'_, E> {
        Parts {
            blocks: self.blocks,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            value_dim: self.value_dim,
            keys: self.keys.numbers_mut().as_chunks_mut().0,
            values: self.values.numbers_mut().as_chunks_mut().0,
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

/// The vectors of a cache, to be written.
struct Parts<'a, E> {
    blocks: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    keys: &'a mut [[E; LANES]],
    values: &'a mut [[E; LANES]],
}

impl<E> Parts<'_, E> {
    #[inline(always)]
    fn head(&mut self, block: usize, head: usize) -> (&mut [[E; LANES]], &mut [[E; LANES]]) {
        let (keys, values) = places(block, head, self.kv_heads, (self.head_dim, self.value_dim));
        (&mut self.keys[keys], &mut self.values[values])
    }
}

/// A stored key or value.
pub(crate) trait Entry: Number + Default + Send + Sync {
    /// Sixteen of them, widened exactly.
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F;
    /// Sixteen of them, rounded.
    fn store<S: Simd>(s: S, to: &mut [Self; LANES], v: S::F);
}

impl Entry for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load(from)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, to: &mut [Self; LANES], v: S::F) {
        s.store(to, v);
    }
}

/// The bits of an f16.
impl Entry for u16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F {
        s.load_f16(from)
    }
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

impl<E: Entry> Kernel for Write<'_, E> {
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
                    let (keys, values) = self.cache.head(block, head);
                    for (keys, new) in keys.chunks_mut(LANES).zip(new_key.chunks(LANES)) {
                        let entries = rounded::<S, E>(s, new);
                        for (lanes, entry) in keys.iter_mut().zip(entries) {
                            lanes[slot] = entry;
                        }
                    }
                    for (value, new) in values[slot * width..(slot + 1) * width].iter_mut().zip(new_value.chunks(LANES)) {
                        *value = rounded::<S, E>(s, new);
                    }
                }
            }
        }
    }
}

/// Up to 16 values as entries; the rest is 0.
#[inline(always)]
fn rounded<S: Simd, E: Entry>(s: S, values: &[f32]) -> [E; LANES] {
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
