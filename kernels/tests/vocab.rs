//! Softmax sums and the largest logits, on every instruction set and for every split.

use crate::{
    inputs::{Kind, Random, activations, weights},
    vector_isas,
};
use kernels::{
    Input, Isa, Matrix, Pool, Quantized, WeightType, matmul,
    vocab::{self, Candidate, Found, TileSum, Total, VOCAB_TILE, Wanted, argmax, bounded, merge_top_k, row_at, tile_sums, top_k},
};

const SIZES: [usize; 10] = [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000, 40_000];

/// Logits of which many are equal, some minus infinity, and one tile is nothing else.
fn logits(n: usize) -> Vec<f32> {
    let mut random = Random::new(n as u64);
    let mut x: Vec<f32> = (0..n).map(|_| (random.float() * 64.0).round() * 0.25).collect();
    x.iter_mut().skip(3).step_by(97).for_each(|x| *x = f32::NEG_INFINITY);
    if n > 3 * VOCAB_TILE {
        x[VOCAB_TILE..2 * VOCAB_TILE].fill(f32::NEG_INFINITY);
    }
    x
}

fn sums(pool: &Pool, isa: Isa, logits: &[f32], factor: f32) -> Vec<TileSum> {
    let mut tiles = vec![TileSum { max: f32::NAN, sum: f32::NAN }; logits.len().div_ceil(VOCAB_TILE)];
    tile_sums(pool, isa, logits, factor, &mut tiles);
    tiles
}

fn bits(tiles: &[TileSum]) -> Vec<(u32, u32)> {
    tiles.iter().map(|tile| (tile.max.to_bits(), tile.sum.to_bits())).collect()
}

#[test]
fn tile_sums_are_the_same_bits_everywhere() {
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    for n in SIZES {
        let x = logits(n);
        for factor in [1.0, 0.7] {
            let want = bits(&sums(&pools[0], Isa::Scalar, &x, factor));
            for isa in vector_isas() {
                for pool in &pools {
                    assert_eq!(bits(&sums(pool, isa, &x, factor)), want, "{n} logits on {isa}, {} threads", pool.threads());
                }
            }
            // Ranks that own whole tiles.
            let cut = (n / VOCAB_TILE / 2 * VOCAB_TILE).min(n);
            let mut split = sums(&pools[0], Isa::best(), &x[..cut], factor);
            split.extend(sums(&pools[0], Isa::best(), &x[cut..], factor));
            assert_eq!(bits(&split), want);
        }
        if n > 1 {
            let other = bits(&sums(&pools[0], Isa::best(), &x, 0.9));
            assert_ne!(other, bits(&sums(&pools[0], Isa::best(), &x, 1.0)), "another temperature must show");
        }
    }
}

#[test]
fn logits_are_bounded_where_every_sum_is_a_number() {
    let pools = [Pool::new(1), Pool::new(3)];
    let isas = || vector_isas().into_iter().chain([Isa::Scalar]);
    for n in SIZES {
        let mut x = logits(n);
        for isa in isas() {
            assert!(pools.iter().all(|pool| bounded(pool, isa, &x)), "{n} logits on {isa}");
        }
        for at in [0, n / 2, n.saturating_sub(1)].into_iter().filter(|&at| at < n) {
            for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN] {
                let before = std::mem::replace(&mut x[at], value);
                let want = !sums(&pools[0], Isa::Scalar, &x, 1.0).iter().any(|tile| tile.sum.is_nan());
                assert_eq!(want, !value.is_nan() && value != f32::INFINITY);
                for isa in isas() {
                    assert!(pools.iter().all(|pool| bounded(pool, isa, &x) == want), "{value} at {at} of {n} on {isa}");
                }
                x[at] = before;
            }
        }
    }
}

#[test]
fn totals_are_those_of_the_softmax() {
    let pool = Pool::new(2);
    for n in SIZES.into_iter().skip(1) {
        let x = logits(n);
        for factor in [1.0_f32, 0.25, 3.0] {
            let tiles = sums(&pool, Isa::best(), &x, factor);
            let total = Total::of(&tiles, factor);
            let exact = x.iter().map(|&x| (f64::from(x) * f64::from(factor)).exp()).sum::<f64>().ln();
            assert!((total.log_sum_exp() - exact).abs() < 1e-5, "{} for {exact} of {n}", total.log_sum_exp());
            let p = total.log_probability(x[0]);
            assert!((p - (f64::from(x[0]) * f64::from(factor) - exact)).abs() < 1e-5);
            let raised = Total { max: total.max + 0.01, ..total };
            assert!((raised.log_sum_exp() - exact).abs() > 1e-3, "another maximum must show");
        }
    }
    let nothing = sums(&pool, Isa::best(), &[f32::NEG_INFINITY; 1500], 1.0);
    assert_eq!(bits(&nothing), bits(&[TileSum { max: f32::NEG_INFINITY, sum: 0.0 }; 2]));
    assert_eq!(Total::of(&nothing, 1.0).tile_at(&nothing, 0.5), None);
    assert!(sums(&pool, Isa::best(), &[1.0, f32::NAN], 1.0)[0].sum.is_nan());
}

#[test]
fn draws_follow_the_probabilities() {
    let pool = Pool::new(1);
    let x = logits(5000);
    let factor = 0.5;
    let tiles = sums(&pool, Isa::best(), &x, factor);
    let total = Total::of(&tiles, factor);
    let draws = 20_000;
    let mut counts = vec![0_usize; x.len()];
    for i in 0..draws {
        let (tile, point) = total.tile_at(&tiles, (f64::from(i) + 0.5) / f64::from(draws)).unwrap();
        let rows = &x[tile * VOCAB_TILE..(tile * VOCAB_TILE + VOCAB_TILE).min(x.len())];
        counts[tile * VOCAB_TILE + row_at(rows, factor, point).unwrap()] += 1;
    }
    for (i, &count) in counts.iter().enumerate() {
        let expected = total.log_probability(x[i]).exp() * f64::from(draws);
        assert!((count as f64 - expected).abs() < 1.5, "row {i}: {count} for {expected}");
    }
    assert!(counts.iter().any(|&count| count > 5));
    assert_eq!(total.tile_at(&tiles, 0.0).map(|(tile, _)| tile), Some(0));
    assert_eq!(total.tile_at(&tiles, 1.0).map(|(tile, _)| tile), Some(4));
    assert_eq!(row_at(&[f32::NEG_INFINITY; 4], 1.0, 0.5), None);
    assert_eq!(row_at(&[0.0, f32::NEG_INFINITY], 1.0, 1.0), Some(0));
}

/// A full sort by the definition.
fn sorted(x: &[f32], first_id: u32, k: usize) -> Vec<(u32, u32)> {
    let mut all: Vec<usize> = (0..x.len()).collect();
    let value = |i: usize| if x[i].is_nan() { f32::NEG_INFINITY } else { x[i] };
    all.sort_by(|&a, &b| value(b).partial_cmp(&value(a)).unwrap().then(a.cmp(&b)));
    all.into_iter().take(k).map(|i| (first_id + i as u32, x[i].to_bits())).collect()
}

fn found(candidates: &[Candidate]) -> Vec<(u32, u32)> {
    candidates.iter().map(|candidate| (candidate.id, candidate.logit.to_bits())).collect()
}

#[test]
fn the_largest_are_those_of_a_full_sort() {
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    let mut isas = vector_isas();
    isas.push(Isa::Scalar);
    for n in SIZES {
        let ordinary = logits(n);
        let mut extreme = ordinary.clone();
        extreme.iter_mut().skip(1).step_by(7).for_each(|x| *x = f32::NAN);
        extreme.iter_mut().skip(2).step_by(11).for_each(|x| *x = f32::INFINITY);
        let zeros: Vec<f32> = (0..n).map(|i| if i % 3 == 0 { -0.0 } else { 0.0 }).collect();
        let rising: Vec<f32> = (0..n).map(|i| i as f32).collect();
        for x in [&ordinary, &extreme, &zeros, &rising, &vec![f32::NAN; n]] {
            for k in [0, 1, 5, 64, 1000] {
                let want = sorted(x, 7, k);
                for &isa in &isas {
                    for pool in &pools {
                        let got = top_k(pool, isa, x, 7, k);
                        assert_eq!(found(&got), want, "{k} of {n} on {isa}, {} threads", pool.threads());
                    }
                }
                let cut = n / 3;
                let parts = [top_k(&pools[0], Isa::best(), &x[..cut], 7, k), top_k(&pools[0], Isa::best(), &x[cut..], 7 + cut as u32, k)];
                assert_eq!(found(&merge_top_k(parts, k)), want);
            }
            let first = argmax(&pools[2], Isa::best(), x, 7);
            assert_eq!(found(first.as_slice()), sorted(x, 7, 1));
        }
        if n > 1 {
            let mut other = ordinary.clone();
            other[n - 1] = 100.0;
            assert_ne!(found(&top_k(&pools[0], Isa::best(), &other, 7, 5)), sorted(&ordinary, 7, 5), "another logit must show");
        }
    }
}

/// What a product is to find in `logits`, by the functions for logits in memory.
fn looked_for(logits: &[f32], first_id: u32, wanted: &Wanted<'_>) -> Found {
    let pool = Pool::new(1);
    let row = |row: u32| row.checked_sub(first_id).and_then(|row| logits.get(row as usize)).copied().unwrap_or(0.0);
    Found {
        tiles: wanted.sums.map_or(Vec::new(), |factor| sums(&pool, Isa::Scalar, logits, factor)),
        bounded: bounded(&pool, Isa::Scalar, logits),
        likeliest: top_k(&pool, Isa::Scalar, logits, first_id, wanted.top),
        logits: wanted.rows.iter().map(|&id| row(id)).collect(),
    }
}

/// Everything as bits.
fn exact(of: &Found) -> impl PartialEq + std::fmt::Debug + use<> {
    let logits: Vec<u32> = of.logits.iter().map(|x| x.to_bits()).collect();
    (bits(&of.tiles), of.bounded, found(&of.likeliest), logits)
}

/// Wants of every kind, and none, by turns.
fn wants(tokens: usize, rows: &[u32], sums: Option<f32>) -> Vec<Wanted<'_>> {
    let kinds = [
        Wanted { top: 1, ..Wanted::default() },
        Wanted { sums, kept: true, ..Wanted::default() },
        Wanted { top: 40, rows, ..Wanted::default() },
        Wanted { sums, top: 3, rows: &rows[..2], ..Wanted::default() },
        Wanted { kept: true, top: 5, ..Wanted::default() },
        Wanted::default(),
    ];
    kinds.into_iter().cycle().take(tokens).collect()
}

#[test]
fn a_product_finds_what_is_found_in_its_logits() {
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    let mut isas = vector_isas();
    isas.push(Isa::Scalar);
    for (dtype, k) in [(WeightType::F32, 1), (WeightType::Q8_0, 64), (WeightType::Q4_K, 256)] {
        for (rows, tokens) in [(2500, 7), (700, 2), (1024, 33), (5, 3), (4097, 1)] {
            let mut stored = weights(dtype, Kind::Ordinary, rows, k, rows as u64);
            if dtype == WeightType::F32 {
                // The logits are the weights times one number: minus infinities, ties, and rows that are broken.
                let mut logits = logits(rows);
                if tokens == 7 {
                    (logits[1030], logits[2]) = (f32::NAN, f32::INFINITY);
                }
                stored = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
            }
            let x = activations(Kind::Ordinary, tokens, k, 5);
            let (first_id, ids) = (2048, [2048, 2050, 2049, 7, 2048 + rows as u32 - 1, 2048 + rows as u32]);
            for &isa in &isas {
                let matrix = Matrix::pack(isa, dtype, rows, k, &stored, &pools[0]).unwrap();
                let mut quantized = Quantized::new(matrix.activation_block().unwrap_or(32));
                let input = match matrix.activation_block() {
                    None => Input::F32(&x),
                    Some(_) => {
                        quantized.quantize(&pools[0], isa, &x, tokens, k);
                        Input::Quantized(&quantized)
                    }
                };
                let mut whole = vec![0.0; tokens * rows];
                matmul(&pools[0], isa, &matrix, 0..rows, input, tokens, &mut whole);
                for (pool, sums) in pools.iter().zip([None, Some(1.0), Some(0.7)]) {
                    let wanted = wants(tokens, &ids, sums);
                    let keeps: Vec<usize> = (0..tokens).filter(|&token| wanted[token].kept).collect();
                    let mut kept = vec![f32::NAN; keeps.len() * rows];
                    let got = vocab::product(pool, isa, (&matrix, rows, first_id), input, &wanted, &mut kept);
                    assert_eq!(got.len(), tokens);
                    for ((got, wanted), logits) in got.iter().zip(&wanted).zip(whole.chunks_exact(rows)) {
                        let want = looked_for(logits, first_id, wanted);
                        assert_eq!(exact(got), exact(&want), "{dtype} [{rows}] x {tokens} on {isa}, {} threads", pool.threads());
                    }
                    for (token, kept) in keeps.into_iter().zip(kept.chunks_exact(rows)) {
                        let whole = &whole[token * rows..(token + 1) * rows];
                        assert!(kept.iter().zip(whole).all(|(a, b)| a.to_bits() == b.to_bits()), "what is kept of token {token}");
                    }
                }
                if tokens > 1 {
                    let [first, other] = [0, 1].map(|token| looked_for(&whole[token * rows..][..rows], first_id, &wants(3, &ids, None)[2]));
                    assert_ne!(exact(&other), exact(&first), "another token's logits must show");
                }
            }
        }
    }
}
