//! What can be wrong with a message from a peer.

/// A message that does not mean anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A field, or a case of a oneof, is absent (or of a later version).
    #[error("{field} is missing")]
    Missing {
        /// Path of the field.
        field: String,
    },
    /// A field has a value it cannot have.
    #[error("{field} is {got}, expected {expected}")]
    Value {
        /// Path of the field.
        field: String,
        /// What came.
        got: String,
        /// What was expected.
        expected: &'static str,
    },
}

impl ConvertError {
    pub(crate) fn missing(field: impl Into<String>) -> Self {
        Self::Missing { field: field.into() }
    }

    pub(crate) fn value(field: impl Into<String>, got: impl ToString, expected: &'static str) -> Self {
        Self::Value { field: field.into(), got: got.to_string(), expected }
    }

    /// The same error one level further out.
    pub(crate) fn within(self, outer: impl std::fmt::Display) -> Self {
        match self {
            Self::Missing { field } => Self::Missing { field: format!("{outer}.{field}") },
            Self::Value { field, got, expected } => Self::Value { field: format!("{outer}.{field}"), got, expected },
        }
    }

    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        "protocol"
    }
}
