//! `skein status`: the deployments of a namespace as trees of replicas, stages and ranks.

use std::fmt::Write as _;

use plan::fleet::FleetDraft;
use serde_json::Value;

use crate::{
    args::StatusArgs,
    exit::{Outcome, bad_input},
    kubectl::Kubectl,
    output,
};

/// Labels by which a pod says which worker it is; crate `operator` sets them.
const DEPLOYMENT: &str = "skein.dev/deployment";
const STAGE: &str = "skein.dev/stage";
const RANK: &str = "apps.kubernetes.io/pod-index";

/// Runs the command.
pub(crate) async fn status(args: StatusArgs) -> Outcome {
    let kubectl = Kubectl::new(&args.cluster);
    let (deployments, pods) = tokio::try_join!(
        kubectl.get(&["modeldeployments.skein.dev"]),
        kubectl.get(&["pods", "--selector=app.kubernetes.io/part-of=skein"])
    )?;
    let deployments: Vec<&Value> =
        list(&deployments).filter(|d| args.name.as_ref().is_none_or(|name| text(d, "/metadata/name") == name)).collect();
    if let (Some(name), true) = (&args.name, deployments.is_empty()) {
        return Err(bad_input!(
            "there is no ModelDeployment {name} in this namespace; `kubectl get modeldeployments --all-namespaces` lists all"
        ));
    }
    let pods: Vec<&Value> = list(&pods).collect();
    if deployments.is_empty() {
        return output::line("there is no ModelDeployment in this namespace; `kubectl apply --filename model.yaml` makes one");
    }
    let mut shown = String::new();
    for deployment in deployments {
        tree(&mut shown, deployment, &pods);
    }
    routers(&mut shown, &pods);
    output::write_all(&shown)
}

fn list(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

fn label<'a>(pod: &'a Value, name: &str) -> &'a str {
    pod["metadata"]["labels"][name].as_str().unwrap_or_default()
}

/// Adds lines below each other, each with the branch that leads to it.
fn branches<'a, T: 'a>(out: &mut String, indent: &str, children: &'a [T], mut show: impl FnMut(&mut String, &str, &'a T)) {
    for (at, child) in children.iter().enumerate() {
        let last = at + 1 == children.len();
        out.push_str(indent);
        out.push_str(if last { "└─ " } else { "├─ " });
        show(out, &format!("{indent}{}", if last { "   " } else { "│  " }), child);
    }
}

/// Ends a line.
macro_rules! line {
    ($out:expr, $($arg:tt)*) => {
        // Writing to a String cannot fail.
        let _ = writeln!($out, $($arg)*);
    };
}

/// Whether a condition is worth a line: `Degraded` is bad news where it is true, the others where they are not.
fn is_news(condition: &Value) -> bool {
    let good = if condition["type"] == "Degraded" { "False" } else { "True" };
    condition["status"] != good && condition["reason"] != "Disabled"
}

/// A deployment, its conditions that are bad news, its adapters, and its replicas down to the ranks.
fn tree(out: &mut String, deployment: &Value, pods: &[&Value]) {
    let (name, status) = (text(deployment, "/metadata/name"), &deployment["status"]);
    let conditions = || status["conditions"].as_array().into_iter().flatten();
    let ready = conditions().find(|c| c["type"] == "Ready");
    let state = match ready {
        Some(ready) if ready["status"] == "True" => "Ready".to_owned(),
        Some(ready) => format!("not Ready: {}", text(ready, "/reason")),
        None => "not looked at yet by an operator".to_owned(),
    };
    let (up, wanted) = (number(status, "/readyReplicas"), number(status, "/desiredReplicas"));
    line!(out, "{name}  {state}  {up} of {wanted} replicas  {}", text(deployment, "/spec/model/uri"));
    let stale = status["observedGeneration"] != deployment["metadata"]["generation"];
    if stale && ready.is_some() {
        line!(out, "│  the spec is newer than this status");
    }
    for condition in conditions().filter(|c| c["type"] != "Ready" && is_news(c)) {
        line!(
            out,
            "│  {} is {}: {}: {}",
            text(condition, "/type"),
            text(condition, "/status"),
            text(condition, "/reason"),
            text(condition, "/message")
        );
    }
    let (fetched, all) = (number(status, "/cache/bytesDownloaded"), number(status, "/cache/bytesTotal"));
    if fetched < all {
        let left = status.pointer("/cache/etaSeconds").and_then(Value::as_u64).map(|s| format!(", about {s} s left")).unwrap_or_default();
        let percent = u128::from(fetched) * 100 / u128::from(all);
        line!(out, "│  weights: {} of {} fetched ({percent} %){left}", output::bytes(fetched), output::bytes(all));
    }
    for adapter in status["adapters"].as_array().into_iter().flatten() {
        line!(out, "│  adapter {}  {}: {}", text(adapter, "/name"), text(adapter, "/state"), text(adapter, "/message"));
    }
    let stages = || status.pointer("/plan/stages").and_then(Value::as_array).into_iter().flatten();
    let replicas = status["replicaStates"].as_array().map_or(&[][..], Vec::as_slice);
    branches(out, "", replicas, |out, indent, replica| {
        let replica_name = text(replica, "/name");
        let workers = (number(replica, "/readyWorkers"), number(replica, "/workers"));
        line!(
            out,
            "{replica_name}  {}  {} of {} workers run  revision {}",
            text(replica, "/phase"),
            workers.0,
            workers.1,
            text(replica, "/revision")
        );
        if let Some(failure) = replica["lastFailure"].as_str() {
            line!(out, "{indent}last failure: {failure}");
        }
        let of = |prefix: String| -> Vec<&Value> {
            let of = |pod: &&Value| label(pod, DEPLOYMENT) == name && text(pod, "/metadata/name").starts_with(&prefix);
            pods.iter().copied().filter(of).collect()
        };
        let of_replica = of(format!("{replica_name}-s"));
        let mut parts: Vec<Part> = of_replica.iter().filter_map(|pod| label(pod, STAGE).parse().ok().map(Part::Stage)).collect();
        parts.sort_unstable();
        parts.dedup();
        parts.extend(replica.get("draft").map(|_| Part::Draft));
        branches(out, indent, &parts, |out, indent, part| {
            let Part::Stage(stage) = part else {
                line!(out, "draft model  {}: {}", text(replica, "/draft/state"), text(replica, "/draft/message"));
                return branches(out, indent, &of(format!("{}-s", FleetDraft::name(replica_name))), |out, indent, pod| {
                    worker(out, indent, "worker", pod)
                });
            };
            // The plan of the present revision; an older replica may have had another.
            let current = replica["revision"] == status["currentRevision"];
            match stages().find(|planned| current && number(planned, "/index") == *stage) {
                Some(planned) => {
                    line!(out, "stage {stage}  layers {} to {}", number(planned, "/firstLayer"), number(planned, "/lastLayer"));
                }
                None => {
                    line!(out, "stage {stage}");
                }
            }
            let mut ranks: Vec<&Value> = of_replica.iter().copied().filter(|pod| label(pod, STAGE).parse() == Ok(*stage)).collect();
            ranks.sort_by_key(|pod| label(pod, RANK).parse::<u64>().unwrap_or(u64::MAX));
            branches(out, indent, &ranks, |out, indent, pod| worker(out, indent, &format!("rank {}", label(pod, RANK)), pod));
        });
    });
}

/// What a replica consists of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    /// By its number.
    Stage(u64),
    /// The worker of its draft model.
    Draft,
}

/// A pod, and how it ended last.
fn worker(out: &mut String, indent: &str, called: &str, pod: &Value) {
    line!(out, "{called}  {}", pod_line(pod));
    if let Some(failure) = last_end(pod) {
        line!(out, "{indent}{failure}");
    }
}

/// The pool of the namespace.
fn routers(out: &mut String, pods: &[&Value]) {
    let routers: Vec<&Value> = pods.iter().copied().filter(|pod| label(pod, "app.kubernetes.io/component") == "router").collect();
    let ready = routers.iter().filter(|pod| is_ready(pod)).count();
    line!(out, "routers  {ready} of {} ready", routers.len());
    branches(out, "", &routers, |out, indent, pod| worker(out, indent, text(pod, "/metadata/name"), pod));
}

fn is_ready(pod: &Value) -> bool {
    pod.pointer("/status/containerStatuses/0/ready") == Some(&Value::Bool(true))
}

/// State, node, address and restarts of a pod.
fn pod_line(pod: &Value) -> String {
    let waiting = text(pod, "/status/containerStatuses/0/state/waiting/reason");
    let state = match (pod.pointer("/metadata/deletionTimestamp"), waiting) {
        (Some(_), _) => "Terminating",
        (None, "") if is_ready(pod) => "Ready",
        (None, "") => text(pod, "/status/phase"),
        (None, waiting) => waiting,
    };
    let mut line = state.to_owned();
    let unscheduled = pod.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    if let Some(refused) = unscheduled.into_iter().find(|c| c["type"] == "PodScheduled" && c["status"] == "False") {
        line.push_str(&format!("  {}", text(refused, "/message")));
    }
    for pointer in ["/spec/nodeName", "/status/podIP"] {
        if !text(pod, pointer).is_empty() {
            line.push_str(&format!("  {}", text(pod, pointer)));
        }
    }
    match number(pod, "/status/containerStatuses/0/restartCount") {
        0 => {}
        1 => line.push_str("  1 restart"),
        n => line.push_str(&format!("  {n} restarts")),
    }
    line
}

/// How the container ended last, if it ever did.
fn last_end(pod: &Value) -> Option<String> {
    let ended = pod.pointer("/status/containerStatuses/0/lastState/terminated")?;
    let said = text(ended, "/message").trim();
    let said = if said.is_empty() { String::new() } else { format!(": {said}") };
    Some(format!("ended {} with exit code {} ({}){said}", text(ended, "/finishedAt"), number(ended, "/exitCode"), text(ended, "/reason")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, stage: &str, rank: &str, status: Value) -> Value {
        let labels = json!({DEPLOYMENT: "m", STAGE: stage, RANK: rank, "app.kubernetes.io/component": "worker"});
        json!({"metadata": {"name": name, "labels": labels}, "spec": {"nodeName": "n0"}, "status": status})
    }

    fn deployment() -> Value {
        json!({
            "metadata": {"name": "m", "generation": 2},
            "spec": {"model": {"uri": "hf://a/b"}},
            "status": {
                "observedGeneration": 2, "readyReplicas": 1, "desiredReplicas": 2, "currentRevision": "cafe",
                "cache": {"bytesDownloaded": 10 << 20, "bytesTotal": 40 << 20, "etaSeconds": 9},
                "adapters": [
                    {"name": "law", "state": "Ready", "message": "1 of 1 replicas that answer have it"},
                    {"name": "songs", "state": "Failed", "message": "m-1-r0: no tensor"},
                ],
                "plan": {"stages": [{"index": 0, "firstLayer": 0, "lastLayer": 8}]},
                "conditions": [
                    {"type": "Scheduled", "status": "True", "reason": "AllReplicasScheduled", "message": "x"},
                    {"type": "ReplicasReady", "status": "False", "reason": "CrashLooping", "message": "1 of 2 replicas answer"},
                    {"type": "Degraded", "status": "False", "reason": "AsExpected", "message": "x"},
                    {"type": "ScalingActive", "status": "False", "reason": "Disabled", "message": "x"},
                    {"type": "Ready", "status": "False", "reason": "CrashLooping", "message": "1 of 2 replicas answer"},
                ],
                "replicaStates": [
                    {"name": "m-1-r0", "revision": "cafe", "phase": "Ready", "readyWorkers": 2, "workers": 2,
                     "draft": {"state": "Ready", "message": "it is asked for guesses"}},
                    {"name": "m-1-r1", "revision": "beef", "phase": "Starting", "readyWorkers": 1, "workers": 1, "lastFailure": "refused"},
                ],
            },
        })
    }

    #[test]
    fn a_tree_has_everything_that_stands_and_why_something_does_not() {
        let running = json!({"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"ready": true, "restartCount": 0}]});
        let crashed = json!({"phase": "Running", "containerStatuses": [{
            "ready": false, "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 2, "reason": "Error", "finishedAt": "12:00", "message": "wrong digest\n"}},
        }]});
        let pods = [
            pod("m-1-r0-s0-1", "0", "1", running.clone()),
            pod("m-1-r0-draft-s0-0", "draft", "0", running.clone()),
            pod("m-1-r0-s0-0", "0", "0", running),
            pod("m-1-r1-s0-0", "0", "0", crashed),
        ];
        let mut shown = String::new();
        tree(&mut shown, &deployment(), &pods.iter().collect::<Vec<_>>());
        let expected = "\
m  not Ready: CrashLooping  1 of 2 replicas  hf://a/b
│  ReplicasReady is False: CrashLooping: 1 of 2 replicas answer
│  weights: 10.0 MiB of 40.0 MiB fetched (25 %), about 9 s left
│  adapter law  Ready: 1 of 1 replicas that answer have it
│  adapter songs  Failed: m-1-r0: no tensor
├─ m-1-r0  Ready  2 of 2 workers run  revision cafe
│  ├─ stage 0  layers 0 to 8
│  │  ├─ rank 0  Ready  n0  10.0.0.1
│  │  └─ rank 1  Ready  n0  10.0.0.1
│  └─ draft model  Ready: it is asked for guesses
│     └─ worker  Ready  n0  10.0.0.1
└─ m-1-r1  Starting  1 of 1 workers run  revision beef
   last failure: refused
   └─ stage 0
      └─ rank 0  CrashLoopBackOff  n0  3 restarts
         ended 12:00 with exit code 2 (Error): wrong digest
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_is_wrong_beside_replicas_that_answer_is_shown() {
        let mut degraded = deployment();
        degraded["status"]["conditions"] = json!([
            {"type": "Degraded", "status": "True", "reason": "DraftFailed", "message": "m-1-r0 answers without its draft model: it is gone"},
        ]);
        let mut shown = String::new();
        tree(&mut shown, &degraded, &[]);
        assert!(shown.contains("│  Degraded is True: DraftFailed: m-1-r0 answers without its draft model: it is gone\n"), "{shown}");
    }

    #[test]
    fn a_deployment_that_no_operator_saw_says_so() {
        let mut shown = String::new();
        tree(&mut shown, &json!({"metadata": {"name": "m", "generation": 1}, "spec": {"model": {"uri": "hf://a/b"}}}), &[]);
        assert_eq!(shown, "m  not looked at yet by an operator  0 of 0 replicas  hf://a/b\n");
    }
}
