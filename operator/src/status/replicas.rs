//! What is said of replicas: each for itself, and all of them as conditions.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::{Value, View, drafts};
use crate::{
    names, observe,
    resource::{CacheStatus, ModelDeployment, ReplicaPhase, ReplicaStatus},
    revision::replica_name,
    rollout::{Placement, Progress, Slot},
};

/// Restarts of a container after which it is said to crash again and again.
const RESTARTS: i32 = 3;

/// A replica that is wanted and does not answer, with its workers' pods where those exist.
pub(super) struct Missing<'a> {
    state: &'a ReplicaStatus,
    pods: Vec<(String, Option<&'a Pod>)>,
}

/// Every replica that exists.
pub(super) fn states(object: &ModelDeployment, view: &View<'_>) -> Vec<ReplicaStatus> {
    view.plan.exist.iter().map(|slot| state(object, view, slot)).collect()
}

fn state(object: &ModelDeployment, view: &View<'_>, slot: &Slot) -> ReplicaStatus {
    let name = replica_name(object, &slot.id);
    let of = |pod: &&Pod| observe::is_worker(pod, &slot.id) && is_running(pod);
    let ready_workers = view.standing.pods.iter().filter(of).count() as u32;
    let workers = view.revisions.get(slot.id.revision.as_str()).map_or(0, |r| r.record.workers() as u32);
    let said = view.standing.load.replicas.get(&name);
    let last = object.status.as_ref().and_then(|s| s.replica_states.iter().find(|r| r.name == name));
    let before = last.map(|r| r.phase);
    let phase = match said {
        _ if slot.draining.is_some() => ReplicaPhase::Draining,
        Some(said) if said.ready => ReplicaPhase::Ready,
        // Where no router reports, nothing is known to be worse.
        _ if view.standing.load.routers > 0 && matches!(before, Some(ReplicaPhase::Ready | ReplicaPhase::Recovering)) => {
            ReplicaPhase::Recovering
        }
        _ if ready_workers == workers => ReplicaPhase::Starting,
        _ => ReplicaPhase::Pending,
    };
    let last_failure = said.filter(|s| !s.ready).and_then(|s| s.last_failure.clone());
    let draft = drafts::state(view, slot, &name, said, last.and_then(|r| r.draft.as_ref()));
    ReplicaStatus { name, revision: slot.id.revision.clone(), phase, ready_workers, workers, last_failure, draft }
}

/// Whether all containers of a pod are ready.
pub(super) fn is_running(pod: &Pod) -> bool {
    let status = pod.status.as_ref().filter(|_| pod.metadata.deletion_timestamp.is_none());
    status.and_then(|s| s.container_statuses.as_ref()).is_some_and(|c| !c.is_empty() && c.iter().all(|c| c.ready))
}

/// Replicas that are in the way of as many answering as are wanted; none where as many do.
pub(super) fn missing<'a>(object: &ModelDeployment, view: &View<'a>, replicas: &'a [ReplicaStatus]) -> Vec<Missing<'a>> {
    let ready = replicas.iter().filter(|r| r.phase == ReplicaPhase::Ready).count();
    if ready >= view.goal.replicas as usize {
        return Vec::new();
    }
    unready(object, view, replicas)
}

/// Replicas that are wanted and do not answer.
fn unready<'a>(object: &ModelDeployment, view: &View<'a>, replicas: &'a [ReplicaStatus]) -> Vec<Missing<'a>> {
    let slots = view.plan.exist.iter().zip(replicas).filter(|(_, r)| !matches!(r.phase, ReplicaPhase::Ready | ReplicaPhase::Draining));
    slots.map(|(slot, state)| Missing { state, pods: pods(object, view, slot) }).collect()
}

/// The pod of each worker of a replica, where it exists.
fn pods<'a>(object: &ModelDeployment, view: &View<'a>, slot: &Slot) -> Vec<(String, Option<&'a Pod>)> {
    let stages = view.revisions.get(slot.id.revision.as_str()).map_or(&[][..], |r| &r.record.stages);
    let replica = replica_name(object, &slot.id);
    let names = stages.iter().enumerate().flat_map(|(stage, of)| (0..of.ranks).map(move |rank| (stage, rank)));
    names
        .map(|(stage, rank)| {
            let name = names::pod(&replica, stage, rank);
            let pod = view.standing.pod(&name);
            (name, pod)
        })
        .collect()
}

/// Whether every worker has a node; which resource is missing where one has none.
pub(super) fn scheduled(view: &View<'_>, missing: &[Missing<'_>]) -> Value {
    let all = || missing.iter().flat_map(|m| &m.pods);
    if let Placement::Waiting { message, short } = observe::placement(all().filter_map(|(_, pod)| *pod)) {
        return (false, if short { "InsufficientCapacity" } else { "Unschedulable" }, message);
    }
    let short = view.plan.exist.iter().filter(|s| s.draining.is_none()).count() < view.goal.replicas as usize;
    if let Some((replica, message)) = view.shortage.as_ref().filter(|_| short) {
        let reason = if message.contains("Insufficient") { "InsufficientCapacity" } else { "Unschedulable" };
        return (false, reason, format!("{replica} was taken back, and is tried again when it has waited: {message}"));
    }
    let placed = |pod: &Option<&Pod>| pod.is_some_and(|p| p.spec.as_ref().is_some_and(|s| s.node_name.is_some()));
    match (all().filter(|(_, pod)| placed(pod)).count(), all().count()) {
        (n, of) if n < of => (false, "GangPending", format!("{n} of {of} workers have a node")),
        _ => (true, "AllReplicasScheduled", "the workers have nodes".to_owned()),
    }
}

/// What is brought from servers for all replicas that are to stay; what was known `before` where no router says anything of it now.
pub(super) fn cache(object: &ModelDeployment, view: &View<'_>, before: Option<CacheStatus>) -> Option<CacheStatus> {
    let slots = || view.plan.exist.iter().filter(|slot| slot.draining.is_none());
    let said = slots().filter_map(|slot| view.standing.load.replicas.get(&replica_name(object, &slot.id)));
    let said: Vec<_> = said.filter(|said| said.fetch > 0).collect();
    if said.is_empty() {
        return before.filter(|_| slots().next().is_some());
    }
    Some(CacheStatus {
        bytes_downloaded: said.iter().map(|s| s.fetched).sum(),
        bytes_total: said.iter().map(|s| s.fetch).sum(),
        eta_seconds: said.iter().filter_map(|s| s.fetch_seconds).max(),
    })
}

/// Whether the weights are there; why not, where a worker ended over them.
pub(super) fn weights_ready(missing: &[Missing<'_>], cache: Option<&CacheStatus>) -> Value {
    if missing.is_empty() {
        return (true, "Ready", "the workers have their weights".to_owned());
    }
    let containers = missing.iter().flat_map(containers);
    let failed = containers.filter_map(|(name, container)| {
        let reason = match reason(container)? {
            "DigestMismatch" => "VerificationFailed",
            "InsufficientDisk" => "InsufficientDisk",
            "NotFound" | "Unauthorized" | "SourceUnreachable" | "DownloadFailed" => "DownloadFailed",
            _ => return None,
        };
        Some((false, reason, format!("{name} {}", ended(container))))
    });
    let downloading = || {
        let said = missing.iter().find_map(|m| m.state.last_failure.as_ref().map(|f| format!("{}: {f}", m.state.name)));
        if let Some(cache) = cache.filter(|c| c.bytes_downloaded < c.bytes_total) {
            let left = cache.eta_seconds.map(|seconds| format!(", about {seconds} s left")).unwrap_or_default();
            return (false, "Downloading", format!("{}{left}", fetched(cache)));
        }
        (false, "Downloading", said.unwrap_or_else(|| format!("{} of the replicas load their weights", missing.len())))
    };
    failed.into_iter().next().unwrap_or_else(downloading)
}

/// How far the workers are, in words.
pub(super) fn fetched(cache: &CacheStatus) -> String {
    let CacheStatus { bytes_downloaded, bytes_total, .. } = cache;
    let percent = (u128::from(*bytes_downloaded) * 100).checked_div(u128::from(*bytes_total)).unwrap_or(100);
    format!("{bytes_downloaded} of {bytes_total} bytes are fetched ({percent} %)")
}

/// Whether as many replicas answer as are wanted; what stands in the way where not. `counts`: those that answer, and those that are wanted.
pub(super) fn replicas_ready(counts: (u32, u32), missing: &[Missing<'_>]) -> Value {
    let counted = format!("{} of {} replicas answer", counts.0, counts.1);
    if counts.0 >= counts.1 {
        return (true, "AllReady", counted);
    }
    let (reason, message) = trouble(missing);
    (false, reason, if message.is_empty() { counted } else { format!("{counted}; {message}") })
}

/// What keeps a container of the pod `name` from running.
fn stuck(name: &str, container: &ContainerStatus) -> Option<(&'static str, String)> {
    let waiting = container.state.as_ref().and_then(|s| s.waiting.as_ref());
    let why = waiting.and_then(|w| w.reason.as_deref()).unwrap_or_default();
    let detail = observe::one_line(waiting.and_then(|w| w.message.as_deref()).unwrap_or_default());
    match why {
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            Some(("ImagePullFailed", format!("{name}: {why}: {detail}; check the operator's --image")))
        }
        "CrashLoopBackOff" => Some(("CrashLooping", format!("{name} {}", ended(container)))),
        _ if container.restart_count >= RESTARTS && !container.ready => Some(("CrashLooping", format!("{name} {}", ended(container)))),
        _ => None,
    }
}

/// What keeps the pod `name` from running, in words.
pub(super) fn trouble_of(name: &str, pod: &Pod) -> Option<String> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    containers.iter().find_map(|container| stuck(name, container)).map(|(_, message)| message)
}

/// What keeps replicas from answering.
fn trouble(missing: &[Missing<'_>]) -> (&'static str, String) {
    if let Some(stuck) = missing.iter().flat_map(containers).find_map(|(name, container)| stuck(name, container)) {
        return stuck;
    }
    if let Some(Missing { state, .. }) =
        missing.iter().find(|m| m.state.phase == ReplicaPhase::Recovering && m.state.ready_workers < m.state.workers)
    {
        return ("StageFailed", format!("{} of {} workers of {} run", state.ready_workers, state.workers, state.name));
    }
    if let Some(Missing { state, .. }) = missing.iter().find(|m| m.state.phase == ReplicaPhase::Pending) {
        return ("Starting", format!("{} of {} workers of {} run", state.ready_workers, state.workers, state.name));
    }
    if missing.is_empty() {
        return ("Starting", String::new());
    }
    // Routers say so from the start: a worker that loads cannot open a session.
    let said = missing.iter().find_map(|m| m.state.last_failure.as_ref().map(|f| format!("{}: {f}", m.state.name)));
    ("LoadingWeights", said.unwrap_or_default())
}

fn containers<'a>(missing: &'a Missing<'_>) -> impl Iterator<Item = (&'a String, &'a ContainerStatus)> {
    missing.pods.iter().flat_map(|(name, pod)| {
        let all = pod.and_then(|p| p.status.as_ref()?.container_statuses.as_ref());
        all.into_iter().flatten().map(move |container| (name, container))
    })
}

/// How a container ended last.
fn ended(container: &ContainerStatus) -> String {
    let last = container.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    match last {
        Some(last) => {
            let said = last_words(last.message.as_deref().unwrap_or_default());
            let said = if said.is_empty() { said } else { format!(": {said}") };
            format!("ended with exit code {} ({} restarts){said}; see its log", last.exit_code, container.restart_count)
        }
        None => format!("ended ({} restarts); see its log", container.restart_count),
    }
}

/// What a process said last: from the error that ended it on, or else the last line of its log.
fn last_words(said: &str) -> String {
    const ERROR: &str = "error: ";
    let from = if said.starts_with(ERROR) { Some(0) } else { said.rfind(&format!("\n{ERROR}")) };
    match from {
        Some(from) => observe::one_line(&said[from..]),
        None => said.trim().lines().next_back().unwrap_or_default().trim().to_owned(),
    }
}

/// The reason that a worker gave in its last lines, from the closed list of its errors.
fn reason(container: &ContainerStatus) -> Option<&str> {
    let now = container.state.as_ref().and_then(|s| s.terminated.as_ref());
    let last = now.or_else(|| container.last_state.as_ref().and_then(|s| s.terminated.as_ref()))?;
    let (_, after) = last.message.as_deref()?.rsplit_once("\"reason\":\"")?;
    after.split_once('"').map(|(reason, _)| reason)
}

/// How the spec's revision takes over.
pub(super) fn progressing(object: &ModelDeployment, view: &View<'_>, replicas: &[ReplicaStatus]) -> (&'static str, &'static str, String) {
    let (name, wanted) = (&view.revision.name, view.goal.replicas);
    let counts = |ready: u32, others: u32| format!("{ready} of {wanted} replicas of revision {name} answer, {others} of others are left");
    let why = || {
        let unready = unready(object, view, replicas);
        let new: Vec<Missing<'_>> = unready.into_iter().filter(|m| m.state.revision == *name).collect();
        let held = view.shortage.as_ref().map(|(replica, message)| format!("{replica} was taken back: {message}"));
        let words = match scheduled(view, &new) {
            (false, "InsufficientCapacity" | "Unschedulable", message) => message,
            _ => held.unwrap_or_else(|| trouble(&new).1),
        };
        if words.is_empty() { String::new() } else { format!("; {words}") }
    };
    match view.plan.progress {
        Progress::New => ("True", "NewRevision", format!("revision {name} is new; {wanted} replicas of it are made{}", why())),
        Progress::Rolling { ready, others } => ("True", "RollingOut", format!("{}{}", counts(ready, others), why())),
        Progress::Paused => ("Unknown", "Paused", format!("revision {name} is not rolled out while spec.rollout.paused is true")),
        Progress::Stalled { ready, others } => {
            let next = "correct the spec, or apply the one before";
            (
                "False",
                "ProgressDeadlineExceeded",
                format!("nothing came of it for {} s: {}{}; {next}", view.goal.deadline, counts(ready, others), why()),
            )
        }
        Progress::Complete => ("True", "RolloutComplete", format!("revision {name} is rolled out")),
    }
}

/// That a replica that answered does not, where one does not.
pub(super) fn degraded(view: &View<'_>, replicas: &[ReplicaStatus]) -> Option<Value> {
    let failure = |r: &ReplicaStatus| r.last_failure.as_ref().map_or_else(String::new, |f| format!("; {f}"));
    let mut recovering = replicas.iter().filter(|r| r.phase == ReplicaPhase::Recovering);
    if let Some(lost) = recovering.clone().find(|r| r.ready_workers == 0) {
        return Some((true, "ReplicaUnavailable", format!("no worker of {} runs{}", lost.name, failure(lost))));
    }
    if let Some(r) = recovering.next() {
        let message = format!("{} of {} workers of {} run{}", r.ready_workers, r.workers, r.name, failure(r));
        return Some((true, "StageRecovering", message));
    }
    let shortage = view.shortage.as_ref().filter(|_| view.plan.progress == Progress::Complete);
    shortage.map(|(replica, message)| (true, "ReplicaUnavailable", format!("{replica}: {message}")))
}
