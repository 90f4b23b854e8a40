//! A vocabulary ready for use, whatever file it came from.

use plan::step::TokenId;

use super::pieces::Pieces;
use super::pipeline::Pipeline;
use super::spm::Spm;

/// Texts of tokens that end a turn or a text wherever they occur in a vocabulary.
pub(super) const END_TEXTS: [&str; 10] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<EOT>",
];

/// How text becomes ids.
pub(super) enum Encoder {
    /// Merging by score.
    Spm(Box<Spm>),
    /// The `tokenizers` crate.
    Pipeline(Box<Pipeline>),
}

/// Ids around two texts that are read together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) before: Vec<TokenId>,
    pub(super) between: Vec<TokenId>,
    pub(super) after: Vec<TokenId>,
}

/// What every tokenizer consists of.
pub(super) struct Vocabulary {
    /// Text to ids.
    pub(super) encoder: Encoder,
    /// Ids to bytes.
    pub(super) pieces: Pieces,
    /// Which ids are control tokens, not part of text.
    pub(super) control: Vec<bool>,
    /// Ids before a text.
    pub(super) prefix: Vec<TokenId>,
    /// Ids after a text.
    pub(super) suffix: Vec<TokenId>,
    /// Ids around two texts, where the files say it.
    pub(super) pair: Option<Pair>,
    /// First token of a text.
    pub(super) bos: Option<TokenId>,
    /// Last token of a text.
    pub(super) eos: Option<TokenId>,
    /// Ids that end a generation.
    pub(super) ends: Vec<TokenId>,
    /// The first piece of a text loses one leading space, which encoding put there.
    pub(super) strip_space: bool,
}
