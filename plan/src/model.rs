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
    /// GPT-2.
    Gpt2,
    /// Mixtral.
    Mixtral,
    /// Qwen 3, mixture of experts.
    Qwen3Moe,
    /// DeepSeek V2 and V2.5, and everything of the kind in GGUF.
    DeepseekV2,
    /// DeepSeek V3 and R1.
    DeepseekV3,
    /// BERT, and the sentence models made of it.
    Bert,
    /// DistilBERT.
    DistilBert,
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
///
/// What depends on a length goes by the longest sequence that a deployment serves, so that it is the same for every sequence and step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// A larger base for longer contexts: with `s = factor · length / trained_context - (factor - 1)` and a length of at least
    /// `trained_context`, the base is `base · s^(dims / (dims - 2))`.
    Dynamic {
        /// How fast the base grows.
        factor: f64,
        /// Length up to which nothing is stretched, in tokens.
        trained_context: f64,
    },
    /// YaRN: low frequencies divided by `factor`, high ones kept, a ramp between.
    Yarn {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Context length before stretching, in tokens.
        original_context: f64,
        /// Pairs that turn more often than this in the original context are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this in the original context are divided.
        beta_slow: f64,
        /// The ramp begins and ends at whole pairs.
        truncate: bool,
    },
    /// Divisors per pair, one list for lengths up to `original_context` and one for longer ones.
    LongRope {
        /// Divisors up to the original context.
        short: Vec<f32>,
        /// Divisors beyond it.
        long: Vec<f32>,
        /// Context length before stretching, in tokens.
        original_context: f64,
    },
    /// As [`RopeScaling::LongRope`], read from the tensors with roles [`Role::ShortRopeFactors`] and [`Role::LongRopeFactors`].
    LongRopeTensors {
        /// Context length before stretching, in tokens.
        original_context: f64,
    },
    /// Divisors per pair, read from the tensor with role [`Role::RopeFactors`].
    Tensor,
}

impl RopeScaling {
    /// Whether it goes by the longest sequence that is served.
    pub fn depends_on_length(&self) -> bool {
        matches!(self, Self::Dynamic { .. } | Self::LongRope { .. } | Self::LongRopeTensors { .. })
    }
}

/// Rotary position embedding of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Frequency base (theta).
    pub base: f64,
    /// Rotated values of each head, from its start, with [`Latent`] attention those at its end; even. 0: nothing is rotated.
    pub dims: usize,
    /// Which values form a pair.
    pub layout: RopeLayout,
    /// Frequency scaling.
    pub scaling: RopeScaling,
    /// Factor of every cosine and sine.
    #[serde(default = "one")]
    pub amplitude: f64,
}

fn yes() -> bool {
    true
}

fn one() -> f64 {
    1.0
}

fn one_f32() -> f32 {
    1.0
}

impl Rope {
    /// No rotation.
    pub const NONE: Self = Self { base: 1.0, dims: 0, layout: RopeLayout::Halves, scaling: RopeScaling::None, amplitude: 1.0 };
}

/// What differs from layer to layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// `Some(w)`: key `j` is visible to query `i` when `0 <= i - j < w`; `None`: every earlier key.
    pub window: Option<u32>,
    /// Rotary embedding of this layer.
    pub rope: Rope,
    /// Its feed-forward block is a mixture of [`ModelConfig::experts`].
    #[serde(default)]
    pub experts: bool,
}

/// A mixture of experts: each token goes to a few of many feed-forward blocks.
///
/// A router scores the experts, the `used` best are chosen, and their outputs, each times its weight, are added in the order of choice.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Experts {
    /// Number of experts.
    pub count: usize,
    /// Experts of each token.
    pub used: usize,
    /// Width of an expert's feed-forward block.
    pub ffn: usize,
    /// The weights of the chosen experts are divided by their sum.
    pub normalize: bool,
    /// What scores are made into.
    #[serde(default)]
    pub scoring: Scoring,
    /// The choice is among the experts of the best groups.
    #[serde(default)]
    pub groups: Option<ExpertGroups>,
    /// Factor of the weights.
    #[serde(default = "one_f32")]
    pub scale: f32,
    /// Experts that every token goes to beside the chosen ones, as one block of `shared · ffn` values.
    #[serde(default)]
    pub shared: usize,
}

impl Experts {
    /// A softmax over the scores of `count` experts of width `ffn`, `used` of them for each token.
    pub const fn softmax(count: usize, used: usize, ffn: usize, normalize: bool) -> Self {
        Self { count, used, ffn, normalize, scoring: Scoring::Softmax, groups: None, scale: 1.0, shared: 0 }
    }

    /// Width of the block that every token goes through; 0: there is none.
    pub fn shared_ffn(&self) -> usize {
        self.shared.saturating_mul(self.ffn)
    }
}

/// What the scores of a router are made into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scoring {
    /// The softmax over all experts: weights, by which the choice goes too.
    #[default]
    Softmax,
    /// `1 / (1 + e^-x)` of each: weights. The choice goes by these plus a stored bias of each expert.
    Sigmoid,
}

/// Groups of experts that follow each other, all of the same size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertGroups {
    /// Number of groups; divides the number of experts.
    pub count: usize,
    /// Groups of each token: those with the highest scores.
    pub used: usize,
    /// A group's score is the sum of what the choice goes by, over so many of its best experts: 1 or 2.
    pub best: usize,
}

/// Multi-head latent attention: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
///
/// Keys and values of all heads are made of one vector of `kv_rank` values, queries of one of `q_rank`. Queries and keys of a head have
/// [`ModelConfig::head_dim`] values, of which the last `rotated` are rotated; those of keys are the same for all heads, and not made of the
/// compressed vector.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latent {
    /// Values of the compressed query; `None`: queries are made of the hidden state at once.
    pub q_rank: Option<usize>,
    /// Values of the compressed keys and values.
    pub kv_rank: usize,
    /// Rotated values of a head; less than a head has.
    pub rotated: usize,
    /// Values of a head of the values.
    pub value_dim: usize,
    /// Epsilon of the norms of compressed vectors.
    pub norm_eps: f32,
    /// Unrotated keys and values are unpacked by products of their own.
    #[serde(default)]
    pub apart: bool,
    /// What [`ModelConfig::attention_scale`] has of YaRN: the square of `0.1 · this · ln(factor) + 1`. 0: nothing.
    pub temperature: f64,
}

/// Gate activation of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt(2)))`.
    Gelu,
}

/// What makes a model an encoder: it reads whole sequences, each token seeing all others, and gives vectors in place of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encoder {
    /// Rows of the table of token types, which say what text of a pair a token belongs to; 0: there is none.
    pub token_types: usize,
    /// What is made of the first token's state, where the model classifies.
    pub classifier: Option<Classifier>,
}

/// A classification head: `classifier · activation(pooler h)`, `h` the state of the first token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classifier {
    /// Number of labels.
    pub labels: usize,
    /// Activation of the pooler.
    pub activation: PoolerActivation,
}

/// Activation between the two products of a classification head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named after the functions")]
pub enum PoolerActivation {
    Tanh,
    Relu,
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
    /// Values per head of queries and keys; of values too, but for [`Latent`] attention.
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
    /// Norms centre their input and add a bias; else they are root-mean-square norms.
    #[serde(default)]
    pub layer_norms: bool,
    /// The feed-forward block is `down(activation(gate x) · up x)`; else `down(activation(up x))`.
    #[serde(default = "yes")]
    pub gated: bool,
    /// A table of `context` positions is added to the embeddings.
    #[serde(default)]
    pub learned_positions: bool,
    /// The sum of the embeddings is normed.
    #[serde(default)]
    pub embedding_norm: bool,
    /// A block's sum with what came into it is normed; else what comes into it is.
    #[serde(default)]
    pub post_norms: bool,
    /// Set for encoders.
    #[serde(default)]
    pub encoder: Option<Encoder>,
    /// What the layers with experts are mixtures of.
    #[serde(default)]
    pub experts: Option<Experts>,
    /// How queries, keys and values are compressed, where they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<Latent>,
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the roles")]
pub enum Role {
    Embedding,
    TokenTypes,
    Positions,
    EmbeddingNorm,
    EmbeddingNormBias,
    RopeFactors,
    ShortRopeFactors,
    LongRopeFactors,
    AttnNorm,
    AttnNormBias,
    Q,
    QBias,
    K,
    KBias,
    V,
    VBias,
    QNorm,
    KNorm,
    QDown,
    QDownNorm,
    QUp,
    KvDown,
    KvDownNorm,
    KvUp,
    KeyUp,
    ValueUp,
    O,
    OBias,
    PostAttnNorm,
    FfnNorm,
    FfnNormBias,
    Gate,
    GateBias,
    Up,
    UpBias,
    Down,
    DownBias,
    PostFfnNorm,
    Router,
    RouterBias,
    ExpertGate(u32),
    ExpertUp(u32),
    ExpertDown(u32),
    SharedGate,
    SharedUp,
    SharedDown,
    OutputNorm,
    OutputNormBias,
    Output,
    Pooler,
    PoolerBias,
    Classifier,
    ClassifierBias,
}

impl Role {
    /// The expert whose tensor it is.
    pub fn expert(self) -> Option<u32> {
        match self {
            Self::ExpertGate(e) | Self::ExpertUp(e) | Self::ExpertDown(e) => Some(e),
            _ => None,
        }
    }
}

impl ModelConfig {
    /// Labels of the classification head; 0 where there is none.
    pub fn labels(&self) -> usize {
        self.encoder.and_then(|e| e.classifier).map_or(0, |c| c.labels)
    }

    /// Values per head of the values.
    pub fn value_dim(&self) -> usize {
        self.latent.map_or(self.head_dim, |l| l.value_dim)
    }

    /// Rows of the product that makes a head's unrotated key and its value of what is compressed; 0 without [`Latent`] attention.
    pub fn unpacked_dim(&self) -> usize {
        self.latent.map_or(0, |l| self.unrotated_dim() + l.value_dim)
    }

    /// Values of a head's key that are not rotated, of [`Latent`] attention.
    pub fn unrotated_dim(&self) -> usize {
        self.latent.map_or(0, |l| self.head_dim.saturating_sub(l.rotated))
    }

    /// Row-major shape of the tensor with a role: `[out, in]` for matrices, `[n]` for vectors.
    pub fn shape(&self, role: Role) -> Vec<usize> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let latent = |size: fn(&Latent) -> usize| self.latent.as_ref().map_or(0, size);
        match role {
            Role::Embedding | Role::Output => vec![self.vocab, self.hidden],
            Role::Q => vec![q, self.hidden],
            Role::QBias => vec![q],
            Role::K | Role::V => vec![kv, self.hidden],
            Role::KBias | Role::VBias => vec![kv],
            Role::O => vec![self.hidden, self.heads * self.value_dim()],
            Role::Gate | Role::Up => vec![self.ffn, self.hidden],
            Role::GateBias | Role::UpBias => vec![self.ffn],
            Role::Down => vec![self.hidden, self.ffn],
            Role::QNorm | Role::KNorm => vec![self.head_dim],
            Role::QDown => vec![latent(|l| l.q_rank.unwrap_or(0)), self.hidden],
            Role::QDownNorm => vec![latent(|l| l.q_rank.unwrap_or(0))],
            Role::QUp => vec![q, latent(|l| l.q_rank.unwrap_or(0))],
            Role::KvDown => vec![latent(|l| l.kv_rank + l.rotated), self.hidden],
            Role::KvDownNorm => vec![latent(|l| l.kv_rank)],
            Role::KvUp => vec![self.kv_heads * self.unpacked_dim(), latent(|l| l.kv_rank)],
            Role::KeyUp => vec![self.kv_heads * self.unrotated_dim(), latent(|l| l.kv_rank)],
            Role::ValueUp => vec![self.kv_heads * self.value_dim(), latent(|l| l.kv_rank)],
            Role::RopeFactors | Role::ShortRopeFactors | Role::LongRopeFactors => vec![self.layers.first().map_or(0, |l| l.rope.dims / 2)],
            Role::AttnNorm | Role::PostAttnNorm | Role::FfnNorm | Role::PostFfnNorm | Role::OutputNorm => vec![self.hidden],
            Role::AttnNormBias | Role::FfnNormBias | Role::OutputNormBias | Role::OBias | Role::DownBias => vec![self.hidden],
            Role::EmbeddingNorm | Role::EmbeddingNormBias | Role::PoolerBias => vec![self.hidden],
            Role::TokenTypes => vec![self.encoder.map_or(0, |e| e.token_types), self.hidden],
            Role::Pooler => vec![self.hidden, self.hidden],
            Role::Classifier => vec![self.labels(), self.hidden],
            Role::ClassifierBias => vec![self.labels()],
            Role::Positions => vec![self.context, self.hidden],
            Role::Router => vec![self.experts.map_or(0, |e| e.count), self.hidden],
            Role::ExpertGate(_) | Role::ExpertUp(_) => vec![self.experts.map_or(0, |e| e.ffn), self.hidden],
            Role::ExpertDown(_) => vec![self.hidden, self.experts.map_or(0, |e| e.ffn)],
            Role::RouterBias => vec![self.experts.map_or(0, |e| e.count)],
            Role::SharedGate | Role::SharedUp => vec![self.experts.map_or(0, |e| e.shared_ffn()), self.hidden],
            Role::SharedDown => vec![self.hidden, self.experts.map_or(0, |e| e.shared_ffn())],
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
    /// Type in memory.
    pub dtype: DType,
    /// Type in the file, where it is converted as it is loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<DType>,
    /// Row-major shape, `[out, in]` for matrices, `[n]` for vectors.
    pub shape: Vec<usize>,
    /// Index into [`ModelHeader::files`].
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// For a matrix whose columns are stored one after the other: bytes from one to the next. `None`: it is stored row by row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column_stride: Option<u64>,
    /// For a matrix of heads each of which is stored by columns, one head after the other, the columns in blocks of their own: rows of a head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turned: Option<usize>,
}

impl TensorInfo {
    /// Type in the file.
    pub fn stored_type(&self) -> DType {
        self.stored.unwrap_or(self.dtype)
    }

    /// Bytes of `rows` of its rows in memory.
    pub fn held_bytes(&self, rows: usize) -> u64 {
        let width = self.shape.get(1).copied().unwrap_or(1);
        self.dtype.row_bytes(width).map_or(0, |bytes| rows as u64 * bytes as u64)
    }
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

impl ModelHeader {
    /// The same model with the matrices that are stored as floats converted to `to` as they are loaded; vectors and what is quantized
    /// already stay as they are.
    ///
    /// A matrix whose rows are not whole blocks of `to` gets the nearest type of smaller blocks, or stays; the vocabulary matrices, whose
    /// errors show most, have 6 bits where `to` has fewer.
    pub fn loaded_as(&self, to: DType) -> Self {
        let mut header = self.clone();
        for (id, tensor) in &mut header.tensors {
            // The choice of experts turns on small differences; the others are small. Files of `skein quantize` have the same.
            let kept = matches!(id.role, Role::Router | Role::Positions | Role::TokenTypes | Role::Pooler | Role::Classifier);
            if tensor.shape.len() != 2 || tensor.dtype.block_len() != 1 || kept || tensor.turned.is_some() {
                continue;
            }
            let vocabulary = matches!(id.role, Role::Embedding | Role::Output);
            if let Some(to) = to.for_rows(tensor.shape[1], vocabulary).filter(|to| *to != tensor.dtype) {
                tensor.stored = Some(tensor.dtype);
                tensor.dtype = to;
            }
        }
        header
    }
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
