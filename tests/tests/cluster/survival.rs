//! Workers, the operator and the API server go away; streams do not notice.

use std::time::{Duration, Instant};

use e2e::{process::Pid, program};
use serde_json::Value;

use crate::{
    answers::requests,
    kubernetes::{Namespace, SAMPLE, SAMPLE_NAME, SYSTEM, WORKERS, component, identity, kubectl, name, succeed},
    load::Load,
};

/// The sample, Ready, in a namespace of its own on a cluster without other tests.
fn sample(name: &str) -> Namespace {
    let namespace = Namespace::alone(name);
    namespace.succeed(&["apply", "--filename", SAMPLE]);
    namespace.ready(SAMPLE_NAME, 1);
    namespace
}

/// The process of a worker's container: pods' processes are this machine's, and a worker's command line has its pod's address.
pub(crate) fn process(pod: &Value) -> Pid {
    let address = format!("{}:7071", pod["status"]["podIP"].as_str().expect("an address"));
    let lists = std::fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut named = lists.filter(|pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let args: Vec<_> = line.split(|b| *b == 0).collect();
        args.first() == Some(&b"/skein".as_slice()) && args.contains(&address.as_bytes())
    });
    Pid(named.next().unwrap_or_else(|| panic!("no process of {}", name(pod))))
}

fn identities(pods: &[Value]) -> Vec<(String, u64)> {
    pods.iter().map(identity).collect()
}

/// Each worker's process in turn is killed under load, as the kernel kills one that takes too much memory; then a pod is deleted.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn streams_survive_killed_workers() {
    let namespace = sample("killed");
    let load = Load::start(&namespace.http(SAMPLE_NAME), 4, requests());
    load.more(4);
    for pod in namespace.running(WORKERS) {
        process(&pod).signal("KILL");
        namespace.watch(&["pod", name(&pod)], "a restarted container", |now| {
            let container = &now["status"]["containerStatuses"][0];
            (container["restartCount"].as_u64() >= Some(1) && container["ready"] == true).then_some(())
        });
        load.more(4);
    }
    let before = namespace.running(WORKERS);
    let (gone, stay) = before.split_first().expect("four workers");
    namespace.succeed(&["delete", "pod", name(gone), "--grace-period=0", "--force"]);
    namespace.watch(&["pods", "--selector", WORKERS], "a pod in its place", |pod| {
        let anew = name(pod) == name(gone) && pod["metadata"]["uid"] != gone["metadata"]["uid"];
        (anew && pod["status"]["containerStatuses"][0]["ready"] == true).then_some(())
    });
    load.more(8);
    load.stop().assert_whole("killed workers");
    // The others kept their weights.
    assert_eq!(identities(&namespace.pods(WORKERS)[1..]), identities(stay));
    namespace.ready(SAMPLE_NAME, 1);
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_killed_operator_restarts_nothing() {
    let namespace = sample("operator");
    let everything =
        || ["app.kubernetes.io/component=worker", "app.kubernetes.io/component=router"].map(|s| identities(&namespace.pods(s)));
    let before = everything();
    let load = Load::start(&namespace.http(SAMPLE_NAME), 2, requests());
    load.more(4);
    succeed(&[
        "--namespace",
        SYSTEM,
        "delete",
        "pods",
        "--selector",
        "app.kubernetes.io/name=skein-operator",
        "--grace-period=0",
        "--force",
    ]);
    load.more(4);
    succeed(&["--namespace", SYSTEM, "rollout", "status", "deployment/skein-operator", "--timeout=120s"]);
    // The new one works: it takes the next change on.
    namespace.succeed(&["scale", "modeldeployment", SAMPLE_NAME, "--replicas", "2"]);
    namespace.ready(SAMPLE_NAME, 2);
    namespace.succeed(&["scale", "modeldeployment", SAMPLE_NAME, "--replicas", "1"]);
    namespace.ready(SAMPLE_NAME, 1);
    namespace.gone(&format!("{WORKERS},skein.dev/replica=1"));
    load.more(4);
    load.stop().assert_whole("a killed operator");
    assert_eq!(everything(), before);
}

/// While the API server is away for a minute, a worker is killed and comes back; afterwards everything is as it was.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_minute_without_the_api_server_goes_unnoticed() {
    /// Longer than leases, watches and the operator's retries.
    const AWAY: Duration = Duration::from_secs(60);
    let namespace = sample("headless");
    let before = namespace.running(WORKERS);
    let load = Load::start(&namespace.http(SAMPLE_NAME), 2, requests());
    load.more(4);
    component("stop", "kube-apiserver");
    let began = Instant::now();
    process(&before[0]).signal("KILL");
    while began.elapsed() < AWAY {
        load.more(1);
    }
    component("start", "kube-apiserver");
    program::until("the API server", || kubectl(&["get", "--raw", "/readyz"]).status.success().then_some(()));
    namespace.watch(&["pod", name(&before[0])], "the news of the restart", |pod| {
        (identity(pod).1 == 1 && pod["status"]["containerStatuses"][0]["ready"] == true).then_some(())
    });
    namespace.ready(SAMPLE_NAME, 1);
    // What the operator does next still works.
    namespace.succeed(&["scale", "modeldeployment", SAMPLE_NAME, "--replicas", "2"]);
    namespace.ready(SAMPLE_NAME, 2);
    load.more(4);
    load.stop().assert_whole("a minute without the API server");
    let uids = |pods: &[Value]| pods.iter().map(|pod| identity(pod).0).collect::<Vec<_>>();
    assert_eq!(uids(&namespace.pods(&format!("{WORKERS},skein.dev/replica=0"))), uids(&before));
}

/// A worker's pod comes back at another address while the operator is away: it says itself where it is.
#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn a_worker_at_a_new_address_is_found_without_the_operator() {
    let namespace = sample("moved");
    let operator = |replicas: &str| succeed(&["--namespace", SYSTEM, "scale", "deployment/skein-operator", "--replicas", replicas]);
    let load = Load::start(&namespace.http(SAMPLE_NAME), 2, requests());
    load.more(4);
    let before = namespace.running(WORKERS);
    operator("0");
    program::until("the operator's end", || {
        let pods = ["--namespace", SYSTEM, "get", "pods", "--selector", "app.kubernetes.io/name=skein-operator", "--output=name"];
        succeed(&pods).trim().is_empty().then_some(())
    });
    namespace.succeed(&["delete", "pod", name(&before[0]), "--grace-period=0", "--force"]);
    let after = namespace.watch(&["pods", "--selector", WORKERS], "a pod in its place", |pod| {
        let anew = name(pod) == name(&before[0]) && pod["metadata"]["uid"] != before[0]["metadata"]["uid"];
        (anew && pod["status"]["containerStatuses"][0]["ready"] == true).then(|| pod.clone())
    });
    assert_ne!(after["status"]["podIP"], before[0]["status"]["podIP"], "the pod came back at the same address: nothing is shown");
    load.more(8);
    operator("1");
    succeed(&["--namespace", SYSTEM, "rollout", "status", "deployment/skein-operator", "--timeout=120s"]);
    namespace.ready(SAMPLE_NAME, 1);
    load.more(4);
    load.stop().assert_whole("a worker at a new address");
}
