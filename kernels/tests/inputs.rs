//! Deterministic weights and activations, ordinary and extreme.

use half::f16;
use kernels::WeightType;

/// PCG-like generator of bytes and floats.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32 ^ (self.0 >> 45) as u32
    }

    /// About uniform in −1..1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() % 20_001) as f32 / 10_000.0 - 1.0
    }
}

/// What kind of values a test multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Random bytes, moderate scales.
    Ordinary,
    /// Every integer at one end of its range, so that sums are as large as they can be.
    Low,
    /// At the other end.
    High,
    /// Scales of zero, the smallest and the largest f16, by turns.
    Scales,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Ordinary, Self::Low, Self::High, Self::Scales];
}

fn scale(kind: Kind, random: &mut Random, index: usize) -> [u8; 2] {
    let value = match kind {
        Kind::Scales => [f16::ZERO, f16::MIN_POSITIVE_SUBNORMAL, f16::MAX, f16::MIN, f16::NEG_ZERO, f16::MIN_POSITIVE][index % 6],
        _ => f16::from_f32(random.float() * 0.05),
    };
    value.to_le_bytes()
}

/// `rows` rows of `k` values as stored.
pub(crate) fn weights(dtype: WeightType, kind: Kind, rows: usize, k: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let blocks = rows * k / dtype.block_len();
    let mut bytes = vec![0; blocks * dtype.block_bytes()];
    for (index, block) in bytes.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        for byte in block.iter_mut() {
            *byte = match (kind, dtype) {
                // Q6_K's scales and Q8_0 are signed: their extremes are −128 and 127.
                (Kind::Low, WeightType::Q8_0) => 0x80,
                (Kind::High, WeightType::Q8_0) => 0x7f,
                (Kind::Low, _) => 0,
                (Kind::High, _) => 0xff,
                _ => random.next() as u8,
            };
        }
        match dtype {
            WeightType::F32 => block.copy_from_slice(&random.float().to_le_bytes()),
            WeightType::F16 => block.copy_from_slice(&f16::from_f32(random.float()).to_le_bytes()),
            WeightType::BF16 => block.copy_from_slice(&half::bf16::from_f32(random.float()).to_le_bytes()),
            WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q5_0 | WeightType::IQ4_NL => {
                block[..2].copy_from_slice(&scale(kind, &mut random, index));
            }
            WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => {
                block[..2].copy_from_slice(&scale(kind, &mut random, index));
                block[2..4].copy_from_slice(&scale(kind, &mut random, index / 2));
            }
            WeightType::MXFP4 => {
                block[0] = if kind == Kind::Scales { [0, 1, 2, 3, 100, 150][index % 6] } else { 118 + random.next() as u8 % 6 }
            }
            WeightType::Q2_K => {
                block[80..82].copy_from_slice(&scale(kind, &mut random, index));
                block[82..].copy_from_slice(&scale(kind, &mut random, index / 2));
            }
            WeightType::Q3_K => block[108..].copy_from_slice(&scale(kind, &mut random, index)),
            WeightType::Q6_K => {
                block[208..].copy_from_slice(&scale(kind, &mut random, index));
                if kind == Kind::Low || kind == Kind::High {
                    block[192..208].fill(if index % 2 == 0 { 0x80 } else { 0x7f });
                }
            }
        }
    }
    bytes
}

/// `[tokens, k]` activations.
pub(crate) fn activations(kind: Kind, tokens: usize, k: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed ^ 0xA5);
    (0..tokens * k)
        .map(|i| match kind {
            Kind::Ordinary => random.float() * 3.0,
            Kind::Low => -1.5,
            Kind::High if i % k < k / 2 => 2.0,
            Kind::High => -2.0,
            // Blocks of zeros, of the smallest and of very large values.
            Kind::Scales => match i / 32 % 5 {
                0 => 0.0,
                1 => f32::from_bits(random.next() % 1000),
                2 => random.float() * 1e30,
                3 => random.float() * 1e-36,
                _ => random.float(),
            },
        })
        .collect()
}
