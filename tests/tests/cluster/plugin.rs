//! `kubectl skein`: what it shows of a deployment that stands.

use std::{env, os::unix::fs::symlink};

use e2e::program::{self, Finished};
use serde_json::Value;

use crate::kubernetes::{LIMIT, Namespace, SAMPLE, SAMPLE_NAME, WORKERS, inside, name};

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn the_plugin_shows_the_tree_the_load_and_the_logs() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    symlink(program::skein(), folder.path().join("kubectl-skein")).expect("a link");
    let own = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([folder.path().to_path_buf()].into_iter().chain(env::split_paths(&own))).expect("a PATH");
    let namespace = Namespace::shared("plugin");
    let skein = |args: &[&str]| -> Finished {
        let args = [&["skein"], args, &["--namespace", &namespace.name]].concat();
        program::finish(program::start(inside("kubectl").args(args).env("PATH", &path)), LIMIT)
    };
    assert!(skein(&["status"]).stdout.contains("there is no ModelDeployment"));
    assert_eq!(skein(&["status", "absent"]).status.code(), Some(2));

    namespace.succeed(&["apply", "--filename", SAMPLE]);
    namespace.ready(SAMPLE_NAME, 1);
    let tree = skein(&["status", SAMPLE_NAME]);
    assert!(tree.status.success() && tree.stdout.starts_with("gemma3-270m  Ready  1 of 1 replicas"), "{}{}", tree.stdout, tree.stderr);
    for pod in namespace.running(WORKERS) {
        let address = pod["status"]["podIP"].as_str().expect("an address");
        assert!(tree.stdout.contains(address), "{} ({address}) in\n{}", name(&pod), tree.stdout);
    }
    assert_eq!((tree.stdout.matches("stage ").count(), tree.stdout.matches("rank ").count()), (2, 4), "{}", tree.stdout);

    let plan = skein(&["plan", "--deployment", SAMPLE_NAME]);
    assert!(plan.stdout.contains("1 replica of 2 stages × 2 ranks"), "{}{}", plan.stdout, plan.stderr);
    let plan = skein(&["plan", "--deployment", SAMPLE_NAME, "--json"]);
    let plan: Value = serde_json::from_str(&plan.stdout).unwrap_or_else(|error| panic!("{error}: {}{}", plan.stdout, plan.stderr));
    let planned = &namespace.deployment(SAMPLE_NAME)["status"]["plan"];
    assert_eq!((&plan["fits"], &plan["stages"]), (&true.into(), &planned["stages"]));
    assert_eq!(skein(&["plan", "--deployment", "absent"]).status.code(), Some(1));

    let bench =
        skein(&["bench", "load", "--deployment", SAMPLE_NAME, "--requests", "8", "--concurrency", "2", "--max-tokens", "8", "--json"]);
    let bench: Value = serde_json::from_str(&bench.stdout).unwrap_or_else(|error| panic!("{error}: {}{}", bench.stdout, bench.stderr));
    assert_eq!((&bench["requests"], &bench["errors"], &bench["completion_tokens"]), (&8.into(), &0.into(), &64.into()), "{bench}");
    for measure in ["ttft_ms", "itl_ms", "request_ms"] {
        assert!(["p50", "p90", "p99"].iter().all(|p| bench[measure][p].as_f64().is_some_and(|ms| ms > 0.0)), "{bench}");
    }

    let load = skein(&["top"]);
    let row = load.stdout.lines().find(|line| line.starts_with(SAMPLE_NAME)).unwrap_or_else(|| panic!("{}{}", load.stdout, load.stderr));
    assert!(row.contains("1/1") && row.contains(" ms"), "{}", load.stdout);
    let replica = namespace.deployment(SAMPLE_NAME)["status"]["replicaStates"][0]["name"].as_str().expect("a name").to_owned();
    let row = load.stdout.lines().find(|line| line.trim_start().starts_with(&replica)).unwrap_or_else(|| panic!("{}", load.stdout));
    assert!(row.contains(" yes ") && row.contains("skein-router-") && row.contains(" ms"), "{}", load.stdout);

    let logs = skein(&["logs", SAMPLE_NAME, "--stage", "1", "--rank", "0"]);
    assert!(
        logs.stdout.lines().count() > 0 && logs.stdout.lines().all(|line| line.contains("-s1-0/worker]")),
        "{}{}",
        logs.stdout,
        logs.stderr
    );
    assert!(skein(&["--help"]).stdout.contains("kubectl skein"));
}
