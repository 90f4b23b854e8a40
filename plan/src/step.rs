//! The unit of work the router sends to every worker, and what comes back.
//!
//! A worker's KV content and sampler state are functions of the steps it was sent, in order. Encoders keep nothing: a sequence's whole input
//! is in one step.

use serde::{Deserialize, Serialize};

/// A token's id in the vocabulary.
pub type TokenId = u32;
/// A sequence's number, unique within a session.
pub type SequenceId = u64;
/// A block's number in its KV group's pool.
pub type BlockId = u32;

/// One pass of a batch through all stages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Number of the step in its session, ascending from 1.
    pub id: u64,
    /// Sequences whose state is dropped before anything else happens.
    pub frees: Vec<SequenceId>,
    /// Block copies made before the batch runs, in order.
    pub copies: Vec<BlockCopy>,
    /// The batch. Tokens are laid out in this order.
    pub sequences: Vec<SequenceStep>,
    /// Masks of draws of sequences whose settings say `masked`. Between processes each travels in a message of its own behind the step.
    pub masks: Vec<(SequenceId, Mask)>,
}

impl Step {
    /// Rows of the step's hidden state.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.input.len()).sum()
    }

    /// Whether anything is wanted for which logits are needed.
    pub fn wants_logits(&self) -> bool {
        self.sequences.iter().flat_map(|part| &part.wants).any(|want| !want.kind.is_vector())
    }
}

/// Copies a whole block's entries, in every layer of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// KV group.
    pub group: u32,
    /// Source block.
    pub from: BlockId,
    /// Destination block.
    pub to: BlockId,
}

/// One sequence's part of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceStep {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Absolute position of the first input token.
    pub first_position: u32,
    /// Input tokens; one hidden row each.
    pub input: Input,
    /// Changes of block tables, applied before the batch runs.
    pub tables: Vec<TableChange>,
    /// What is computed at which input offsets, ascending by offset.
    pub wants: Vec<Want>,
    /// State that the last stage keeps for the sequence; sent with its first step and when it changes.
    pub begin: Option<Box<Begin>>,
    /// LoRA adapter slot; 0 is the bare model.
    pub adapter: u32,
    /// Offset in the input at which the second text of a pair begins, for models with token types; 0: there is one text.
    pub second: u32,
}

/// Where a sequence's input tokens come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// These ids.
    Ids(Vec<TokenId>),
    /// The one token sampled for this sequence in an earlier step, then drafts to verify.
    Sampled {
        /// The step that samples the first token.
        step: u64,
        /// Ids guessed to follow it.
        drafts: Vec<TokenId>,
    },
}

impl Input {
    /// Number of input tokens.
    pub fn len(&self) -> usize {
        match self {
            Self::Ids(ids) => ids.len(),
            Self::Sampled { drafts, .. } => 1 + drafts.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Sets entries of a sequence's block table in one KV group, growing it as needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableChange {
    /// KV group.
    pub group: u32,
    /// First entry set: the block of positions `first * 16 ..`.
    pub first: u32,
    /// Block of each entry from `first` on.
    pub blocks: Vec<BlockId>,
}

/// Something to compute at one input token.
#[derive(Clone, Debug, PartialEq)]
pub struct Want {
    /// Offset of the token in the sequence's input.
    pub offset: u32,
    /// What.
    pub kind: WantKind,
}

/// Kinds of results.
#[derive(Clone, Debug, PartialEq)]
pub enum WantKind {
    /// The next token, drawn by the sequence's sampling settings.
    Sample,
    /// The log-probability of a given next token, before temperature and masks.
    Score {
        /// The token that follows.
        target: TokenId,
        /// How many of the likeliest alternatives to return.
        top: u32,
    },
    /// All logits.
    Logits,
    /// A vector of final hidden states.
    Pooled(Pooled),
    /// What a classification head makes of the whole input, a value for each label.
    Classes,
}

impl WantKind {
    /// Whether the result is a vector, for which no logits are computed.
    pub fn is_vector(&self) -> bool {
        matches!(self, Self::Pooled(_) | Self::Classes)
    }
}

/// A vector, and what is made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pooled {
    /// Of which tokens.
    pub over: Pooling,
    /// How many of its first values are kept; 0: all.
    pub dimensions: u32,
    /// What is kept is divided by its Euclidean length.
    pub normalize: bool,
}

impl Pooled {
    /// The final hidden state of the token, as it is.
    pub const HIDDEN: Self = Self { over: Pooling::Token, dimensions: 0, normalize: false };
}

/// The tokens whose states make a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Pooling {
    /// The token that it is wanted at.
    Token,
    /// The first token of the input; encoders alone.
    First,
    /// The mean over the input; encoders alone.
    Mean,
}

/// What the sampler needs to know of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Begin {
    /// Every id so far: the prompt, then what was already emitted (when a stream is resumed).
    pub ids: Vec<TokenId>,
    /// How many of `ids` are prompt.
    pub prompt_len: u32,
    /// Sampling settings.
    pub sampling: Sampling,
}

/// How the next token is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Keep the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set with this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides (multiplies, when negative) the logit of every id in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from every id in the output.
    pub presence_penalty: f32,
    /// Subtracted for every occurrence in the output.
    pub frequency_penalty: f32,
    /// Added to these logits; ascending ids.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Ids not drawn while fewer than `min_tokens` tokens were emitted (end tokens).
    pub suppress: Vec<TokenId>,
    /// See `suppress`.
    pub min_tokens: u32,
    /// Key of all draws, with `choice` and the position.
    pub seed: u64,
    /// Index of the choice when a request asks for several.
    pub choice: u32,
    /// `Some(n)`: return the log-probability of the token and of the n likeliest.
    pub logprobs: Option<u32>,
    /// A mask for each draw arrives in a message of its own.
    pub masked: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            suppress: Vec::new(),
            min_tokens: 0,
            seed: 0,
            choice: 0,
            logprobs: None,
            masked: false,
        }
    }
}

/// One result, in the order of the step's wants.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Absolute position of the input token it was computed at.
    pub position: u32,
    /// The result.
    pub value: OutputValue,
}

/// A result's value.
#[derive(Clone, Debug, PartialEq)]
pub enum OutputValue {
    /// For [`WantKind::Sample`].
    Token {
        /// The token drawn.
        id: TokenId,
        /// Present when asked for.
        logprobs: Option<Logprobs>,
    },
    /// For [`WantKind::Score`].
    Score(Logprobs),
    /// For [`WantKind::Logits`]: `[vocab]`.
    Logits(Vec<f32>),
    /// For [`WantKind::Pooled`]: `[hidden]`, after the final norm, or as many as were asked for; for [`WantKind::Classes`]: `[labels]`.
    Vector(Vec<f32>),
    /// This sequence alone failed.
    Failed(String),
}

/// Natural-log probabilities of a token and its alternatives, before temperature and masks.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token itself.
    pub token: f32,
    /// The likeliest ids, descending; ties to the lower id.
    pub top: Vec<(TokenId, f32)>,
}

/// Which ids may be drawn next. It covers the ids of the tokenizer that it was made for, which can be more or fewer than the model has rows:
/// rows that it does not cover are not drawn, ids without a row mean nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mask {
    /// The same as for the sequence's previous draw.
    Unchanged,
    /// These ids alone, ascending.
    Ids(Vec<TokenId>),
    /// Bit `i % 8` of byte `i / 8` allows id `i`.
    Bits(Vec<u8>),
}
