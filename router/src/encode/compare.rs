//! Whether two models mean the same by every id, which one that guesses for the other has to.

use plan::{card::ModelCard, step::TokenId};

use super::{Tokenizer, TokenizerError};

/// Why a model cannot guess for another.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A tokenizer cannot be made.
    #[error("the tokenizer of {whose} cannot be compared: {source}")]
    Tokenizer {
        /// Which model's.
        whose: &'static str,
        /// Why not.
        source: TokenizerError,
    },
    /// There are more ids, or fewer.
    #[error("its tokenizer has {got} tokens, expected the model's {expected}")]
    Count {
        /// The draft model's.
        got: usize,
        /// The model's.
        expected: usize,
    },
    /// An id is another token.
    #[error("its token {id} is {got}, expected {expected}, which is the model's")]
    Token {
        /// The first that differs.
        id: TokenId,
        /// The draft model's, for a person.
        got: String,
        /// The model's.
        expected: String,
    },
}

/// Checks that each id stands for the same bytes in both models. Computes for as long as two tokenizers take to be made.
///
/// # Errors
/// The first difference, or when there is no tokenizer.
pub fn same_tokens(draft: &ModelCard, model: &ModelCard) -> Result<(), CompareError> {
    let made = |card, whose| Tokenizer::from_card(card).map_err(|source| CompareError::Tokenizer { whose, source });
    let (got, expected) = (made(draft, "the draft model")?, made(model, "the model")?);
    if got.vocab() != expected.vocab() {
        return Err(CompareError::Count { got: got.vocab(), expected: expected.vocab() });
    }
    let other = |id: &TokenId| got.piece(*id) != expected.piece(*id) || got.is_control(*id) != expected.is_control(*id);
    match (0..expected.vocab() as TokenId).find(other) {
        None => Ok(()),
        Some(id) => {
            let show = |of: &Tokenizer| {
                let (text, control) = (String::from_utf8_lossy(of.piece(id)), of.is_control(id));
                if control { format!("{text:?} (control)") } else { format!("{text:?}") }
            };
            Err(CompareError::Token { id, got: show(&got), expected: show(&expected) })
        }
    }
}
