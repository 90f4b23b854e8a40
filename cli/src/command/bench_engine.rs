//! `skein bench engine`: prefill and decode speed, without API or scheduler.

use std::time::{Duration, Instant};

use anyhow::Context;
use engine::Timings;
use plan::predict::{self, Machine};
use router::replica::WorkerTimes;
use serde::Serialize;

use crate::{
    args::{BenchEngineArgs, Global, Placement},
    bench::{
        engine::EngineBench,
        loading::{self, Loading},
        stats::Spread,
        test::BenchTest,
    },
    blocks::Blocks,
    drive::Drive,
    exit::{BadInput, Outcome, bad_input},
    local::loaded::{self, Loaded, Needs, Prober},
    model::Model,
    output::{self, Unit},
};

/// One test's result, as `--json` prints it. Rates are tokens per second.
#[derive(Debug, Serialize)]
struct Measured {
    test: String,
    threads: usize,
    /// Median over the repetitions.
    tok_s: f64,
    min: f64,
    max: f64,
    /// Most bytes per second that the same threads read from memory, in units of 1e9, probed in this process between the repetitions: the
    /// median.
    read_gb_s: f64,
    /// Name of the kernels' instructions.
    isa: &'static str,
    pp: usize,
    tp: usize,
    repetitions: usize,
    /// Bytes of weights in the files.
    weight_bytes: u64,
    /// Which part of what memory and arithmetic allow this plan was reached: the median over the repetitions, each beside what was probed
    /// before and after it; decodes only.
    #[serde(skip_serializing_if = "Option::is_none")]
    of_allowed: Option<f64>,
    /// Where the time of worker processes went.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    workers: Vec<PerToken>,
}

/// Where a worker's time went, in microseconds for each token of the test.
#[derive(Clone, Copy, Debug, Serialize)]
struct PerToken {
    stage: usize,
    rank: usize,
    compute_us: f64,
    /// Exchanges with the ranks of its stage.
    collective_us: f64,
    /// Sending to other stages.
    link_us: f64,
    /// Waiting for its input within a step: what the stage before computes, and its way.
    wait_us: f64,
    /// Without a step.
    idle_us: f64,
}

impl PerToken {
    /// Of what passed between two readings, `elapsed` and `tokens` long.
    fn new(before: &WorkerTimes, after: &WorkerTimes, elapsed: Duration, tokens: usize) -> Self {
        let per = |time: Duration| time.as_secs_f64() * 1e6 / tokens.max(1) as f64;
        let spent = |of: fn(&WorkerTimes) -> Duration| of(after).saturating_sub(of(before));
        let (compute, collective, link, wait) = (spent(|t| t.compute), spent(|t| t.collective), spent(|t| t.link), spent(|t| t.wait));
        Self {
            stage: after.stage,
            rank: after.rank,
            compute_us: per(compute),
            collective_us: per(collective),
            link_us: per(link),
            wait_us: per(wait),
            idle_us: per(elapsed.saturating_sub(compute + collective + link + wait)),
        }
    }
}

/// Runs the command.
pub(crate) async fn bench(global: &Global, args: BenchEngineArgs) -> Outcome {
    let model = Model::open(global, &args.model).await?;
    model.must_generate("the benchmark")?;
    let placement = &args.placement;
    let chunk = placement.chunk();
    let context = args.tests.iter().map(BenchTest::context).max().unwrap_or(1);
    let sequences = args.tests.iter().map(BenchTest::sequences).max().unwrap_or(1);
    if let Some(test) = args.tests.iter().find(|test| test.context() > model.header.config.context) {
        return Err(bad_input!("test {test} needs a context of {} tokens, the model has {}", test.context(), model.header.config.context));
    }
    let vocab = model.header.config.vocab;
    let needs = Needs { context, sequences, batch_tokens: chunk.max(sequences), ..Needs::default() };
    let read = if args.load { Some(read(&model, placement, &needs).await?) } else { None };
    let started = Instant::now();
    let loaded = Loaded::start(global, model, placement, &needs).await?;
    let ready = started.elapsed();
    let done = loaded.watch(async {
        let mut bench = EngineBench::new(Drive::open(loaded.replica.as_ref()).await?, loaded.replica.stages(), chunk, vocab);
        if let Some(read) = read {
            let test = BenchTest::Prefill { tokens: 1 };
            let blocks = Blocks::new(&loaded.plan.kv, test.sequences(), test.context(), chunk).bad_input()?;
            bench.once(test, &blocks).await?;
            print_loading(&args, &loaded, read, ready, started.elapsed())?;
        }
        measure(global, &args, &loaded, &mut bench).await
    });
    let done = done.await;
    loaded.close().await;
    done
}

/// How long reading the weights alone takes.
async fn read(model: &Model, placement: &Placement, needs: &Needs) -> Outcome<Duration> {
    let plan = loaded::plan(model, placement, needs)?;
    let (reader, threads) = (model.reader(), placement.threads());
    let read = tokio::task::spawn_blocking(move || loading::read(&reader, &plan, threads)).await.context("reading was cut off")?;
    Ok(read.with_context(|| format!("failed to read {}", model.name))?)
}

/// Prints how long loading took.
fn print_loading(args: &BenchEngineArgs, loaded: &Loaded, read: Duration, ready: Duration, first_token: Duration) -> Outcome {
    let (pp, tp) = args.placement.parallelism();
    let loading = Loading {
        test: "load",
        bytes: loaded.plan.tensor_bytes + loaded.plan.shared_bytes,
        read_s: read.as_secs_f64(),
        load_s: ready.as_secs_f64(),
        first_token_s: first_token.as_secs_f64(),
        threads: loaded.threads,
        isa: loaded.isa.name(),
        pp,
        tp,
    };
    if args.json {
        return output::json(&loading);
    }
    let rate = loading.bytes as f64 / 1e9;
    output::line(&format!(
        "{:<12} {:>10.1} ms to the first token  (weights ready after {:.1} ms, {:.1} GB/s; read alone in {:.1} ms, {:.1} GB/s)",
        loading.test,
        loading.first_token_s * 1e3,
        loading.load_s * 1e3,
        rate / loading.load_s,
        loading.read_s * 1e3,
        rate / loading.read_s
    ))
}

/// Runs and prints each test.
async fn measure(global: &Global, args: &BenchEngineArgs, loaded: &Loaded, bench: &mut EngineBench) -> Outcome {
    let chunk = args.placement.chunk();
    let (pp, tp) = args.placement.parallelism();
    let prober = loaded.prober();
    for &test in &args.tests {
        let blocks = Blocks::new(&loaded.plan.kv, test.sequences(), test.context(), chunk).bad_input()?;
        let (before, workers) = (loaded.timings(), loaded.worker_times());
        let Repeated { rates, machines, elapsed } = repeat(global, bench, test, &blocks, args.repetitions.get(), &prober).await?;
        let tokens = test.counted() * (args.repetitions.get() + 1);
        let reads: Vec<f64> = machines.iter().map(|machine| machine.read / 1e9).collect();
        let (Some(spread), Some(reads)) = (Spread::of(&rates), Spread::of(&reads)) else { continue };
        let of_allowed = test.depth().map(|depth| {
            let allowed = |machine: &Machine| predict::decode(&loaded.plan, machine, test.sequences(), depth);
            // What was allowed in the time of a repetition is between what was allowed before and after it.
            let around = machines.windows(2).map(|two| (allowed(&two[0]) + allowed(&two[1])) / 2.0);
            rates.iter().zip(around).map(|(rate, allowed)| rate / allowed).collect::<Vec<_>>()
        });
        let measured = Measured {
            test: test.to_string(),
            threads: loaded.threads,
            tok_s: spread.median,
            min: spread.min,
            max: spread.max,
            read_gb_s: reads.median,
            isa: loaded.isa.name(),
            pp,
            tp,
            repetitions: rates.len(),
            weight_bytes: loaded.plan.file_bytes,
            of_allowed: of_allowed.and_then(|shares| Spread::of(&shares)).map(|shares| shares.median),
            workers: workers
                .iter()
                .zip(&loaded.worker_times())
                .map(|(before, after)| PerToken::new(before, after, elapsed, tokens))
                .collect(),
        };
        if args.json {
            output::json(&measured)?
        } else {
            print(&measured)?
        }
        if args.profile {
            match (before, loaded.timings()) {
                (Some(before), Some(after)) => profile(test, &before, &after),
                _ => profile_workers(&measured),
            }
        }
    }
    Ok(())
}

/// What repetitions of a test gave.
struct Repeated {
    /// Tokens per second of each.
    rates: Vec<f64>,
    /// What the machine yielded before each of them, and after the last.
    machines: Vec<Machine>,
    /// The time of all, that of the first, which does not count, included.
    elapsed: Duration,
}

/// Repeats a test `times` times, after once that warms caches and threads up.
async fn repeat(
    global: &Global,
    bench: &mut EngineBench,
    test: BenchTest,
    blocks: &Blocks,
    times: usize,
    prober: &Prober,
) -> Outcome<Repeated> {
    let bar = output::bar(global.quiet, "Measuring", times as u64 + 1, Unit::Items);
    let mut all = Repeated { rates: Vec::with_capacity(times), machines: Vec::with_capacity(times + 1), elapsed: Duration::ZERO };
    for repetition in 0..=times {
        bar.set_message(test.to_string());
        let started = Instant::now();
        let rate = bench.once(test, blocks).await?;
        all.elapsed += started.elapsed();
        if repetition > 0 {
            all.rates.push(rate);
        }
        all.machines.push(prober.measure(test.sequences()));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(all)
}

/// Prints what each phase of the steps between two readings took, on stderr.
fn profile(test: BenchTest, before: &Timings, after: &Timings) {
    let steps = after.steps.saturating_sub(before.steps).max(1);
    output::note(false, &format!("{test}: {steps} steps, {} tokens", after.tokens.saturating_sub(before.tokens)));
    if after.screened > before.screened {
        let [screened, checked, missed] = [
            after.screened - before.screened,
            after.screens_checked - before.screens_checked,
            after.screens_missed - before.screens_missed,
        ];
        output::note(false, &format!("  {screened} screened, of which {checked} were checked; {missed} of those lacked a token"));
    }
    for ((name, before), (_, after)) in before.phases().into_iter().zip(after.phases()) {
        let spent = after.saturating_sub(before);
        output::note(
            false,
            &format!("  {name:<11} {:>9.1} ms, {:>9.1} µs a step", spent.as_secs_f64() * 1e3, spent.as_secs_f64() * 1e6 / steps as f64),
        );
    }
}

/// Prints where the time of worker processes went, on stderr.
fn profile_workers(measured: &Measured) {
    output::note(false, &format!("{}: µs a token", measured.test));
    for worker in &measured.workers {
        let PerToken { stage, rank, compute_us, collective_us, link_us, wait_us, idle_us } = worker;
        output::note(
            false,
            &format!(
                "  stage {stage} rank {rank}: computing {compute_us:.1}, exchanges of ranks {collective_us:.1}, sending {link_us:.1}, waiting for input {wait_us:.1}, idle {idle_us:.1}"
            ),
        );
    }
}

/// The result for a person.
fn print(measured: &Measured) -> Outcome {
    let allowed = measured.of_allowed.map(|share| format!(", {share:.2} of what this machine allows the plan"));
    output::line(&format!(
        "{:<12} {:>10.1} tok/s  (min {:.1}, max {:.1}; {} threads, {}, memory reads {:.1} GB/s{})",
        measured.test,
        measured.tok_s,
        measured.min,
        measured.max,
        measured.threads,
        measured.isa,
        measured.read_gb_s,
        allowed.unwrap_or_default()
    ))
}
