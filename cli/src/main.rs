//! `skein`: runs models in one process or many, plans, inspects, evaluates, measures, and shows what a cluster runs.

mod args;
mod bench;
mod blocks;
mod command;
mod drive;
mod exit;
mod exposition;
mod forward;
mod importance;
mod kubectl;
mod local;
mod logging;
mod model;
mod output;
mod stop;
mod talk;
mod write;

use std::{process::ExitCode, time::Duration};

use anyhow::Context;

use crate::{args::Skein, exit::Outcome, stop::Stop};

/// How long abandoned tasks may take to be dropped.
const ENDING: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let args = Skein::from_command_line();
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            failure.code()
        }
    }
}

/// Sets the process up and runs the command to its end.
fn start(args: Skein) -> Outcome {
    logging::start(&args.global)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("failed to start the async runtime")?;
    let outcome = runtime.block_on(async { command::dispatch(args, Stop::listen()?).await });
    // What still runs at this point was abandoned by a signal or an error. Dropping it kills the workers it started; what blocks, such as a
    // read of the terminal, is not waited for.
    runtime.shutdown_timeout(ENDING);
    outcome
}
