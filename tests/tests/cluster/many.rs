//! Many deployments: how long they take to settle, what the operator needs for them, and that nothing is written once they have.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::{Duration, Instant},
};

use e2e::{client, program};
use serde_json::{Value, json};

use crate::{
    kubernetes::{Namespace, SYSTEM, condition, succeed},
    models::{LLAMA, llama},
};

/// Deployments; they want no replicas, as one node has room for few pods.
const MANY: usize = 100;

/// The operator's pod.
fn operator() -> Value {
    let pods = succeed(&["--namespace", SYSTEM, "get", "pods", "--selector=app.kubernetes.io/name=skein-operator", "--output=json"]);
    let pods: Value = serde_json::from_str(&pods).expect("JSON");
    let all = pods["items"].as_array().expect("a list");
    all.iter().find(|pod| pod["metadata"]["deletionTimestamp"].is_null()).expect("an operator").clone()
}

/// A number of the operator's metrics: the sum over its labels.
fn metric(pod: &Value, name: &str) -> Option<f64> {
    let url = format!("http://{}:8080/metrics", pod["status"]["podIP"].as_str()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let text = runtime.block_on(client::get(&url)).ok()?;
    let named = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    Some(named.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

/// Resident memory of the operator's process, in MiB.
fn memory(pod: &Value) -> u64 {
    let uid = pod["metadata"]["uid"].as_str().expect("a uid");
    let pids = fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let read = |pid: u32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let own = pids.filter(|pid| read(*pid, "cgroup").contains(uid) && read(*pid, "cmdline").starts_with("/skein-operator"));
    let status = own.map(|pid| read(pid, "status")).next().expect("the operator's process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") / 1024
}

/// When the operator changed each object that it made in the namespace; others change their status.
fn changes(namespace: &Namespace) -> BTreeMap<String, Vec<String>> {
    let kinds =
        "configmaps,secrets,services,serviceaccounts,statefulsets,deployments,networkpolicies,poddisruptionbudgets,controllerrevisions";
    let list = namespace.get(&["--show-managed-fields", kinds]);
    let text = |object: &Value, pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let own = |object: &Value| {
        let writers = object["metadata"]["managedFields"].as_array().into_iter().flatten();
        let ours = writers.filter(|writer| text(writer, "/manager").starts_with("skein-operator"));
        let times: Vec<String> = ours.map(|writer| text(writer, "/time")).collect();
        let name = format!("{}/{}", text(object, "/kind"), text(object, "/metadata/name"));
        (!times.is_empty()).then_some((name, times))
    };
    list["items"].as_array().expect("a list").iter().filter_map(own).collect()
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn many_deployments_settle_and_then_nothing_is_written() {
    let namespace = Namespace::alone("many");
    llama();
    let first = operator();
    let deployment = |number: usize| {
        let spec = json!({"model": {"uri": LLAMA}, "replicas": 0, "parallelism": {"pipeline": 2, "tensor": 2}});
        json!({"apiVersion": "skein.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": format!("m{number}")}, "spec": spec})
    };
    let items: Vec<Value> = (0..MANY).map(deployment).collect();
    let writes = metric(&first, "skein_operator_status_writes_total").expect("the operator's metrics");
    let began = Instant::now();
    namespace.apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string());
    let applied = began.elapsed();
    let mut settled = BTreeSet::new();
    namespace.watch(&["modeldeployments"], "every deployment to be planned and at zero", |object| {
        if condition(&object["status"], "Available")["reason"] == "ScaledToZero" {
            settled.insert(object["metadata"]["name"].to_string());
        }
        (settled.len() == MANY).then_some(())
    });
    let took = began.elapsed();
    let writes = metric(&first, "skein_operator_status_writes_total").expect("the operator's metrics") - writes;
    println!(
        "{MANY} deployments: applied in {:.1} s, settled after {:.1} s, {:.1} status writes each, operator {} MiB",
        applied.as_secs_f64(),
        took.as_secs_f64(),
        writes / MANY as f64,
        memory(&first)
    );
    assert!(took < Duration::from_secs(240), "{took:?}");

    // Another operator looks at all of them, and changes none of their objects.
    let settled = changes(&namespace);
    assert!(settled.len() >= 3 * MANY, "{}", settled.len());
    succeed(&["--namespace", SYSTEM, "delete", "pod", first["metadata"]["name"].as_str().expect("a name")]);
    succeed(&["--namespace", SYSTEM, "rollout", "status", "deployment/skein-operator", "--timeout=120s"]);
    let second = operator();
    program::until("a new operator to have looked at all", || {
        metric(&second, "skein_operator_reconciles_total").filter(|n| *n >= MANY as f64)
    });
    let now = changes(&namespace);
    let changed: Vec<_> = settled.iter().filter(|(name, times)| now.get(*name) != Some(times)).collect();
    assert!(changed.is_empty() && now.len() == settled.len(), "{changed:?}");
    println!("a new operator over {MANY} deployments: {} MiB", memory(&second));
}
