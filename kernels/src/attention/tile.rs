//! Tiles of keys and values against rows of queries, in registers.

use std::cell::RefCell;
use std::ops::Range;

use super::{Attention, BLOCKS, Item, TILE};
use crate::{
    KvCache, KvType,
    kv::{Entry, KV_BLOCK, KV_SCALED, block_of},
    math::exp,
    simd::{Kernel, LANES, Simd},
};

/// Maximum and sum of a row's softmax over some tiles; `sum` is 0 only if it saw none of them.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    sum: f32,
}

const UNSEEN: Softmax = Softmax { max: f32::NEG_INFINITY, sum: 0.0 };

/// Softmax and vector (`width` vectors of 16 dimensions) of some rows.
pub(super) struct State<'a> {
    softmax: &'a mut [Softmax],
    vectors: &'a mut [[f32; LANES]],
}

impl<'a> State<'a> {
    /// Splits off the first `rows` rows.
    pub(super) fn take(&mut self, rows: usize, width: usize) -> State<'a> {
        let (softmax, rest) = std::mem::take(&mut self.softmax).split_at_mut(rows);
        self.softmax = rest;
        let (vectors, rest) = std::mem::take(&mut self.vectors).split_at_mut(rows * width);
        self.vectors = rest;
        State { softmax, vectors }
    }

    fn part(&mut self, rows: Range<usize>, width: usize) -> State<'_> {
        State { vectors: &mut self.vectors[rows.start * width..rows.end * width], softmax: &mut self.softmax[rows] }
    }
}

/// Memory of a [`State`].
#[derive(Default)]
pub(super) struct Partials {
    softmax: Vec<Softmax>,
    vectors: Vec<[f32; LANES]>,
}

impl Partials {
    /// Room for `rows` rows that have seen nothing.
    pub(super) fn reset(&mut self, rows: usize, width: usize) {
        self.softmax.clear();
        self.softmax.resize(rows, UNSEEN);
        // What a row has not seen is not read, so old vectors may stay.
        self.vectors.resize(rows * width, [0.0; LANES]);
    }

    pub(super) fn state(&mut self) -> State<'_> {
        State { softmax: &mut self.softmax, vectors: &mut self.vectors }
    }
}

/// Where a unit's rows go.
pub(super) enum Sink<'a, 'b> {
    /// All tiles are merged: the finished rows.
    Results(Vec<&'b mut [f32]>),
    /// The state of each tile alone, `[tiles, rows]`.
    Tiles(State<'a>),
}

/// Some tiles of an item, computed by one thread.
pub(super) struct Unit<'a, 'b> {
    pub(super) item: &'a Item<'a>,
    pub(super) tiles: Range<usize>,
    pub(super) sink: Sink<'a, 'b>,
}

/// Computes a unit.
pub(super) struct Run<'r, 'a, 'b> {
    pub(super) attention: &'r Attention<'r>,
    pub(super) queries: &'r [f32],
    pub(super) unit: &'r mut Unit<'a, 'b>,
}

/// Memory of one thread.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    state: Partials,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Kernel for Run<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut scratch = SCRATCH.take();
        match self.attention.cache.dtype() {
            KvType::F32 => self.tiles::<S, f32>(s, &mut scratch),
            KvType::F16 => self.tiles::<S, u16>(s, &mut scratch),
            KvType::Q8 => self.tiles::<S, i8>(s, &mut scratch),
        }
        SCRATCH.set(scratch);
    }
}

impl Run<'_, '_, '_> {
    #[inline(always)]
    fn tiles<S: Simd, E: Entry>(self, s: S, scratch: &mut Scratch) {
        let Self { attention, queries, unit: Unit { item, tiles, sink } } = self;
        let cache = attention.cache;
        let (rows, width) = (item.rows.len(), cache.value_dim().div_ceil(LANES));
        pack::<S>(item, queries, attention.kv_heads.len(), cache.head_dim(), &mut scratch.queries);
        scratch.state.reset(if matches!(sink, Sink::Results(_)) { rows } else { 0 }, width);
        for (i, tile) in tiles.clone().enumerate() {
            let state = match sink {
                Sink::Results(_) => scratch.state.state(),
                Sink::Tiles(state) => state.part(i * rows..(i + 1) * rows, width),
            };
            Tile::<E>::new(attention, item, tile).step(s, attention, item, &scratch.queries, state);
        }
        if let Sink::Results(results) = sink {
            finish(s, scratch.state.state(), width, results);
        }
    }
}

/// Rows of the next register tile when `left` are left.
#[inline(always)]
fn register_rows<S: Simd>(left: usize) -> usize {
    match left {
        _ if S::TILE == 1 => 1,
        0..2 => 1,
        2..4 => 2,
        8.. if S::TILE >= 16 => 8,
        _ => 4,
    }
}

/// Lays the queries of each register tile out as `[head_dim][rows]`.
#[inline(always)]
fn pack<S: Simd>(item: &Item<'_>, queries: &[f32], heads: usize, head_dim: usize, packed: &mut Vec<f32>) {
    packed.clear();
    packed.resize(item.rows.len() * head_dim, 0.0);
    let mut at = 0;
    while at < item.rows.len() {
        let rows = register_rows::<S>(item.rows.len() - at);
        let packed = &mut packed[at * head_dim..(at + rows) * head_dim];
        for r in 0..rows {
            let query = &queries[item.place(item.rows.start + at + r, heads) * head_dim..][..head_dim];
            for (packed, &x) in packed[r..].iter_mut().step_by(rows).zip(query) {
                *packed = x;
            }
        }
        at += rows;
    }
}

/// The visible blocks of a tile; the others are empty.
struct Tile<'a, E> {
    /// First position.
    base: usize,
    /// Vectors per row of values.
    width: usize,
    /// `[head_dim]` vectors of 16 keys.
    keys: [&'a [[E; LANES]]; BLOCKS],
    /// `[16, width]`.
    values: [&'a [[E; LANES]]; BLOCKS],
    /// Of 32 dimensions and 16 keys, where entries have scales.
    key_scales: [&'a [[u16; LANES]]; BLOCKS],
    value_scales: [&'a [[u16; LANES]]; BLOCKS],
}

impl<'a, E: Entry> Tile<'a, E> {
    #[inline(always)]
    fn new(attention: &Attention<'a>, item: &Item<'_>, number: usize) -> Self {
        let cache: &'a KvCache = attention.cache;
        let span = &item.span;
        let seen = attention.seen(span, item.position(item.rows.start)).start..attention.seen(span, item.position(item.rows.end - 1)).end;
        let mut tile = Self {
            base: number * TILE,
            width: cache.value_dim().div_ceil(LANES),
            keys: [&[]; BLOCKS],
            values: [&[]; BLOCKS],
            key_scales: [&[]; BLOCKS],
            value_scales: [&[]; BLOCKS],
        };
        for i in 0..BLOCKS {
            let first = tile.base + i * KV_BLOCK;
            if first < seen.end && first + KV_BLOCK > seen.start {
                let block = block_of(&item.span, first, cache.blocks());
                (tile.keys[i], tile.values[i]) = cache.head(block, item.kv_head);
                (tile.key_scales[i], tile.value_scales[i]) = cache.scales(block, item.kv_head);
            }
        }
        tile
    }

    /// Merges this tile into the state of the item's rows.
    #[inline(always)]
    fn step<S: Simd>(&self, s: S, attention: &Attention<'_>, item: &Item<'_>, queries: &[f32], mut state: State<'_>) {
        let (rows, head_dim) = (item.rows.len(), attention.cache.head_dim());
        let mut at = 0;
        while at < rows {
            let n = register_rows::<S>(rows - at);
            let group = Group { attention, item, first_row: item.rows.start + at, queries: &queries[at * head_dim..(at + n) * head_dim] };
            let state = state.part(at..at + n, self.width);
            // Constant, so that only the register tiles of this instruction set are compiled.
            if const { S::TILE >= 16 } {
                match n {
                    8 => self.group::<S, 8, 2>(s, &group, state),
                    4 => self.group::<S, 4, 4>(s, &group, state),
                    2 => self.group::<S, 2, 4>(s, &group, state),
                    _ => self.group::<S, 1, 4>(s, &group, state),
                }
            } else if const { S::TILE == 1 } {
                self.group::<S, 1, 1>(s, &group, state);
            } else {
                match n {
                    4 => self.group::<S, 4, 1>(s, &group, state),
                    2 => self.group::<S, 2, 2>(s, &group, state),
                    _ => self.group::<S, 1, 4>(s, &group, state),
                }
            }
            at += n;
        }
    }

    /// `Q` rows, `V` vectors of keys or values at a time.
    #[inline(always)]
    fn group<S: Simd, const Q: usize, const V: usize>(&self, s: S, group: &Group<'_>, state: State<'_>) {
        let seen = group.seen::<Q>(self.base);
        let any = seen.any();
        if any.is_empty() {
            return;
        }
        let mut p = [[0.0; TILE]; Q];
        let (queries, _) = group.queries.as_chunks::<Q>();
        let (mut block, blocks) = (any.start / KV_BLOCK, any.end.div_ceil(KV_BLOCK));
        while block + V <= blocks {
            self.scores::<S, Q, V>(s, queries, block, &mut p);
            block += V;
        }
        while block < blocks {
            self.scores::<S, Q, 1>(s, queries, block, &mut p);
            block += 1;
        }
        let mut new = [UNSEEN; Q];
        for r in 0..Q {
            if seen.first[r] < seen.end[r] {
                new[r] = softmax(s, &mut p[r], group.attention.scale, seen.first[r], seen.end[r]);
            }
        }
        let merging = Merging::new(s, state.softmax, &new);
        let mut at = 0;
        while at + V <= self.width {
            let vectors = self.vectors::<S, Q, V>(s, &p, &seen, at);
            merging.vectors(s, state.vectors, self.width, at, vectors);
            at += V;
        }
        while at < self.width {
            let vectors = self.vectors::<S, Q, 1>(s, &p, &seen, at);
            merging.vectors(s, state.vectors, self.width, at, vectors);
            at += 1;
        }
        state.softmax.copy_from_slice(&merging.merged);
    }

    /// Products of the queries with the keys of `V` blocks from `block` on.
    #[inline(always)]
    fn scores<S: Simd, const Q: usize, const V: usize>(&self, s: S, queries: &[[f32; Q]], block: usize, p: &mut [[f32; TILE]; Q]) {
        let mut keys = [self.keys[block]; V];
        for (keys, of_block) in keys.iter_mut().zip(&self.keys[block..]) {
            *keys = &of_block[..queries.len()];
        }
        let mut dots = [[s.splat(0.0); V]; Q];
        let mut scale = [s.splat(1.0); V];
        for (d, q) in queries.iter().enumerate() {
            if E::SCALED && d.is_multiple_of(KV_SCALED) {
                for (scale, scales) in scale.iter_mut().zip(&self.key_scales[block..]) {
                    *scale = s.load_f16(&scales[d / KV_SCALED]);
                }
            }
            let mut key = [s.splat(0.0); V];
            for v in 0..V {
                key[v] = E::load(s, &keys[v][d]);
                if E::SCALED {
                    key[v] = s.mul(key[v], scale[v]);
                }
            }
            for r in 0..Q {
                let x = s.splat(q[r]);
                for v in 0..V {
                    dots[r][v] = s.fma(x, key[v], dots[r][v]);
                }
            }
        }
        for r in 0..Q {
            let (lanes, _) = p[r].as_chunks_mut::<LANES>();
            for v in 0..V {
                s.store(&mut lanes[block + v], dots[r][v]);
            }
        }
    }

    /// `Σ p[j] v[j]` over visible keys, for `V` vectors of dimensions from `at` on.
    #[inline(always)]
    fn vectors<S: Simd, const Q: usize, const V: usize>(&self, s: S, p: &[[f32; TILE]; Q], seen: &Seen<Q>, at: usize) -> [[S::F; V]; Q] {
        let mut sums = [[s.splat(0.0); V]; Q];
        let any = seen.any();
        let slots = |block: usize| any.start.saturating_sub(block * KV_BLOCK)..(any.end - block * KV_BLOCK).min(KV_BLOCK);
        let is_whole = |&block: &usize| {
            let (first, end) = (block * KV_BLOCK, (block + 1) * KV_BLOCK);
            first >= any.start && (0..Q).all(|r| seen.first[r] <= first && end <= seen.end[r])
        };
        let end = any.end.div_ceil(KV_BLOCK);
        let mut block = any.start / KV_BLOCK;
        while block < end {
            let whole = (block..end).take_while(is_whole).count();
            if whole == 0 {
                let (values, scales) = self.values_of::<S, V>(s, block, at);
                for slot in slots(block) {
                    let row = &values[slot * self.width + at..][..V];
                    let j = block * KV_BLOCK + slot;
                    add_row::<S, E, Q, V>(s, p, j, (row, &scales), &mut sums, seen.key(j));
                }
                block += 1;
                continue;
            }
            // Sums of their own: those that other blocks add to one by one are kept in memory, or the compiler may keep both there.
            let mut here = *std::hint::black_box(&mut sums);
            for block in block..block + whole {
                let (values, scales) = self.values_of::<S, V>(s, block, at);
                for (slot, row) in values.chunks_exact(self.width).enumerate() {
                    add_row::<S, E, Q, V>(s, p, block * KV_BLOCK + slot, (&row[at..at + V], &scales), &mut here, [true; Q]);
                }
            }
            sums = here;
            block += whole;
        }
        sums
    }

    /// The values of a block, and where entries have scales those of `V` vectors from `at` on, by key.
    #[inline(always)]
    fn values_of<S: Simd, const V: usize>(&self, s: S, block: usize, at: usize) -> (&'a [[E; LANES]], [[f32; LANES]; V]) {
        let mut scales = [[1.0; LANES]; V];
        if E::SCALED {
            for (scales, vector) in scales.iter_mut().zip(at..) {
                let scale = s.load_f16(&self.value_scales[block][vector * LANES / KV_SCALED]);
                s.store(scales, scale);
            }
        }
        (&self.values[block][..KV_BLOCK * self.width], scales)
    }
}

/// `sums[r] += p[r][j] · row` for the rows that see key `j`. `scales`: those of the row's vectors, of the 16 positions of its block.
#[inline(always)]
fn add_row<S: Simd, E: Entry, const Q: usize, const V: usize>(
    s: S,
    p: &[[f32; TILE]; Q],
    j: usize,
    (row, scales): (&[[E; LANES]], &[[f32; LANES]; V]),
    sums: &mut [[S::F; V]; Q],
    see: [bool; Q],
) {
    let mut value = [s.splat(0.0); V];
    for v in 0..V {
        value[v] = E::load(s, &row[v]);
        if E::SCALED {
            value[v] = s.mul(value[v], s.splat(scales[v][j % KV_BLOCK]));
        }
    }
    for r in 0..Q {
        if see[r] {
            let x = s.splat(p[r][j]);
            for v in 0..V {
                sums[r][v] = s.fma(x, value[v], sums[r][v]);
            }
        }
    }
}

/// Rows of a register tile.
struct Group<'a> {
    attention: &'a Attention<'a>,
    item: &'a Item<'a>,
    first_row: usize,
    /// `[head_dim][rows]`.
    queries: &'a [f32],
}

/// The keys of a tile that each of `Q` rows sees, `first .. end`.
struct Seen<const Q: usize> {
    first: [usize; Q],
    end: [usize; Q],
}

impl<const Q: usize> Seen<Q> {
    /// The keys that any row sees. Rows are in the order of their positions, so that the first sees the first key.
    #[inline(always)]
    fn any(&self) -> Range<usize> {
        self.first[0]..self.end[Q - 1]
    }

    /// Which rows see key `j`.
    #[inline(always)]
    fn key(&self, j: usize) -> [bool; Q] {
        let mut rows = [false; Q];
        for ((row, &first), &end) in rows.iter_mut().zip(&self.first).zip(&self.end) {
            *row = first <= j && j < end;
        }
        rows
    }
}

impl Group<'_> {
    #[inline(always)]
    fn seen<const Q: usize>(&self, base: usize) -> Seen<Q> {
        let mut seen = Seen { first: [0; Q], end: [0; Q] };
        for r in 0..Q {
            let all = self.attention.seen(&self.item.span, self.item.position(self.first_row + r));
            seen.first[r] = all.start.saturating_sub(base).min(TILE);
            seen.end[r] = all.end.saturating_sub(base).min(TILE);
        }
        seen
    }
}

/// Turns products into weights, 0 where keys are not seen.
#[inline(always)]
fn softmax<S: Simd>(s: S, p: &mut [f32; TILE], scale: f32, first: usize, end: usize) -> Softmax {
    let (lanes, _) = p.as_chunks_mut::<LANES>();
    let (scale, lowest, zero) = (s.splat(scale), s.splat(f32::NEG_INFINITY), s.splat(0.0));
    let mut scores = [zero; BLOCKS];
    let mut max = lowest;
    for i in 0..BLOCKS {
        let (first, end) = (first.saturating_sub(i * LANES), end.saturating_sub(i * LANES));
        scores[i] = s.keep(s.mul(s.load(&lanes[i]), scale), lowest, first, end);
        max = s.max(scores[i], max);
    }
    let max = s.fold_max(max);
    let top = s.splat(max);
    let mut sum = zero;
    for i in 0..BLOCKS {
        let (first, end) = (first.saturating_sub(i * LANES), end.saturating_sub(i * LANES));
        let weights = s.keep(exp(s, s.sub(scores[i], top)), zero, first, end);
        s.store(&mut lanes[i], weights);
        sum = s.add(sum, weights);
    }
    Softmax { max, sum: s.fold_add(sum) }
}

/// How the softmax and the vectors of `Q` rows are merged with those of a later tile.
struct Merging<const Q: usize> {
    merged: [Softmax; Q],
    /// Factors of the old and of the new vector.
    factors: [(f32, f32); Q],
    kind: [Kind; Q],
}

/// What a row has seen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nothing in the new tile.
    Old,
    /// Nothing before it.
    New,
    Both,
}

impl<const Q: usize> Merging<Q> {
    #[inline(always)]
    fn new<S: Simd>(s: S, old: &[Softmax], new: &[Softmax; Q]) -> Self {
        const { assert!(Q <= LANES / 2) }
        let mut lanes = [0.0; LANES];
        let mut merging = Self { merged: *new, factors: [(0.0, 0.0); Q], kind: [Kind::Both; Q] };
        for r in 0..Q {
            let max = if new[r].max > old[r].max { new[r].max } else { old[r].max };
            merging.merged[r].max = max;
            (lanes[r], lanes[LANES / 2 + r]) = (old[r].max - max, new[r].max - max);
        }
        let factors = exp(s, s.load(&lanes));
        s.store(&mut lanes, factors);
        for r in 0..Q {
            let (a, b) = (lanes[r], lanes[LANES / 2 + r]);
            merging.factors[r] = (a, b);
            if new[r].sum == 0.0 {
                merging.kind[r] = Kind::Old;
                merging.merged[r] = old[r];
            } else if old[r].sum == 0.0 {
                merging.kind[r] = Kind::New;
                merging.merged[r] = new[r];
            } else {
                merging.merged[r].sum = new[r].sum.mul_add(b, old[r].sum * a);
            }
        }
        merging
    }

    /// Merges `V` vectors of each row from `at` on into `vectors`, `[Q, width]`.
    #[inline(always)]
    fn vectors<S: Simd, const V: usize>(&self, s: S, vectors: &mut [[f32; LANES]], width: usize, at: usize, new: [[S::F; V]; Q]) {
        for r in 0..Q {
            let old = &mut vectors[r * width + at..][..V];
            let (a, b) = (s.splat(self.factors[r].0), s.splat(self.factors[r].1));
            for v in 0..V {
                match self.kind[r] {
                    Kind::Old => {}
                    Kind::New => s.store(&mut old[v], new[r][v]),
                    Kind::Both => {
                        let merged = s.fma(new[r][v], b, s.mul(s.load(&old[v]), a));
                        s.store(&mut old[v], merged);
                    }
                }
            }
        }
    }
}

/// Merges the tiles of an item, in rising order, and finishes its rows.
pub(super) struct Merge<'a, 'b> {
    /// `[tiles, rows]`.
    pub(super) state: State<'a>,
    pub(super) width: usize,
    pub(super) results: Vec<&'b mut [f32]>,
}

impl Kernel for &mut Merge<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (rows, width) = (self.results.len(), self.width);
        let (first, later) = self.state.vectors.split_at_mut(rows * width);
        let (first_softmax, later_softmax) = self.state.softmax.split_at_mut(rows);
        for (tile, softmax) in later.chunks_exact(rows * width).zip(later_softmax.chunks_exact(rows)) {
            for r in 0..rows {
                let merging = Merging::new(s, &first_softmax[r..=r], &[softmax[r]]);
                for at in 0..width {
                    merging.vectors(s, &mut first[r * width..(r + 1) * width], width, at, [[s.load(&tile[r * width + at])]]);
                }
                first_softmax[r] = merging.merged[0];
            }
        }
        finish(s, State { softmax: first_softmax, vectors: first }, width, &mut self.results);
    }
}

/// `vector / sum` of every row.
#[inline(always)]
fn finish<S: Simd>(s: S, state: State<'_>, width: usize, results: &mut [&mut [f32]]) {
    for ((softmax, vector), result) in state.softmax.iter().zip(state.vectors.chunks_exact(width)).zip(results) {
        let sum = s.splat(softmax.sum);
        let (whole, tail) = result.as_chunks_mut::<LANES>();
        for (result, vector) in whole.iter_mut().zip(vector) {
            s.store(result, s.div(s.load(vector), sum));
        }
        if !tail.is_empty() {
            s.store_part(tail, s.div(s.load(&vector[width - 1]), sum));
        }
    }
}
