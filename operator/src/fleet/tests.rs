//! What routers are told, and when.

use plan::fleet::FleetDeployment;
use proto::fleet::{DeploymentLoad, ReplicaState, RouterReport};
use tokio::sync::mpsc;

use super::*;
use crate::{
    build::tests::revision,
    validate::tests::{spec, valid},
};

fn hub() -> (Arc<Hub>, mpsc::Receiver<ObjectRef<ModelDeployment>>) {
    let (wake, woken) = mpsc::channel(8);
    (Arc::new(Hub::new(7, wake)), woken)
}

fn entry() -> FleetDeployment {
    at("", false)
}

fn at(address: &str, draining: bool) -> FleetDeployment {
    let (valid, revision) = (valid(spec()), revision(&spec()));
    FleetDeployment {
        name: "llama".into(),
        model: "llama".into(),
        aliases: Vec::new(),
        limits: valid.limits(),
        serving: valid.manifest.serving(),
        drivers: String::new(),
        replicas: vec![revision.replica("r".into(), draining, |_, _| address.into(), String::new)],
        adapters: Vec::new(),
    }
}

/// The namespace `n`, whose pool has one router.
fn space(hub: &Hub) -> Arc<Space> {
    let space = hub.space("n");
    space.meet(pool(&["a"]), BTreeSet::new(), &names(&["unknown"]));
    space
}

fn pool(names: &[&str]) -> Vec<FleetRouter> {
    names.iter().map(|name| FleetRouter { name: (*name).to_owned(), address: format!("{name}:7072"), pool: String::new() }).collect()
}

fn names(all: &[&str]) -> Vec<String> {
    all.iter().map(|n| (*n).to_owned()).collect()
}

fn report(router: &str, ready: bool) -> RouterReport {
    let replica = ReplicaState { name: "r".into(), ready, ..ReplicaState::default() };
    let load = DeploymentLoad { deployment: "llama".into(), replicas: vec![replica], ..DeploymentLoad::default() };
    RouterReport { router: router.into(), term: 7, number: 1, loads: vec![load] }
}

#[test]
fn nothing_is_pushed_before_everything_is_known() {
    let (hub, _) = hub();
    let space = space(&hub);
    space.settle("llama", Some(entry()), &names(&["llama", "other"]));
    assert!(space.state.borrow().is_none());
    space.settle("other", None, &names(&["llama", "other"]));
    let state = space.state.borrow().clone().expect("a state");
    assert_eq!((state.term, state.number, state.deployments.len()), (7, 1, 1));
}

#[test]
fn routers_are_told_of_each_other_and_of_nothing_before() {
    let (hub, _) = hub();
    let space = hub.space("n");
    space.settle("llama", Some(entry()), &names(&["llama"]));
    assert_eq!(space.number(), None, "a router that knows of no other would take every replica");
    space.meet(pool(&["a"]), BTreeSet::new(), &names(&["llama"]));
    space.meet(pool(&["a"]), BTreeSet::new(), &names(&["llama"]));
    assert_eq!(space.number(), Some((7, 1)));
    space.meet(pool(&["a", "b"]), BTreeSet::new(), &names(&["llama"]));
    assert_eq!(space.number(), Some((7, 2)));
    assert_eq!(space.state.borrow().as_ref().map(|s| s.routers.len()), Some(2));
}

#[tokio::test(start_paused = true)]
async fn a_router_is_open_when_it_reports_and_services_lead_to_it() {
    let (hub, _woken) = hub();
    let space = space(&hub);
    space.settle("llama", Some(entry()), &names(&["llama"]));
    let lead_to = |ready: &[&str]| space.meet(pool(&["a", "b"]), names(ready).into_iter().collect(), &names(&["llama"]));
    space.report(1, report("a", true));
    assert_eq!((space.load("llama").routers, space.load("llama").open), (1, 0));
    assert_eq!(lead_to(&["b"]), ["llama"]);
    assert_eq!(space.load("llama").open, 0, "the one that is ready does not report");
    assert_eq!(lead_to(&["a", "b"]), ["llama"]);
    assert_eq!(space.load("llama").open, 1);
    assert!(lead_to(&["a", "b"]).is_empty(), "that is no news");
}

#[test]
fn only_news_has_a_new_number() {
    let (hub, _) = hub();
    let space = space(&hub);
    let number = || space.state.borrow().as_ref().map(|s| s.number);
    space.settle("llama", Some(entry()), &names(&["llama"]));
    space.settle("llama", Some(entry()), &names(&["llama"]));
    assert_eq!(number(), Some(1));
    space.settle("llama", Some(at("10.0.0.1:7071", false)), &names(&["llama"]));
    assert_eq!(number(), Some(2));
    space.refresh(&[]);
    assert_eq!(number(), Some(3));
    assert!(space.state.borrow().as_ref().is_some_and(|s| s.deployments.is_empty()));
}

#[tokio::test(start_paused = true)]
async fn what_is_fetched_has_a_pace_and_wakes_now_and_then() {
    let (hub, _woken) = hub();
    let space = space(&hub);
    space.settle("llama", Some(entry()), &names(&["llama"]));
    let says = |fetched: u64| {
        let mut report = report("a", false);
        let replica = &mut report.loads[0].replicas[0];
        (replica.fetched_bytes, replica.fetch_bytes) = (fetched, 1000);
        replica.last_failure = format!("a worker has {fetched}");
        space.report(1, report)
    };
    let left = || {
        let said = &space.load("llama").replicas["r"];
        (said.fetched, said.fetch, said.fetch_seconds)
    };
    assert_eq!(says(0), ["llama"]);
    assert_eq!(left(), (0, 1000, None));
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(says(40).is_empty(), "not a twentieth");
    assert_eq!(left(), (40, 1000, Some(48)));
    assert_eq!(says(60), ["llama"]);
    tokio::time::advance(Duration::from_secs(2)).await;
    // It was restarted, and its volume is gone.
    says(10);
    assert_eq!(left(), (10, 1000, Some(396)));
    assert_eq!(says(1000), ["llama"]);
    assert_eq!(left(), (1000, 1000, None));
}

#[tokio::test(start_paused = true)]
async fn reports_wake_what_they_change() {
    let (hub, mut woken) = hub();
    let space = space(&hub);
    space.settle("llama", Some(entry()), &names(&["llama"]));
    assert_eq!(space.report(1, report("a", false)), ["llama"]);
    assert!(space.report(1, report("a", false)).is_empty());
    assert_eq!(space.report(1, report("a", true)), ["llama"]);
    let load = space.load("llama");
    assert_eq!((load.routers, load.replicas["r"].ready), (1, true));
    // It came back on another stream: the end of the old one means nothing.
    space.report(2, report("a", true));
    assert!(space.leave(1).is_empty());
    assert_eq!(space.leave(2), ["llama"]);
    assert_eq!(space.load("llama").routers, 0);
    space.report(3, report("a", true));
    tokio::time::advance(SILENCE).await;
    assert_eq!(space.load("llama").routers, 0, "a silent router counts as gone");
    hub.wake("n", names(&["llama"])).await;
    assert_eq!(woken.recv().await.expect("it is woken").name, "llama");
}

#[test]
fn a_router_gets_in_as_its_namespaces_alone() {
    let (hub, _) = hub();
    let call = |token: &str| {
        let mut request = Request::new(());
        request.extensions_mut().insert(Peer(None));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("a header"));
        request
    };
    let (a, b) = (hub.space("a"), hub.space("b"));
    assert!(hub.admit(&Request::new(())).is_none(), "no token is known, so nobody gets in");
    a.let_in("one".into());
    b.let_in("two".into());
    assert_eq!(hub.admit(&call("two")).expect("b").namespace, "b");
    assert!(hub.admit(&call("three")).is_none());
    assert!(hub.admit(&Request::new(())).is_none());
    // Where names are proven they decide, whatever else is carried.
    let named = |name: &str| {
        let mut request = call("one");
        request.extensions_mut().insert(Peer(Some(name.parse().expect("a name"))));
        hub.admit(&request).map(|space| space.namespace.clone())
    };
    assert_eq!(named("spiffe://skein/ns/b/router"), Some("b".into()));
    assert_eq!(named("spiffe://skein/ns/a/replica/r/stage/0"), None);
    assert_eq!(named("spiffe://skein/operator"), None);
}

#[tokio::test(start_paused = true)]
async fn a_replica_is_drained_when_every_router_knows_that_it_drains() {
    let (hub, _woken) = hub();
    let space = space(&hub);
    let say = |stream: u64, router: &str, number: u64, sequences: u32| {
        let mut report = report(router, true);
        report.number = number;
        report.loads[0].replicas[0].sequences = sequences;
        space.report(stream, report)
    };
    let left = || space.load("llama").replicas["r"].sequences;
    space.settle("llama", Some(entry()), &names(&["llama"]));
    say(1, "a", 1, 2);
    assert!(say(1, "a", 1, 3).is_empty(), "load alone is no reason to look");
    assert_eq!(left(), Some(3));
    say(2, "b", 1, 1);
    assert_eq!(left(), Some(4));
    space.settle("llama", Some(at("", true)), &names(&["llama"]));
    assert_eq!(left(), None, "neither knows");
    assert_eq!(say(1, "a", 2, 0), ["llama"], "where a replica drains, every report counts");
    say(1, "a", 2, 0);
    say(2, "b", 1, 0);
    assert_eq!(left(), None, "one does not know");
    say(2, "b", 2, 1);
    assert_eq!(left(), None, "one has just heard");
    say(2, "b", 2, 1);
    assert_eq!(left(), Some(1));
    say(2, "b", 2, 0);
    assert_eq!(left(), Some(0));
    // Another process numbers anew: what was said to the last one does not count.
    let mut other = report("b", true);
    (other.term, other.number) = (6, 9);
    space.report(2, other);
    space.report(2, report("b", true));
    assert_eq!(left(), None);
}

#[tokio::test(start_paused = true)]
async fn what_routers_measure_is_known_with_its_age_and_a_request_wakes() {
    let (hub, _) = hub();
    let space = hub.space("n");
    space.settle("llama", Some(entry()), &names(&["llama"]));
    let load = |router: &str, held: u32, kv_used: f32| {
        let load =
            DeploymentLoad { deployment: "llama".into(), held, running: 2, kv_used, ttft_p90_seconds: 0.5, ..DeploymentLoad::default() };
        RouterReport { router: router.into(), term: 7, number: 1, loads: vec![load] }
    };
    let idle = |router: &str| RouterReport {
        loads: vec![DeploymentLoad { deployment: "llama".into(), ..Default::default() }],
        ..load(router, 0, 0.0)
    };
    assert_eq!(space.reports("llama"), []);
    space.report(1, idle("a"));
    assert_eq!(space.report(1, idle("a")), names(&[]));
    assert_eq!(space.report(1, load("a", 3, 0.25)), names(&["llama"]), "it has become busy");
    assert_eq!(space.report(1, load("a", 4, f32::NAN)), names(&[]), "it is busy still");
    tokio::time::advance(Duration::from_secs(7)).await;
    space.report(2, load("b", 0, 0.75));
    let mut reports = space.reports("llama");
    reports.sort_by_key(|r| r.age);
    assert_eq!((reports[0].age, reports[0].held, reports[0].kv_used, reports[0].ttft_p90), (0, 0, 0.75, Some(0.5)));
    assert_eq!((reports[1].age, reports[1].held, reports[1].itl_p90), (7, 4, None));
    assert_eq!(space.reports("other").len(), 2, "both routers say that there is nothing of it");
    tokio::time::advance(GONE).await;
    assert_eq!(space.reports("llama"), []);
    space.report(2, idle("b"));
    space.leave(2);
    assert_eq!(space.reports("llama"), [], "one whose stream ended is gone at once");
}
