//! Grammars that constrain output: what they are made from, compiled for a vocabulary; a matcher follows a sequence and says which tokens may come next.
//!
//! Text becomes ids at the edge, so a grammar is compiled there, where a bad one can still be refused. Masks are made by whoever drives the
//! sequence, from the grammar and the ids emitted so far alone: a sequence that goes on elsewhere has the masks that it would have had.

mod matcher;
mod vocabulary;

use std::sync::Arc;

pub(crate) use matcher::Matcher;
pub use vocabulary::Grammars;
pub(crate) use vocabulary::any_object;

/// What a grammar is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrammarSource {
    /// A JSON schema, as JSON text.
    JsonSchema(String),
    /// A regular expression that the whole output matches.
    Regex(String),
}

/// What the output of a sequence must match.
#[derive(Clone, Debug)]
pub struct Constraint {
    /// What it says.
    pub source: Arc<GrammarSource>,
    /// The same for the tokens of the sequence's model; `None` where it came from another process.
    pub grammar: Option<Arc<Grammar>>,
}

/// A grammar compiled for a vocabulary, at its start.
pub struct Grammar(llguidance::Matcher);

impl Grammar {
    /// Follows the ids emitted so far. Takes as long as there are ids.
    ///
    /// # Errors
    /// When they do not match.
    pub(crate) fn matcher(&self, emitted: &[plan::step::TokenId]) -> Result<Matcher, GrammarError> {
        let mut matcher = Matcher::new(self.0.deep_clone());
        matcher.advance(emitted)?;
        Ok(matcher)
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

/// Characters of what the library says of a grammar that are passed on.
const MESSAGE: usize = 400;

/// Why a grammar cannot be used; for whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub(crate) String);

impl GrammarError {
    /// What the library says, without its traces.
    fn of(error: &impl std::fmt::Display) -> Self {
        let text = error.to_string();
        if text.starts_with("panic: ") {
            tracing::error!(error = text, "the grammar library panicked");
            return Self("the grammar cannot be processed".to_owned());
        }
        let text = text.replace("<non-verbose/>", "");
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let mut text = lines.join("; ");
        // It can hold all that a client wrote.
        if let Some((end, _)) = text.char_indices().nth(MESSAGE) {
            text.truncate(end);
            text.push_str("...");
        }
        Self(text)
    }
}

#[cfg(test)]
pub(crate) mod tests;
