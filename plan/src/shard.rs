//! The plan: which worker holds which slice of which tensor, and how large its KV cache is.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{
    dtype::DType,
    model::{ModelConfig, Role, TensorId, TensorInfo},
};

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = 16;
/// Vocabulary rows per tile: softmax sums are formed per tile and merged in row order; ranks own whole tiles.
pub const VOCAB_TILE: usize = 1024;

/// Type of KV cache entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named after the types")]
pub enum KvDType {
    F32,
    F16,
    /// Of 8 bits: whole multiples of a scale (f16) that 32 values of a head share.
    Q8,
}

impl KvDType {
    /// Bytes of `dim` values of a head at a position.
    pub fn bytes(self, dim: usize) -> usize {
        match self {
            Self::F32 => 4 * dim,
            Self::F16 => 2 * dim,
            Self::Q8 => dim + 2 * dim.div_ceil(32),
        }
    }

    /// As command lines and messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8 => "q8",
        }
    }

    /// The type of that name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Q8].into_iter().find(|dtype| dtype.name() == name)
    }
}

/// Layers that share a pool of blocks and a block table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvGroup {
    /// `None`: full attention; `Some(w)`: sliding window of `w` tokens.
    pub window: Option<u32>,
    /// The model's layers in this group, ascending (all stages).
    pub layers: Vec<usize>,
    /// Blocks in the pool; the same number on every worker.
    pub blocks: usize,
}

/// How every worker lays out its KV cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvGeometry {
    /// Entry type.
    pub dtype: KvDType,
    /// Groups in the order in which steps number them.
    pub groups: Vec<KvGroup>,
}

/// Which slice of each split dimension each rank of a stage owns; every vector has one range per rank, in order.
///
/// Output rows only are split, so nothing is ever summed across ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Splits {
    /// Query heads. Disjoint, cover all heads.
    pub heads: Vec<Range<usize>>,
    /// Key/value heads read by those query heads. May overlap where a group is cut.
    pub kv_heads: Vec<Range<usize>>,
    /// Output rows of the attention output and down matrices (the hidden width). Disjoint, cover `hidden`.
    pub hidden: Vec<Range<usize>>,
    /// Rows of gate and up. Whole activation blocks of the down product. Disjoint, cover `ffn`.
    pub ffn: Vec<Range<usize>>,
    /// Experts, whole. Disjoint, cover all of them; empty where the model has none.
    #[serde(default)]
    pub experts: Vec<Range<usize>>,
    /// Rows of gate and up of the shared experts, as of [`Splits::ffn`]; empty where the model has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared: Vec<Range<usize>>,
    /// Rows of the vocabulary matrix and of the embedding table: whole tiles. Disjoint, cover `vocab`.
    pub vocab: Vec<Range<usize>>,
    /// Where the vocabulary product is spread over stages, the row of each rank's at which it is cut, between tiles: those before it are
    /// multiplied on the first stage, the others on the last, which holds no more of the table. Empty: all of them on the last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cuts: Vec<usize>,
}

impl Splits {
    /// Vocabulary rows that `rank` of the first stage multiplies, where that is not also the last.
    pub fn lent(&self, rank: usize) -> Range<usize> {
        self.vocab.get(rank).zip(self.cuts.get(rank)).map_or(0..0, |(rows, &cut)| rows.start..cut)
    }

    /// Vocabulary rows that `rank` of the last stage multiplies.
    pub fn kept(&self, rank: usize) -> Range<usize> {
        let rows = self.vocab.get(rank).cloned().unwrap_or(0..0);
        self.cuts.get(rank).map_or(rows.start, |&cut| cut)..rows.end
    }

    /// As [`Splits::rows`], of what `rank` of a stage holds: behind the first stage, of a table only the rows that it multiplies.
    pub fn held(&self, config: &ModelConfig, role: Role, rank: usize, first: bool) -> Range<usize> {
        match role {
            Role::Embedding if !first => self.kept(rank),
            _ => self.rows(config, role, rank),
        }
    }

    /// Rows (elements, for vectors) that `rank` owns of the tensor with a role.
    pub fn rows(&self, config: &ModelConfig, role: Role, rank: usize) -> Range<usize> {
        let of = |ranges: &[Range<usize>], unit: usize| ranges.get(rank).map_or(0..0, |r| r.start * unit..r.end * unit);
        match role {
            Role::Embedding | Role::Output => of(&self.vocab, 1),
            Role::Q | Role::QBias | Role::QUp => of(&self.heads, config.head_dim),
            Role::K | Role::KBias | Role::V | Role::VBias => of(&self.kv_heads, config.head_dim),
            Role::KvUp => of(&self.kv_heads, config.unpacked_dim()),
            Role::KeyUp => of(&self.kv_heads, config.unrotated_dim()),
            Role::ValueUp => of(&self.kv_heads, config.value_dim()),
            Role::O | Role::OBias | Role::Down | Role::DownBias | Role::SharedDown => of(&self.hidden, 1),
            Role::SharedGate | Role::SharedUp => of(&self.shared, 1),
            Role::Gate | Role::GateBias | Role::Up | Role::UpBias => of(&self.ffn, 1),
            Role::ExpertGate(e) | Role::ExpertUp(e) | Role::ExpertDown(e) => match self.experts.get(rank) {
                Some(own) if own.contains(&(e as usize)) => 0..config.shape(role)[0],
                _ => 0..0,
            },
            Role::TokenTypes
            | Role::Positions
            | Role::EmbeddingNorm
            | Role::EmbeddingNormBias
            | Role::Pooler
            | Role::PoolerBias
            | Role::Classifier
            | Role::ClassifierBias
            | Role::Router
            | Role::RouterBias
            | Role::QDown
            | Role::QDownNorm
            | Role::KvDown
            | Role::KvDownNorm
            | Role::AttnNormBias
            | Role::FfnNormBias
            | Role::OutputNormBias
            | Role::RopeFactors
            | Role::ShortRopeFactors
            | Role::LongRopeFactors
            | Role::AttnNorm
            | Role::QNorm
            | Role::KNorm
            | Role::PostAttnNorm
            | Role::FfnNorm
            | Role::PostFfnNorm
            | Role::OutputNorm => 0..config.shape(role)[0],
        }
    }
}

/// The rows of one tensor that a worker holds: one contiguous byte range of one file, or a part of each column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSlice {
    /// Which tensor.
    pub id: TensorId,
    /// The whole tensor.
    pub tensor: TensorInfo,
    /// Rows held (elements, for vectors).
    pub rows: Range<usize>,
    /// Bytes of the file from the first to the last of those rows; of a tensor stored by columns what lies between them too.
    pub bytes: Range<u64>,
}

impl TensorSlice {
    /// The slice of `rows` of a tensor.
    pub fn new(id: TensorId, tensor: &TensorInfo, rows: Range<usize>) -> Self {
        let count = tensor.shape.first().map_or(1, |&n| n.max(1) as u64);
        if let Some(head) = tensor.turned.map(|rows| rows.max(1)) {
            let bytes = tensor.bytes / (count / head as u64).max(1);
            let at = |row: usize| tensor.offset + (row / head) as u64 * bytes;
            return Self { id, tensor: tensor.clone(), bytes: at(rows.start)..at(rows.end), rows };
        }
        let bytes = match (tensor.column_stride, tensor.shape.last().copied().unwrap_or(0) as u64) {
            (Some(stride), columns) if !rows.is_empty() && columns > 0 => {
                let element = tensor.bytes / count / columns;
                let last = tensor.offset + (columns - 1) * stride;
                tensor.offset + rows.start as u64 * element..last + rows.end as u64 * element
            }
            (Some(_), _) => tensor.offset..tensor.offset,
            (None, _) => {
                let row = tensor.bytes / count;
                tensor.offset + rows.start as u64 * row..tensor.offset + rows.end as u64 * row
            }
        };
        Self { id, tensor: tensor.clone(), rows, bytes }
    }

    /// Bytes that are read.
    pub fn len(&self) -> u64 {
        match self.tensor.column_stride {
            None => self.bytes.end - self.bytes.start,
            Some(_) => self.tensor.bytes / self.tensor.shape.first().map_or(1, |&n| n.max(1) as u64) * self.rows.len() as u64,
        }
    }

    /// The byte ranges of the file that are read: one, or of a tensor stored by columns one for each column.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let columns = self.tensor.shape.last().copied().unwrap_or(0) as u64;
        let (stride, count) = match self.tensor.column_stride {
            _ if self.is_empty() => (0, 0),
            Some(stride) => (stride, columns),
            None => (0, 1),
        };
        let (start, len) = (self.bytes.start, self.len() / count.max(1));
        (0..count).map(move |column| start + column * stride..start + column * stride + len)
    }

    /// Whether nothing is read.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// What one worker, rank `rank` of stage `stage`, owns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Pipeline stage, from 0.
    pub stage: usize,
    /// Number of stages.
    pub stages: usize,
    /// Rank in the stage, from 0.
    pub rank: usize,
    /// Ranks in the stage.
    pub ranks: usize,
    /// The model's layers of this stage.
    pub layers: Range<usize>,
    /// Splits over the ranks of this stage.
    pub splits: Splits,
    /// Everything to load, ordered by file and offset: one slice for every tensor the stage uses, also where this rank holds no row of it.
    /// A tied table stands on the first and the last stage under [`Role::Embedding`].
    pub slices: Vec<TensorSlice>,
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// Bytes of KV cache.
    pub kv_bytes: u64,
    /// The rows of the vocabulary that it multiplies are screened: see [`crate::planner::Spec::screening`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub screening: bool,
}

/// Type of the copy of the vocabulary that rows are screened by.
pub const SCREEN: DType = DType::Q4_0;

impl Shard {
    /// Bytes of weight files to read: other than [`Shard::weight_bytes`] where tensors are converted as they are loaded.
    pub fn bytes_to_load(&self) -> u64 {
        self.slices.iter().map(TensorSlice::len).sum()
    }

    /// The byte ranges of weight files, by number of file, that are read.
    pub fn ranges(&self) -> impl Iterator<Item = (usize, Range<u64>)> {
        self.slices.iter().flat_map(|slice| slice.ranges().map(|range| (slice.tensor.file, range)))
    }

    /// Whether this stage turns ids into hidden states.
    pub fn is_first(&self) -> bool {
        self.stage == 0
    }

    /// Vocabulary rows that this worker multiplies.
    pub fn product(&self) -> Range<usize> {
        match (self.is_first(), self.is_last()) {
            (_, true) => self.splits.kept(self.rank),
            (true, false) => self.splits.lent(self.rank),
            (false, false) => 0..0,
        }
    }

    /// Bytes of the copy that the rows of the vocabulary are screened by; 0 where they are not.
    pub fn screen_bytes(&self, hidden: usize) -> u64 {
        let row = SCREEN.row_bytes(hidden).filter(|_| self.screening).unwrap_or(0);
        (self.product().len() * row) as u64
    }

    /// Whether this stage turns hidden states into tokens.
    pub fn is_last(&self) -> bool {
        self.stage + 1 == self.stages
    }
}

/// One pipeline stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Layers of this stage.
    pub layers: Range<usize>,
    /// One shard per rank.
    pub shards: Vec<Shard>,
}

/// The whole replica: every stage and rank, the KV geometry, and whether it fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecutionPlan {
    /// Model shape.
    pub config: ModelConfig,
    /// Stages in order; at least one, each with at least one layer.
    pub stages: Vec<Stage>,
    /// KV cache layout.
    pub kv: KvGeometry,
    /// Longest sequence served, in tokens.
    pub max_context: usize,
    /// Most sequences in a step.
    pub max_batch_sequences: usize,
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Bytes of weight files.
    pub file_bytes: u64,
    /// Bytes in memory of the tensors the forward pass uses, each counted once.
    pub tensor_bytes: u64,
    /// Bytes held by more than one worker, counted once for each extra holder.
    pub shared_bytes: u64,
    /// Bytes that adapters need on the worker where they need most.
    #[serde(default)]
    pub adapter_bytes: u64,
    /// Whether every worker fits into its memory.
    pub fits: bool,
    /// Why, with numbers.
    pub message: String,
}
