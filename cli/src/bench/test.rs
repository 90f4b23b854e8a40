//! Names of engine benchmarks: what each measures.

use std::{fmt, str::FromStr};

/// One benchmark of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BenchTest {
    /// `ppN`: a prompt of `tokens`, to its first token.
    Prefill {
        /// Prompt length.
        tokens: usize,
    },
    /// `tgN` or `tgN@dM`: `tokens` decode steps of one sequence after `depth` tokens.
    Decode {
        /// Timed tokens.
        tokens: usize,
        /// Tokens in the cache before the first timed one.
        depth: usize,
    },
    /// `batchN`: that many sequences of one prompt token each, with some new tokens each.
    Batch {
        /// Sequences in each step.
        sequences: usize,
    },
}

/// Longest prompt, decode run or depth a test may name.
const MOST_TOKENS: usize = 1 << 20;
/// Most sequences a test may name.
const MOST_SEQUENCES: usize = 1024;

impl BenchTest {
    /// New tokens of each sequence in a batch test: 16 from 32 sequences on, 32 below.
    pub(crate) fn batch_tokens(sequences: usize) -> usize {
        if sequences >= 32 { 16 } else { 32 }
    }

    /// Sequences that run together.
    pub(crate) fn sequences(&self) -> usize {
        match *self {
            Self::Prefill { .. } | Self::Decode { .. } => 1,
            Self::Batch { sequences } => sequences,
        }
    }

    /// Tokens in the cache of each sequence before it decodes; nothing where it does not.
    pub(crate) fn depth(&self) -> Option<usize> {
        match *self {
            Self::Prefill { .. } => None,
            Self::Decode { depth, .. } => Some(depth),
            Self::Batch { .. } => Some(0),
        }
    }

    /// Longest sequence in tokens.
    pub(crate) fn context(&self) -> usize {
        match *self {
            Self::Prefill { tokens } => tokens + 1,
            Self::Decode { tokens, depth } => depth.max(1) + tokens,
            Self::Batch { sequences } => 1 + Self::batch_tokens(sequences),
        }
    }

    /// Tokens counted in its rate: prompt tokens for prefill, new tokens of all sequences otherwise.
    pub(crate) fn counted(&self) -> usize {
        match *self {
            Self::Prefill { tokens } | Self::Decode { tokens, .. } => tokens,
            Self::Batch { sequences } => sequences * Self::batch_tokens(sequences),
        }
    }
}

impl fmt::Display for BenchTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Prefill { tokens } => write!(f, "pp{tokens}"),
            Self::Decode { tokens, depth: 0 } => write!(f, "tg{tokens}"),
            Self::Decode { tokens, depth } => write!(f, "tg{tokens}@d{depth}"),
            Self::Batch { sequences } => write!(f, "batch{sequences}"),
        }
    }
}

/// A name no benchmark has.
#[derive(Debug, thiserror::Error)]
#[error("expected ppN, tgN, tgN@dM or batchN, with at most {MOST_TOKENS} tokens and {MOST_SEQUENCES} sequences")]
pub(crate) struct BenchTestError;

impl FromStr for BenchTest {
    type Err = BenchTestError;

    fn from_str(text: &str) -> Result<Self, BenchTestError> {
        let count = |digits: &str, most: usize| match digits.parse::<usize>() {
            Ok(n) if (1..=most).contains(&n) && !digits.starts_with('+') => Ok(n),
            _ => Err(BenchTestError),
        };
        if let Some(rest) = text.strip_prefix("pp") {
            Ok(Self::Prefill { tokens: count(rest, MOST_TOKENS)? })
        } else if let Some(rest) = text.strip_prefix("tg") {
            match rest.split_once("@d") {
                Some((tokens, depth)) => Ok(Self::Decode { tokens: count(tokens, MOST_TOKENS)?, depth: count(depth, MOST_TOKENS)? }),
                None => Ok(Self::Decode { tokens: count(rest, MOST_TOKENS)?, depth: 0 }),
            }
        } else if let Some(rest) = text.strip_prefix("batch") {
            Ok(Self::Batch { sequences: count(rest, MOST_SEQUENCES)? })
        } else {
            Err(BenchTestError)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip() {
        for name in ["pp512", "tg128", "tg64@d1024", "batch8", "batch32"] {
            assert_eq!(name.parse::<BenchTest>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn other_names_are_refused() {
        for name in ["", "pp", "pp0", "pp-1", "tg+5", "tg5@", "tg5@d", "tg5@d0", "batch", "batch5000", "xx4", "PP4"] {
            assert!(name.parse::<BenchTest>().is_err(), "{name}");
        }
    }

    #[test]
    fn batches_of_32_run_half_as_long() {
        assert_eq!("batch32".parse::<BenchTest>().unwrap().counted(), 32 * 16);
        assert_eq!("batch16".parse::<BenchTest>().unwrap().counted(), 16 * 32);
    }
}
