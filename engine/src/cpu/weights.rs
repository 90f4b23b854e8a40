//! The weights of a shard, packed.

use kernels::{Matrix, WeightType};
use plan::dtype::DType;

/// A product with an optional bias, each holding this rank's rows.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) matrix: Matrix,
    /// Empty when there is none.
    pub(crate) bias: Vec<f32>,
}

/// One layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) attn_norm: Vec<f32>,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    /// Norms over each head of query and key.
    pub(crate) head_norms: Option<HeadNorms>,
    pub(crate) o: Linear,
    /// Norm of the attention block's output, before it is added.
    pub(crate) post_attn_norm: Option<Vec<f32>>,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    /// Norm of the feed-forward block's output, before it is added.
    pub(crate) post_ffn_norm: Option<Vec<f32>>,
}

/// Norm weights `[head_dim]` of query and key heads.
#[derive(Debug)]
pub(crate) struct HeadNorms {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
}

/// Everything a rank holds.
#[derive(Debug)]
pub(crate) struct Weights {
    /// Rows of the embedding table: on the first stage, and on the last where it is also the vocabulary matrix.
    pub(crate) embedding: Option<Matrix>,
    pub(crate) layers: Vec<LayerWeights>,
    /// On the last stage.
    pub(crate) output_norm: Vec<f32>,
    /// Rows of a vocabulary matrix of its own.
    pub(crate) output: Option<Matrix>,
    /// Divisors of the rotary frequencies.
    pub(crate) rope_factors: Option<Vec<f32>>,
}

impl Weights {
    /// The vocabulary matrix, on the last stage.
    pub(crate) fn vocabulary(&self) -> Option<&Matrix> {
        self.output.as_ref().or(self.embedding.as_ref())
    }
}

/// The kernels' name for a stored type.
pub(crate) fn weight_type(dtype: DType) -> WeightType {
    match dtype {
        DType::F32 => WeightType::F32,
        DType::F16 => WeightType::F16,
        DType::BF16 => WeightType::BF16,
        DType::Q8_0 => WeightType::Q8_0,
        DType::Q4_0 => WeightType::Q4_0,
        DType::Q4_1 => WeightType::Q4_1,
        DType::Q5_0 => WeightType::Q5_0,
        DType::Q5_1 => WeightType::Q5_1,
        DType::IQ4_NL => WeightType::IQ4_NL,
        DType::MXFP4 => WeightType::MXFP4,
        DType::Q2_K => WeightType::Q2_K,
        DType::Q3_K => WeightType::Q3_K,
        DType::Q4_K => WeightType::Q4_K,
        DType::Q5_K => WeightType::Q5_K,
        DType::Q6_K => WeightType::Q6_K,
    }
}
