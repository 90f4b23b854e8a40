//! What a model is, whatever file it came from: its shape, its layers, and where each tensor's bytes lie.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// The family a model belongs to: how its files name and order things. What its layers compute is in [`ModelConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Architecture {
    /// Llama 2/3 and everything shaped like it.
    Llama,
    /// Gemma 3, text only.
    Gemma3,
    /// Mistral 7B and its kin.
    Mistral,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
    /// Phi 3, 3.5 and 4 mini.
    Phi3,
}

/// Which two values of a head a rotation turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RopeLayout {
    /// Pairs `(2i, 2i + 1)`: Llama in GGUF, whose query and key rows are permuted.
    Adjacent,
    /// Pairs `(i, i + dims / 2)`: Llama in safetensors, Gemma.
    Halves,
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divisor of every frequency.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before stretching, in tokens.
        original_context: f64,
    },
    /// Divisors per pair, read from the tensor with role [`Role::RopeFactors`].
    Tensor,
}

/// Rotary position embedding of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Frequency base (theta).
    pub base: f64,
    /// Rotated values of each head, from its start; even.
    pub dims: usize,
    /// Which values form a pair.
    pub layout: RopeLayout,
    /// Frequency scaling.
    pub scaling: RopeScaling,
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// `Some(w)`: key `j` is visible to query `i` when `0 <= i - j < w`; `None`: every earlier key.
    pub window: Option<u32>,
    /// Rotary embedding of this layer.
    pub rope: Rope,
}

/// Gate activation of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// A model's shape, normalised over file formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Width of the feed-forward block.
    pub ffn: usize,
    /// Rows of the vocabulary table.
    pub vocab: usize,
    /// Trained context in tokens.
    pub context: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Added to every stored norm weight at load: 1 for Gemma in safetensors, else 0.
    pub norm_weight_offset: f32,
    /// Gate activation.
    pub activation: Activation,
    /// Factor of token embeddings: `sqrt(hidden)` for Gemma, else 1.
    pub embedding_scale: f32,
    /// Factor of attention scores, usually `1 / sqrt(head_dim)`.
    pub attention_scale: f32,
    /// The vocabulary product uses the embedding table.
    pub tied_embeddings: bool,
    /// Each head of query and key is normed before it is rotated.
    #[serde(default)]
    pub head_norms: bool,
    /// The output of attention and of the feed-forward block is normed before it is added.
    #[serde(default)]
    pub block_norms: bool,
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the roles")]
pub enum Role {
    Embedding,
    RopeFactors,
    AttnNorm,
    Q,
    QBias,
    K,
    KBias,
    V,
    VBias,
    QNorm,
    KNorm,
    O,
    OBias,
    PostAttnNorm,
    FfnNorm,
    Gate,
    GateBias,
    Up,
    UpBias,
    Down,
    DownBias,
    PostFfnNorm,
    OutputNorm,
    Output,
}

impl ModelConfig {
    /// Row-major shape of the tensor with a role: `[out, in]` for matrices, `[n]` for vectors.
    pub fn shape(&self, role: Role) -> Vec<usize> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match role {
            Role::Embedding | Role::Output => vec![self.vocab, self.hidden],
            Role::Q => vec![q, self.hidden],
            Role::QBias => vec![q],
            Role::K | Role::V => vec![kv, self.hidden],
            Role::KBias | Role::VBias => vec![kv],
            Role::O => vec![self.hidden, q],
            Role::Gate | Role::Up => vec![self.ffn, self.hidden],
            Role::GateBias | Role::UpBias => vec![self.ffn],
            Role::Down => vec![self.hidden, self.ffn],
            Role::QNorm | Role::KNorm => vec![self.head_dim],
            Role::RopeFactors => vec![self.layers.first().map_or(0, |l| l.rope.dims / 2)],
            Role::AttnNorm | Role::PostAttnNorm | Role::FfnNorm | Role::PostFfnNorm | Role::OutputNorm => vec![self.hidden],
            Role::OBias | Role::DownBias => vec![self.hidden],
        }
    }
}

/// A tensor's identity in a model: its role and, for layer tensors, the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TensorId {
    /// Layer from 0; `None` for tensors outside the layers.
    pub layer: Option<u32>,
    /// What it is for.
    pub role: Role,
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorInfo {
    /// Name in the file, for messages.
    pub name: String,
    /// Stored type.
    pub dtype: DType,
    /// Row-major shape, `[out, in]` for matrices, `[n]` for vectors.
    pub shape: Vec<usize>,
    /// Index into [`ModelHeader::files`].
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// One weight file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFile {
    /// Path relative to the model's root.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
}

/// File format of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, clippy::upper_case_acronyms, reason = "named after the formats")]
pub enum Format {
    GGUF,
    Safetensors,
}

/// Everything known of a model from its headers, without its weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelHeader {
    /// File format.
    pub format: Format,
    /// Shape.
    pub config: ModelConfig,
    /// Weight files.
    pub files: Vec<ModelFile>,
    /// The tensors the forward pass uses.
    #[serde(with = "tensor_list")]
    pub tensors: BTreeMap<TensorId, TensorInfo>,
}

/// Serialises the tensor table as a list, since JSON keys are strings.
mod tensor_list {
    use super::{BTreeMap, TensorId, TensorInfo};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(map: &BTreeMap<TensorId, TensorInfo>, to: S) -> Result<S::Ok, S::Error> {
        map.iter().collect::<Vec<_>>().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<TensorId, TensorInfo>, D::Error> {
        Ok(Vec::<(TensorId, TensorInfo)>::deserialize(from)?.into_iter().collect())
    }
}
