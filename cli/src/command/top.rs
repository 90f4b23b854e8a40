//! `skein top`: what each replica of a namespace's models has to do, as the routers say it.

use std::collections::BTreeMap;

use anyhow::Context;

use crate::{args::TopArgs, exit::Outcome, exposition::sample, kubectl::Kubectl, output};

/// Port of a router's HTTP API, which has its metrics.
const PORT: u16 = 8080;

/// What all routers say of one model.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    /// Requests that wait at a router, on whichever replica they will run.
    waiting: f64,
    replicas: BTreeMap<String, Replica>,
}

/// What all routers say of one replica.
#[derive(Clone, Debug, Default, PartialEq)]
struct Replica {
    ready: bool,
    /// The router that drives it.
    driver: Option<String>,
    running: f64,
    waiting: f64,
    /// Fraction of KV blocks.
    kv: f64,
    /// Of every router's clients together.
    tokens_per_second: f64,
    /// The slowest router's.
    ttft: Option<f64>,
}

/// Runs the command.
pub(crate) async fn top(args: TopArgs) -> Outcome {
    let kubectl = Kubectl::new(&args.cluster);
    let pods = kubectl.get(&["pods", "--selector=app.kubernetes.io/part-of=skein,app.kubernetes.io/component=router"]).await?;
    let (mut models, mut found, mut silent) = (BTreeMap::new(), false, Vec::new());
    for pod in pods["items"].as_array().into_iter().flatten() {
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
        let namespace = pod["metadata"]["namespace"].as_str().context("a pod without a namespace")?;
        found = true;
        // A router that starts or ends does not answer; the others do.
        match kubectl.raw(&format!("/api/v1/namespaces/{namespace}/pods/{name}:{PORT}/proxy/metrics")).await {
            Ok(text) => add(&mut models, name, &text),
            Err(error) => silent.push(format!("{name} does not answer: {error}")),
        }
    }
    if !found {
        return output::line("there are no routers in this namespace");
    }
    for line in silent {
        output::note(false, &line);
    }
    output::write_all(&table(&models))
}

/// Adds what a router says, from its metrics in the text exposition.
fn add(models: &mut BTreeMap<String, Model>, router: &str, text: &str) {
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, labels, value)) = sample(line) else { continue };
        let Some(model) = labels.get("model_name") else { continue };
        if matches!(name, "vllm:num_requests_waiting" | "skein_replicas") {
            let model = models.entry(model.clone()).or_default();
            model.waiting += if name == "skein_replicas" { 0.0 } else { value };
            continue;
        }
        let (Some(kind), Some(replica)) = (name.strip_prefix("skein_replica_"), labels.get("replica")) else { continue };
        let replica = models.entry(model.clone()).or_default().replicas.entry(replica.clone()).or_default();
        match kind {
            "ready" => replica.ready |= value > 0.0,
            "driven" if value > 0.0 => replica.driver = Some(router.to_owned()),
            "running" => replica.running += value,
            "waiting" => replica.waiting += value,
            "kv_used" => replica.kv = replica.kv.max(value),
            "tokens_per_second" => replica.tokens_per_second += value,
            "ttft_p90_seconds" => replica.ttft = Some(replica.ttft.map_or(value, |known| known.max(value))),
            _ => {}
        }
    }
}

/// A line for each model, and below it one for each of its replicas.
fn table(models: &BTreeMap<String, Model>) -> String {
    let heads = ["MODEL", "READY", "RUNNING", "WAITING", "KV CACHE", "TOKENS/S", "TTFT P90", "DRIVEN BY"];
    let mut cells = vec![heads.map(str::to_owned)];
    let ttft = |seconds: Option<f64>| seconds.map_or_else(|| "-".to_owned(), |s| format!("{:.0} ms", s * 1000.0));
    for (name, model) in models {
        let replicas = || model.replicas.values();
        // Not `sum`, which is minus zero of nothing.
        let sum = |read: fn(&Replica) -> f64| replicas().map(read).fold(0.0, |sum, value| sum + value);
        let ready = replicas().filter(|r| r.ready).count();
        let kv = sum(|r| if r.ready { r.kv } else { 0.0 }) / ready.max(1) as f64;
        cells.push([
            name.clone(),
            format!("{ready}/{}", model.replicas.len()),
            sum(|r| r.running).to_string(),
            model.waiting.to_string(),
            format!("{:.0} %", kv * 100.0),
            format!("{:.1}", sum(|r| r.tokens_per_second)),
            ttft(replicas().filter_map(|r| r.ttft).reduce(f64::max)),
            String::new(),
        ]);
        for (name, replica) in &model.replicas {
            cells.push([
                format!("  {name}"),
                if replica.ready { "yes" } else { "no" }.to_owned(),
                replica.running.to_string(),
                replica.waiting.to_string(),
                format!("{:.0} %", replica.kv * 100.0),
                format!("{:.1}", replica.tokens_per_second),
                ttft(replica.ttft),
                replica.driver.clone().unwrap_or_else(|| "-".to_owned()),
            ]);
        }
    }
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |row: &[String; 8]| {
        let padded: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    cells.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: &str = "\
# HELP vllm:num_requests_waiting Sequences waiting.
vllm:num_requests_waiting{model_name=\"a\\\"b\",engine=\"0\"} 1
skein_replica_ready{model_name=\"a\\\"b\",replica=\"r0\"} 1
skein_replica_driven{model_name=\"a\\\"b\",replica=\"r0\"} 1
skein_replica_running{model_name=\"a\\\"b\",replica=\"r0\"} 3
skein_replica_waiting{model_name=\"a\\\"b\",replica=\"r0\"} 2
skein_replica_kv_used{model_name=\"a\\\"b\",replica=\"r0\"} 0.25
skein_replica_tokens_per_second{model_name=\"a\\\"b\",replica=\"r0\"} 12.34
skein_replica_ttft_p90_seconds{model_name=\"a\\\"b\",replica=\"r0\"} 0.04
skein_replica_ready{model_name=\"a\\\"b\",replica=\"r1\"} 0
skein_replica_tokens_per_second{model_name=\"a\\\"b\",replica=\"r1\"} 0
skein_replicas{model_name=\"c\",state=\"all\"} 0
other_total 5
# EOF
";
    const OTHER: &str = "\
vllm:num_requests_waiting{model_name=\"a\\\"b\",engine=\"0\"} 4
skein_replica_ready{model_name=\"a\\\"b\",replica=\"r0\"} 1
skein_replica_driven{model_name=\"a\\\"b\",replica=\"r0\"} 0
skein_replica_tokens_per_second{model_name=\"a\\\"b\",replica=\"r0\"} 1
skein_replica_ttft_p90_seconds{model_name=\"a\\\"b\",replica=\"r0\"} 0.12
";

    #[test]
    fn what_routers_say_becomes_a_line_for_each_replica() {
        let mut models = BTreeMap::new();
        add(&mut models, "router-0", OWNER);
        add(&mut models, "router-1", OTHER);
        let shown = "\
MODEL  READY  RUNNING  WAITING  KV CACHE  TOKENS/S  TTFT P90  DRIVEN BY
a\"b    1/2    3        5        25 %      13.3      120 ms
  r0   yes    3        2        25 %      13.3      120 ms    router-0
  r1   no     0        0        0 %       0.0       -         -
c      0/0    0        0        0 %       0.0       -
";
        assert_eq!(table(&models), shown);
    }
}
