//! `skein top`: what the routers of a namespace have to do, by model.

use std::collections::BTreeMap;

use anyhow::Context;

use crate::{args::TopArgs, exit::Outcome, kubectl::Kubectl, output};

/// Port of a router's HTTP API, which has its metrics.
const PORT: u16 = 8080;

/// What one router says of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Load {
    ready: f64,
    replicas: f64,
    running: f64,
    waiting: f64,
    /// Fraction of KV blocks.
    kv: f64,
    tokens_per_second: f64,
}

/// Runs the command.
pub(crate) async fn top(args: TopArgs) -> Outcome {
    let kubectl = Kubectl::new(&args.cluster);
    let pods = kubectl.get(&["pods", "--selector=app.kubernetes.io/part-of=skein,app.kubernetes.io/component=router"]).await?;
    let mut rows = Vec::new();
    let (mut names, mut silent) = (Vec::new(), Vec::new());
    for pod in pods["items"].as_array().into_iter().flatten() {
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
        let namespace = pod["metadata"]["namespace"].as_str().context("a pod without a namespace")?;
        names.push(name.to_owned());
        // A router that starts or ends does not answer; the others do.
        match kubectl.raw(&format!("/api/v1/namespaces/{namespace}/pods/{name}:{PORT}/proxy/metrics")).await {
            Ok(text) => rows.extend(loads(&text).into_iter().map(|(model, load)| (model, name.to_owned(), load))),
            Err(error) => silent.push(format!("{name} does not answer: {error}")),
        }
    }
    if names.is_empty() {
        return output::line("there are no routers in this namespace");
    }
    rows.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    for line in silent {
        output::note(false, &line);
    }
    output::write_all(&table(&rows))
}

/// Loads by model, from a router's metrics in the text exposition.
fn loads(text: &str) -> BTreeMap<String, Load> {
    let mut loads: BTreeMap<String, Load> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, labels, value)) = sample(line) else { continue };
        let field: fn(&mut Load) -> &mut f64 = match (name, labels.get("state").map(String::as_str)) {
            ("skein_replicas", Some("ready")) => |l| &mut l.ready,
            ("skein_replicas", Some("all")) => |l| &mut l.replicas,
            ("vllm:num_requests_running", _) => |l| &mut l.running,
            ("vllm:num_requests_waiting", _) => |l| &mut l.waiting,
            ("vllm:kv_cache_usage_perc", _) => |l| &mut l.kv,
            ("skein_tokens_per_second", _) => |l| &mut l.tokens_per_second,
            _ => continue,
        };
        if let Some(model) = labels.get("model_name") {
            *field(loads.entry(model.clone()).or_default()) = value;
        }
    }
    loads
}

/// Name, labels and value of a line such as `name{a="b"} 1`.
fn sample(line: &str) -> Option<(&str, BTreeMap<String, String>, f64)> {
    let (name, rest) = line.split_once('{')?;
    let (labels, value) = rest.rsplit_once("} ")?;
    let mut found = BTreeMap::new();
    let mut rest = labels;
    while let Some((key, quoted)) = rest.split_once("=\"") {
        let (mut text, mut chars) = (String::new(), quoted.char_indices());
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => match chars.next()?.1 {
                    'n' => text.push('\n'),
                    other => text.push(other),
                },
                (_, other) => text.push(other),
            }
        };
        found.insert(key.to_owned(), text);
        rest = quoted[end + 1..].trim_start_matches(',');
    }
    Some((name, found, value.split(' ').next()?.parse().ok()?))
}

fn table(rows: &[(String, String, Load)]) -> String {
    let mut cells = vec![["MODEL", "ROUTER", "REPLICAS", "RUNNING", "WAITING", "KV CACHE", "TOKENS/S"].map(str::to_owned)];
    for (model, router, load) in rows {
        cells.push([
            model.clone(),
            router.clone(),
            format!("{}/{}", load.ready, load.replicas),
            load.running.to_string(),
            load.waiting.to_string(),
            format!("{:.0} %", load.kv * 100.0),
            format!("{:.1}", load.tokens_per_second),
        ]);
    }
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..7).map(width).collect();
    let line = |row: &[String; 7]| {
        let padded: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    cells.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = "\
# HELP vllm:num_requests_running Sequences in batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name=\"a\\\"b\",engine=\"0\"} 3
vllm:num_requests_waiting{model_name=\"a\\\"b\",engine=\"0\"} 1
vllm:kv_cache_usage_perc{model_name=\"a\\\"b\",engine=\"0\"} 0.25
skein_tokens_per_second{model_name=\"a\\\"b\",engine=\"0\"} 12.34
skein_replicas{model_name=\"a\\\"b\",state=\"all\"} 2
skein_replicas{model_name=\"a\\\"b\",state=\"ready\"} 1
skein_replicas{model_name=\"c\",state=\"all\"} 0
other_total 5
# EOF
";

    #[test]
    fn metrics_become_a_table() {
        let loads = loads(METRICS);
        let expected = Load { ready: 1.0, replicas: 2.0, running: 3.0, waiting: 1.0, kv: 0.25, tokens_per_second: 12.34 };
        assert_eq!(loads["a\"b"], expected);
        assert_eq!(loads["c"], Load::default());
        assert_eq!(loads.len(), 2);
        let rows = [("a\"b".to_owned(), "router-0".to_owned(), expected)];
        let shown = "\
MODEL  ROUTER    REPLICAS  RUNNING  WAITING  KV CACHE  TOKENS/S
a\"b    router-0  1/2       3        1        25 %      12.3
";
        assert_eq!(table(&rows), shown);
    }
}
