//! Flags of `skein bench router`.

use std::{num::NonZeroUsize, path::PathBuf};

use clap::Args;

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchRouterArgs {
    /// Folder, file or source of a model, for its tokenizer; its weights are not read.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Streams at once, each on a connection of its own.
    #[arg(long, default_value = "1000", value_name = "N")]
    pub(crate) streams: NonZeroUsize,
    /// Requests in all [default: three for each stream].
    #[arg(long, value_name = "N")]
    pub(crate) requests: Option<NonZeroUsize>,
    /// Tokens to generate for each request.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,
    /// File with one prompt a line [default: built-in prompts of different lengths].
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts: Option<PathBuf>,
    /// Streams that a replica decodes together; there are as many replicas as that takes.
    #[arg(long, default_value = "32", value_name = "N", help_heading = "Simulated replicas")]
    pub(crate) batch: NonZeroUsize,
    /// Microseconds that a step takes, however few tokens are in it.
    #[arg(long, default_value_t = 20_000, value_name = "MICROSECONDS", help_heading = "Simulated replicas")]
    pub(crate) step_time: u64,
    /// Microseconds more for each token in a step.
    #[arg(long, default_value_t = 100, value_name = "MICROSECONDS", help_heading = "Simulated replicas")]
    pub(crate) token_time: u64,
    /// Threads of the router [default: the cores this process may use].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}
