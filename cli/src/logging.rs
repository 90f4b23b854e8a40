//! Log lines on stderr.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

use crate::{
    args::{Global, LogFormat},
    exit::{Outcome, bad_input},
    output::LogWriter,
};

/// Installs the subscriber for the whole process.
///
/// `--log` (or `RUST_LOG`) wins; else warnings, and more with each `-v`. Libraries below Skein stay at warn until `-vvv`.
pub(crate) fn start(global: &Global) -> Outcome {
    let filter = match &global.log {
        Some(filter) => EnvFilter::try_new(filter).map_err(|error| bad_input!("log filter {filter:?} is not valid: {error}"))?,
        None => EnvFilter::new(match global.verbose {
            0 if global.quiet => "error",
            0 => "warn",
            1 => "warn,skein=info,worker=info,router=info,source=info,engine=info",
            2 => "warn,skein=debug,worker=debug,router=debug,source=debug,engine=debug",
            _ => "trace",
        }),
    };
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogWriter).log_internal_errors(false);
    let installed = match global.log_format {
        LogFormat::Text => base.with_ansi(stderr().is_terminal()).try_init(),
        LogFormat::Json => base.json().try_init(),
    };
    installed.map_err(|error| anyhow::anyhow!(error).context("failed to start logging").into())
}
