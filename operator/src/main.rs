//! `skein-operator`: the process in the cluster.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, anyhow};
use clap::Parser;
use operator::{args::Args, crd, serve};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::parse();
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Without logging there is standard error alone, and nothing to do about it when that is closed.
            error!(error = format!("{failure:#}"), "the operator ends");
            let _ = writeln!(io::stderr(), "error: {failure:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: Args) -> anyhow::Result<()> {
    if args.print_crd {
        return io::stdout().write_all(crd::yaml().as_bytes()).context("failed to print the definition");
    }
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("log filter {:?} is not valid", args.log))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = if args.log_json { log.json().try_init() } else { log.try_init() };
    started.map_err(|error| anyhow!(error)).context("failed to start logging")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("failed to start the async runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
        let told = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            info!("stopping");
            told.cancel();
        });
        serve::run(args, stop).await
    })
}
