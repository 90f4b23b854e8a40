//! Development chores: `cargo xtask demo`, `test`, `check`, `fuzz` and what they need.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "chores talk to the person who runs them")]

mod bench;
mod chart;
mod check;
#[cfg(target_os = "linux")]
mod cluster;
mod codegen;
mod demo;
mod fuzz;
mod minilm;
mod model;
#[cfg(target_os = "linux")]
mod operator;
mod paths;
mod peers;
mod process;
mod python;
mod random_model;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Development chores of Skein.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Fetch the models of the tests (253 MB and 83 MB) into Skein's cache; does nothing when they are there.
    Model,
    /// Answer a prompt with the reference model on two stages of two ranks each.
    Demo {
        /// Serve the same manifest afterwards, until Ctrl-C.
        #[arg(long)]
        keep: bool,
        /// What to ask.
        #[arg(long, default_value = demo::QUESTION)]
        prompt: String,
    },
    /// Prepare everything and run all tests.
    Test(test::Options),
    /// Format, lints, docs, dependencies, generated files, rules of the tree.
    Check,
    /// Fuzz the parsers of model files, templates and manifests; needs nightly.
    Fuzz(fuzz::Options),
    /// Regenerate the code made from the .proto files, the definition of the resource, and what is made from the chart.
    Codegen {
        /// Only what is made from the chart.
        #[arg(long)]
        chart: bool,
    },
    /// A one-node Kubernetes cluster on this machine; needs root.
    #[cfg(target_os = "linux")]
    Cluster(cluster::Options),
    /// Time the engine and llama-cpp-python in turns on the reference model; or the operator with many deployments.
    Bench(bench::Options),
    /// Compare perplexity on the first chunks of the test text with llama-cpp-python.
    PeerPpl(peers::PplOptions),
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    match args.chore {
        Chore::Model => {
            println!("{}", model::ensure()?.display());
            println!("{}", minilm::ensure()?.display());
            Ok(())
        }
        Chore::Demo { keep, prompt } => demo::answer(&prompt, keep),
        Chore::Test(options) => test::all(&options),
        Chore::Check => check::run_all(),
        Chore::Fuzz(options) => fuzz::run_targets(&options),
        Chore::Codegen { chart: true } => chart::write(),
        Chore::Codegen { chart: false } => codegen::run(),
        #[cfg(target_os = "linux")]
        Chore::Cluster(options) => cluster::run(options),
        Chore::Bench(options) => bench::run(&options),
        Chore::PeerPpl(options) => peers::ppl(&options),
    }
}
