//! Attention over a paged cache: softmax(scale · q Kᵀ) V, with grouped heads and sliding windows.
//!
//! Where it is causal, query `i` sees keys `j <= i` and, with a window `w`, only those with `i - j < w`; else every key up to the last token
//! of its span. The bits of a query's result are defined by positions
//! alone:
//! - Positions are cut into tiles of 64, counted from 0. Tiles without a visible key do not count.
//! - The score of key `j` is `scale · dot`, `dot` a chain of fused multiply-adds over dimensions `0, 1, …`, begun at 0.
//! - A tile's `max` is the largest visible score; `p[j] = e^(score[j] - max)` for visible keys, by [`exp_f32`](crate::math::exp_f32).
//! - Its `sum` runs in 16 lanes: lane `c` adds `p` of keys `c, c + 16, c + 32, c + 48` of the tile in this order to 0, an invisible key being
//!   0; lanes are folded 16 → 8 → 4 → 2 → 1, lower half plus upper half.
//! - Its `vector[d]` is a chain of fused multiply-adds `p[j] · v[j, d]` over visible keys in rising order, begun at 0.
//! - Tiles are merged in rising order. The first is taken as it is; then with `new = max(old max, tile max)`, `a = e^(old max - new)` and
//!   `b = e^(tile max - new)`: `sum = fma(tile sum, b, sum · a)` and `vector[d] = fma(tile vector[d], b, vector[d] · a)`.
//! - The result is `vector[d] / sum`.
//!
//! What a query does not see is selected away, never multiplied: blocks that were freed, or not yet written, may hold anything. So neither
//! the other queries of a step, nor how a prompt is cut into steps, nor threads, nor the instruction set change a bit.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::ops::Range;

mod tile;

use crate::{
    Isa, KvCache, KvSpan, Pool,
    kv::KV_BLOCK,
    pool::split,
    simd::{LANES, vectorize},
};
use tile::{Merge, Partials, Run, Sink, Unit};

/// Positions of a tile.
const TILE: usize = 64;
/// Blocks of a tile.
const BLOCKS: usize = TILE / KV_BLOCK;
/// Most rows that are computed together, so that their state stays in the second-level cache beside a tile.
const MAX_ROWS: usize = 64;
/// Fewest rows of an item when there are enough: those of the largest register tile.
const MIN_ROWS: usize = 8;
/// Less work than this, in multiplications of vectors, is done by the caller alone.
const PARALLEL_FROM: usize = 32 << 10;

thread_local! {
    /// What tiles of long contexts give, kept for its memory.
    static PARTIALS: RefCell<Partials> = RefCell::default();
}

/// Attention of one layer (or of a rank's heads of it).
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Keys and values, those of the queries' own positions included.
    pub cache: &'a KvCache,
    /// The head of `cache` that each query head reads.
    pub kv_heads: &'a [u32],
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// `Some(w)`: key `j` is visible to query `i` when `0 <= i - j < w`; `None`: every key up to `i`.
    pub window: Option<u32>,
    /// A query sees no later key; else it sees those of its whole span, and there is no window.
    pub causal: bool,
}

/// Rows (a token and a query head each) of one span that read one head of the cache.
struct Item<'a> {
    span: KvSpan<'a>,
    /// Number of the span's first token among all.
    first_token: usize,
    /// Head of the cache.
    kv_head: usize,
    /// Query heads that read it.
    heads: &'a [usize],
    /// Rows, `heads.len()` for each token of the span.
    rows: Range<usize>,
    /// Tiles that any of the rows sees.
    tiles: Range<usize>,
}

impl Item<'_> {
    /// Position of a row.
    fn position(&self, row: usize) -> usize {
        self.span.first_position + row / self.heads.len()
    }

    /// Where the row's query and result lie among those of all `heads` heads of all tokens.
    fn place(&self, row: usize, heads: usize) -> usize {
        (self.first_token + row / self.heads.len()) * heads + self.heads[row % self.heads.len()]
    }

    /// Rows times tiles.
    fn work(&self) -> usize {
        self.rows.len() * self.tiles.len()
    }
}

/// An item whose tiles are spread over several units, and where its results go.
struct Spread<'a, 'b> {
    item: &'a Item<'a>,
    units: usize,
    results: Vec<&'b mut [f32]>,
}

impl Attention<'_> {
    /// Computes `out`, `[tokens, heads, value_dim]`, of `queries`, `[tokens, heads, head_dim]`; the tokens of all spans follow each other.
    ///
    /// # Panics
    /// If a size differs, a query head reads a head the cache does not have, the window is 0 or of what is not causal, or a visible position has
    /// no block.
    pub fn run(&self, pool: &Pool, isa: Isa, spans: &[KvSpan<'_>], queries: &[f32], out: &mut [f32]) {
        let (heads, head_dim, value_dim) = (self.kv_heads.len(), self.cache.head_dim(), self.cache.value_dim());
        let tokens: usize = spans.iter().map(|span| span.tokens).sum();
        assert_eq!(queries.len(), tokens * heads * head_dim, "queries of {tokens} tokens of {heads} heads of {head_dim}");
        assert_eq!(out.len(), tokens * heads * value_dim, "results of {tokens} tokens of {heads} heads of {value_dim}");
        assert!(self.kv_heads.iter().all(|&head| (head as usize) < self.cache.kv_heads()), "heads {:?} read", self.kv_heads);
        assert!(self.window != Some(0), "a window of 0 sees nothing");
        assert!(self.causal || self.window.is_none(), "a window looks back only");

        let groups = self.groups();
        let items = self.items(&groups, spans, pool.threads());
        let total: usize = items.iter().map(Item::work).sum();
        let width = value_dim.div_ceil(LANES);
        let alone = pool.threads() == 1 || total * TILE * (head_dim.div_ceil(LANES) + width) < PARALLEL_FROM;
        let limit = if alone { usize::MAX } else { total.div_ceil(2 * pool.threads()) };

        let mut results: Vec<Option<&mut [f32]>> = out.chunks_exact_mut(value_dim).map(Some).collect();
        let (mut units, mut spread) = (Vec::new(), Vec::new());
        for item in &items {
            let results = item.rows.clone().filter_map(|row| results[item.place(row, heads)].take()).collect();
            match item.work().div_ceil(limit).min(item.tiles.len()) {
                0 | 1 => units.push(Unit { item, tiles: item.tiles.clone(), sink: Sink::Results(results) }),
                units => spread.push(Spread { item, units, results }),
            }
        }
        let mut partials = PARTIALS.take();
        partials.reset(spread.iter().map(|spread| spread.item.work()).sum(), width);
        let mut rest = partials.state();
        for Spread { item, units: parts, .. } in &spread {
            for part in 0..*parts {
                let tiles = split(item.tiles.len(), *parts, part, 1);
                let state = rest.take(tiles.len() * item.rows.len(), width);
                let tiles = item.tiles.start + tiles.start..item.tiles.start + tiles.end;
                units.push(Unit { item, tiles, sink: Sink::Tiles(state) });
            }
        }
        // The longest first, so that threads end together.
        units.sort_by_key(|unit| Reverse(unit.item.rows.len() * unit.tiles.len()));
        let run = |unit: &mut Unit<'_, '_>| vectorize(isa, Run { attention: self, queries, unit });
        if alone {
            units.iter_mut().for_each(run)
        } else {
            pool.for_each(&mut units, run)
        }
        drop(units);

        let mut rest = partials.state();
        let mut merges = Vec::new();
        for Spread { item, results, .. } in spread {
            merges.push(Merge { state: rest.take(item.work(), width), width, results });
        }
        pool.for_each(&mut merges, |merge| vectorize(isa, merge));
        drop(merges);
        PARTIALS.set(partials);
    }

    /// The heads of the cache that are read, each with its query heads.
    fn groups(&self) -> Vec<(usize, Vec<usize>)> {
        let readers = |kv_head| (0..self.kv_heads.len()).filter(|&head| self.kv_heads[head] as usize == kv_head).collect();
        (0..self.cache.kv_heads())
            .map(|kv_head| (kv_head, readers(kv_head)))
            .filter(|(_, heads): &(_, Vec<usize>)| !heads.is_empty())
            .collect()
    }

    /// Cuts the rows of every span and head into items, as many as threads want.
    fn items<'a>(&self, groups: &'a [(usize, Vec<usize>)], spans: &[KvSpan<'a>], threads: usize) -> Vec<Item<'a>> {
        let tokens: usize = spans.iter().map(|span| span.tokens).sum();
        let share = (tokens * self.kv_heads.len()).div_ceil(2 * threads).next_multiple_of(MIN_ROWS);
        let most = if threads == 1 { MAX_ROWS } else { share.clamp(MIN_ROWS, MAX_ROWS) };
        let mut items = Vec::new();
        let mut first_token = 0;
        for &span in spans {
            for (kv_head, heads) in groups {
                let all = span.tokens * heads.len();
                for first in (0..all).step_by(most) {
                    let rows = first..all.min(first + most);
                    let mut item = Item { span, first_token, kv_head: *kv_head, heads, rows, tiles: 0..0 };
                    let seen = self.seen(&span, item.position(first)).start..self.seen(&span, item.position(item.rows.end - 1)).end;
                    item.tiles = seen.start / TILE..seen.end.div_ceil(TILE);
                    items.push(item);
                }
            }
            first_token += span.tokens;
        }
        items
    }

    /// The keys that a query of `span` at `position` sees.
    #[inline(always)]
    fn seen(&self, span: &KvSpan<'_>, position: usize) -> Range<usize> {
        if !self.causal {
            return 0..span.first_position + span.tokens;
        }
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window as usize))..end
    }
}
