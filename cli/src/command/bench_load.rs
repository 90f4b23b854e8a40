//! `skein bench load`: latency and throughput of a running endpoint.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    args::{BenchLoadArgs, Global},
    bench::{
        load::{Endpoint, Timed},
        stats::percentile,
    },
    exit::{BadInput, Outcome, bad_input},
    forward::Forward,
    kubectl::Kubectl,
    output::{self, Unit},
};

/// Prompts of different lengths, for when none are given.
const PROMPTS: [&str; 6] = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Kubernetes is an open source",
    "Once upon a time, in a small village at the edge of a great forest, there lived a clockmaker who",
    "Flying geese share the work of the lead. When the bird at the front tires, it drops back into the line and another takes its place, and when one",
    "Write down, one after the other, the names of ten rivers and the countries they flow through, from the longest to the shortest:\n1.",
];

/// Percentiles of one measure, in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
}

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Load {
    url: String,
    model: String,
    concurrency: usize,
    requests: usize,
    errors: usize,
    /// The first error, if there was one.
    first_error: Option<String>,
    seconds: f64,
    requests_per_second: f64,
    /// New tokens of all requests per second.
    output_tokens_per_second: f64,
    prompt_tokens: u64,
    completion_tokens: u64,
    ttft_ms: Option<Percentiles>,
    itl_ms: Option<Percentiles>,
    request_ms: Option<Percentiles>,
    /// New tokens per second of a single request, first token to last: the median and the slowest ends.
    stream_tokens_per_second: Option<Percentiles>,
}

/// Runs the command. Fails when every request failed.
pub(crate) async fn bench(global: &Global, args: BenchLoadArgs) -> Outcome {
    let target = Target::find(&args).await?;
    let prompts = prompts(args.prompts.as_deref())?;
    let endpoint = Endpoint::new(&target.url, args.api_key, Duration::from_secs(args.timeout), args.max_tokens, args.temperature)?;
    let model = match args.model.or(target.model) {
        Some(model) => model,
        None => endpoint.first_model().await?,
    };
    let (requests, concurrency) = (args.requests.get(), args.concurrency.get());

    let bar = output::bar(global.quiet, "Requesting", requests as u64, Unit::Items);
    let next = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..concurrency.min(requests) {
        let (endpoint, model, prompts) = (endpoint.clone(), model.clone(), prompts.clone());
        let (next, bar) = (next.clone(), bar.clone());
        clients.spawn(async move {
            let mut results = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= requests {
                    return results;
                }
                results.push(endpoint.complete(&model, &prompts[number % prompts.len()]).await);
                bar.inc(1);
            }
        });
    }
    let results = clients.join_all().await;
    let seconds = started.elapsed().as_secs_f64();
    bar.finish_and_clear();

    let (mut timed, mut errors) = (Vec::new(), Vec::new());
    for result in results.into_iter().flatten() {
        match result {
            Ok(times) => timed.push(times),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    let load = report(target.url, model, concurrency, seconds, &timed, &errors);
    if args.json {
        output::json(&load)?
    } else {
        print(&load)?
    }
    match (timed.is_empty(), load.first_error) {
        (true, Some(error)) => Err(anyhow::anyhow!("all {requests} requests failed, the first with: {error}").into()),
        _ => Ok(()),
    }
}

/// Where requests go.
struct Target {
    url: String,
    /// What a deployment is called in requests.
    model: Option<String>,
    /// The way to a deployment.
    _forward: Option<Forward>,
}

impl Target {
    /// The endpoint that was named, or a way to the deployment that was.
    async fn find(args: &BenchLoadArgs) -> Outcome<Self> {
        if let Some(name) = &args.deployment {
            let kubectl = Kubectl::new(&args.cluster);
            let deployment = kubectl.get(&["modeldeployments.skein.dev", name]).await?;
            let model = deployment.pointer("/spec/model/name").and_then(Value::as_str).unwrap_or(name).to_owned();
            let forward = Forward::open(&kubectl, name).await?;
            return Ok(Self { url: forward.url.clone(), model: Some(model), _forward: Some(forward) });
        }
        match &args.url {
            Some(url) if url.starts_with("http://") => Ok(Self { url: url.clone(), model: None, _forward: None }),
            url => Err(bad_input!("--url is {:?}, expected http://host:port", url.as_deref().unwrap_or_default())),
        }
    }
}

/// Those of a file, or the built-in ones.
pub(super) fn prompts(file: Option<&Path>) -> Outcome<Vec<String>> {
    file.map_or_else(|| Ok(PROMPTS.map(String::from).to_vec()), read_prompts)
}

/// One prompt a line; empty lines are left out.
fn read_prompts(path: &Path) -> Outcome<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read prompts from {}", path.display())).bad_input()?;
    let prompts: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
    if prompts.is_empty() { Err(bad_input!("{} has no prompt, expected one a line", path.display())) } else { Ok(prompts) }
}

/// Folds all requests into one result.
fn report(url: String, model: String, concurrency: usize, seconds: f64, timed: &[Timed], errors: &[String]) -> Load {
    let millis = |values: Vec<f64>| percentiles(&values, 1e3);
    let completion_tokens = timed.iter().map(|t| t.completion_tokens).sum();
    let rates = timed.iter().filter(|t| t.completion_tokens > 1).map(|t| (t.completion_tokens - 1) as f64 / (t.total - t.first).max(1e-9));
    Load {
        url,
        model,
        concurrency,
        requests: timed.len() + errors.len(),
        errors: errors.len(),
        first_error: errors.first().cloned(),
        seconds,
        requests_per_second: timed.len() as f64 / seconds,
        output_tokens_per_second: completion_tokens as f64 / seconds,
        prompt_tokens: timed.iter().map(|t| t.prompt_tokens).sum(),
        completion_tokens,
        ttft_ms: millis(timed.iter().map(|t| t.first).collect()),
        itl_ms: millis(timed.iter().flat_map(|t| t.gaps.iter().copied()).collect()),
        request_ms: millis(timed.iter().map(|t| t.total).collect()),
        // Slow is high here: the 90th percentile is what nine of ten streams reach.
        stream_tokens_per_second: percentiles(&rates.map(|rate| -rate).collect::<Vec<_>>(), -1.0),
    }
}

/// Percentiles of `values`, scaled; `None` when there are none.
pub(super) fn percentiles(values: &[f64], scale: f64) -> Option<Percentiles> {
    let at = |percent| percentile(values, percent).map(|value| value * scale);
    Some(Percentiles { p50: at(50)?, p90: at(90)?, p99: at(99)? })
}

/// The result for a person.
fn print(load: &Load) -> Outcome {
    output::line(&format!("{} requests, {} at once, {} errors, {:.1} s", load.requests, load.concurrency, load.errors, load.seconds))?;
    output::line(&format!("throughput      {:.1} tok/s, {:.2} requests/s", load.output_tokens_per_second, load.requests_per_second))?;
    let rows = [
        ("first token", &load.ttft_ms, "ms"),
        ("between tokens", &load.itl_ms, "ms"),
        ("request", &load.request_ms, "ms"),
        ("one stream", &load.stream_tokens_per_second, "tok/s"),
    ];
    print_clients(&rows, load.first_error.as_deref())
}

/// What clients saw: rows of a label, percentiles and their unit, and the first error.
pub(super) fn print_clients(rows: &[(&str, &Option<Percentiles>, &str)], first_error: Option<&str>) -> Outcome {
    for (label, row, unit) in rows {
        if let Some(row) = row {
            output::line(&format!("{label:<15} p50 {:.1} {unit}, p90 {:.1} {unit}, p99 {:.1} {unit}", row.p50, row.p90, row.p99))?;
        }
    }
    match first_error {
        Some(error) => output::line(&format!("first error     {error}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_times_come_from_all_requests() {
        let timed = |first: f64| Timed { first, gaps: vec![0.01; 3], total: first + 0.03, prompt_tokens: 5, completion_tokens: 4 };
        let load = report("u".into(), "m".into(), 2, 2.0, &[timed(0.1), timed(0.3)], &["broke".into()]);
        assert_eq!((load.requests, load.errors, load.completion_tokens), (3, 1, 8));
        assert!((load.output_tokens_per_second - 4.0).abs() < 1e-9);
        let ttft = load.ttft_ms.unwrap();
        assert!((ttft.p50 - 100.0).abs() < 1e-9 && (ttft.p99 - 300.0).abs() < 1e-9);
        assert!((load.stream_tokens_per_second.unwrap().p90 - 100.0).abs() < 1e-6);
    }
}
