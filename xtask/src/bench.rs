//! `cargo xtask bench`: the engine and llama-cpp-python in turns, in one run, on the same file and threads.
//!
//! One column says how much of what the machine allows a decode reaches: reading every byte of the weights once for each token.

use std::{collections::BTreeMap, path::PathBuf, process::Command, thread};

use anyhow::{Context, Result};
#[cfg(target_os = "linux")]
use clap::Subcommand;
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::{
    demo, model, paths,
    peers::{self, Build},
    process::{command, output, say},
    random_model,
};

/// Options of `bench`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    /// What is timed in place of the engine.
    #[cfg(target_os = "linux")]
    #[command(subcommand)]
    other: Option<Other>,
    /// Turns of each program.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// What to time.
    #[arg(long, default_value = "pp512,pp128,tg128,tg64@d1024,batch8,batch16,batch32")]
    tests: String,
    /// What is run.
    #[arg(long, value_enum, default_value_t = Subject::Reference)]
    model: Subject,
    /// Instructions of the engine's kernels, one row each.
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    isa: Vec<String>,
    /// Builds of llama.cpp, two columns each.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "native")]
    peers: Vec<Build>,
    /// Compute threads of both; all the machine offers when absent.
    #[arg(long)]
    threads: Option<usize>,
}

/// What is timed in place of the engine.
#[cfg(target_os = "linux")]
#[derive(Subcommand)]
enum Other {
    /// The operator with many deployments, whose pods are played, on a cluster of their own; needs root.
    Operator(crate::operator::Options),
}

/// A model to run.
#[derive(Clone, Copy, ValueEnum)]
enum Subject {
    /// Gemma 3 270M Q4_K_M.
    Reference,
    /// A Llama of 1.1 billion random parameters in Q4_K and Q6_K.
    Llama,
}

impl Subject {
    fn file(self) -> Result<PathBuf> {
        match self {
            Self::Reference => model::ensure(),
            Self::Llama => random_model::ensure(),
        }
    }
}

/// What a program printed, round after round, by test.
#[derive(Default)]
struct Samples {
    /// Tokens per second.
    rates: BTreeMap<String, Vec<f64>>,
    /// Which part of what memory and arithmetic allow was reached, where the program says so.
    shares: BTreeMap<String, Vec<f64>>,
}

/// Times both programs in alternating rounds and prints a table of medians, spreads and ratios.
///
/// # Errors
/// If a program fails or prints something else than its results.
pub(crate) fn run(options: &Options) -> Result<()> {
    #[cfg(target_os = "linux")]
    if let Some(Other::Operator(options)) = &options.other {
        return crate::operator::bench(options);
    }
    let model = options.model.file()?;
    demo::build()?;
    let threads = match options.threads {
        Some(n) => n,
        None => thread::available_parallelism().context("failed to count the processors")?.get(),
    }
    .to_string();
    let model = model.to_string_lossy();
    let mut ours: Vec<Samples> = options.isa.iter().map(|_| Samples::default()).collect();
    let mut theirs: Vec<Samples> = options.peers.iter().map(|_| Samples::default()).collect();
    for round in 1..=options.rounds {
        for (isa, samples) in options.isa.iter().zip(&mut ours) {
            say(&format!("round {round} of {}: skein, {isa}", options.rounds));
            let mut skein = command(paths::skein()?);
            skein.args(["bench", "engine", &model, "--threads", &threads, "--tests", &options.tests, "--isa", isa, "--json"]);
            collect(&mut skein, samples)?;
        }
        for (&peer, samples) in options.peers.iter().zip(&mut theirs) {
            say(&format!("round {round} of {}: llama-cpp-python, {}", options.rounds, peer.name()));
            collect(&mut peers::script(peer, &["bench", &model, "--threads", &threads, "--tests", &options.tests])?, samples)?;
        }
    }
    println!("threads {threads}, rounds {}; tokens/s, median (lowest to highest)\n", options.rounds);
    let columns: Vec<String> = options.peers.iter().map(|peer| format!("llama-cpp-python, {} | ratio of medians", peer.name())).collect();
    println!("| test | isa | skein | of the limit | {} |", columns.join(" | "));
    println!("|---|---|---|---|{}", "---|---|".repeat(columns.len()));
    for test in options.tests.split(',') {
        for (isa, samples) in options.isa.iter().zip(&ours) {
            let rates = row(&samples.rates, test)?;
            let share = row(&samples.shares, test).map_or_else(|_| String::new(), |shares| format!("{:.2}", median(&shares)));
            print!("| {test} | {isa} | {} | {share} |", shown(&rates));
            for samples in &theirs {
                let peer = row(&samples.rates, test)?;
                print!(" {} | {:.2} |", shown(&peer), median(&rates) / median(&peer));
            }
            println!();
        }
    }
    Ok(())
}

/// Runs `program` and adds the figures of every line it prints to `samples`.
fn collect(program: &mut Command, samples: &mut Samples) -> Result<()> {
    for line in output(program)?.lines().filter(|l| !l.trim().is_empty()) {
        let result: Value = serde_json::from_str(line).with_context(|| format!("expected a JSON object a line, got {line}"))?;
        let test = result["test"].as_str().with_context(|| format!("no test in {line}"))?;
        let rate = result["tok_s"].as_f64().with_context(|| format!("no tok_s in {line}"))?;
        eprintln!("    {test}: {rate:.1} tokens/s");
        samples.rates.entry(test.to_owned()).or_default().push(rate);
        if let Some(share) = result["of_allowed"].as_f64() {
            samples.shares.entry(test.to_owned()).or_default().push(share);
        }
    }
    Ok(())
}

fn row(samples: &BTreeMap<String, Vec<f64>>, test: &str) -> Result<Vec<f64>> {
    let mut rates = samples.get(test).filter(|r| !r.is_empty()).with_context(|| format!("no result for {test}"))?.clone();
    rates.sort_by(f64::total_cmp);
    Ok(rates)
}

/// Middle of sorted `rates`; the mean of the two middle ones when their number is even.
fn median(rates: &[f64]) -> f64 {
    let n = rates.len();
    (rates[(n - 1) / 2] + rates[n / 2]) / 2.0
}

fn shown(rates: &[f64]) -> String {
    format!("{:.1} ({:.1} to {:.1})", median(rates), rates[0], rates[rates.len() - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
