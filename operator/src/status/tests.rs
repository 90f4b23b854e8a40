//! Statuses of deployments in every state.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use plan::manifest::API_VERSION;
use serde_json::{Value, json};

use super::*;
use crate::{
    autoscale::Report,
    build::{
        place::{Place, Volume},
        tests::{revision, slots},
    },
    fleet::{Load, Presence, Said},
    resource::LoadPhase,
    rollout::{Id, Slot, Strategy},
    validate::{
        Until,
        tests::{drafted, object, refusals, spec, valid},
    },
};

fn reason(status: &Status, kind: &str) -> (String, String) {
    let c = status.conditions.iter().find(|c| c.kind == kind).expect("the condition");
    (c.status.clone(), c.reason.clone())
}

fn is(status: &Status, kind: &str, truth: &str, why: &str) {
    assert_eq!(reason(status, kind), (truth.to_owned(), why.to_owned()), "{kind}");
}

fn message<'a>(status: &'a Status, kind: &str) -> &'a str {
    status.conditions.iter().find(|c| c.kind == kind).map(|c| c.message.as_str()).expect("the condition")
}

/// A deployment in some state.
struct Case {
    object: ModelDeployment,
    valid: ValidatedDeployment,
    revision: Revision,
    goal: Goal,
    plan: Plan,
    standing: Standing,
    shortage: Option<(String, String)>,
}

impl Case {
    /// One of which a router says nothing, and whose pods do not exist.
    fn new(spec: Value) -> Self {
        let (valid, revision) = (valid(spec.clone()), revision(&spec));
        let replicas = valid.replicas();
        let goal = Goal {
            revision: revision.name.clone(),
            current: None,
            replicas,
            strategy: Strategy::Auto,
            paused: false,
            gang: true,
            deadline: 600,
            drain: 120,
        };
        let plan = Plan {
            exist: slots(&revision, replicas),
            remove: Vec::new(),
            drained: Vec::new(),
            taken_back: Vec::new(),
            progress: Progress::Rolling { ready: 0, others: 0 },
            again: None,
        };
        let standing = Standing { load: Load { routers: 1, open: 1, ..Load::default() }, ..Standing::default() };
        Self { object: object(spec), valid, revision, goal, plan, standing, shortage: None }
    }

    fn name(&self, slot: &Slot) -> String {
        crate::revision::replica_name(&self.object, &slot.id)
    }

    /// Gives every worker a pod.
    fn pods(mut self, node: bool, status: &Value) -> Self {
        let slots = self.plan.exist.clone();
        self.standing.pods = slots.iter().flat_map(|slot| self.of(slot, node, status)).collect();
        self
    }

    fn of(&self, slot: &Slot, node: bool, status: &Value) -> Vec<Pod> {
        let spec = if node { json!({ "nodeName": "one", "containers": [] }) } else { json!({ "containers": [] }) };
        let labels = json!({ names::REVISION: slot.id.revision, names::REPLICA: slot.id.number.to_string() });
        let stages = self.revision.record.stages.iter().enumerate();
        let names = stages.flat_map(|(stage, of)| (0..of.ranks).map(move |rank| names::pod(&self.name(slot), stage, rank)));
        let pod = |name: String| json!({ "metadata": { "name": name, "labels": labels }, "spec": spec, "status": status });
        names.map(|name| serde_json::from_value(pod(name)).expect("a pod")).collect()
    }

    fn routers(mut self, routers: usize, open: usize) -> Self {
        (self.standing.load.routers, self.standing.load.open) = (routers, open);
        self
    }

    /// Has routers say of each replica whether it is ready.
    fn ready(mut self, ready: &[bool]) -> Self {
        for (slot, ready) in self.plan.exist.iter().zip(ready) {
            let last_failure = (!ready).then(|| "a worker loads".to_owned());
            let said = Said { ready: *ready, last_failure, sequences: Some(0), ..Said::default() };
            self.standing.load.replicas.insert(self.name(slot), said);
        }
        self
    }

    /// Has routers say how many of `fetch` bytes each replica has, and how long the rest takes.
    fn fetching(mut self, fetched: u64, fetch: u64, seconds: Option<u64>) -> Self {
        for said in self.standing.load.replicas.values_mut() {
            (said.fetched, said.fetch, said.fetch_seconds) = (fetched, fetch, seconds);
        }
        self
    }

    fn progress(mut self, progress: Progress) -> Self {
        self.plan.progress = progress;
        self
    }

    fn before(mut self, status: &Status) -> Self {
        self.object.status = Some(status.clone());
        self
    }

    fn status(&self) -> Status {
        let revisions = crate::revision::by_name(&[], &self.revision);
        let view = View {
            valid: &self.valid,
            revision: &self.revision,
            collisions: 0,
            revisions: &revisions,
            goal: &self.goal,
            plan: &self.plan,
            standing: &self.standing,
            routers: None,
            shortage: self.shortage.clone(),
        };
        applied(&self.object, &view)
    }
}

fn running() -> Value {
    json!({ "podIP": "10.0.0.1", "containerStatuses": [
        { "name": "worker", "ready": true, "restartCount": 0, "image": "", "imageID": "" },
    ]})
}

fn waiting(why: &str, said: &str) -> Value {
    json!({ "containerStatuses": [{
        "name": "worker", "ready": false, "restartCount": 2, "image": "", "imageID": "",
        "state": { "waiting": { "reason": why, "message": "detail\n  and more" } }, "lastState": { "terminated": { "exitCode": 2, "message": said } },
    }]})
}

fn ended(reason: &str) -> Value {
    waiting(
        "CrashLoopBackOff",
        &format!(
            "{{\"level\":\"ERROR\",\"fields\":{{\"reason\":\"{reason}\"}}}}\nerror: the file is not that one\n  caused by: another digest\n"
        ),
    )
}

fn unscheduled(message: &str) -> Value {
    json!({ "conditions": [{ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message }] })
}

fn one() -> Case {
    Case::new(spec())
}

fn two() -> Case {
    let mut spec = spec();
    spec["replicas"] = json!(2);
    Case::new(spec)
}

/// One that is rolled out and answers.
fn answers() -> Case {
    one().pods(true, &running()).ready(&[true]).progress(Progress::Complete)
}

#[test]
fn a_router_that_is_silent_for_a_moment_is_no_news() {
    let standing = two().routers(2, 2).status();
    let said = |case: Case| serde_json::to_value(case.status()).expect("JSON")["conditions"].clone();
    let messages = |conditions: Value| -> Vec<Value> {
        conditions.as_array().expect("a list").iter().map(|c| json!([c["type"], c["status"], c["reason"], c["message"]])).collect()
    };
    is(&standing, ROUTER_READY, "True", "Ready");
    assert_eq!(messages(said(two().routers(2, 2))), messages(said(two().routers(1, 1))));
    assert_ne!(messages(said(two().routers(2, 2))), messages(said(two().routers(1, 0))));
}

#[test]
fn ready_is_a_token_and_not_a_pod() {
    let loading = one().pods(true, &running()).ready(&[false]).status();
    is(&loading, SCHEDULED, "True", "AllReplicasScheduled");
    is(&loading, REPLICAS_READY, "False", "LoadingWeights");
    is(&loading, READY, "False", "Downloading");
    assert_eq!((loading.replicas, loading.ready_replicas), (1, 0));
    assert_eq!(loading.selector, "skein.dev/deployment=llama,skein.dev/stage=0,apps.kubernetes.io/pod-index=0");

    let answers = answers().status();
    for kind in SUMMED {
        assert_eq!(reason(&answers, kind).0, "True", "{kind}");
    }
    is(&answers, READY, "True", "Ready");
    assert_eq!((answers.ready_replicas, answers.available_replicas, answers.desired_replicas), (1, 1, 1));
    assert_eq!((answers.updated_replicas, answers.current_revision.clone()), (1, answers.update_revision.clone()));
    assert_eq!(answers.revisions, [RevisionStatus { name: answers.update_revision.clone().expect("a revision"), replicas: 1 }]);
    assert_eq!(answers.url.as_deref(), Some("http://llama.models"));
}

/// A condition's type, status and reason, and a deployment that has it.
type Reached = (&'static str, &'static str, &'static str, Case);

/// One that answers, whose draft model is on its way.
fn guessed() -> Case {
    Case::new(drafted()).pods(true, &running()).ready(&[true]).progress(Progress::Complete)
}

impl Case {
    /// Gives the draft model of the first replica a pod, of which routers say `said`.
    fn draft(mut self, status: &Value, said: Option<Presence>) -> Self {
        let slot = self.plan.exist[0].clone();
        let replica = self.name(&slot);
        let labels = json!({ names::REVISION: slot.id.revision, names::REPLICA: slot.id.number.to_string(), names::STAGE: names::DRAFT });
        let name = names::pod(&plan::fleet::FleetDraft::name(&replica), 0, 0);
        let pod = json!({ "metadata": { "name": name, "labels": labels }, "spec": { "containers": [] }, "status": status });
        self.standing.pods.push(serde_json::from_value(pod).expect("a pod"));
        self.standing.load.replicas.get_mut(&replica).expect("routers say something of it").draft = said;
        self
    }
}

#[test]
fn a_draft_model_stands_in_no_ones_way_and_is_said() {
    let loading = || Some(Presence::default());
    let lost = || Some(Presence { ready: false, failure: Some("worker d:1 is gone".into()) });
    let ready = || Some(Presence { ready: true, failure: None });
    for (case, state, part) in [
        (guessed(), LoadPhase::Loading, "its worker does not run yet"),
        (guessed().draft(&running(), loading()), LoadPhase::Loading, "it runs, and is not asked"),
        (guessed().draft(&running(), ready()), LoadPhase::Ready, "it is asked for guesses"),
        (guessed().draft(&running(), lost()), LoadPhase::Failed, "worker d:1 is gone"),
        (guessed().draft(&ended("NotFound"), loading()), LoadPhase::Failed, "ended with exit code 2"),
        (guessed().draft(&unscheduled("1 Insufficient cpu"), None), LoadPhase::Failed, "1 Insufficient cpu"),
    ] {
        let status = case.status();
        let draft = status.replica_states[0].draft.as_ref().expect("it has one");
        assert!(draft.state == state && draft.message.contains(part), "{draft:?}");
        is(&status, READY, "True", "Ready");
        let counts = (status.replica_states[0].ready_workers, status.replica_states[0].workers);
        assert_eq!((counts, status.ready_replicas), ((4, 4), 1), "workers are those that it cannot answer without");
        let expected = if state == LoadPhase::Failed { ("True", "DraftFailed") } else { ("False", "AsExpected") };
        is(&status, DEGRADED, expected.0, expected.1);
        let events: Vec<String> = news(Some(&guessed().status()), &status).into_iter().map(|event| event.reason).collect();
        let expected = match state {
            LoadPhase::Loading => vec![],
            LoadPhase::Ready => vec!["DraftReady"],
            LoadPhase::Failed => vec!["DraftFailed"],
        };
        assert_eq!(events, expected);
    }
    // Which router drives it changes, and the one that does says so first.
    let was = guessed().draft(&running(), ready()).status();
    let kept = guessed().draft(&running(), None).before(&was).status();
    assert_eq!((&kept.replica_states[0].draft, news(Some(&was), &kept).len()), (&was.replica_states[0].draft, 0));
    assert_eq!(
        guessed().before(&was).status().replica_states[0].draft.as_ref().map(|d| d.state),
        Some(LoadPhase::Loading),
        "it has no pod"
    );
    let planned = guessed().status().plan.expect("a plan").draft.expect("its worker");
    assert!(planned.weight_bytes > 0 && planned.kv_bytes > 0 && planned.cost > 0, "{planned:?}");
    assert_eq!((answers().status().replica_states[0].draft.clone(), answers().status().plan.expect("a plan").draft), (None, None));
}

/// Every condition and reason that the code can set once objects stand, but for those of autoscaling.
fn cases() -> Vec<Reached> {
    let full = unscheduled("0/1 nodes are available: 1 Insufficient cpu.");
    let mut held = one();
    held.plan.exist.clear();
    held.shortage = Some(("llama-0".into(), "p: 1 Insufficient memory".into()));
    let mut lost = answers();
    lost.plan.exist.clear();
    lost.shortage = Some(("llama-0".into(), "p: 1 Insufficient memory".into()));
    let mut without = answers();
    without.valid.adapters = vec![("b".into(), Err("it does not exist".into()))];
    let mut asleep = spec();
    asleep["suspend"] = json!(true);
    let mut none = spec();
    none["replicas"] = json!(0);
    let fell = || answers().ready(&[false]).before(&answers().status());
    vec![
        (ACCEPTED, "True", "Accepted", answers()),
        (MODEL_RESOLVED, "True", "Resolved", answers()),
        (SCHEDULED, "True", "AllReplicasScheduled", answers()),
        (SCHEDULED, "False", "GangPending", one()),
        (SCHEDULED, "False", "InsufficientCapacity", one().pods(false, &full)),
        (SCHEDULED, "False", "InsufficientCapacity", held),
        (SCHEDULED, "False", "Unschedulable", one().pods(false, &unscheduled("no node matches"))),
        (WEIGHTS_READY, "True", "Ready", answers()),
        (WEIGHTS_READY, "False", "Downloading", one().pods(true, &running()).ready(&[false])),
        (WEIGHTS_READY, "False", "VerificationFailed", one().pods(true, &ended("DigestMismatch"))),
        (WEIGHTS_READY, "False", "InsufficientDisk", one().pods(true, &ended("InsufficientDisk"))),
        (WEIGHTS_READY, "False", "DownloadFailed", one().pods(true, &ended("SourceUnreachable"))),
        (REPLICAS_READY, "True", "AllReady", answers()),
        (REPLICAS_READY, "False", "Starting", one()),
        (REPLICAS_READY, "False", "ImagePullFailed", one().pods(true, &waiting("ImagePullBackOff", ""))),
        (REPLICAS_READY, "False", "CrashLooping", one().pods(true, &waiting("CrashLoopBackOff", ""))),
        (REPLICAS_READY, "False", "LoadingWeights", one().pods(true, &running()).ready(&[false])),
        (REPLICAS_READY, "False", "StageFailed", fell().pods(true, &waiting("", ""))),
        (ROUTER_READY, "True", "Ready", answers()),
        (ROUTER_READY, "False", "Deploying", answers().routers(0, 0)),
        (ROUTER_READY, "False", "NoEndpoints", answers().routers(2, 0)),
        (AVAILABLE, "True", "MinimumReplicasAvailable", answers()),
        (AVAILABLE, "False", "Unavailable", one()),
        (AVAILABLE, "False", "ScaledToZero", Case::new(none)),
        (AVAILABLE, "False", "ScaledToZero", Case::new(asleep)),
        (PROGRESSING, "True", "NewRevision", one().progress(Progress::New)),
        (PROGRESSING, "True", "RollingOut", one()),
        (PROGRESSING, "Unknown", "Paused", one().progress(Progress::Paused)),
        (PROGRESSING, "False", "ProgressDeadlineExceeded", one().progress(Progress::Stalled { ready: 0, others: 1 })),
        (PROGRESSING, "True", "RolloutComplete", answers()),
        (DEGRADED, "True", "StageRecovering", fell()),
        (DEGRADED, "True", "ReplicaUnavailable", fell().pods(true, &waiting("", ""))),
        (DEGRADED, "True", "ReplicaUnavailable", lost),
        (DEGRADED, "True", "AdapterFailed", without),
        (DEGRADED, "True", "DraftFailed", guessed().draft(&waiting("CrashLoopBackOff", ""), None)),
        (DEGRADED, "False", "AsExpected", answers()),
        (READY, "True", "Ready", answers()),
    ]
}

#[test]
fn every_condition_and_reason_is_reached() {
    for (kind, truth, why, case) in &cases() {
        let status = case.status();
        is(&status, kind, truth, why);
        let order: Vec<&str> = status.conditions.iter().map(|c| c.kind.as_str()).collect();
        assert_eq!(order.len(), 10, "{order:?}");
        let lines = status.conditions.iter().find(|c| c.message.contains('\n') || c.message.trim() != c.message);
        assert_eq!(lines, None, "messages are one line");
    }
}

/// What autoscaling says: by another's word, switched off, and by the load from nothing known to none.
fn scaling_reasons() -> Vec<Status> {
    let said = |autoscaling: Value, reports: &[&[Report]]| {
        let mut spec = spec();
        spec["autoscaling"] = autoscaling;
        let (mut case, scaling) = (Case::new(spec), scaling::Scaling::default());
        let mut status = case.status();
        for (at, reports) in reports.iter().enumerate() {
            let decision = scaling.decide(&case.object, &mut case.valid.manifest, 1, reports, 1000 * at as i64);
            scaled(&mut status, &case.object, &case.valid, decision.as_ref());
            case.object.status = Some(status.clone());
        }
        status
    };
    let builtin =
        json!({ "mode": "Builtin", "minReplicas": 0, "maxReplicas": 2, "targets": [{ "type": "InflightPerReplica", "value": 4 }] });
    let (idle, some, many) = (Report::default(), Report { running: 3, ..Report::default() }, Report { running: 99, ..Report::default() });
    vec![
        said(json!({ "mode": "External" }), &[&[]]),
        said(json!({ "mode": "Disabled" }), &[&[]]),
        said(builtin.clone(), &[&[]]),
        said(builtin.clone(), &[&[some]]),
        said(builtin.clone(), &[&[many]]),
        said(builtin, &[&[idle], &[idle]]),
    ]
}

/// The list is what the code can say: every reason of it is reached, and what is not on it cannot be said.
#[test]
fn every_reason_of_the_list_is_reached() {
    let mut statuses: Vec<Status> = cases().iter().map(|(.., case)| case.status()).collect();
    statuses.extend(scaling_reasons());
    statuses.push(resolving(&object(spec())));
    statuses.extend(refusals().iter().map(|rejection| rejected(&object(spec()), rejection)));
    let planned = planned(&object(spec()), &valid(spec()), &revision(&spec()), 0);
    statuses.push(failed(planned, &object(spec()), Some("PortConflict"), "taken"));
    let reached: BTreeSet<(&str, &str)> = statuses
        .iter()
        .flat_map(|status| &status.conditions)
        .map(|c| (c.kind.as_str(), c.reason.as_str()))
        .filter(|(kind, _)| *kind != READY)
        .collect();
    let listed: BTreeSet<(&str, &str)> =
        REASONS.iter().flat_map(|(kind, reasons)| reasons.iter().map(move |reason| (*kind, *reason))).collect();
    assert_eq!(reached, listed);
}

#[test]
#[should_panic(expected = "Accepted has no reason Invented")]
fn a_reason_that_is_not_listed_cannot_be_said() {
    let rejection = Rejection { condition: ACCEPTED, reason: "Invented", message: String::new(), until: Until::Changed };
    rejected(&object(spec()), &rejection);
}

#[test]
fn what_is_missing_is_said() {
    let full = one().pods(false, &unscheduled("0/1 nodes are available: 1 Insufficient cpu.")).status();
    is(&full, READY, "False", "InsufficientCapacity");
    assert!(message(&full, READY).contains("Insufficient cpu"));
    let wrong = one().pods(true, &ended("DigestMismatch")).status();
    is(&wrong, READY, "False", "VerificationFailed");
    assert!(
        message(&wrong, WEIGHTS_READY)
            .contains("exit code 2 (2 restarts): error: the file is not that one: caused by: another digest; see its log")
    );
    // A message without a reason says nothing of weights.
    is(&one().pods(true, &waiting("CrashLoopBackOff", "thread panicked")).status(), WEIGHTS_READY, "False", "Downloading");
    let asleep = {
        let mut spec = spec();
        spec["suspend"] = json!(true);
        Case::new(spec).status()
    };
    assert!(message(&asleep, READY).contains("suspended"));
    assert_eq!((asleep.desired_replicas, reason(&asleep, READY).1.as_str()), (0, "ScaledToZero"));
}

/// A replica of another revision, of which routers say that it is ready.
/// Pods know the folders of their nodes by other names, and who they run as is nobody's guess.
#[test]
fn what_pods_say_of_folders_of_nodes_is_said_of_the_nodes() {
    let status = |mut case: Case| {
        case.valid.node_cache = Some("/srv/cache".into());
        case.valid.place = Some(Place { volume: Volume::Folder("/srv/models".into()), path: "a".into() });
        case.status()
    };
    let closed = |path: &str, why: &str| {
        let said = format!("{{\"fields\":{{\"reason\":\"DownloadFailed\"}}}}\nerror: failed to open {path}\n  caused by: {why}\n");
        one().pods(true, &waiting("CrashLoopBackOff", &said))
    };
    let denied = "Permission denied (os error 13)";
    for (path, shown, next) in [
        ("/var/cache/skein/models/parts", "/srv/cache/models/parts", "user 65532 must be able to write to /srv/cache of the node"),
        ("/var/lib/skein/model/a/b", "/srv/models/a/b", "user 65532 must be able to read it on the node"),
    ] {
        let failed = status(closed(path, denied));
        for kind in [WEIGHTS_READY, REPLICAS_READY] {
            let said = message(&failed, kind);
            assert!(said.contains(shown) && said.ends_with(next) && !said.contains(path), "{kind}: {said}");
        }
        let other = status(closed(path, "Input/output error (os error 5)"));
        assert!(!message(&other, WEIGHTS_READY).contains("65532"), "{}", message(&other, WEIGHTS_READY));
        // Where it is no folder of a node, its paths are the pod's own.
        let own = closed(path, denied).status();
        assert!(message(&own, WEIGHTS_READY).contains(path) && !message(&own, WEIGHTS_READY).contains("65532"));
    }
    let waits = status(one().pods(true, &json!({})));
    is(&waits, REPLICAS_READY, "False", "Starting");
    assert!(message(&waits, REPLICAS_READY).ends_with("; their nodes must have /srv/models and /srv/cache"));
}

fn beside(mut case: Case, number: u32) -> Case {
    let slot = Slot { id: Id { revision: "before".into(), number }, draining: None };
    case.standing.load.replicas.insert(case.name(&slot), Said { ready: true, sequences: Some(1), ..Said::default() });
    case.plan.exist.push(slot);
    case
}

#[test]
fn while_the_old_ones_answer_a_new_one_that_does_not_is_progress_alone() {
    let broken = beside(one().pods(true, &waiting("CrashLoopBackOff", "")), 0).progress(Progress::Stalled { ready: 0, others: 1 }).status();
    is(&broken, READY, "True", "Ready");
    is(&broken, PROGRESSING, "False", "ProgressDeadlineExceeded");
    let said = message(&broken, PROGRESSING);
    assert!(said.contains("0 of 1 replicas") && said.contains("ended with exit code 2") && said.contains("apply the one before"), "{said}");
    assert_eq!((broken.replicas, broken.ready_replicas, broken.updated_replicas), (2, 1, 1));
    let crowded = beside(one().pods(false, &unscheduled("1 Insufficient memory")), 0).status();
    is(&crowded, SCHEDULED, "True", "AllReplicasScheduled");
    assert!(message(&crowded, PROGRESSING).contains("Insufficient memory"));
    // Where fewer answer than are wanted, it is in the way.
    let needed = beside(two().pods(false, &unscheduled("1 Insufficient memory")), 0).status();
    is(&needed, SCHEDULED, "False", "InsufficientCapacity");
    // One that drains takes no requests.
    let mut draining = beside(one().pods(true, &running()).ready(&[true]), 0);
    draining.plan.exist[1].draining = Some(5);
    let status = draining.status();
    assert_eq!((status.replicas, status.ready_replicas, status.replica_states[1].phase), (2, 1, ReplicaPhase::Draining));
}

#[test]
fn zero_by_hand_is_not_ready() {
    let mut none = spec();
    none["replicas"] = json!(0);
    let status = Case::new(none).status();
    is(&status, AVAILABLE, "False", "ScaledToZero");
    is(&status, READY, "False", "ScaledToZero");
}

#[test]
fn zero_that_a_request_ends_is_ready() {
    let mut idle = spec();
    idle["autoscaling"] =
        json!({ "mode": "Builtin", "minReplicas": 0, "maxReplicas": 2, "targets": [{ "type": "InflightPerReplica", "value": 4 }] });
    let (mut object, scaling) = (object(idle.clone()), scaling::Scaling::default());
    let mut look = |report: Report, now| {
        let mut case = Case::new(idle.clone());
        case.object = object.clone();
        let decision = scaling.decide(&object, &mut case.valid.manifest, 0, &[report], now);
        case.goal.replicas = case.valid.replicas();
        case.plan.exist = slots(&case.revision, case.goal.replicas);
        let mut status = case.status();
        scaled(&mut status, &object, &case.valid, decision.as_ref());
        let events: Vec<(String, String)> =
            news(object.status.as_ref(), &status).into_iter().map(|e| (e.reason, e.note.unwrap_or_default())).collect();
        object.status = Some(status.clone());
        (status, events, case.valid)
    };
    let note = |events: &[(String, String)], reason: &str| events.iter().find(|e| e.0 == reason).map(|e| e.1.clone());
    let empty = Report::default();
    let (first, ..) = look(empty, 0);
    assert_eq!(first.desired_replicas, 1);
    let (asleep, events, valid) = look(empty, 1000);
    is(&asleep, AVAILABLE, "True", "ScaledToZero");
    is(&asleep, SCALING_ACTIVE, "True", "AtZero");
    is(&asleep, READY, "True", "Ready");
    assert_eq!((asleep.desired_replicas, valid.replicas()), (0, 0));
    assert!(note(&events, "ScaledDown").is_some_and(|why| why.contains("no request for 300 s")), "{events:?}");
    assert!(valid.manifest.serving().hold.is_some(), "routers hold what comes");
    let (awake, events, valid) = look(Report { held: 6, ..empty }, 1001);
    assert_eq!((awake.desired_replicas, valid.replicas()), (2, 2));
    assert!(note(&events, "ActivatedFromZero").is_some_and(|why| why.contains("6 requests in flight")), "{events:?}");
    assert_eq!(reason(&awake, READY).0, "False");
    let (_, events, _) = look(Report { held: 6, ..empty }, 1006);
    assert_eq!(events, [], "nothing new");
}

#[test]
fn the_plan_stands_before_any_pod() {
    let status = planned(&object(spec()), &valid(spec()), &revision(&spec()), 0);
    let plan = status.plan.expect("a plan");
    assert_eq!((plan.stages.len(), plan.stages[0].ranks, plan.stages[1].first_layer), (2, 2, plan.stages[0].last_layer + 1));
    assert!(plan.stages[0].weight_bytes > 0 && status.model.expect("a model").parameters > 0);
}

#[test]
fn refusals_keep_what_runs_and_times_keep_their_start() {
    let mut running = answers().status();
    running.conditions.iter_mut().for_each(|c| c.last_transition_time = "2020-01-01T00:00:00Z".into());
    let case = answers().before(&running);
    assert_eq!(case.status(), running, "nothing new is nothing to write");

    let mut before = case.object;
    before.metadata.generation = Some(4);
    let rejection = Rejection { condition: ACCEPTED, reason: "InvalidSpec", message: "why".into(), until: Until::Changed };
    let refused = rejected(&before, &rejection);
    assert_eq!((refused.ready_replicas, refused.observed_generation), (1, 4));
    is(&refused, ACCEPTED, "False", "InvalidSpec");
    is(&refused, READY, "False", "InvalidSpec");
    let unchanged = refused.conditions.iter().find(|c| c.kind == AVAILABLE).expect("the condition");
    assert_eq!(unchanged.last_transition_time, "2020-01-01T00:00:00Z");
    assert_eq!(before.owner(true).api_version, API_VERSION);
}

/// Reasons of the events between two statuses.
fn reasons(old: Option<&Status>, new: &Status) -> Vec<String> {
    news(old, new).into_iter().map(|e| e.reason).collect()
}

#[test]
fn events_tell_news_once() {
    let first = planned(&object(spec()), &valid(spec()), &revision(&spec()), 0);
    assert_eq!(reasons(None, &first), ["ModelResolved", "PlanComputed"]);
    assert!(reasons(Some(&first), &first).is_empty());
    let rolling = one().status();
    assert_eq!(reasons(Some(&first), &rolling), ["ReplicaCreated"]);
    let ready = answers().status();
    assert_eq!(reasons(Some(&rolling), &ready), ["RolloutCompleted", "ReplicaReady"]);
    let rejection = Rejection { condition: ACCEPTED, reason: "PlanInfeasible", message: "why".into(), until: Until::Changed };
    assert_eq!(reasons(Some(&first), &rejected(&object(spec()), &rejection)), ["PlanInfeasible"]);
}

#[test]
fn what_is_fetched_is_in_status_conditions_and_events() {
    let starting = || two().pods(true, &running()).ready(&[false, false]);
    let begun = starting().fetching(0, 1000, None).status();
    let cache = |status: &Status| status.cache.as_ref().map(|c| (c.bytes_downloaded, c.bytes_total, c.eta_seconds));
    assert_eq!(cache(&begun), Some((0, 2000, None)), "of both replicas");
    assert_eq!(reasons(Some(&starting().status()), &begun), ["DownloadStarted"]);
    let half = starting().fetching(500, 1000, Some(7)).before(&begun).status();
    is(&half, WEIGHTS_READY, "False", "Downloading");
    assert_eq!(message(&half, WEIGHTS_READY), "1000 of 2000 bytes are fetched (50 %), about 7 s left");
    assert_eq!((cache(&half), reasons(Some(&begun), &half)), (Some((1000, 2000, Some(7))), vec![]));
    let failed = starting().pods(true, &ended("SourceUnreachable")).fetching(500, 1000, None).before(&half).status();
    assert!(reasons(Some(&half), &failed).contains(&"DownloadFailed".to_owned()));
    let done = starting().fetching(1000, 1000, None).before(&half).status();
    assert_eq!((cache(&done), reasons(Some(&half), &done)), (Some((2000, 2000, None)), vec!["DownloadCompleted".to_owned()]));
    // A router that has just taken the replicas over knows nothing of it.
    assert_eq!(cache(&starting().before(&done).status()), Some((2000, 2000, None)));
    assert_eq!(reasons(None, &starting().fetching(5, 5, None).status()).iter().filter(|r| r.starts_with("Download")).count(), 1);
}

#[test]
fn events_of_a_deployments_life() {
    let ready = answers().status();
    let mut next = ready.clone();
    next.update_revision = Some("next".into());
    assert_eq!(reasons(Some(&ready), &next), ["PlanComputed", "RolloutStarted"]);
    let stalled = beside(one(), 0).progress(Progress::Stalled { ready: 0, others: 1 }).status();
    assert!(reasons(Some(&beside(one(), 0).status()), &stalled).contains(&"RolloutStalled".to_owned()));
    let more = two().status();
    assert!(reasons(Some(&ready), &more).contains(&"ScaledUp".to_owned()));
    assert!(reasons(Some(&more), &ready).contains(&"ScaledDown".to_owned()));
    let fell = answers().ready(&[false]).before(&ready).status();
    assert_eq!(reasons(Some(&ready), &fell), ["StageFailed"]);
    let back = answers().before(&fell).status();
    assert_eq!(reasons(Some(&fell), &back), ["StageRecovered"]);
    let gone = answers().ready(&[false]).pods(true, &waiting("", "")).before(&ready).status();
    assert!(reasons(Some(&ready), &gone).contains(&"ReplicaRestarted".to_owned()));
    let wrong = one().pods(true, &ended("DigestMismatch")).status();
    let found = reasons(Some(&one().status()), &wrong);
    assert!(found.contains(&"DigestMismatch".to_owned()) && found.contains(&"StageFailed".to_owned()), "{found:?}");
}

/// A deployment that answers, with an adapter that workers are told of, of which routers say `presence`, and one whose source fails.
fn with_adapters(presence: Option<Presence>, broken: bool) -> Case {
    let mut case = answers();
    let source = plan::adapter::AdapterSource { uri: "hf://o/a".into(), digest: None, numerics: "n".into() };
    case.valid.adapters = vec![("a".into(), Ok(source))];
    if broken {
        case.valid.adapters.push(("b".into(), Err("it does not exist".into())));
    }
    let name = case.name(&case.plan.exist[0]);
    if let (Some(presence), Some(said)) = (presence, case.standing.load.replicas.get_mut(&name)) {
        said.adapters.insert("n".into(), presence);
    }
    case
}

#[test]
fn adapters_are_loading_ready_or_failed_and_degrade_nothing_else() {
    let ready = || Some(Presence { ready: true, failure: None });
    let failed = Some(Presence { ready: false, failure: Some("no room".into()) });
    let states = |status: &Status| status.adapters.iter().map(|a| a.state).collect::<Vec<_>>();
    let loading = with_adapters(None, false).status();
    assert_eq!(states(&loading), [LoadPhase::Loading]);
    assert_eq!(loading.adapters[0].message, "0 of 1 replicas that answer have it");
    let loaded = with_adapters(ready(), false).status();
    assert_eq!(states(&loaded), [LoadPhase::Ready]);
    is(&loaded, DEGRADED, "False", "AsExpected");
    let broken = with_adapters(ready(), true).status();
    assert_eq!(states(&broken), [LoadPhase::Ready, LoadPhase::Failed]);
    is(&broken, DEGRADED, "True", "AdapterFailed");
    is(&broken, READY, "True", "Ready");
    assert_eq!(message(&broken, DEGRADED), "adapter b: it does not exist");
    let failed = with_adapters(failed, false).status();
    is(&failed, DEGRADED, "True", "AdapterFailed");
    assert!(message(&failed, DEGRADED).ends_with("no room"), "{}", message(&failed, DEGRADED));
    // Another that lacks a worker is more than an adapter that fails.
    let mut recovering = with_adapters(None, true).before(&answers().status());
    recovering = recovering.ready(&[false]);
    is(&recovering.status(), DEGRADED, "True", "StageRecovering");
    // Events are of what changed.
    let names = |old: &Status, new: &Status| news(Some(old), new).into_iter().map(|e| e.reason).collect::<Vec<_>>();
    assert_eq!(names(&loading, &loaded), ["AdapterLoaded"]);
    assert_eq!(names(&loaded, &broken), ["AdapterFailed"]);
    assert!(names(&broken, &broken).is_empty());
}
