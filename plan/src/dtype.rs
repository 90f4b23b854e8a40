//! Element types of stored tensors and the geometry of their blocks.

use serde::{Deserialize, Serialize};

/// How a tensor's elements are stored. Values come in blocks that run along the contiguous (last) axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(non_camel_case_types, reason = "these are the format's own names")]
#[expect(missing_docs, reason = "each variant is named after the format it stands for")]
pub enum DType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    IQ4_NL,
    MXFP4,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl DType {
    /// Every type.
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::IQ4_NL,
        Self::MXFP4,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Values per block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::IQ4_NL | Self::MXFP4 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 | Self::IQ4_NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::MXFP4 => 17,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes of one row of `len` values, or `None` when `len` is not a whole number of blocks.
    pub const fn row_bytes(self, len: usize) -> Option<usize> {
        if len.is_multiple_of(self.block_len()) { (len / self.block_len()).checked_mul(self.block_bytes()) } else { None }
    }

    /// Values per block of the activation that a product with this type quantizes its input to; `None` for float types.
    pub const fn activation_block(self) -> Option<usize> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::IQ4_NL | Self::MXFP4 => Some(32),
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => Some(256),
        }
    }

    /// The type that rows of `len` values get when `self` is asked for: itself, or where they are not whole blocks the nearest one of smaller
    /// blocks; `None` if there is none. `vocabulary`: at least 6 bits, where `self` is one of the types of 256 values.
    pub const fn for_rows(self, len: usize, vocabulary: bool) -> Option<Self> {
        let wanted = if vocabulary && matches!(self, Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K) { Self::Q6_K } else { self };
        if len.is_multiple_of(wanted.block_len()) {
            return Some(wanted);
        }
        if !len.is_multiple_of(32) {
            return None;
        }
        match wanted {
            Self::Q2_K | Self::Q3_K => Some(Self::IQ4_NL),
            Self::Q4_K => Some(Self::Q5_0),
            Self::Q5_K => Some(Self::Q5_1),
            Self::Q6_K => Some(Self::Q8_0),
            _ => None,
        }
    }
}
