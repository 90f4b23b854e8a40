//! Attention against its definition, written out plainly, on every instruction set.

use crate::{inputs::Random, vector_isas};
use half::f16;
use kernels::{ABSENT, Attention, Isa, KV_BLOCK, KV_SCALED, KvCache, KvSpan, KvType, Pool, math::exp_f32};

/// One sequence's keys, values and queries, and the heads that read each other.
struct Case {
    dtype: KvType,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    /// Cache head of each query head.
    readers: Vec<u32>,
    window: Option<u32>,
    causal: bool,
    scale: f32,
    /// `[positions, kv_heads, head_dim]`.
    keys: Vec<f32>,
    /// `[positions, kv_heads, value_dim]`.
    values: Vec<f32>,
    /// `[positions, heads, head_dim]`.
    queries: Vec<f32>,
}

impl Case {
    fn new(dtype: KvType, readers: &[u32], head_dim: usize, positions: usize, window: Option<u32>) -> Self {
        Self::of_dims(dtype, readers, (head_dim, head_dim), positions, window)
    }

    fn of_dims(dtype: KvType, readers: &[u32], (head_dim, value_dim): (usize, usize), positions: usize, window: Option<u32>) -> Self {
        let kv_heads = readers.iter().max().map_or(1, |&head| head as usize + 1);
        let mut random = Random::new((positions * 31 + head_dim * 7 + readers.len()) as u64);
        let mut fill = |n: usize, size: f32| (0..n).map(|_| random.float() * size).collect::<Vec<f32>>();
        let keys = fill(positions * kv_heads * head_dim, 2.0);
        let values = fill(positions * kv_heads * value_dim, 1.0);
        let queries = fill(positions * readers.len() * head_dim, 2.0);
        let readers = readers.to_vec();
        Self { dtype, kv_heads, head_dim, value_dim, readers, window, causal: true, scale: 0.125, keys, values, queries }
    }

    fn positions(&self) -> usize {
        self.keys.len() / self.kv_heads / self.head_dim
    }

    /// What the cache makes of rows of `width` values.
    fn stored(&self, rows: &[f32], width: usize) -> Vec<f32> {
        match self.dtype {
            KvType::F32 => rows.to_vec(),
            KvType::F16 => rows.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
            KvType::Q8 => rows.chunks_exact(width).flat_map(|row| row.chunks(KV_SCALED)).flat_map(multiples).collect(),
        }
    }

    /// The first key that a query at `position` sees.
    fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window as usize))
    }

    /// The keys that a query at `position` sees.
    fn seen(&self, position: usize) -> std::ops::Range<usize> {
        self.first(position)..if self.causal { position + 1 } else { self.positions() }
    }

    /// The rows of `x` at `range`, of `width` values each.
    fn rows(x: &[f32], range: std::ops::Range<usize>, width: usize) -> &[f32] {
        &x[range.start * width..range.end * width]
    }

    /// Results from `first` on, by the definition in the module, with tiles of `tile` positions.
    fn defined(&self, first: usize, tile: usize) -> Vec<f32> {
        let (heads, n, m) = (self.readers.len(), self.head_dim, self.value_dim);
        let (keys, values) = (self.stored(&self.keys, n), self.stored(&self.values, m));
        let mut out = Vec::new();
        for position in first..self.positions() {
            for head in 0..heads {
                let query = &self.queries[(position * heads + head) * n..][..n];
                let stored = |x: &[f32], j: usize, n: usize, d: usize| x[(j * self.kv_heads + self.readers[head] as usize) * n + d];
                let key = |j: usize, d: usize| stored(&keys, j, n, d);
                let value = |j: usize, d: usize| stored(&values, j, m, d);
                let seen = self.seen(position);
                let (mut max, mut sum, mut vector) = (f32::NEG_INFINITY, 0.0, vec![0.0_f32; m]);
                for base in (seen.start / tile * tile..seen.end).step_by(tile) {
                    let keys = base.max(seen.start)..(base + tile).min(seen.end);
                    let score = |j| (0..n).fold(0.0, |dot, d| query[d].mul_add(key(j, d), dot)) * self.scale;
                    let scores: Vec<f32> = keys.clone().map(score).collect();
                    let tile_max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| if score > max { score } else { max });
                    let p: Vec<f32> = scores.iter().map(|score| exp_f32(score - tile_max)).collect();
                    let mut lanes = [0.0_f32; 16];
                    for (p, j) in p.iter().zip(keys.clone()) {
                        lanes[(j - base) % 16] += p;
                    }
                    for half in [8, 4, 2, 1] {
                        for i in 0..half {
                            lanes[i] += lanes[i + half];
                        }
                    }
                    let chain = |d| p.iter().zip(keys.clone()).fold(0.0, |sum: f32, (p, j)| p.mul_add(value(j, d), sum));
                    let tile_vector: Vec<f32> = (0..m).map(chain).collect();
                    if base <= seen.start {
                        (max, sum, vector) = (tile_max, lanes[0], tile_vector);
                        continue;
                    }
                    let new = if tile_max > max { tile_max } else { max };
                    let (a, b) = (exp_f32(max - new), exp_f32(tile_max - new));
                    max = new;
                    sum = lanes[0].mul_add(b, sum * a);
                    vector = vector.iter().zip(tile_vector).map(|(old, new)| new.mul_add(b, old * a)).collect();
                }
                out.extend(vector.iter().map(|x| x / sum));
            }
        }
        out
    }

    /// Results from `first` on in f64, without tiles.
    fn exact(&self, first: usize) -> Vec<f64> {
        let (heads, n, m) = (self.readers.len(), self.head_dim, self.value_dim);
        let (stored_keys, stored_values) = (self.stored(&self.keys, n), self.stored(&self.values, m));
        let mut out = Vec::new();
        for position in first..self.positions() {
            for head in 0..heads {
                let query = &self.queries[(position * heads + head) * n..][..n];
                let at = |x: &[f32], j: usize, n: usize, d: usize| f64::from(x[(j * self.kv_heads + self.readers[head] as usize) * n + d]);
                let keys = self.seen(position);
                let score = |j| (0..n).map(|d| f64::from(query[d]) * at(&stored_keys, j, n, d)).sum::<f64>() * f64::from(self.scale);
                let scores: Vec<f64> = keys.clone().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let sum: f64 = p.iter().sum();
                out.extend((0..m).map(|d| p.iter().zip(keys.clone()).map(|(p, j)| p * at(&stored_values, j, m, d)).sum::<f64>() / sum));
            }
        }
        out
    }

    /// Results from `first` on, in steps of `chunk` tokens. Blocks lie in falling order among others of NaN and infinity, and those that
    /// the window has passed are taken away.
    fn run(&self, pool: &Pool, isa: Isa, first: usize, chunk: usize) -> Vec<u32> {
        let (positions, key_width, value_width) = (self.positions(), self.kv_heads * self.head_dim, self.kv_heads * self.value_dim);
        let blocks = positions.div_ceil(KV_BLOCK);
        let mut cache = garbage(self.dtype, blocks + 2, self.kv_heads, (self.head_dim, self.value_dim));
        let mut table: Vec<u32> = (0..blocks as u32).rev().map(|block| block + 1).collect();
        let attention = |cache: &KvCache, span: KvSpan<'_>, out: &mut [f32]| {
            let queries = span.first_position..span.first_position + span.tokens;
            let attention = Attention { cache, kv_heads: &self.readers, scale: self.scale, window: self.window, causal: self.causal };
            attention.run(pool, isa, &[span], Self::rows(&self.queries, queries, self.readers.len() * self.head_dim), out);
        };
        let write = |cache: &mut KvCache, span: KvSpan<'_>| {
            let new = span.first_position..span.first_position + span.tokens;
            cache.write(isa, &[span], Self::rows(&self.keys, new.clone(), key_width), Self::rows(&self.values, new, value_width));
        };
        write(&mut cache, KvSpan { table: &table, first_position: 0, tokens: first });
        let mut out = vec![f32::NAN; (positions - first) * self.readers.len() * self.value_dim];
        for (i, out) in out.chunks_mut((chunk * self.readers.len() * self.value_dim).max(1)).enumerate() {
            let first = first + i * chunk;
            table[..self.first(first) / KV_BLOCK].fill(ABSENT);
            let span = KvSpan { table: &table, first_position: first, tokens: chunk.min(positions - first) };
            write(&mut cache, span);
            attention(&cache, span, out);
        }
        bits(&out)
    }
}

/// Up to 32 values as multiples of their scale.
fn multiples(x: &[f32]) -> Vec<f32> {
    let top = x.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
    let scale = f16::from_f32((top / 127.0).min(65504.0)).to_f32();
    let multiple = |x: &f32| if scale == 0.0 { 0.0 } else { (x / scale).round_ties_even().clamp(-127.0, 127.0) * scale };
    x.iter().map(multiple).collect()
}

/// A cache of signalling nonsense.
fn garbage(dtype: KvType, blocks: usize, kv_heads: usize, dims: (usize, usize)) -> KvCache {
    let mut cache = KvCache::new(dtype, blocks, kv_heads, dims);
    let size = cache.exported_bytes();
    for block in 0..blocks {
        let entry: &[u8] = match (dtype, block % 2) {
            (KvType::F32, 0) => &f32::NAN.to_le_bytes(),
            (KvType::F32, _) => &f32::INFINITY.to_le_bytes(),
            (KvType::F16 | KvType::Q8, 0) => &f16::NAN.to_le_bytes(),
            (KvType::F16 | KvType::Q8, _) => &f16::INFINITY.to_le_bytes(),
        };
        let bytes: Vec<u8> = entry.iter().copied().cycle().take(size).collect();
        cache.import_block(block as u32, &bytes).unwrap();
    }
    cache
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Whether `got` and `want` are the same bits; prints the first difference.
fn same(got: &[u32], want: &[u32]) -> bool {
    let different = got.iter().zip(want).position(|(a, b)| a != b);
    if let Some(i) = different {
        println!("result {i}: {} for {}", f32::from_bits(got[i]), f32::from_bits(want[i]));
    }
    different.is_none() && got.len() == want.len()
}

/// Where attention is not causal, every query sees the whole sequence.
#[test]
fn what_is_not_causal_sees_the_whole_sequence() {
    let pools: Vec<Pool> = (1..=3).map(Pool::new).collect();
    let mut isas = vector_isas();
    isas.push(Isa::Scalar);
    let mut n = 0;
    for head_dim in [1, 16, 17, 32, 64] {
        for positions in [1, 15, 16, 63, 64, 65, 130, 300] {
            let readers: &[u32] = [&[0][..], &[0, 1, 2, 3], &[0, 1, 0]][n % 3];
            let mut case = Case::new(KvType::F32, readers, head_dim, positions, None);
            case.causal = false;
            let want = bits(&case.defined(0, 64));
            for (i, &isa) in isas.iter().enumerate() {
                let pool = &pools[(n + i) % 3];
                assert!(same(&case.run(pool, isa, 0, positions), &want), "{positions} × {head_dim} on {isa}, {} threads", pool.threads());
            }
            for (got, exact) in want.iter().zip(case.exact(0)) {
                assert!((f64::from(f32::from_bits(*got)) - exact).abs() < 1e-5, "{positions} × {head_dim}");
            }
            case.causal = true;
            assert!(positions == 1 || bits(&case.defined(0, 64)) != want, "later keys must show");
            n += 1;
        }
    }
}

#[test]
fn every_isa_gives_the_defined_bits() {
    let pools: Vec<Pool> = (1..=3).map(Pool::new).collect();
    let mut isas = vector_isas();
    isas.push(Isa::Scalar);
    let mut n = 0;
    for dtype in KvType::ALL {
        for head_dim in [1, 15, 16, 17, 32, 64, 80, 128, 256] {
            for (positions, window) in [(1, None), (15, Some(4)), (16, Some(16)), (17, None), (66, Some(20)), (129, None), (150, Some(70))]
            {
                let readers: &[u32] = [&[0][..], &[0, 0, 0, 0], &[0, 1, 0], &[1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0]][n % 4];
                let case = Case::new(dtype, readers, head_dim, positions, window);
                let first = [0, positions - 1, positions / 3][n % 3];
                let want = bits(&case.defined(first, 64));
                for (i, &isa) in isas.iter().enumerate() {
                    let pool = &pools[(n / 3 + i) % 3];
                    let chunk = [1, 7, 64, positions][(n / 4 + i) % 4];
                    assert!(
                        same(&case.run(pool, isa, first, chunk), &want),
                        "{dtype:?} × {head_dim}, readers {readers:?}, {first}..{positions}, window {window:?}, chunks of {chunk} on {isa}, {} threads",
                        pool.threads()
                    );
                }
                n += 1;
            }
        }
    }
}

/// Values of other widths than keys, narrower and wider.
#[test]
fn keys_and_values_have_widths_of_their_own() {
    let pools: Vec<Pool> = (1..=3).map(Pool::new).collect();
    let mut n = 0;
    for dtype in KvType::ALL {
        for dims in [(1, 17), (24, 16), (16, 24), (40, 33), (192, 128), (48, 160)] {
            for (positions, first) in [(1, 0), (17, 3), (66, 0), (150, 149), (300, 200)] {
                let readers: &[u32] = [&[0, 1, 2][..], &[0], &[0, 0, 1]][n % 3];
                let case = Case::of_dims(dtype, readers, dims, positions, [None, Some(70)][n % 2]);
                let want = bits(&case.defined(first, 64));
                assert_eq!(want.len(), (positions - first) * readers.len() * dims.1);
                for (i, isa) in Isa::available().into_iter().enumerate() {
                    let (pool, chunk) = (&pools[(n + i) % 3], [1, 7, 64, positions][(n / 3 + i) % 4]);
                    assert!(same(&case.run(pool, isa, first, chunk), &want), "{dtype:?} × {dims:?}, {first}..{positions} on {isa}");
                }
                for (got, exact) in want.iter().zip(case.exact(first)) {
                    assert!((f64::from(f32::from_bits(*got)) - exact).abs() < 1e-5, "{dims:?}, {positions}");
                }
                n += 1;
            }
        }
    }
    let mut case = Case::of_dims(KvType::F32, &[0], (24, 16), 40, None);
    let want = bits(&case.defined(0, 64));
    case.keys[5 * 24 + 20] += 0.5;
    assert_ne!(case.run(&pools[0], Isa::best(), 0, 40), want, "a key's value past the width of values must show");
}

#[test]
fn results_are_close_to_exact_softmax_and_a_wrong_question_shows() {
    let pool = Pool::new(2);
    for dtype in KvType::ALL {
        for window in [None, Some(64), Some(100)] {
            let mut case = Case::new(dtype, &[0, 1, 1], 64, 300, window);
            let exact = case.exact(0);
            let far =
                |got: &[u32]| got.iter().zip(&exact).map(|(&got, want)| (f64::from(f32::from_bits(got)) - want).abs()).fold(0.0, f64::max);
            let run = |case: &Case| case.run(&pool, Isa::best(), 0, 64);
            let got = run(&case);
            assert!(far(&got) < 2e-6, "{dtype:?}, window {window:?}: {} off", far(&got));

            let readers = std::mem::replace(&mut case.readers, vec![0, 0, 1]);
            assert!(far(&run(&case)) > 1e-2, "another head must show");
            case.readers = readers;
            case.window = window.map_or(Some(299), |window| Some(window - 1));
            assert!(far(&run(&case)) > 1e-5, "a window one smaller must show");
            case.window = window;
            case.scale *= 1.01;
            assert!(far(&run(&case)) > 1e-4, "another scale must show");
            case.scale /= 1.01;
            let at = case.keys.len() - 200 * 128;
            case.keys[at] += 0.5;
            assert!(far(&run(&case)) > 1e-5, "another key must show");
        }
    }
}

#[test]
fn another_tile_or_order_changes_the_bits() {
    let case = Case::new(KvType::F32, &[0], 64, 200, None);
    let got = case.run(&Pool::new(1), Isa::best(), 0, 64);
    assert!(same(&got, &bits(&case.defined(0, 64))));
    for tile in [16, 32, 128] {
        assert!(!same(&got, &bits(&case.defined(0, tile))), "tiles of {tile} must show");
    }
}

#[test]
fn batch_mates_do_not_change_a_bit() {
    // Three sequences of different lengths in one cache; the third decodes one token deep in its context.
    for dtype in KvType::ALL {
        for window in [None, Some(50)] {
            let lengths = [(0, 40), (10, 77), (699, 700)];
            let readers = [0, 1, 1, 0, 1];
            let cases: Vec<Case> =
                lengths.iter().map(|&(_, positions)| Case::of_dims(dtype, &readers, (48, 40), positions, window)).collect();
            let mut cache = garbage(dtype, 60, 2, (48, 40));
            let tables: [Vec<u32>; 3] = [vec![14, 3, 8], vec![2, 9, 0, 13, 5], (15..59).rev().collect()];
            let (mut spans, mut queries, mut want) = (Vec::new(), Vec::new(), Vec::new());
            for (i, case) in cases.iter().enumerate() {
                let (first, positions) = lengths[i];
                let all = KvSpan { table: &tables[i], first_position: 0, tokens: positions };
                cache.write(Isa::best(), &[all], &case.keys, &case.values);
                spans.push(KvSpan { first_position: first, tokens: positions - first, ..all });
                queries.extend_from_slice(Case::rows(&case.queries, first..positions, readers.len() * 48));
                want.extend(bits(&case.defined(first, 64)));
            }
            for isa in Isa::available() {
                for threads in 1..=3 {
                    let mut out = vec![f32::NAN; want.len()];
                    let attention = Attention { cache: &cache, kv_heads: &readers, scale: 0.125, window, causal: true };
                    attention.run(&Pool::new(threads), isa, &spans, &queries, &mut out);
                    assert!(same(&bits(&out), &want), "{dtype:?}, window {window:?} on {isa}, {threads} threads");
                }
            }
        }
    }
}

#[test]
fn a_rank_gives_its_heads_the_bits_of_the_whole() {
    let pool = Pool::new(2);
    let whole = Case::new(KvType::F16, &[0, 0, 1, 1], 64, 130, None);
    let want = whole.run(&pool, Isa::best(), 0, 130);
    // Query head 1 reads the first cache head and heads 2 and 3 the second: a group that is cut.
    let heads = 1..4;
    let part = Case {
        readers: vec![0, 1, 1],
        queries: whole.queries.chunks_exact(4 * 64).flat_map(|row| row[heads.start * 64..heads.end * 64].to_vec()).collect(),
        keys: whole.keys.clone(),
        values: whole.values.clone(),
        ..whole
    };
    let got = part.run(&pool, Isa::best(), 0, 130);
    let want: Vec<u32> = want.chunks_exact(4 * 64).flat_map(|row| row[heads.start * 64..heads.end * 64].to_vec()).collect();
    assert!(same(&got, &want));
}

#[test]
fn huge_and_tiny_scores_give_the_defined_bits() {
    for size in [1e-30, 30.0, 1e4, 1e18] {
        let mut case = Case::new(KvType::F32, &[0, 0], 32, 140, None);
        case.keys.iter_mut().for_each(|key| *key *= size);
        case.values.iter_mut().step_by(3).for_each(|value| *value *= 1e-41 / size);
        let want = bits(&case.defined(0, 64));
        assert!(want.iter().all(|&x| f32::from_bits(x).is_finite()));
        for isa in Isa::available() {
            assert!(same(&case.run(&Pool::new(2), isa, 0, 7), &want), "keys of {size} on {isa}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let pool = Pool::new(1);
    let cache = KvCache::new(KvType::F32, 2, 1, (16, 16));
    let refused = |kv_heads: &[u32], window: Option<u32>, table: &[u32], len: usize| {
        let attention = Attention { cache: &cache, kv_heads, scale: 1.0, window, causal: true };
        let mut out = vec![0.0; len];
        let span = KvSpan { table, first_position: 20, tokens: 1 };
        let run = || attention.run(&pool, Isa::best(), &[span], &vec![0.0; len], &mut out);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err()
    };
    assert!(!refused(&[0], None, &[0, 1], 16));
    assert!(!refused(&[0], Some(5), &[ABSENT, 1], 16));
    assert!(refused(&[0], Some(6), &[ABSENT, 1], 16));
    assert!(refused(&[0], None, &[0, 2], 16));
    assert!(refused(&[0], None, &[0], 16));
    assert!(refused(&[1], None, &[0, 1], 16));
    assert!(refused(&[0], Some(0), &[0, 1], 16));
    assert!(refused(&[0], None, &[0, 1], 17));
}
