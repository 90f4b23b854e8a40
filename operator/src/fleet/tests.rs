//! What routers are told, and when.

use plan::fleet::FleetDeployment;
use proto::fleet::{DeploymentLoad, ReplicaState, RouterReport};
use tokio::sync::mpsc;

use super::*;
use crate::validate::tests::{spec, valid};

fn hub() -> (Arc<Hub>, mpsc::Receiver<ObjectRef<ModelDeployment>>) {
    let (wake, woken) = mpsc::channel(8);
    (Arc::new(Hub::new(7, wake)), woken)
}

fn entry() -> FleetDeployment {
    valid(spec()).fleet(|_, _, _| String::new())
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
    let space = hub.space("n");
    space.settle("llama", Some(entry()), &names(&["llama", "other"]));
    assert_eq!(*space.state.borrow(), None);
    space.settle("other", None, &names(&["llama", "other"]));
    let state = space.state.borrow().clone().expect("a state");
    assert_eq!((state.term, state.number, state.deployments.len()), (7, 1, 1));
}

#[test]
fn only_news_has_a_new_number() {
    let (hub, _) = hub();
    let space = hub.space("n");
    let number = || space.state.borrow().as_ref().map(|s| s.number);
    space.settle("llama", Some(entry()), &names(&["llama"]));
    space.settle("llama", Some(entry()), &names(&["llama"]));
    assert_eq!(number(), Some(1));
    let moved = valid(spec()).fleet(|_, _, _| "10.0.0.1:7071".into());
    space.settle("llama", Some(moved), &names(&["llama"]));
    assert_eq!(number(), Some(2));
    space.refresh(&[]);
    assert_eq!(number(), Some(3));
    assert!(space.state.borrow().as_ref().is_some_and(|s| s.deployments.is_empty()));
}

#[tokio::test(start_paused = true)]
async fn reports_wake_what_they_change() {
    let (hub, mut woken) = hub();
    let space = hub.space("n");
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
fn a_router_gets_in_with_its_namespaces_token_alone() {
    let (hub, _) = hub();
    let call = |token: &str| {
        let mut request = Request::new(());
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
}
