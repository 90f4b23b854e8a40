//! The arbiter's grants and refusals.

use plan::worker::{CollectiveKind, Epoch};
use proto::{
    convert::encode_epoch,
    worker::{Alive, Close, ProbeRequest, session_request::Message},
};
use tokio::time::Instant;
use tonic::Code;

use crate::fleet::{Grant, LONG, Running, Talk, acquire, acquire_for, client, hello, plan, start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_is_above_everything_any_worker_has_seen() {
    let workers = start(&plan(2, 1), CollectiveKind::Unix).await;
    let grant = acquire(&workers).await.expect("a free replica");
    assert_eq!(grant.epoch.number, 1);
    let probes = [workers[0].probe().await, workers[1].probe().await];
    for (named, probe) in grant.workers.iter().zip(&probes) {
        assert_eq!(named.incarnation, probe.identity.as_ref().expect("an identity").incarnation);
    }
    // Stage 1 sees an epoch that the arbiter never granted.
    let seen = Grant { epoch: Epoch { number: 41, session: 7 }, workers: grant.workers.clone() };
    let talk = Talk::begin(&workers[1], &seen).await;
    until(|| async { workers[1].probe().await.highest == Some(encode_epoch(seen.epoch)) }).await;
    drop(talk);
    let later = acquire_for(&workers, workers.iter().map(Running::named).collect(), true).await.expect("a hand-over");
    assert_eq!(later.epoch.number, 42);
    assert_ne!(later.epoch.session, grant.epoch.session);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_granted_without_every_worker() {
    let mut workers = start(&plan(2, 1), CollectiveKind::Unix).await;
    let named: Vec<_> = workers.iter().map(Running::named).collect();
    let code = |r: Result<Grant, tonic::Status>| r.map(|g| g.epoch).expect_err("a refusal").code();
    // Not all are named, one twice, the addresses are swapped, the asked one is no arbiter.
    assert_eq!(code(acquire_for(&workers, named[..1].to_vec(), false).await), Code::FailedPrecondition);
    assert_eq!(code(acquire_for(&workers, vec![named[0].clone(), named[0].clone()], false).await), Code::FailedPrecondition);
    let mut swapped = named.clone();
    swapped[0].address = named[1].address.clone();
    swapped[1].address = named[0].address.clone();
    assert_eq!(code(acquire_for(&workers, swapped, false).await), Code::FailedPrecondition);
    workers.reverse();
    assert_eq!(code(acquire_for(&workers, named.clone(), false).await), Code::FailedPrecondition);
    workers.reverse();
    // One is gone.
    workers.pop().expect("stage 1").stop().await;
    assert_eq!(code(acquire_for(&workers, named.clone(), false).await), Code::Unavailable);
    // And back.
    let again = plan(2, 1);
    let spec = start(&again, CollectiveKind::Unix).await.pop().expect("stage 1");
    workers.push(spec);
    assert_eq!(acquire(&workers).await.expect("a whole replica").epoch.number, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_live_session_is_replaced_only_by_a_hand_over() {
    let workers = start(&plan(1, 1), CollectiveKind::Unix).await;
    let first = acquire(&workers).await.expect("a free replica");
    // Granted a moment ago, not begun.
    assert_eq!(acquire(&workers).await.map(|g| g.epoch).expect_err("a refusal").code(), Code::Aborted);
    let mut talk = Talk::begin(&workers[0], &first).await;
    assert_eq!(talk.welcomed().await, first.epoch);
    // As long as its owner says something now and then, it stays.
    let begun = Instant::now();
    while begun.elapsed() < 2 * worker_silence() {
        talk.say(Message::Alive(Alive {})).await;
        assert_eq!(acquire(&workers).await.map(|g| g.epoch).expect_err("a refusal").code(), Code::Aborted);
    }
    let second = acquire_for(&workers, workers.iter().map(Running::named).collect(), true).await.expect("a hand-over");
    assert_eq!(second.epoch.number, first.epoch.number + 1);
    let mut next = Talk::begin(&workers[0], &second).await;
    assert_eq!(next.welcomed().await, second.epoch);
    assert_eq!(talk.failure().await.reason, "superseded");
    // The first epoch is over for good.
    assert_eq!(Talk::begin(&workers[0], &first).await.failure().await.reason, "stale_epoch");
    // Closed in good order, it is free at once.
    next.say(Message::Close(Close {})).await;
    assert_eq!(next.next().await, None);
    assert_eq!(acquire(&workers).await.expect("a free replica").epoch.number, second.epoch.number + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_owner_is_replaced() {
    let workers = start(&plan(1, 1), CollectiveKind::Unix).await;
    let first = acquire(&workers).await.expect("a free replica");
    let mut talk = Talk::begin(&workers[0], &first).await;
    talk.welcomed().await;
    let begun = Instant::now();
    let mut second = acquire(&workers).await;
    assert_eq!(second.as_ref().map(|g| g.epoch).expect_err("a refusal").code(), Code::Aborted);
    while second.is_err() {
        assert!(begun.elapsed() < LONG, "the silent owner is not replaced");
        second = acquire(&workers).await;
    }
    assert!(begun.elapsed() >= worker_silence() / 2, "replaced after {:?}", begun.elapsed());
    assert_eq!(second.expect("a grant").epoch.number, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_worker_voids_the_grant() {
    let mut workers = start(&plan(2, 1), CollectiveKind::Unix).await;
    let grant = acquire(&workers).await.expect("a free replica");
    let restarted = workers.pop().expect("stage 1").restart().await;
    workers.push(restarted);
    assert_eq!(Talk::begin(&workers[1], &grant).await.failure().await.reason, "incarnation");
    // So does an arbiter that has forgotten what it granted, whatever the hello claims.
    let first = workers.remove(0).restart().await;
    workers.insert(0, first);
    let own = workers[0].probe().await.identity.expect("an identity").incarnation;
    let mut claimed = grant.workers.clone();
    claimed[0].incarnation = own;
    let claimed = Grant { epoch: grant.epoch, workers: claimed };
    assert_eq!(Talk::begin(&workers[0], &claimed).await.failure().await.reason, "stale_epoch");
    // Control: what is granted now is good for both.
    let again = acquire(&workers).await.expect("a free replica");
    let (mut a, mut b) = (Talk::begin(&workers[0], &again).await, Talk::begin(&workers[1], &again).await);
    assert_eq!((a.welcomed().await, b.welcomed().await), (again.epoch, again.epoch));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_common_versions_are_spoken() {
    let workers = start(&plan(1, 1), CollectiveKind::Unix).await;
    let grant = acquire(&workers).await.expect("a free replica");
    for (version_min, version_max) in [(4, 5), (0, 0)] {
        let other = proto::worker::Hello { version_min, version_max, ..hello(&workers[0], &grant) };
        assert_eq!(Talk::begin_with(&workers[0], other).await.failure().await.reason, "version");
    }
    let wider = proto::worker::Hello { version_min: 0, version_max: 9, ..hello(&workers[0], &grant) };
    Talk::begin_with(&workers[0], wider).await.welcomed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_without_the_token_are_refused() {
    let workers = start(&plan(1, 1), CollectiveKind::Unix).await;
    for token in [None, Some("another token")] {
        let mut client = client(workers[0].address, token).await;
        let unauthenticated = |status: tonic::Status| assert_eq!(status.code(), Code::Unauthenticated);
        unauthenticated(client.probe(ProbeRequest {}).await.expect_err("a refusal"));
        unauthenticated(client.acquire(proto::worker::AcquireRequest::default()).await.expect_err("a refusal"));
        unauthenticated(client.card(proto::worker::CardRequest {}).await.map(|_| ()).expect_err("a refusal"));
        unauthenticated(client.session(tokio_stream::empty()).await.map(|_| ()).expect_err("a refusal"));
        unauthenticated(client.link(tokio_stream::empty()).await.map(|_| ()).expect_err("a refusal"));
    }
    assert!(workers[0].probe().await.loaded);
}

/// How long an owner may be silent.
fn worker_silence() -> std::time::Duration {
    std::time::Duration::from_secs(1)
}

/// Waits until `condition` holds.
pub(crate) async fn until<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < LONG, "waited in vain");
    }
}
