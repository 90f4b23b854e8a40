//! Why a shard could not be loaded, and why a step could not be run.

use std::io;

use plan::{
    dtype::DType,
    model::Role,
    step::{BlockId, SequenceId, TokenId},
};

use crate::collective::CollectiveError;

/// Why [`crate::Engine::load`] failed.
#[derive(Debug, thiserror::Error)]
pub enum LoadShardError {
    /// The bytes of a tensor could not be read.
    #[error("failed to read {len} bytes of tensor {name} at offset {offset}")]
    Read {
        /// Tensor in the file.
        name: String,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// The reader's own error.
        #[source]
        source: io::Error,
    },
    /// A tensor that the family needs is not among the shard's slices.
    #[error("the shard of stage {stage} rank {rank} has no {role:?} tensor for layer {layer:?}")]
    Missing {
        /// Role of the tensor.
        role: Role,
        /// Layer, unless the tensor is outside the layers.
        layer: Option<u32>,
        /// Stage of the shard.
        stage: usize,
        /// Rank of the shard.
        rank: usize,
    },
    /// A tensor's shape, or the rows held of it, is not what the model's shape and the plan say.
    #[error("tensor {name} has {got}, expected {expected} for stage {stage} rank {rank}")]
    Shape {
        /// Tensor in the file.
        name: String,
        /// What came.
        got: String,
        /// What was expected.
        expected: String,
        /// Stage of the shard.
        stage: usize,
        /// Rank of the shard.
        rank: usize,
    },
    /// A vector is stored in a type that only matrices may have.
    #[error("vector {name} is stored as {dtype:?}, expected F32, F16 or BF16")]
    VectorType {
        /// Tensor in the file.
        name: String,
        /// Its type.
        dtype: DType,
    },
    /// A matrix could not be packed.
    #[error("failed to pack tensor {name}: {detail}")]
    Pack {
        /// Tensor in the file.
        name: String,
        /// What was wrong.
        detail: String,
    },
    /// The plan, the model's shape or the options contradict each other.
    #[error("{what} is {got}, expected {expected}")]
    Plan {
        /// The quantity.
        what: &'static str,
        /// What came.
        got: String,
        /// What was expected.
        expected: String,
    },
}

impl LoadShardError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Read { .. } => "weights_unreadable",
            Self::Missing { .. } | Self::Shape { .. } | Self::VectorType { .. } | Self::Pack { .. } => "weights_mismatch",
            Self::Plan { .. } => "plan_mismatch",
        }
    }
}

/// Why [`crate::Engine::run`] failed. The step, and with it the session, is over.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The step contradicts the plan or the steps before it.
    #[error("step {step} is invalid")]
    Invalid {
        /// The step.
        step: u64,
        /// What is wrong with it.
        #[source]
        source: InvalidStep,
    },
    /// An exchange between the ranks of the stage failed.
    #[error("an exchange between ranks failed")]
    Collective(#[from] CollectiveError),
    /// The mask of a sequence did not come.
    #[error("the mask of sequence {sequence} in step {step} did not come")]
    Mask {
        /// The step.
        step: u64,
        /// The sequence.
        sequence: SequenceId,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl StepError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid_step",
            Self::Collective(_) => "collective_failed",
            Self::Mask { .. } => "mask_missing",
        }
    }
}

/// What is wrong with a step.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the fields are the numbers of the messages")]
pub enum InvalidStep {
    /// Step ids ascend.
    #[error("its id is {got}, expected more than {last}")]
    Order { got: u64, last: u64 },
    /// More tokens than the buffers hold.
    #[error("it has {got} tokens, expected at most {max}")]
    Tokens { got: usize, max: usize },
    /// The hidden states handed in do not match the batch.
    #[error("{got} hidden values came, expected {expected}")]
    Hidden { got: usize, expected: usize },
    /// A sequence is in the batch twice.
    #[error("sequence {sequence} is in the batch twice")]
    Twice { sequence: SequenceId },
    /// A sequence has no input.
    #[error("sequence {sequence} has no input token")]
    Empty { sequence: SequenceId },
    /// A sequence continues that was never begun, or was freed.
    #[error("sequence {sequence} is unknown, yet starts at position {position} without its beginning")]
    UnknownSequence { sequence: SequenceId, position: u32 },
    /// A position was skipped.
    #[error("sequence {sequence} starts at position {got}, expected at most {fed}")]
    Position { sequence: SequenceId, got: u32, fed: u32 },
    /// The sequence outgrows the context.
    #[error("sequence {sequence} would be {got} tokens long, expected at most {max}")]
    Context { sequence: SequenceId, got: usize, max: usize },
    /// The input still names the step that samples it.
    #[error("sequence {sequence} waits for the token of step {step}, expected ids")]
    Unresolved { sequence: SequenceId, step: u64 },
    /// An id outside the vocabulary.
    #[error("sequence {sequence} has id {id}, expected less than {vocab}")]
    Id { sequence: SequenceId, id: TokenId, vocab: usize },
    /// A KV group that does not exist.
    #[error("KV group {got} does not exist, expected less than {groups}")]
    Group { got: u32, groups: usize },
    /// A block outside its pool.
    #[error("block {block} of KV group {group} does not exist, expected less than {blocks}")]
    Block { group: usize, block: BlockId, blocks: usize },
    /// A table change beyond any context.
    #[error("table entry {got} of sequence {sequence} is set, expected less than {max}")]
    Entry { sequence: SequenceId, got: usize, max: usize },
    /// A position that is read or written has no block.
    #[error("sequence {sequence} has no block for position {position} in KV group {group}")]
    Hole { sequence: SequenceId, group: usize, position: usize },
    /// A want outside the input, or out of order.
    #[error("sequence {sequence} wants a result at offset {offset}, expected ascending offsets below {tokens}")]
    Want { sequence: SequenceId, offset: u32, tokens: usize },
    /// A sample is wanted of a sequence whose sampling settings never came.
    #[error("sequence {sequence} wants a sample, but its sampling settings never came")]
    NoSampling { sequence: SequenceId },
    /// The sequence's ids do not reach its first position.
    #[error("sequence {sequence} begins at position {position} with {got} known ids")]
    ShortHistory { sequence: SequenceId, position: u32, got: usize },
    /// What this kind of model cannot do.
    #[error("sequence {sequence} has {got}, expected {expected}")]
    Unsuited { sequence: SequenceId, got: &'static str, expected: &'static str },
    /// More values of a vector than a state has.
    #[error("sequence {sequence} wants the first {got} values of a vector, expected at most {width}")]
    Dimensions { sequence: SequenceId, got: u32, width: usize },
    /// A slot without an adapter.
    #[error("sequence {sequence} names adapter slot {adapter}, expected 0 or one that holds an adapter")]
    Adapter { sequence: SequenceId, adapter: u32 },
    /// A sequence's KV content is of one adapter.
    #[error("sequence {sequence} names adapter slot {adapter}, it began with {before}")]
    OtherAdapter { sequence: SequenceId, adapter: u32, before: u32 },
    /// Parts of another step than the one that waits for them.
    #[error("it does not wait for parts of logits, or another one waits before it")]
    NotAsked,
    /// Parts of logits of other lengths.
    #[error("parts of {got:?} bytes came, expected {expected:?}")]
    Parts { got: Vec<usize>, expected: Vec<usize> },
    /// A question that cannot be.
    #[error("{got} states and tokens up to {most} came for {rows} rows, expected {expected} and less than {vocab}")]
    Question { got: usize, most: u64, rows: usize, expected: usize, vocab: usize },
    /// A draw of the sequence is not finished.
    #[error("sequence {sequence} is in a step that waits for parts of logits, expected that to be finished before")]
    Unfinished { sequence: SequenceId },
    /// A mask that is to be the one before, where there was none.
    #[error("the first mask of sequence {sequence} is said to be unchanged, expected ids or bits")]
    Mask { sequence: SequenceId },
}
