//! Many deployments, whose pods are played: how long they take, what the operator needs for them, and that nothing is written once they have settled.
//!
//! No token comes out of a pod that is played. So a deployment counts as reconciled when all its objects are applied, its pods run, and its status
//! says of the present spec that its replicas load their weights: that is all an operator can do for it.

use std::{
    collections::BTreeMap,
    env, fs,
    io::Write,
    thread,
    time::{Duration, Instant},
};

use e2e::{client, wait};
use serde_json::{Value, json};

use crate::{
    kubernetes::{LIMIT, Namespace, SYSTEM, Watch, component, condition, kubectl, succeed},
    models::{LLAMA, llama},
};

/// Deployments, where the environment does not say how many.
const MANY: usize = 50;
/// More than this are measured, on a cluster that goes away afterwards.
const FEW: usize = 200;
/// Processes that make them beside each other: each keeps a pace of its own.
const MAKERS: usize = 8;
/// Nodes that are played, and the label by which workers find them.
const NODES: usize = 3;
const PLAYED: &str = "skein.dev/played";
/// Between two looks at the operator's metrics.
const LOOK: Duration = Duration::from_millis(250);
/// For so long nothing may be written, of few and of many.
const STEADY: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(60));

/// How many deployments, and how long they may take, and are watched.
fn size() -> (usize, Duration, Duration) {
    let many = env::var("SKEIN_TEST_DEPLOYMENTS").map_or(MANY, |n| n.parse().expect("SKEIN_TEST_DEPLOYMENTS is a number"));
    if many > FEW { (many, 6 * LIMIT, STEADY.1) } else { (many, LIMIT, STEADY.0) }
}

/// Nodes that are played; they go away with the value.
struct Nodes;

impl Nodes {
    fn make() -> Self {
        let node = |number: usize| {
            json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": format!("played-{number}"), "labels": {PLAYED: "true"}, "annotations": {"kwok.x-k8s.io/node": "fake"}},
                "spec": {"taints": [{"key": PLAYED, "effect": "NoSchedule"}]},
            })
        };
        let nodes: Vec<Value> = (0..NODES).map(node).collect();
        apply(&["apply", "--server-side", "--filename"], &nodes);
        let nodes = Self;
        let selector = format!("--selector={PLAYED}");
        succeed(&["wait", "nodes", &selector, "--for=condition=Ready", "--timeout=60s"]);
        nodes
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        let gone = kubectl(&["delete", "nodes", &format!("--selector={PLAYED}"), "--ignore-not-found"]);
        assert!(thread::panicking() || gone.status.success(), "{}", gone.stderr);
    }
}

/// Hands objects to kubectl.
fn apply(command: &[&str], items: &[Value]) {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    write!(file, "{}", json!({"apiVersion": "v1", "kind": "List", "items": items})).expect("a writable file");
    succeed(&[command, &[&*file.path().to_string_lossy()]].concat());
}

/// The operator's pod.
fn operator() -> Value {
    let pods = succeed(&["--namespace", SYSTEM, "get", "pods", "--selector=app.kubernetes.io/name=skein-operator", "--output=json"]);
    let pods: Value = serde_json::from_str(&pods).expect("JSON");
    let all = pods["items"].as_array().expect("a list");
    all.iter().find(|pod| pod["metadata"]["deletionTimestamp"].is_null()).expect("an operator").clone()
}

/// The operator's metrics, by name and labels; none where it does not answer.
fn metrics(pod: &Value) -> Option<BTreeMap<String, f64>> {
    let url = format!("http://{}:8080/metrics", pod["status"]["podIP"].as_str()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let text = runtime.block_on(client::get(&url)).ok()?;
    let sample = |line: &str| line.rsplit_once(' ').and_then(|(name, value)| Some((name.to_owned(), value.parse().ok()?)));
    Some(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
}

/// The value of a label in a metric's name.
fn label<'a>(name: &'a str, label: &str) -> &'a str {
    let after = name.split_once(&format!("{label}=\"")).map(|(_, after)| after);
    after.and_then(|after| after.split('"').next()).unwrap_or_default()
}

/// Deployments of which it is said that they are not ready for one of `reasons`.
fn counted(metrics: &BTreeMap<String, f64>, reasons: impl Fn(&str) -> bool) -> usize {
    let all = metrics.iter().filter(|(name, _)| name.starts_with("skein_operator_deployments{") && reasons(label(name, "reason")));
    all.map(|(_, count)| *count as usize).sum()
}

/// Requests to the API server by verb and resource.
fn requests(metrics: &BTreeMap<String, f64>) -> BTreeMap<(String, String), f64> {
    let all = metrics.iter().filter(|(name, _)| name.starts_with("skein_operator_api_requests_total{"));
    all.map(|(name, count)| ((label(name, "verb").to_owned(), label(name, "resource").to_owned()), *count)).collect()
}

/// Those that write; the operator's lease is renewed every few seconds, whatever there is to do.
fn writes(metrics: &BTreeMap<String, f64>) -> BTreeMap<(String, String), f64> {
    let mut all = requests(metrics);
    all.retain(|(verb, resource), _| !matches!(verb.as_str(), "get" | "list" | "watch") && resource != "leases");
    all
}

/// What there is more of.
fn more(before: &BTreeMap<(String, String), f64>, after: &BTreeMap<(String, String), f64>) -> BTreeMap<(String, String), f64> {
    let grown = after.iter().map(|(what, count)| (what.clone(), count - before.get(what).copied().unwrap_or(0.0)));
    grown.filter(|(_, count)| *count > 0.0).collect()
}

/// What a process has used.
struct Use {
    /// Memory now and at most, in MiB.
    memory: (u64, u64),
    /// Processor time.
    time: Duration,
}

/// What the operator's process has used.
fn used(pod: &Value) -> Use {
    let uid = pod["metadata"]["uid"].as_str().expect("a uid");
    let pids = fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let read = |pid: u32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let mut own = pids.filter(|pid| read(*pid, "cgroup").contains(uid) && read(*pid, "cmdline").starts_with("/skein-operator"));
    let pid = own.next().expect("the operator's process");
    let status = read(pid, "status");
    let memory = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("its memory");
        line.trim().split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") / 1024
    };
    let stat = read(pid, "stat");
    // Fields 14 and 15 of proc(5), in hundredths of a second; the second one, the program's name, ends with a parenthesis.
    let fields: Vec<u64> = stat.rsplit_once(") ").expect("a name").1.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
    Use { memory: (memory("VmRSS:"), memory("VmHWM:")), time: Duration::from_millis(10 * (fields[11] + fields[12])) }
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

/// Fields of a status that are others than before; conditions one by one.
fn differences(name: &str, before: &Value, after: &Value) -> Vec<String> {
    let pairs = |pointer: &str| {
        let of = |status: &Value| status.pointer(pointer).and_then(Value::as_array).cloned().unwrap_or_default();
        of(before).into_iter().zip(of(after)).collect::<Vec<_>>()
    };
    let fields = before.as_object().into_iter().flatten().filter(|(key, _)| *key != "conditions");
    let fields = fields.map(|(key, value)| (value.clone(), after[key].clone()));
    let others = pairs("/conditions").into_iter().chain(fields).filter(|(before, after)| before != after);
    others.map(|(before, after)| format!("{name}: {before} became {after}")).collect()
}

/// Makes the deployments, as fast as the API server takes them.
fn make(namespace: &Namespace, many: usize) {
    let deployment = |number: usize| {
        json!({
            "apiVersion": "skein.dev/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"name": format!("m{number}")},
            "spec": {
                "model": {"uri": LLAMA},
                "workers": {"nodeSelector": {PLAYED: "true"}, "tolerations": [{"key": PLAYED, "operator": "Exists", "effect": "NoSchedule"}]},
            },
        })
    };
    let all: Vec<Value> = (0..many).map(deployment).collect();
    let name = namespace.name.as_str();
    thread::scope(|scope| {
        for part in all.chunks(many.div_ceil(MAKERS)) {
            scope.spawn(move || apply(&["--namespace", name, "create", "--validate=false", "--filename"], part));
        }
    });
}

#[test]
#[ignore = "needs a cluster: cargo xtask test"]
fn many_deployments_settle_and_then_nothing_is_written() {
    let (many, limit, steady) = size();
    // They go after the namespace: nobody else ends the pods of a node that is gone.
    let nodes;
    let namespace = Namespace::alone("many");
    component("start", "kwok");
    nodes = Nodes::make();
    llama();
    let first = operator();
    let before = metrics(&first).expect("the operator's metrics");
    let (idle, others) = (used(&first), counted(&before, |_| true));
    let began = Instant::now();
    let look = |what: &str, enough: &dyn Fn(&BTreeMap<String, f64>) -> bool| {
        wait::until(limit, what, || {
            thread::park_timeout(LOOK);
            metrics(&first).filter(|m| enough(m)).map(|_| began.elapsed().as_secs_f64())
        })
    };
    let (made, applied) = thread::scope(|scope| {
        let making = scope.spawn(|| {
            make(&namespace, many);
            began.elapsed().as_secs_f64()
        });
        let unsaid = |reason: &str| matches!(reason, "" | "Starting" | "Resolving");
        let applied = look("every deployment's objects to be applied", &|m| counted(m, |r| !unsaid(r)) >= others + many);
        (making.join().expect("they are made"), applied)
    });
    look("every deployment's pods to have nodes", &|m| counted(m, |r| r == "Downloading") >= many);
    // Whoever plays the pods, and the routers, may come later than that.
    let settled = wait::until(limit, "every deployment's pods to run", || {
        thread::park_timeout(4 * LOOK);
        let list = namespace.get(&["modeldeployments"]);
        let all = list["items"].as_array().expect("a list");
        let runs = |status: &Value| status["replicaStates"][0]["readyWorkers"] == 1 && condition(status, "RouterReady")["status"] == "True";
        all.iter().all(|object| runs(&object["status"])).then(|| began.elapsed().as_secs_f64())
    });
    // Until the last events are told, there is something to write.
    let mut last = (Instant::now(), writes(&metrics(&first).expect("the operator's metrics")));
    wait::until(limit, "the operator to have nothing to write", || {
        thread::park_timeout(LOOK);
        let now = writes(&metrics(&first)?);
        if now != last.1 {
            last = (Instant::now(), now);
        }
        (last.0.elapsed() > 4 * LOOK.max(Duration::from_secs(1))).then_some(())
    });
    let after = metrics(&first).expect("the operator's metrics");
    let busy = used(&first);
    println!(
        "{many} deployments: made in {made:.1} s, objects applied after {applied:.1} s, pods run after {settled:.1} s; operator: {:.1} s of processor \
         time, {} MiB, at most {} MiB",
        (busy.time - idle.time).as_secs_f64(),
        busy.memory.0,
        busy.memory.1
    );
    let each = more(&requests(&before), &requests(&after));
    for ((verb, resource), count) in &each {
        println!("requests for each deployment: {verb} {resource}: {:.2}", count / many as f64);
    }
    println!("requests for each deployment: {:.1}", each.values().sum::<f64>() / many as f64);

    // All of it is there, and status is of the present spec.
    let list = namespace.get(&["modeldeployments"]);
    let all = list["items"].as_array().expect("a list");
    assert_eq!(all.len(), many);
    for object in all {
        let status = &object["status"];
        assert_eq!(status["observedGeneration"], object["metadata"]["generation"], "{object:#}");
        assert_eq!(condition(status, "Scheduled")["status"], "True", "{status:#}");
        assert_eq!(condition(status, "Ready")["status"], "False", "no token came out of anything: {status:#}");
        assert_eq!(status["replicaStates"][0]["readyWorkers"], 1, "{status:#}");
    }

    // The steady state. What is written, in vain or not, is told by a watch.
    let watched = writes(&metrics(&first).expect("the operator's metrics"));
    let began = Instant::now();
    let watch = Watch::begin(&namespace.name, &["modeldeployments"]);
    let (mut statuses, mut others) = (BTreeMap::new(), Vec::new());
    while let Some(left) = steady.checked_sub(began.elapsed()) {
        let Ok(event) = watch.told.recv_timeout(left) else { break };
        let (name, status) = (event["object"]["metadata"]["name"].to_string(), event["object"]["status"].clone());
        if let Some(before) = statuses.insert(name.clone(), status.clone()) {
            others.extend(differences(&name, &before, &status));
        }
    }
    wait::until(limit, "the time to be over", || (began.elapsed() >= steady).then_some(()));
    drop(watch);
    let still = metrics(&first).expect("the operator's metrics");
    let written = more(&watched, &writes(&still));
    let resting = used(&first);
    println!(
        "{steady:?} of steady state: {:.0} writes, {:.2} s of processor time, {} MiB",
        written.values().sum::<f64>().abs(),
        (resting.time - busy.time).as_secs_f64(),
        resting.memory.0
    );
    assert!(written.is_empty(), "{written:?}\n{}", others.join("\n"));

    // Another operator looks at all of them, and changes none of their objects.
    let stands = changes(&namespace);
    assert!(stands.len() >= 3 * many, "{}", stands.len());
    let began = Instant::now();
    succeed(&["--namespace", SYSTEM, "delete", "pod", first["metadata"]["name"].as_str().expect("a name")]);
    succeed(&["--namespace", SYSTEM, "rollout", "status", "deployment/skein-operator", "--timeout=120s"]);
    let second = operator();
    let reconciled = |m: &BTreeMap<String, f64>| {
        let all = m.iter().filter(|(name, _)| name.starts_with("skein_operator_reconciles_total{") && label(name, "result") == "Applied");
        all.map(|(_, count)| *count).sum::<f64>()
    };
    wait::until(limit, "a new operator to have looked at all", || {
        thread::park_timeout(LOOK);
        metrics(&second).filter(|m| reconciled(m) >= many as f64)
    });
    let now = changes(&namespace);
    let changed: Vec<_> = stands.iter().filter(|(name, times)| now.get(*name) != Some(times)).collect();
    assert!(changed.is_empty() && now.len() == stands.len(), "{changed:?}");
    let use_ = used(&second);
    println!(
        "a new operator had looked at all after {:.1} s: {:.1} s of processor time, {} MiB, at most {} MiB",
        began.elapsed().as_secs_f64(),
        use_.time.as_secs_f64(),
        use_.memory.0,
        use_.memory.1
    );
    if many > FEW {
        // They take minutes to go, and the cluster goes with them.
        std::mem::forget((namespace, nodes));
    }
}
