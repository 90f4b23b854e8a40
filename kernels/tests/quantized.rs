//! Quantized activations: the same on every instruction set, and through export and import.

use crate::inputs::{Kind, activations};
use kernels::{Isa, Pool, Quantized};

fn exported(x: &Quantized) -> Vec<u8> {
    let mut bytes = Vec::new();
    x.export(0..x.tokens(), 0..x.k(), &mut bytes);
    assert_eq!(bytes.len(), x.exported_bytes(x.tokens(), x.k()));
    bytes
}

#[test]
fn every_isa_and_thread_count_quantizes_alike() {
    for block in [32, 256] {
        for kind in Kind::ALL {
            for tokens in [0, 1, 2, 13, 33] {
                let k = 3 * 256;
                let x = activations(kind, tokens, k, 1);
                let mut expected = Quantized::new(block);
                expected.quantize(&Pool::new(1), Isa::Scalar, &x, tokens, k);
                for isa in Isa::available() {
                    for threads in 1..=3 {
                        let mut got = Quantized::new(block);
                        got.quantize(&Pool::new(threads), isa, &x, tokens, k);
                        assert!(exported(&got) == exported(&expected), "{kind:?} {tokens} tokens on {isa}, {threads} threads");
                    }
                }
            }
        }
    }
}

#[test]
fn values_and_scales_follow_the_definition() {
    let mut x = vec![0.0_f32; 96];
    // Ties go to even: 127/127 per unit makes q = x.
    x[..5].copy_from_slice(&[127.0, 0.5, 1.5, -2.5, -127.0]);
    x[32] = f32::INFINITY;
    for isa in Isa::available() {
        let mut got = Quantized::new(32);
        got.quantize(&Pool::new(1), isa, &x, 1, 96);
        let bytes = exported(&got);
        assert_eq!(bytes[..4], 1.0_f32.to_le_bytes());
        assert_eq!(bytes[4..9].iter().map(|b| b.cast_signed()).collect::<Vec<_>>(), [127, 0, 2, -2, -127]);
        assert_eq!(bytes[36..40], f32::INFINITY.to_le_bytes());
        assert!(bytes[40..].iter().all(|&b| b == 0));
    }
}

#[test]
fn dequantized_values_are_quantized_values_times_scales() {
    for (block, tokens) in [(32, 1), (32, 14), (256, 5), (32, 50), (256, 34)] {
        let k = 3 * block;
        let x = activations(Kind::Ordinary, tokens, k, 4);
        let mut quantized = Quantized::new(block);
        quantized.quantize(&Pool::new(1), Isa::best(), &x, tokens, k);
        for token in 0..tokens {
            let mut bytes = Vec::new();
            quantized.export(token..token + 1, 0..k, &mut bytes);
            let scaled = |unit: &[u8]| {
                let scale = f32::from_le_bytes(unit[..4].try_into().unwrap());
                unit[4..].iter().map(|q| f32::from(q.cast_signed()) * scale).collect::<Vec<_>>()
            };
            let expected: Vec<f32> = bytes.chunks_exact(4 + block).flat_map(scaled).collect();
            let mut got = vec![f32::NAN; k];
            quantized.dequantize(token, &mut got);
            assert_eq!(got, expected, "token {token} of {tokens}, blocks of {block}");
            let far = got.iter().zip(&x[token * k..]).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs()));
            assert!(far > 0.0 && far < 0.05, "off by {far}");
        }
    }
}

#[test]
fn slices_gathered_from_ranks_make_the_whole() {
    let pool = Pool::new(2);
    for (block, tokens) in [(32, 1), (32, 14), (256, 5), (32, 50), (256, 34)] {
        let k = 6 * block;
        let x = activations(Kind::Ordinary, tokens, k, 9);
        let mut whole = Quantized::new(block);
        whole.quantize(&pool, Isa::best(), &x, tokens, k);
        let mut gathered = Quantized::new(block);
        gathered.resize(Isa::best(), tokens, k);
        for range in [0..block, block..4 * block, 4 * block..k] {
            let slice: Vec<f32> = x.chunks(k).flat_map(|row| row[range.clone()].to_vec()).collect();
            let mut part = Quantized::new(block);
            part.quantize(&pool, Isa::best(), &slice, tokens, range.len());
            gathered.import(Isa::best(), 0..tokens, range, &exported(&part));
        }
        assert!(exported(&gathered) == exported(&whole));
        assert_eq!(format!("{gathered:?}"), format!("{whole:?}"));
        gathered.import(Isa::best(), 0..1, 0..block, &vec![1; 4 + block]);
        assert!(exported(&gathered) != exported(&whole));
    }
}
