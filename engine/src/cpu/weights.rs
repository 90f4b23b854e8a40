//! The weights of a shard, packed.

use kernels::{Matrix, WeightType};
use plan::{
    dtype::DType,
    model::{Role, TensorId},
};

/// A product with an optional bias, each holding this rank's rows.
#[derive(Debug)]
pub(crate) struct Linear {
    /// The matrix, as adapters name it.
    pub(crate) id: TensorId,
    pub(crate) matrix: Matrix,
    /// Empty when there is none.
    pub(crate) bias: Vec<f32>,
}

/// The weight of a norm, and the bias of a layer norm.
#[derive(Debug, Default)]
pub(crate) struct Norm {
    pub(crate) weight: Vec<f32>,
    /// Empty for a root-mean-square norm.
    pub(crate) bias: Vec<f32>,
}

/// One layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) attn_norm: Norm,
    pub(crate) projection: Projection,
    pub(crate) o: Linear,
    /// Norm of the attention block's output, before it is added.
    pub(crate) post_attn_norm: Option<Vec<f32>>,
    pub(crate) ffn_norm: Norm,
    pub(crate) feed_forward: FeedForward,
    /// Norm of the feed-forward block's output, before it is added.
    pub(crate) post_ffn_norm: Option<Vec<f32>>,
}

/// What makes queries, keys and values.
#[derive(Debug)]
pub(crate) enum Projection {
    Plain(Box<Plain>),
    Latent(Box<Latent>),
}

/// Each of the hidden state.
#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    /// Norms over each head of query and key.
    pub(crate) head_norms: Option<HeadNorms>,
}

/// By way of compressed vectors. What compresses is whole on every rank; what unpacks has the rows of this rank's heads.
#[derive(Debug)]
pub(crate) struct Latent {
    /// What compresses queries, and the norm behind it, where they are compressed.
    pub(crate) q_down: Option<(Linear, Vec<f32>)>,
    pub(crate) q: Linear,
    /// Compressed keys and values, then the rotated part of all heads' keys.
    pub(crate) kv_down: Linear,
    pub(crate) kv_norm: Vec<f32>,
    pub(crate) unpack: Unpack,
}

/// What makes unrotated keys and values of what is compressed.
#[derive(Debug)]
pub(crate) enum Unpack {
    /// For each head the unrotated part of its key, then its value.
    Together(Linear),
    /// Keys' parts, and values.
    Apart(Linear, Linear),
}

/// A feed-forward block.
#[derive(Debug)]
pub(crate) enum FeedForward {
    Dense(Box<Dense>),
    Experts(Box<Experts>),
}

/// A mixture of experts.
#[derive(Debug)]
pub(crate) struct Experts {
    pub(crate) router: Linear,
    /// What is added to scores for the choice; empty where nothing is.
    pub(crate) router_bias: Vec<f32>,
    pub(crate) own: Vec<Expert>,
    /// The block that every token goes through, split as a dense one.
    pub(crate) shared: Option<Dense>,
}

/// `down(activation(gate x) · up x)`, or without a gate `down(activation(up x))`.
#[derive(Debug)]
pub(crate) struct Dense {
    pub(crate) gate: Option<Linear>,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// One of the experts that this rank has.
#[derive(Debug)]
pub(crate) struct Expert {
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
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
    /// Learned positions, on the first stage.
    pub(crate) positions: Option<Matrix>,
    /// Token types, on the first stage.
    pub(crate) token_types: Option<Matrix>,
    /// Of the sum of the embeddings, on the first stage.
    pub(crate) embedding_norm: Option<Norm>,
    pub(crate) layers: Vec<LayerWeights>,
    /// On the last stage.
    pub(crate) output_norm: Norm,
    /// Rows of a vocabulary matrix of its own.
    pub(crate) output: Option<Matrix>,
    /// On the last stage of a model that classifies.
    pub(crate) classifier: Option<ClassifierWeights>,
    pub(crate) rope_factors: RopeFactors,
}

/// A classification head, whole on every rank.
#[derive(Debug)]
pub(crate) struct ClassifierWeights {
    pub(crate) pooler: Linear,
    pub(crate) output: Linear,
}

/// Stored divisors of the rotary frequencies; empty where there are none.
#[derive(Debug, Default)]
pub(crate) struct RopeFactors {
    /// For every length.
    pub(crate) all: Vec<f32>,
    /// For lengths up to the original context.
    pub(crate) short: Vec<f32>,
    /// For longer ones.
    pub(crate) long: Vec<f32>,
}

impl Weights {
    /// The vocabulary matrix, on the last stage: one of its own, or the embedding table.
    pub(crate) fn vocabulary(&self) -> Option<(TensorId, &Matrix)> {
        let id = |role| TensorId { layer: None, role };
        let table = self.embedding.as_ref().map(|matrix| (id(Role::Embedding), matrix));
        self.output.as_ref().map(|matrix| (id(Role::Output), matrix)).or(table)
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
