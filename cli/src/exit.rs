//! How a command ends: exit codes, and the one message a failure prints.

use std::{fmt, process::ExitCode};

use anstream::eprintln;

/// Why a command did not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What the user gave cannot be used; exit code 2.
    Input(anyhow::Error),
    /// Something else went wrong; exit code 1.
    Failed(anyhow::Error),
    /// Whoever started this process was told, on a way of its own; exit code 2 for bad input, else 1.
    Told {
        /// What was given cannot be used.
        input: bool,
    },
    /// Ctrl-C; exit code 130.
    Interrupted,
}

/// Result of a command.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// The process's exit code.
    pub(crate) fn code(&self) -> ExitCode {
        match self {
            Self::Input(_) | Self::Told { input: true } => ExitCode::from(2),
            Self::Failed(_) | Self::Told { input: false } => ExitCode::FAILURE,
            Self::Interrupted => ExitCode::from(130),
        }
    }

    /// The same with its causes in one message, for whoever reads the last line of a log.
    pub(crate) fn on_one_line(self) -> Self {
        let line = self.to_string();
        match self {
            Self::Input(_) => Self::Input(anyhow::Error::msg(line)),
            Self::Failed(_) => Self::Failed(anyhow::Error::msg(line)),
            told => told,
        }
    }

    /// Prints the message and its causes to stderr.
    pub(crate) fn report(&self) {
        match self {
            Self::Input(error) | Self::Failed(error) => eprintln!("{RED}error:{RESET} {}", Chain(error, "\n  caused by: ")),
            Self::Told { .. } | Self::Interrupted => {}
        }
    }
}

/// On one line, for logs.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(error) | Self::Failed(error) => Chain(error, ": ").fmt(f),
            Self::Told { .. } => f.write_str("failed"),
            Self::Interrupted => f.write_str("interrupted"),
        }
    }
}

/// Bold red, and back.
const RED: &str = "\x1b[1;31m";
const RESET: &str = "\x1b[0m";

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Marks an error as bad input.
pub(crate) trait BadInput<T> {
    /// Turns an error into [`Failure::Input`].
    fn bad_input(self) -> Outcome<T>;
}

impl<T, E: Into<anyhow::Error>> BadInput<T> for Result<T, E> {
    fn bad_input(self) -> Outcome<T> {
        self.map_err(|error| Failure::Input(error.into()))
    }
}

/// Bad input with this message.
macro_rules! bad_input {
    ($($arg:tt)*) => { $crate::exit::Failure::Input(anyhow::anyhow!($($arg)*)) };
}
pub(crate) use bad_input;

/// An error and its causes with this between them; a cause already contained in the one before is left out.
struct Chain<'a>(&'a anyhow::Error, &'static str);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut above = self.0.to_string();
        f.write_str(&above)?;
        for cause in self.0.chain().skip(1) {
            let text = cause.to_string();
            if !above.contains(&text) {
                write!(f, "{}{text}", self.1)?;
            }
            above = text;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn causes_follow_on_lines_of_their_own() {
        let error = anyhow!("no such file").context("failed to open a.gguf").context("cannot load the model");
        let lines = "cannot load the model\n  caused by: failed to open a.gguf\n  caused by: no such file";
        assert_eq!(Chain(&error, "\n  caused by: ").to_string(), lines);
        assert_eq!(Failure::Failed(error).to_string(), "cannot load the model: failed to open a.gguf: no such file");
    }

    #[test]
    fn repeated_causes_are_left_out() {
        let error = anyhow!("no such file").context("failed to open a.gguf: no such file");
        assert_eq!(Failure::Input(error).to_string(), "failed to open a.gguf: no such file");
    }
}
