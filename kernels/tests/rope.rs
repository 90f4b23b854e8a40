//! Rotary embedding against its definition, on every instruction set.

use crate::{inputs::Random, vector_isas};
use kernels::{
    Isa, Pool,
    rope::{RopeLayout, RopeScaling, RopeTable},
};

const BASE: f64 = 10_000.0;

fn rotated(table: &RopeTable, pool: &Pool, isa: Isa, x: &[f32], head_dim: usize, positions: &[u32]) -> Vec<u32> {
    let mut x = x.to_vec();
    table.apply(pool, isa, &mut x, (head_dim, 0), positions);
    x.into_iter().map(f32::to_bits).collect()
}

fn noise(n: usize) -> Vec<f32> {
    let mut random = Random::new(n as u64);
    (0..n).map(|_| random.float()).collect()
}

/// The definition in f64, with the system's own functions.
fn exact(x: &[f32], layout: RopeLayout, dims: usize, head_dim: usize, heads: usize, positions: &[u32]) -> Vec<f64> {
    let mut out: Vec<f64> = x.iter().copied().map(f64::from).collect();
    for (row, head) in out.chunks_exact_mut(head_dim).enumerate() {
        for i in 0..dims / 2 {
            let angle = f64::from(positions[row / heads]) * BASE.powf(-2.0 * i as f64 / dims as f64);
            let (first, second) = match layout {
                RopeLayout::Adjacent => (2 * i, 2 * i + 1),
                RopeLayout::Halves => (i, i + dims / 2),
            };
            let (a, b) = (head[first], head[second]);
            (head[first], head[second]) = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos());
        }
    }
    out
}

#[test]
fn every_isa_and_thread_count_gives_the_specified_bits() {
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    let isas = vector_isas();
    for layout in [RopeLayout::Adjacent, RopeLayout::Halves] {
        for (dims, head_dim) in [(2, 2), (2, 5), (16, 16), (20, 32), (32, 40), (34, 34), (64, 64), (80, 80), (96, 128), (256, 256)] {
            let table = RopeTable::new(layout, dims, BASE, &RopeScaling::None, 5000);
            for (heads, positions) in [(1, vec![]), (1, vec![0]), (3, vec![4999, 63, 64, 0]), (4, (100..170).collect::<Vec<u32>>())] {
                let x = noise(positions.len() * heads * head_dim);
                let want = rotated(&table, &pools[0], Isa::Scalar, &x, head_dim, &positions);
                for &isa in &isas {
                    for pool in &pools {
                        let got = rotated(&table, pool, isa, &x, head_dim, &positions);
                        assert!(got == want, "{layout:?} {dims} of {head_dim} on {isa}, {} threads", pool.threads());
                    }
                }
                let exact = exact(&x, layout, dims, head_dim, heads, &positions);
                assert!(want.iter().zip(&exact).all(|(&got, want)| (f64::from(f32::from_bits(got)) - want).abs() < 3e-7));
                if !positions.is_empty() {
                    let mut other = positions.clone();
                    other[0] ^= 1;
                    assert_ne!(rotated(&table, &pools[0], Isa::best(), &x, head_dim, &other), want, "another position must show");
                }
            }
        }
    }
}

/// Of each head the values from some place on: those are turned as if they were the head, and the others stay.
#[test]
fn a_part_of_a_head_is_turned_as_a_head() {
    let (dims, head_dim, positions) = (20, 45, [7, 300, 0]);
    for layout in [RopeLayout::Adjacent, RopeLayout::Halves] {
        let table = RopeTable::new(layout, dims, BASE, &RopeScaling::None, 500);
        let x = noise(positions.len() * 2 * head_dim);
        for first in [0, 1, 16, 25] {
            let part: Vec<f32> = x.chunks(head_dim).flat_map(|head| head[first..first + dims].to_vec()).collect();
            let turned = rotated(&table, &Pool::new(1), Isa::Scalar, &part, dims, &positions);
            for isa in Isa::available() {
                let mut got = x.clone();
                table.apply(&Pool::new(2), isa, &mut got, (head_dim, first), &positions);
                for ((got, x), turned) in got.chunks(head_dim).zip(x.chunks(head_dim)).zip(turned.chunks(dims)) {
                    assert!(
                        got[first..first + dims].iter().map(|x| x.to_bits()).eq(turned.iter().copied()),
                        "{layout:?} from {first} on {isa}"
                    );
                    assert!(got[..first] == x[..first] && got[first + dims..] == x[first + dims..]);
                }
            }
        }
        let mut x = x;
        let past = || table.apply(&Pool::new(1), Isa::best(), &mut x, (head_dim, 26), &positions);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(past)).is_err());
    }
}

/// The angle by which pair `i` is turned at position 1.
fn frequency(scaling: &RopeScaling, dims: usize, i: usize) -> f64 {
    let table = RopeTable::new(RopeLayout::Halves, dims, BASE, scaling, 2);
    let mut x = vec![0.0; dims];
    x[i] = 1.0;
    table.apply(&Pool::new(1), Isa::best(), &mut x, (dims, 0), &[1]);
    f64::from(x[i + dims / 2]).atan2(f64::from(x[i]))
}

#[test]
fn scaling_stretches_the_frequencies_it_names() {
    let dims = 64;
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
    let mut divisors = vec![1.0; dims / 2];
    divisors[3] = 2.5;
    let divisors = RopeScaling::Divisors(divisors);
    let mut kinds = [0; 3];
    for i in 0..dims / 2 {
        let plain = BASE.powf(-2.0 * i as f64 / dims as f64);
        let close = |scaling: &RopeScaling, want: f64| (frequency(scaling, dims, i) / want - 1.0).abs() < 1e-6;
        assert!(close(&RopeScaling::None, plain));
        assert!(close(&RopeScaling::Linear { factor: 8.0 }, plain / 8.0));
        assert!(close(&divisors, if i == 3 { plain / 2.5 } else { plain }));
        // As Hugging Face states it: a blend of both frequencies.
        let wavelength = std::f64::consts::TAU / plain;
        let (want, kind) = if wavelength < 8192.0 / 4.0 {
            (plain, 0)
        } else if wavelength > 8192.0 {
            (plain / 8.0, 1)
        } else {
            let smooth = (8192.0 / wavelength - 1.0) / 3.0;
            ((1.0 - smooth) * plain / 8.0 + smooth * plain, 2)
        };
        kinds[kind] += 1;
        assert!(close(&llama3, want), "pair {i}");
        assert!(kind == 0 || !close(&llama3, plain), "another scaling must show");
    }
    assert!(kinds.iter().all(|&n| n > 0), "all three parts of the ramp: {kinds:?}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let table = RopeTable::new(RopeLayout::Halves, 8, BASE, &RopeScaling::None, 10);
    let refused = |len: usize, head_dim: usize, positions: &[u32]| {
        let mut x = vec![1.0; len];
        let apply = || table.apply(&Pool::new(1), Isa::best(), &mut x, (head_dim, 0), positions);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(apply)).is_err()
    };
    assert!(!refused(32, 8, &[0, 9]));
    assert!(refused(32, 8, &[0, 10]));
    assert!(refused(24, 6, &[0, 9]));
    assert!(refused(24, 8, &[0, 9]));
}

/// Angles of transformers' `_compute_yarn_parameters`, in f64.
fn yarn(dims: usize, base: f64, factor: f64, original: f64, position: f64) -> Vec<f64> {
    let pair = |turns: f64| dims as f64 * (original / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * base.ln());
    let (low, high) = (pair(32.0).floor().max(0.0), pair(1.0).ceil().min(dims as f64 - 1.0));
    let angle = |i: usize| {
        let inverse = base.powf(-2.0 * i as f64 / dims as f64);
        let kept = 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        position * (inverse / factor * (1.0 - kept) + inverse * kept)
    };
    (0..dims / 2).map(angle).collect()
}

#[test]
fn yarn_divides_low_frequencies_and_scales_what_it_turns() {
    let (dims, factor, original) = (64, 4.0_f64, 2048.0);
    let amplitude = 0.1 * factor.ln() + 1.0;
    let scaling = |factor| RopeScaling::Yarn { factor, original_context: original, beta_fast: 32.0, beta_slow: 1.0, truncate: true };
    let table = RopeTable::new(RopeLayout::Halves, dims, BASE, &scaling(factor), 5000).with_amplitude(amplitude);
    let other = RopeTable::new(RopeLayout::Halves, dims, BASE, &scaling(5.0), 5000).with_amplitude(amplitude);
    for position in [1, 77, 4999] {
        // Each pair is (1, 0), and becomes its cosine and sine.
        let x: Vec<f32> = (0..dims).map(|i| if i < dims / 2 { 1.0 } else { 0.0 }).collect();
        let turn = |table: &RopeTable| rotated(table, &Pool::new(1), Isa::best(), &x, dims, &[position]);
        let got: Vec<f32> = turn(&table).into_iter().map(f32::from_bits).collect();
        let angles = yarn(dims, BASE, factor, original, f64::from(position));
        let off = angles.iter().enumerate().map(|(i, angle)| {
            let (cos, sin) = (angle.cos() * amplitude, angle.sin() * amplitude);
            (f64::from(got[i]) - cos).abs().max((f64::from(got[i + dims / 2]) - sin).abs())
        });
        assert!(off.fold(0.0, f64::max) < 2e-7);
        assert_ne!(turn(&table), turn(&other), "another factor must show");
    }
    // The fastest pair is kept, the slowest divided by the factor.
    let angles = yarn(dims, BASE, factor, original, 1.0);
    assert_eq!(angles[0], 1.0);
    assert!((angles[31] * factor / BASE.powf(-62.0 / 64.0) - 1.0).abs() < 1e-12);
}

#[test]
fn a_stretched_base_is_the_formulas() {
    let base = kernels::rope::dynamic_base(10_000.0, 128, 2.0, 4096.0, 8192.0);
    assert!((base / (10_000.0 * 3.0_f64.powf(128.0 / 126.0)) - 1.0).abs() < 1e-12);
    assert_eq!(kernels::rope::dynamic_base(10_000.0, 128, 2.0, 4096.0, 100.0), 10_000.0, "nothing is stretched below the trained length");
}
