//! What a process that can read a model says of it to one that cannot: the headers as read, on one line, or why there are none.
//!
//! Who hears it trusts nothing of it: headers are understood, and refused, as if they had just been read.

use std::error::Error;

use plan::{header::HeaderError, model::ModelHeader};
use serde::{Deserialize, Serialize};

use crate::{RawHeader, Source, SourceError, SourceOptions};

/// What is said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Inspection {
    /// The headers.
    Header(RawHeader),
    /// Why there are none.
    Refused {
        /// From the closed list of this crate's errors.
        reason: String,
        /// The chain of errors.
        message: String,
    },
}

/// An inspection without a model.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum InspectionError {
    #[error("{message}")]
    Refused { reason: String, message: String },
    #[error("what was said of the model is not understood")]
    Unknown { source: serde_json::Error },
    #[error("the headers list tensors outside of their files")]
    Outside,
    #[error("the model cannot be used")]
    Header { source: Box<HeaderError> },
}

impl Inspection {
    /// Longest line: a tensor takes about 130 bytes, and what a container says is cut by Kubernetes at 10 MiB.
    pub const MOST_BYTES: usize = 8 << 20;

    /// Reads the headers of the model at `uri`.
    pub fn of(uri: &str, options: SourceOptions) -> Self {
        let read = Source::open(uri, options).and_then(|source| Ok(source.raw_header()?.clone()));
        match read {
            Ok(raw) => Self::Header(raw),
            Err(error) => Self::Refused { reason: error.reason().to_owned(), message: chain(&error) },
        }
    }

    /// The line. Headers that do not fit, or that no line can hold, are refused.
    pub fn line(&self) -> String {
        let refuse = |message: String| {
            let refused = Self::Refused { reason: "header_too_large".to_owned(), message };
            serde_json::to_string(&refused).unwrap_or_else(|error| unreachable!("text is plain data: {error}"))
        };
        match serde_json::to_string(self) {
            Ok(line) if line.len() <= Self::MOST_BYTES => line,
            Ok(line) => refuse(format!("the headers take {} bytes, expected at most {}", line.len(), Self::MOST_BYTES)),
            Err(error) => refuse(format!("the headers cannot be written down: {error}")),
        }
    }

    /// The model that a line says.
    ///
    /// # Errors
    /// When it is none, says why there is no model, or says one that cannot be used.
    pub fn understand(line: &str) -> Result<ModelHeader, InspectionError> {
        match serde_json::from_str(line).map_err(|source| InspectionError::Unknown { source })? {
            Self::Header(raw) if raw.is_whole() => {
                raw.model_header().map_err(|source| InspectionError::Header { source: Box::new(source) })
            }
            Self::Header(_) => Err(InspectionError::Outside),
            Self::Refused { reason, message } => Err(InspectionError::Refused { reason, message }),
        }
    }
}

/// An error and its causes.
fn chain(error: &SourceError) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::Keep;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(name)
    }

    fn inspect(path: &Path) -> String {
        Inspection::of(&path.display().to_string(), SourceOptions { keep: Keep::Nothing, ..SourceOptions::default() }).line()
    }

    fn header(path: &Path) -> ModelHeader {
        let source = Source::open(&path.display().to_string(), SourceOptions::default()).expect("the fixture");
        source.header().expect("its header")
    }

    #[test]
    fn what_is_said_is_what_was_read() {
        let mut seen = 0;
        for entry in std::fs::read_dir(fixture("")).expect("fixtures").map(|entry| entry.expect("an entry").path()) {
            let Ok(source) = Source::open(&entry.display().to_string(), SourceOptions::default()) else { continue };
            let Ok(header) = source.header() else { continue };
            assert_eq!(Inspection::understand(&inspect(&entry)).expect("a model"), header, "{}", entry.display());
            seen += 1;
        }
        assert!(seen > 3, "{seen} fixtures");
    }

    #[test]
    fn what_cannot_be_read_is_said_with_its_reason() {
        let refused = |path: &Path| match Inspection::understand(&inspect(path)).expect_err("no model") {
            InspectionError::Refused { reason, message } => (reason, message),
            other => panic!("{other}"),
        };
        let (reason, message) = refused(&fixture("absent.gguf"));
        assert_eq!(reason, "NotFound");
        assert!(message.contains("absent.gguf does not exist"), "{message}");
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(refused(folder.path()).0, "NotFound");
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, b"GGUF\x03\0\0\0").expect("a file");
        let (reason, message) = refused(&file);
        assert_eq!(reason, "header_invalid");
        assert!(message.contains("at byte 8"), "{message}");
        let long = Inspection::Refused { reason: String::new(), message: "x".repeat(Inspection::MOST_BYTES) };
        assert!(long.line().contains("header_too_large") && long.line().len() < 1000);
        assert!(matches!(Inspection::understand("{}"), Err(InspectionError::Unknown { .. })));
    }

    /// Whatever somebody writes into a line, it is refused or is a model; nothing breaks.
    #[test]
    fn a_line_that_lies_breaks_nothing() {
        let path = fixture("llama");
        let (line, whole) = (inspect(&path), header(&path));
        let digits = |c: char| c.is_ascii_digit();
        let (mut at, mut refused, mut others) = (0, 0, 0);
        while let Some(begin) = line[at..].find(digits).map(|i| at + i) {
            let end = line[begin..].find(|c| !digits(c)).map_or(line.len(), |i| begin + i);
            for lie in ["0", "1", "9223372036854775808", "18446744073709551615"] {
                match Inspection::understand(&format!("{}{lie}{}", &line[..begin], &line[end..])) {
                    Err(_) => refused += 1,
                    Ok(header) if header != whole => others += 1,
                    Ok(_) => {}
                }
            }
            at = end;
        }
        assert!(refused > 100 && others > 0, "{refused} were refused, {others} are other models");
        let mut outside = line.clone();
        let offset = line.find("\"offset\":").expect("a tensor") + 9;
        outside.insert_str(offset, "1844674407370955161");
        assert!(matches!(Inspection::understand(&outside), Err(InspectionError::Outside | InspectionError::Unknown { .. })));
    }
}
