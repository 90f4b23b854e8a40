//! Blocks of the cache: written, copied, and moved between ranks.

use crate::inputs::Random;
use half::f16;
use kernels::{ABSENT, Isa, KV_BLOCK, KV_SCALED, KvCache, KvError, KvSpan, KvType};

/// A cache of `blocks` blocks that are all written, with its keys and values.
fn filled(dtype: KvType, blocks: usize, kv_heads: usize, dims: (usize, usize), isa: Isa) -> (KvCache, Vec<f32>, Vec<f32>) {
    let mut random = Random::new(5);
    let mut fill = |dim: usize| (0..blocks * KV_BLOCK * kv_heads * dim).map(|_| random.float() * 1e3).collect::<Vec<f32>>();
    let (keys, values) = (fill(dims.0), fill(dims.1));
    let mut cache = KvCache::new(dtype, blocks, kv_heads, dims);
    let table: Vec<u32> = (0..blocks as u32).collect();
    cache.write(isa, &[KvSpan { table: &table, first_position: 0, tokens: blocks * KV_BLOCK }], &keys, &values);
    (cache, keys, values)
}

fn exported(cache: &KvCache, block: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    cache.export_block(block, &mut bytes);
    bytes
}

/// What the export of `block` is by definition.
fn defined(dtype: KvType, block: usize, kv_heads: usize, dims: (usize, usize), keys: &[f32], values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for head in 0..kv_heads {
        for (x, dim) in [(keys, dims.0), (values, dims.1)] {
            for slot in 0..KV_BLOCK {
                for &x in &x[((block * KV_BLOCK + slot) * kv_heads + head) * dim..][..dim] {
                    match dtype {
                        KvType::F32 => bytes.extend(x.to_le_bytes()),
                        KvType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
                        KvType::Q8 => {}
                    }
                }
            }
        }
        if dtype == KvType::Q8 {
            bytes.extend(defined_q8(block, (head, kv_heads), dims, keys, values));
        }
    }
    bytes
}

/// A head's part of the export of entries of 8 bits: multiples of keys and of values, then scales of both.
fn defined_q8(block: usize, (head, kv_heads): (usize, usize), dims: (usize, usize), keys: &[f32], values: &[f32]) -> Vec<u8> {
    let (mut entries, mut scales) = (Vec::new(), Vec::new());
    for (x, dim) in [(keys, dims.0), (values, dims.1)] {
        for slot in 0..KV_BLOCK {
            for x in x[((block * KV_BLOCK + slot) * kv_heads + head) * dim..][..dim].chunks(KV_SCALED) {
                let scale = f16::from_f32(x.iter().fold(0.0_f32, |top, x| top.max(x.abs())) / 127.0);
                scales.extend(scale.to_le_bytes());
                let multiple = |x: &f32| if scale == f16::ZERO { 0 } else { (x / scale.to_f32()).round_ties_even() as i8 };
                entries.extend(x.iter().map(|x| multiple(x).clamp(-127, 127).cast_unsigned()));
            }
        }
    }
    [entries, scales].concat()
}

#[test]
fn blocks_are_exported_as_defined_and_imported_back() {
    for dtype in KvType::ALL {
        let alike = [(1, 1), (2, 15), (3, 16), (1, 17), (2, 80), (1, 256)].map(|(heads, dim)| (heads, (dim, dim)));
        for (kv_heads, dims) in alike.into_iter().chain([(2, (24, 16)), (3, (17, 33)), (1, (192, 128))]) {
            for isa in Isa::available() {
                let (cache, keys, values) = filled(dtype, 3, kv_heads, dims, isa);
                let mut other = KvCache::new(dtype, 2, kv_heads, dims);
                for block in 0..3 {
                    let bytes = exported(&cache, block);
                    assert_eq!(bytes.len(), cache.exported_bytes());
                    assert!(bytes == defined(dtype, block as usize, kv_heads, dims, &keys, &values), "{dtype:?} {dims:?} on {isa}");
                    other.import_block(1, &bytes).unwrap();
                    assert!(exported(&other, 1) == bytes && exported(&other, 0) != bytes);
                }
            }
        }
    }
}

#[test]
fn scales_of_8_bits_go_from_nothing_to_the_largest() {
    let row = |x: f32| (0..40).map(|d| if d == 7 { x } else { x / 1000.0 }).collect::<Vec<f32>>();
    for (x, scale, multiple) in
        [(0.0, 0, 0), (1e-30, 0, 0), (-5e-6, 1, -84), (127.0, 0x3c00, 127), (-1e30, 0x7bff, -127), (1e38, 0x7bff, 127)]
    {
        for isa in Isa::available() {
            let mut cache = KvCache::new(KvType::Q8, 1, 1, (40, 40));
            cache.write(isa, &[KvSpan { table: &[0], first_position: 0, tokens: 1 }], &row(x), &row(x));
            let bytes = exported(&cache, 0);
            let scales = &bytes[2 * KV_BLOCK * 40..];
            assert_eq!(u16::from_le_bytes([scales[0], scales[1]]), scale, "{x} on {isa}");
            assert_eq!((bytes[7].cast_signed(), bytes[KV_BLOCK * 40 + 7].cast_signed()), (multiple, multiple), "{x} on {isa}");
        }
    }
}

#[test]
fn the_blocks_of_ranks_make_the_block_of_one() {
    for dtype in KvType::ALL {
        ranks_make_one(dtype);
    }
}

fn ranks_make_one(dtype: KvType) {
    let (whole, keys, values) = filled(dtype, 1, 3, (32, 24), Isa::best());
    let of = |heads: std::ops::Range<usize>, dim: usize, x: &[f32]| -> Vec<f32> {
        x.chunks_exact(3 * dim).flat_map(|row| row[heads.start * dim..heads.end * dim].to_vec()).collect()
    };
    let mut bytes = Vec::new();
    for heads in [0..1, 1..3] {
        let mut rank = KvCache::new(dtype, 1, heads.len(), (32, 24));
        let span = KvSpan { table: &[0], first_position: 0, tokens: KV_BLOCK };
        rank.write(Isa::best(), &[span], &of(heads.clone(), 32, &keys), &of(heads, 24, &values));
        rank.export_block(0, &mut bytes);
    }
    assert!(bytes == exported(&whole, 0));
}

#[test]
fn a_copy_is_equal_and_apart() {
    for dtype in KvType::ALL {
        copied(dtype);
    }
}

fn copied(dtype: KvType) {
    let (mut cache, ..) = filled(dtype, 3, 2, (17, 17), Isa::best());
    let (first, second) = (exported(&cache, 0), exported(&cache, 1));
    assert_ne!(first, second);
    cache.copy_block(0, 2);
    assert_eq!(exported(&cache, 2), first);
    cache.write(Isa::best(), &[KvSpan { table: &[2], first_position: 3, tokens: 1 }], &[1.0; 34], &[2.0; 34]);
    assert_ne!(exported(&cache, 2), first);
    assert_eq!((exported(&cache, 0), exported(&cache, 1)), (first, second));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut cache = KvCache::new(KvType::F32, 2, 1, (4, 4));
    assert_eq!(cache.import_block(0, &[0; 5]), Err(KvError::Size { expected: cache.exported_bytes(), got: 5 }));
    assert_eq!(cache.bytes(), 2 * 16 * (4 + 16) * 4);
    let mut refused = |table: &[u32], first_position: usize, len: usize| {
        let span = KvSpan { table, first_position, tokens: 1 };
        let write = || cache.write(Isa::best(), &[span], &vec![0.0; len], &vec![0.0; len]);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(write)).is_err()
    };
    assert!(!refused(&[ABSENT, 1], 16, 4));
    assert!(refused(&[ABSENT, 1], 15, 4));
    assert!(refused(&[0, 2], 16, 4));
    assert!(refused(&[0], 16, 4));
    assert!(refused(&[0], 0, 5));
}
