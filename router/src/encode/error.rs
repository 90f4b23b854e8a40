//! Why a card gives no tokenizer, and why text gives no ids.

/// Why a model card gives no tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The card holds no GGUF header, tokenizer.json, tokenizer.model or vocab.txt.
    #[error("model has no tokenizer: expected a GGUF header, tokenizer.json, tokenizer.model or vocab.txt, found {0}")]
    Missing(String),
    /// A file of the card cannot be read.
    #[error("cannot read {file}: {problem}")]
    File {
        /// Name in the card.
        file: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A GGUF tokenizer of a kind that is not known.
    #[error("tokenizer.ggml.model {0:?} is not supported, expected \"llama\", \"gpt2\", \"t5\" or \"bert\"")]
    Model(String),
    /// A pre-tokenizer whose splitting rule is not known; guessing one would change ids silently.
    #[error("pre-tokenizer tokenizer.ggml.pre {0:?} is not known")]
    PreTokenizer(String),
    /// Parts of the vocabulary contradict each other.
    #[error("tokenizer vocabulary: {0}")]
    Vocabulary(String),
    /// A decoder in tokenizer.json whose rule is not known.
    #[error("decoder {0:?} of tokenizer.json is not supported")]
    Decoder(String),
}

impl TokenizerError {
    /// Stable, low-cardinality key for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing(_) => "tokenizer_missing",
            Self::File { .. } => "tokenizer_unreadable",
            Self::Model(_) | Self::PreTokenizer(_) | Self::Decoder(_) => "tokenizer_unsupported",
            Self::Vocabulary(_) => "tokenizer_invalid",
        }
    }
}

/// Why messages give no prompt.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The model has no template and none was given.
    #[error("this model has no chat template (it may be a base model): use /v1/completions, or set chat.template of the deployment")]
    NoTemplate,
    /// The template does not parse.
    #[error("the chat template is not valid: {0}")]
    Template(String),
    /// The template refused the messages, by `raise_exception` or an operation that failed.
    #[error("the chat template refused the messages: {0}")]
    Refused(String),
    /// The template ran longer, or wrote more, than allowed.
    #[error("the chat template exceeded its limit of {0}")]
    Limit(&'static str),
    /// Text cannot be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// Why text gives no ids.
#[derive(Debug, thiserror::Error)]
#[error("text cannot be tokenized: {0}")]
pub struct EncodeError(pub(super) String);
