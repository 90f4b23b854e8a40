//! What commands print: results on stdout, progress and notes on stderr.

use std::{
    io::{self, IsTerminal, Write},
    sync::LazyLock,
    time::Duration,
};

use anyhow::Context;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::exit::{Failure, Outcome};

/// Prints one JSON object on a line of its own.
///
/// # Errors
/// When stdout is closed, or the value holds something JSON cannot say.
pub(crate) fn json(value: &impl Serialize) -> Outcome {
    let mut text = serde_json::to_string(value).context("failed to write the result as JSON")?;
    text.push('\n');
    write_all(&text)
}

/// Prints a line on stdout.
pub(crate) fn line(text: &str) -> Outcome {
    write_all(&format!("{text}\n"))
}

/// Prints text on stdout as it is, at once. A closed pipe ends the command quietly, as it does for other Unix tools.
pub(crate) fn write_all(text: &str) -> Outcome {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::Interrupted),
        Err(error) => Err(anyhow::Error::new(error).context("failed to write to stdout").into()),
    }
}

/// All bars, so that lines on stderr go above them and not through them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Prints a note on stderr, unless told to be quiet.
pub(crate) fn note(quiet: bool, text: &str) {
    if !quiet {
        BARS.suspend(|| anstream::eprintln!("{text}"));
    }
}

/// Prints a note like cargo's: a right-aligned verb in colour, then what it is about.
pub(crate) fn status(quiet: bool, verb: &str, text: &str) {
    note(quiet, &format!("\x1b[1;36m{verb:>12}\x1b[0m {text}"));
}

/// Prints on stderr what a person is asked with, without a line break of its own.
pub(crate) fn prompt(text: &str) {
    anstream::eprint!("{text}");
}

/// Writes a line that is a log line already to stderr. When stderr is gone there is nobody to tell.
pub(crate) fn log_line(line: &[u8]) {
    let whole = [line, b"\n"].concat();
    BARS.suspend(|| io::stderr().write_all(&whole)).unwrap_or_default();
}

/// Standard error for log lines: above the bars, if there are any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(bytes))
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        BARS.suspend(|| io::stderr().write_all(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Bytes, with a rate.
    Bytes,
    /// Things, with the time left.
    Items,
}

/// A progress bar on stderr; invisible when stderr is no terminal or `quiet` is set.
pub(crate) fn bar(quiet: bool, label: &'static str, length: u64, unit: Unit) -> ProgressBar {
    if quiet || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template = match unit {
        Unit::Bytes => "{prefix:>12.cyan.bold} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        Unit::Items => "{prefix:>12.cyan.bold} [{bar:30}] {pos}/{len} {msg} {eta}",
    };
    let bar = BARS.add(ProgressBar::new(length).with_prefix(label));
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// A spinner with a changing message; invisible when stderr is no terminal or `quiet` is set.
pub(crate) fn spinner(quiet: bool, label: &'static str) -> ProgressBar {
    if quiet || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = BARS.add(ProgressBar::new_spinner().with_prefix(label));
    if let Ok(style) = ProgressStyle::with_template("{prefix:>12.cyan.bold} {spinner} {msg}") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Bytes in the largest binary unit that leaves at least 1: `241.4 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_use_the_largest_fitting_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes(253_113_024), "241.4 MiB");
    }
}
