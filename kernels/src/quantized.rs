//! Activations quantized to 8 bits, laid out for the matrix kernels.
//!
//! Tokens are cut into panels of at most 12, for a matrix unit 16, as even as possible (13 tokens are 7 + 6). In a panel of n tokens everything is interleaved:
//! four consecutive values of k of token 0, of token 1, … then the next four values; one scale per token and block, one sum per token and
//! run, in the same order. A kernel thus reads its columns with one pointer. Where a matrix unit is to multiply them, the values of a block lie
//! token after token. Which panel a token is in changes no bit of any result.
#![expect(unsafe_code, reason = "threads fill disjoint parts of the panels")]

use std::ops::Range;

use crate::Isa;
use crate::memory::Buffer;
use crate::pool::{Disjoint, Pool, split};
use crate::scalar::quantize::quantize_block;

/// Tokens in a panel, at most.
pub(crate) const PANEL: usize = 12;
/// The same for a matrix unit.
pub(crate) const WIDE_PANEL: usize = 16;

/// Fewer values than this are quantized by the caller alone.
const PARALLEL_FROM: usize = 16 << 10;

/// Quantized activations `[tokens, k]`: for each block of 32 or 256 values along k a scale `amax / 127` (f32) and
/// `q = round_half_even(x · (127 / amax))` (i8), and the sums of q that the kernels need.
///
/// A block of zeros has scale 0. A block that holds an infinity or a NaN has it as its scale, so that it shows in every product.
/// The buffers are kept and reused from one use to the next.
#[derive(Debug)]
pub struct Quantized {
    block: usize,
    tokens: usize,
    k: usize,
    /// For a matrix unit.
    wide: bool,
    /// `tokens · k` values, and room.
    q: Buffer<i8>,
    scales: Vec<f32>,
    /// Blocks of 32: −128 · Σ q for each block. Blocks of 256: −32 · Σ q for each run of 16.
    offsets: Vec<i32>,
    /// Blocks of 32: −16 · Σ q for each block. Blocks of 256: Σ q of two runs of 32, as two i16 (the first one low), for each run of 64.
    sums: Vec<i32>,
}

/// The columns of one panel, as the kernels read them; `n` tokens interleaved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panel<'a> {
    pub(crate) n: usize,
    pub(crate) q: &'a [i8],
    pub(crate) scales: &'a [f32],
    pub(crate) offsets: &'a [i32],
    pub(crate) sums: &'a [i32],
}

/// One block of all tokens of a panel, to be filled.
struct Unit<'a> {
    n: usize,
    block: usize,
    wide: bool,
    q: &'a mut [i8],
    scales: &'a mut [f32],
    offsets: &'a mut [i32],
    sums: &'a mut [i32],
}

impl Unit<'_> {
    /// Stores the block of the panel's token `j`.
    fn store(&mut self, isa: Isa, j: usize, q: &[i8], scale: f32) {
        let n = self.n;
        self.scales[j] = scale;
        if self.wide {
            self.q[j * self.block..(j + 1) * self.block].copy_from_slice(q);
        } else {
            for (to, from) in self.q.as_chunks_mut::<4>().0[j..].iter_mut().step_by(n).zip(q.as_chunks::<4>().0) {
                *to = *from;
            }
        }
        let runs = run_sums(isa, q);
        if self.block == 32 {
            let sum = runs[0] + runs[1];
            self.offsets[j] = -128 * sum;
            self.sums[j] = -16 * sum;
        } else {
            for (offset, sum) in self.offsets[j..].iter_mut().step_by(n).zip(runs) {
                *offset = -32 * sum;
            }
            for (sums, runs) in self.sums[j..].iter_mut().step_by(n).zip(runs.as_chunks::<4>().0) {
                *sums = ((runs[0] + runs[1]) & 0xffff) | (runs[2] + runs[3]) << 16;
            }
        }
    }
}

impl Quantized {
    /// An empty activation with blocks of `block` values.
    ///
    /// # Panics
    /// If `block` is neither 32 nor 256.
    pub fn new(block: usize) -> Self {
        assert!(block == 32 || block == 256, "activation blocks hold 32 or 256 values, not {block}");
        Self { block, tokens: 0, k: 0, wide: false, q: Buffer::default(), scales: Vec::new(), offsets: Vec::new(), sums: Vec::new() }
    }

    /// Values in a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Values of a token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Values of a token that share an element of `offsets`, and of `sums`.
    fn runs(&self) -> (usize, usize) {
        if self.block == 32 { (32, 32) } else { (16, 64) }
    }

    /// Makes this `[tokens, k]` with unspecified content, to be filled by [`Quantized::import`] and multiplied with `isa`.
    ///
    /// # Panics
    /// If `k` is not whole blocks.
    pub fn resize(&mut self, isa: Isa, tokens: usize, k: usize) {
        assert!(k.is_multiple_of(self.block), "{k} values are not whole blocks of {}", self.block);
        (self.tokens, self.k) = (tokens, k);
        self.wide = matches!(isa, Isa::Amx(_));
        let values = tokens * k;
        let (offset_run, sum_run) = self.runs();
        self.q.first(values);
        self.scales.resize(values / self.block, 0.0);
        self.offsets.resize(values / offset_run, 0);
        self.sums.resize(values / sum_run, 0);
    }

    /// Quantizes `x`, `[tokens, k]` row-major, in parallel, to be multiplied with `isa`.
    ///
    /// # Panics
    /// If `x` is not `tokens · k` values or `k` is not whole blocks.
    pub fn quantize(&mut self, pool: &Pool, isa: Isa, x: &[f32], tokens: usize, k: usize) {
        assert_eq!(x.len(), tokens * k, "values of {tokens} tokens of {k}");
        self.resize(isa, tokens, k);
        let (block, blocks) = (self.block, k / self.block);
        if tokens == 0 {
            return;
        }
        let panels = self.panels();
        let (offset_run, sum_run) = self.runs();
        let wide = self.wide;
        let (q, scales) = (Disjoint::new(&mut self.q), Disjoint::new(&mut self.scales));
        let (offsets, sums) = (Disjoint::new(&mut self.offsets), Disjoint::new(&mut self.sums));
        let fill = |units: Range<usize>| {
            let mut values = [0_i8; 256];
            for index in units {
                let (panel, b) = (split(tokens, panels, index / blocks, 1), index % blocks);
                let n = panel.len();
                let first = panel.start * blocks + b * n;
                let part = |run: usize| first * (block / run)..(first + n) * (block / run);
                // SAFETY: unit `index` is n blocks of its own at `first`; every unit is filled by one thread.
                let mut unit = unsafe {
                    Unit {
                        n,
                        block,
                        wide,
                        q: q.slice(part(1)),
                        scales: scales.slice(part(block)),
                        offsets: offsets.slice(part(offset_run)),
                        sums: sums.slice(part(sum_run)),
                    }
                };
                for j in 0..n {
                    let start = (panel.start + j) * k + b * block;
                    let scale = quantize_one(isa, &x[start..start + block], &mut values[..block]);
                    unit.store(isa, j, &values[..block], scale);
                }
            }
        };
        if x.len() < PARALLEL_FROM || pool.threads() == 1 {
            fill(0..panels * blocks);
        } else {
            pool.run(&|thread| fill(split(panels * blocks, pool.threads(), thread, 1)));
        }
    }

    /// Bytes that [`Quantized::export`] writes for `tokens` tokens and `len` values of k.
    pub fn exported_bytes(&self, tokens: usize, len: usize) -> usize {
        tokens * (len / self.block) * (4 + self.block)
    }

    /// Appends the blocks of `tokens` and of `k_range` to `out`: token by token, block by block, the scale (f32 little-endian), then q.
    ///
    /// # Panics
    /// If a range is out of bounds or `k_range` cuts a block.
    pub fn export(&self, tokens: Range<usize>, k_range: Range<usize>, out: &mut Vec<u8>) {
        let blocks = self.block_range(&tokens, &k_range);
        out.reserve(self.exported_bytes(tokens.len(), k_range.len()));
        for token in tokens {
            let (panel, j) = self.locate(token);
            for b in blocks.clone() {
                let first = panel.start * (self.k / self.block) + b * panel.len();
                out.extend_from_slice(&self.scales[first + j].to_le_bytes());
                let unit = &self.q[first * self.block..(first + panel.len()) * self.block];
                for chunk in self.chunks(unit, panel.len(), j) {
                    out.extend_from_slice(&chunk.map(i8::cast_unsigned));
                }
            }
        }
    }

    /// Fills the blocks of `tokens` and of `k_range` with what [`Quantized::export`] wrote for as many tokens and values.
    ///
    /// # Panics
    /// If a range is out of bounds, `k_range` cuts a block, or `bytes` has not the length [`Quantized::exported_bytes`] tells.
    pub fn import(&mut self, isa: Isa, tokens: Range<usize>, k_range: Range<usize>, bytes: &[u8]) {
        let blocks = self.block_range(&tokens, &k_range);
        assert_eq!(bytes.len(), self.exported_bytes(tokens.len(), k_range.len()), "bytes of {tokens:?} and {k_range:?}");
        let (block, n_blocks) = (self.block, self.k / self.block);
        let (offset_run, sum_run) = self.runs();
        let mut source = bytes.chunks_exact(4 + block);
        let mut values = [0_i8; 256];
        for token in tokens {
            let (panel, j) = self.locate(token);
            let n = panel.len();
            for b in blocks.clone() {
                let Some((scale, q)) = source.next().and_then(|bytes| bytes.split_first_chunk::<4>()) else { return };
                for (to, from) in values.iter_mut().zip(q) {
                    *to = from.cast_signed();
                }
                let first = panel.start * n_blocks + b * n;
                let part = |run: usize| first * (block / run)..(first + n) * (block / run);
                let mut unit = Unit {
                    n,
                    block,
                    wide: self.wide,
                    q: &mut self.q[part(1)],
                    scales: &mut self.scales[part(block)],
                    offsets: &mut self.offsets[part(offset_run)],
                    sums: &mut self.sums[part(sum_run)],
                };
                unit.store(isa, j, &values[..block], f32::from_le_bytes(*scale));
            }
        }
    }

    /// Copies q and the scales of one token out of its panel: `q`: `[k]`, `scales`: `[k / block]`.
    pub(crate) fn token(&self, token: usize, q: &mut [i8], scales: &mut [f32]) {
        let (tokens, j) = self.locate(token);
        let panel = self.panel_of(tokens);
        let from = panel.q.chunks_exact(self.block * panel.n).flat_map(|unit| self.chunks(unit, panel.n, j));
        for (to, from) in q.as_chunks_mut::<4>().0.iter_mut().zip(from) {
            *to = *from;
        }
        for (to, from) in scales.iter_mut().zip(panel.scales[j..].iter().step_by(panel.n)) {
            *to = *from;
        }
    }

    /// The values of a token as products read them, `[k]`: each quantized value times the scale of its block.
    ///
    /// # Panics
    /// If there is no such token, or `out` is not `k` values.
    pub fn dequantize(&self, token: usize, out: &mut [f32]) {
        assert!(token < self.tokens && out.len() == self.k, "token {token} of {}, {} of {} values", self.tokens, out.len(), self.k);
        let (tokens, j) = self.locate(token);
        let panel = self.panel_of(tokens);
        let quantized = panel.q.chunks_exact(self.block * panel.n).flat_map(|unit| self.chunks(unit, panel.n, j));
        for (index, (out, q)) in out.as_chunks_mut::<4>().0.iter_mut().zip(quantized).enumerate() {
            let scale = panel.scales[j + index * 4 / self.block * panel.n];
            *out = q.map(|q| f32::from(q) * scale);
        }
    }

    /// Whether the values lie as a matrix unit reads them.
    pub(crate) fn is_wide(&self) -> bool {
        self.wide
    }

    /// The values of token `j` in a block of a panel of `n` tokens.
    fn chunks<'a>(&self, unit: &'a [i8], n: usize, j: usize) -> impl Iterator<Item = &'a [i8; 4]> {
        let (first, step) = if self.wide { (j * self.block / 4, 1) } else { (j, n) };
        unit.as_chunks::<4>().0[first..].iter().step_by(step).take(self.block / 4)
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.tokens.div_ceil(if self.wide { WIDE_PANEL } else { PANEL })
    }

    /// The tokens of panel `index` and their columns.
    pub(crate) fn panel(&self, index: usize) -> (Range<usize>, Panel<'_>) {
        let tokens = split(self.tokens, self.panels(), index, 1);
        (tokens.clone(), self.panel_of(tokens))
    }

    fn panel_of(&self, tokens: Range<usize>) -> Panel<'_> {
        let part = |run: usize| tokens.start * (self.k / run)..tokens.end * (self.k / run);
        let (offset_run, sum_run) = self.runs();
        Panel {
            n: tokens.len(),
            q: &self.q[part(1)],
            scales: &self.scales[part(self.block)],
            offsets: &self.offsets[part(offset_run)],
            sums: &self.sums[part(sum_run)],
        }
    }

    /// The panel of `token` and its place in it.
    fn locate(&self, token: usize) -> (Range<usize>, usize) {
        let panels = self.panels();
        let (small, larger) = (self.tokens / panels, self.tokens % panels);
        // The first `larger` panels hold one token more.
        let index = if token < larger * (small + 1) { token / (small + 1) } else { larger + (token - larger * (small + 1)) / small };
        let panel = split(self.tokens, panels, index, 1);
        let j = token - panel.start;
        (panel, j)
    }

    fn block_range(&self, tokens: &Range<usize>, k_range: &Range<usize>) -> Range<usize> {
        assert!(tokens.start <= tokens.end && tokens.end <= self.tokens, "tokens {tokens:?} of {}", self.tokens);
        assert!(
            k_range.start <= k_range.end
                && k_range.end <= self.k
                && k_range.start.is_multiple_of(self.block)
                && k_range.end.is_multiple_of(self.block),
            "values {k_range:?} of {} are not whole blocks of {}",
            self.k,
            self.block
        );
        k_range.start / self.block..k_range.end / self.block
    }
}

/// Sums of runs of 16 values of a block; of as many as it has.
fn run_sums(isa: Isa, q: &[i8]) -> [i32; 16] {
    #[cfg(target_arch = "x86_64")]
    if let Some(proof) = isa.avx2() {
        return crate::x86_64::quantize::run_sums(proof, q);
    }
    let mut sums = [0; 16];
    for (sum, run) in sums.iter_mut().zip(q.as_chunks::<16>().0) {
        *sum = run.iter().map(|&q| i32::from(q)).sum();
    }
    sums
}

fn quantize_one(isa: Isa, x: &[f32], q: &mut [i8]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if let Some(proof) = isa.avx2() {
        return crate::x86_64::quantize::quantize_block(proof, x, q);
    }
    quantize_block(x, q)
}
