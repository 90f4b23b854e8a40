//! The router notices workers that fall silent or stand still. They are played by a service that does as it is told.

use std::{net::SocketAddr, pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use plan::{planner, step::Step};
use proto::{
    convert::encode_epoch,
    worker::{
        self as wire, AcquireReply, AcquireRequest, CardChunk, CardRequest, Heartbeat, LinkAck, LinkFrame, ProbeReply, ProbeRequest,
        SessionReply, SessionRequest, WorkerIdentity,
        session_reply::Message,
        session_request,
        worker_server::{Worker, WorkerServer},
    },
};
use router::replica::{Connector, ReplicaError, WorkersConnector};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{Instant, interval, timeout},
};
use tokio_stream::wrappers::{IntervalStream, ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

use crate::fleet::{LONG, plan};

/// What a worker does after its welcome.
#[derive(Clone, Copy)]
enum Part {
    /// Nothing.
    Silent,
    /// Says again and again that it is at the same layer.
    Stuck,
    /// Answers its step, then says again and again that it computes for another worker.
    Lending,
    /// Says that it waits for its input, which never comes.
    Waiting,
    /// Has not loaded its weights.
    Loading,
}

/// A worker that plays a part, the only rank of its stage.
struct Played {
    part: Part,
    stage: u32,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Worker for Played {
    type SessionStream = Answers<SessionReply>;

    async fn session(&self, request: Request<Streaming<SessionRequest>>) -> Result<Response<Self::SessionStream>, Status> {
        let epoch = wire::Epoch { number: 1, session: 2 };
        let welcome = Message::Welcome(wire::Welcome { version: 1, epoch: Some(epoch), ..wire::Welcome::default() });
        let heartbeat = match self.part {
            Part::Silent | Part::Loading => None,
            Part::Stuck | Part::Lending => Some(Heartbeat { step: 1, layer: 2, finished: 0 }),
            Part::Waiting => Some(Heartbeat::default()),
        };
        let beats = IntervalStream::new(interval(Duration::from_millis(100))).filter_map(move |_| std::future::ready(heartbeat));
        let mut requests = request.into_inner();
        let (answer, answers) = mpsc::channel(1);
        let answers_steps = matches!(self.part, Part::Lending);
        // The requests are read to their end, as a worker would.
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                if let (true, Some(session_request::Message::Step(step))) = (answers_steps, request.message) {
                    answer.send(Message::Step(wire::StepReply { step: step.id, ..wire::StepReply::default() })).await.expect("a stream");
                }
            }
        });
        let said = stream::select(beats.map(Message::Heartbeat), ReceiverStream::new(answers));
        let all = stream::once(std::future::ready(welcome)).chain(said);
        Ok(Response::new(Box::pin(all.map(|message| Ok(SessionReply { message: Some(message) })))))
    }

    type LinkStream = Answers<LinkAck>;

    async fn link(&self, _request: Request<Streaming<LinkFrame>>) -> Result<Response<Self::LinkStream>, Status> {
        Err(Status::unimplemented("links are not played"))
    }

    async fn probe(&self, _request: Request<ProbeRequest>) -> Result<Response<ProbeReply>, Status> {
        let identity = WorkerIdentity { replica: "played".into(), stage: self.stage, rank: 0, incarnation: 1 };
        let (loaded, progress) = (!matches!(self.part, Part::Loading), 0.42);
        let (fetched_bytes, fetch_bytes) = (30, 70);
        Ok(Response::new(ProbeReply { identity: Some(identity), loaded, progress, fetched_bytes, fetch_bytes, ..ProbeReply::default() }))
    }

    async fn acquire(&self, request: Request<AcquireRequest>) -> Result<Response<AcquireReply>, Status> {
        let workers = request.into_inner().workers;
        Ok(Response::new(AcquireReply { epoch: Some(encode_epoch(plan::worker::Epoch { number: 1, session: 2 })), workers }))
    }

    type CardStream = Answers<CardChunk>;

    async fn card(&self, _request: Request<CardRequest>) -> Result<Response<Self::CardStream>, Status> {
        Err(Status::unimplemented("cards are not played"))
    }
}

/// How a session with stages of one worker each that play `parts` ends, and how long that takes after a step was sent.
async fn ends(parts: &[Part]) -> (ReplicaError, Duration) {
    let (mut servers, mut workers) = (Vec::new(), Vec::new());
    for (&part, stage) in parts.iter().zip(0..) {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a port");
        workers.push(vec![listener.local_addr().expect("an address").to_string()]);
        let server =
            Server::builder().add_service(WorkerServer::new(Played { part, stage })).serve_with_incoming(TcpIncoming::from(listener));
        servers.push(tokio::spawn(server));
    }
    let fleet = plan::fleet::FleetReplica {
        name: "played".into(),
        revision: String::new(),
        numerics: String::new(),
        weight: 1,
        draining: false,
        limits: planner::limits(&plan(1, 1), false),
        workers,
        draft: None,
    };
    let replica = WorkersConnector::new(None).replica(&fleet);
    let begun = Instant::now();
    let ended = match timeout(LONG, replica.open()).await.expect("in time") {
        Err(error) => error,
        Ok(mut session) => {
            session.steps.send(Step { id: 1, ..Step::default() }).await.expect("a session");
            timeout(LONG, session.replies.recv()).await.expect("in time").expect("an error").expect_err("an error")
        }
    };
    servers.iter().for_each(tokio::task::JoinHandle::abort);
    (ended, begun.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_worker_is_noticed_within_two_seconds() {
    let (error, after) = ends(&[Part::Silent]).await;
    assert!(matches!(error, ReplicaError::Silent { millis: 1000..2000, .. }), "{error:?}");
    assert!(after >= Duration::from_secs(1), "after {after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stands_still_is_noticed() {
    let (error, after) = ends(&[Part::Stuck]).await;
    assert!(matches!(error, ReplicaError::Stuck { step: 1, layer: 2, .. }), "{error:?}");
    assert!(after >= Duration::from_secs(2), "after {after:?}");
}

/// A first stage that has answered its steps may still owe the last one a part of their logits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stands_still_for_another_is_noticed() {
    let (error, after) = ends(&[Part::Lending, Part::Waiting]).await;
    assert!(matches!(error, ReplicaError::Stuck { step: 1, layer: 2, .. }), "{error:?}");
    assert!(after >= Duration::from_secs(2), "after {after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_all_wait_are_noticed() {
    let (error, _) = ends(&[Part::Waiting]).await;
    assert!(matches!(error, ReplicaError::Stuck { step: 1, .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_loads_says_how_far_it_is() {
    let (error, _) = ends(&[Part::Loading]).await;
    assert!(matches!(error, ReplicaError::Loading { percent: 42 | 41, .. }), "{error:?}");
}
