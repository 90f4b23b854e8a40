//! What is of an old epoch is refused: on step streams, links and collectives.

use plan::worker::{CollectiveKind, Epoch};
use proto::{
    convert::encode_epoch,
    worker::{self as wire, LinkFrame, LinkHello, WorkerIdentity, link_frame, session_request::Message},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use worker::{
    Deadlines,
    collective::{Group, JoinError, Lobby, Peer, Waits, join},
};

use crate::{
    arbiter::until,
    fleet::{Grant, LONG, Running, Talk, acquire, plan, start, start_with},
};

fn before(epoch: Epoch) -> Epoch {
    Epoch { number: epoch.number - 1, ..epoch }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_epoch_is_refused_on_step_streams() {
    let workers = start(&plan(1, 1), CollectiveKind::Unix).await;
    let grant = acquire(&workers).await.expect("a free replica");
    let mut talk = Talk::begin(&workers[0], &grant).await;
    assert_eq!(talk.welcomed().await, grant.epoch);
    // A session of an earlier number, or of another router with the same one.
    for stale in [before(grant.epoch), Epoch { session: grant.epoch.session + 1, ..grant.epoch }, grant.epoch] {
        let stale = Grant { epoch: stale, workers: grant.workers.clone() };
        assert_eq!(Talk::begin(&workers[0], &stale).await.failure().await.reason, "stale_epoch");
    }
    // Control: a step of the present epoch is answered.
    let step = |epoch, id| Message::Step(wire::Step { epoch: Some(encode_epoch(epoch)), id, ..wire::Step::default() });
    talk.say(step(grant.epoch, 1)).await;
    match talk.next().await {
        Some(wire::session_reply::Message::Step(reply)) => assert_eq!(reply.step, 1),
        other => panic!("{other:?} came, expected a reply"),
    }
    talk.say(step(before(grant.epoch), 2)).await;
    assert_eq!(talk.failure().await.reason, "stale_epoch");
}

/// A link to `worker` that says it is of `epoch`, from stage 0 as granted.
async fn link(worker: &Running, grant: &Grant, epoch: Epoch) -> Result<tonic::Streaming<wire::LinkAck>, tonic::Status> {
    link_of(worker, grant, epoch, false).await
}

/// The same; `parts`: it says that it brings parts of logits.
async fn link_of(worker: &Running, grant: &Grant, epoch: Epoch, parts: bool) -> Result<tonic::Streaming<wire::LinkAck>, tonic::Status> {
    let of = |stage: u32| grant.workers.iter().find(|w| (w.stage, w.rank) == (stage, 0)).expect("a worker");
    let from = WorkerIdentity { replica: worker.spec.replica.clone(), stage: 0, rank: 0, incarnation: of(0).incarnation };
    let hello = LinkHello { epoch: Some(encode_epoch(epoch)), from: Some(from), to_incarnation: of(1).incarnation, parts };
    let (frames, outgoing) = mpsc::channel(1);
    frames.try_send(LinkFrame { message: Some(link_frame::Message::Hello(hello)) }).expect("room");
    worker.client().await.link(ReceiverStream::new(outgoing)).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_epoch_is_refused_on_links() {
    // Stage 1 alone is told of the epoch, and waits for stage 0; so the test can play stage 0's part.
    let workers = start_with(&plan(2, 1), CollectiveKind::Unix, Deadlines { meet: LONG, hello: LONG, ..Deadlines::default() }).await;
    let grant = acquire(&workers).await.expect("a free replica");
    let talk = Talk::begin(&workers[1], &grant).await;
    until(|| async { workers[1].probe().await.highest == Some(encode_epoch(grant.epoch)) }).await;
    for stale in [before(grant.epoch), Epoch { session: grant.epoch.session + 1, ..grant.epoch }] {
        let status = link(&workers[1], &grant, stale).await.map(|_| ()).expect_err("a refusal");
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().starts_with("stale_epoch"), "{status:?}");
    }
    // Control: the present epoch's link is taken, and only one.
    let _taken = link(&workers[1], &grant, grant.epoch).await.expect("the link of the present epoch");
    let second = link(&workers[1], &grant, grant.epoch).await.map(|_| ()).expect_err("a refusal");
    assert!(second.message().contains("already"), "{second:?}");
    // This vocabulary is not spread.
    let parts = link_of(&workers[1], &grant, grant.epoch, true).await.map(|_| ()).expect_err("a refusal");
    assert!(parts.message().contains("no link is expected here"), "{parts:?}");
    drop(talk);
    // And it is over with its session.
    until(|| async { link(&workers[1], &grant, grant.epoch).await.is_err_and(|s| s.message().contains("is over")) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_epoch_is_refused_on_collectives() {
    for kind in [CollectiveKind::Unix, CollectiveKind::Tcp] {
        let workers = start_with(&plan(1, 2), kind, Deadlines { meet: LONG, hello: LONG, ..Deadlines::default() }).await;
        let grant = acquire(&workers).await.expect("a free replica");
        let _talk = Talk::begin(&workers[0], &grant).await;
        until(|| async { workers[0].probe().await.highest == Some(encode_epoch(grant.epoch)) }).await;
        // The test plays rank 1.
        let peer =
            |w: &wire::WorkerAddress| Peer { address: w.collective_address.parse().expect("an address"), incarnation: w.incarnation };
        let group = |epoch| Group { kind, epoch, stage: 0, rank: 1, peers: grant.workers.iter().map(peer).collect() };
        let waits = Waits { meet: LONG, exchange: LONG, spin: std::time::Duration::ZERO };
        for stale in [before(grant.epoch), Epoch { session: grant.epoch.session + 1, ..grant.epoch }] {
            let refused = join(group(stale), &Lobby::default(), None, waits).await;
            assert!(matches!(&refused, Err(JoinError::Refused { rank: 0, reason }) if reason.contains("epoch")), "{refused:?}");
        }
        let mut other = group(grant.epoch);
        other.peers[0].incarnation += 1;
        let refused = join(other, &Lobby::default(), None, waits).await;
        assert!(matches!(&refused, Err(JoinError::Refused { reason, .. }) if reason.contains("incarnation")), "{refused:?}");
        // Control.
        let joined = join(group(grant.epoch), &Lobby::default(), None, waits).await.expect("the present epoch's collective");
        assert_eq!((joined.collective.rank(), joined.collective.ranks()), (1, 2));
    }
}
