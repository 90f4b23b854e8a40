//! Peers that stall, that are somebody else or carry no token; workers that announce themselves.

use std::sync::atomic::{AtomicBool, Ordering};

use identity::{Dialer, testing::Authority};
use proto::{
    bearer::Bearer,
    pool::{
        Announcement, EdgeMessage, Hello, OwnerMessage, StateRequest, Status as Said, edge_message, owner_message, pool_client::PoolClient,
        pool_server,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming, transport::server::TcpIncoming};

use super::*;

/// A router that says that it drives everything until it is sent a sequence, and then does nothing more.
#[derive(Default)]
struct Stalled(Arc<AtomicBool>);

#[tonic::async_trait]
impl pool_server::Pool for Stalled {
    type JoinStream = ReceiverStream<Result<OwnerMessage, Status>>;

    async fn join(&self, request: Request<Streaming<EdgeMessage>>) -> Result<Response<Self::JoinStream>, Status> {
        if self.0.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let (stalled, mut incoming) = (self.0.clone(), request.into_inner());
        let (sender, messages) = mpsc::channel(4);
        let say = |message| Ok(OwnerMessage { message: Some(message) });
        tokio::spawn(async move {
            let welcome = proto::pool::Welcome { version: 1, name: "router-1".to_owned() };
            sender.send(say(owner_message::Message::Welcome(welcome))).await.expect("room");
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            loop {
                tokio::select! {
                    message = incoming.message() => match message {
                        Ok(Some(EdgeMessage { message: Some(edge_message::Message::Submit(_)) })) => break,
                        Ok(Some(_)) => {}
                        _ => return,
                    },
                    _ = ticks.tick() => {
                        let replica = |i: usize| proto::pool::ReplicaStatus { replica: format!("tiny-r{i}"), ready: true, ..Default::default() };
                        let status = Said { term: 1, number: 1, leaving: false, replicas: (0..REPLICAS).map(replica).collect() };
                        if sender.send(say(owner_message::Message::Status(status))).await.is_err() {
                            return;
                        }
                    }
                }
            }
            // The stream stays open, and nothing more that comes is read.
            stalled.store(true, Ordering::Relaxed);
            sender.closed().await;
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn state(&self, _: Request<StateRequest>) -> Result<Response<proto::fleet::FleetState>, Status> {
        Err(Status::unavailable("it stalls"))
    }

    async fn announce(&self, _: Request<Announcement>) -> Result<Response<proto::pool::AnnounceReply>, Status> {
        Err(Status::unavailable("it stalls"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_stalls_is_left_and_its_sequences_go_on() {
    let ((one, one_at), (two, two_at)) = (listener().await, listener().await);
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(pool_server::PoolServer::new(Stalled::default()))
            .serve_with_incoming(TcpIncoming::from(two)),
    );
    let connector = Arc::new(Shared::default());
    let router = Router::start("router-0", one, &connector, state(1, &[("router-0", one_at), ("router-1", two_at)]), Vec::new());
    let theirs = |r: &ReplicaLoad| r.ready && !r.drives;
    until("the other to have replicas", || router.is_complete() && router.replicas().iter().any(theirs)).await;
    let generation = generation(5, 30);
    let stuck: Vec<TokenStream> = (0..2 * REPLICAS).map(|_| router.edge.submit("tiny", generation.clone()).expect("admitted")).collect();
    assert!(router.replicas().iter().any(|r| theirs(r) && r.sequences > 0), "some are where nothing happens: {:?}", router.replicas());
    for stream in stuck {
        let (tokens, end) = rest(stream).await;
        assert_eq!(tokens, solo(&generation));
        assert!(end.is_ok());
    }
}

async fn client(address: SocketAddr) -> PoolClient<tonic::transport::Channel> {
    PoolClient::connect(format!("http://{address}")).await.expect("it listens")
}

fn with<T>(token: Option<&str>, message: T) -> Request<T> {
    use tonic::service::Interceptor;
    let call = Bearer::new(token.map(str::to_owned)).call(Request::new(())).expect("a token for headers");
    let (metadata, extensions, ()) = call.into_parts();
    Request::from_parts(metadata, extensions, message)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused() {
    let ((one, one_at), connector) = (listener().await, Arc::new(Shared::default()));
    let _router = Router::start("router-0", one, &connector, state(1, &[("router-0", one_at)]), Vec::new());
    let mut client = client(one_at).await;
    for (token, code) in [(None, Some(Code::Unauthenticated)), (Some(WORKERS), Some(Code::Unauthenticated)), (Some(TOKEN), None)] {
        assert_eq!(client.state(with(token, StateRequest {})).await.err().map(|s| s.code()), code, "{token:?}");
    }
    for (to, max, code) in
        [("router-9", 1, Some(Code::FailedPrecondition)), ("router-0", 0, Some(Code::FailedPrecondition)), ("router-0", 1, None)]
    {
        let hello = Hello { version_min: 0, version_max: max, from: "router-1".to_owned(), to: to.to_owned() };
        let hello = EdgeMessage { message: Some(edge_message::Message::Hello(hello)) };
        let (said, messages) = mpsc::channel(1);
        said.try_send(hello).expect("room");
        let mut replies = client.join(with(Some(TOKEN), ReceiverStream::new(messages))).await.expect("a stream").into_inner();
        assert_eq!(replies.message().await.err().map(|s| s.code()), code, "{to}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_names_are_proven_each_caller_is_held_to_its_own() {
    const ROUTER: &str = "spiffe://skein/ns/a/router";
    let (authority, connector) = (Authority::new(), Arc::new(Shared::default()));
    let processes = [authority.process(ROUTER), authority.process(ROUTER)];
    let ((one, one_at), (two, two_at)) = (listener().await, listener().await);
    let state = state(1, &[("router-0", one_at), ("router-1", two_at)]);
    let identity = |i: usize| Some(processes[i].identity.clone());
    let first = Router::start_as("router-0", one, &connector, state.clone(), (Vec::new(), identity(0), ""));
    let second = Router::start_as("router-1", two, &connector, state, (Vec::new(), identity(1), ""));
    until("every replica at both routers", || first.is_complete() && second.is_complete()).await;
    assert!(!first.drives().is_empty() && !second.drives().is_empty(), "they found each other");
    // A worker may say where it is, and nothing else, and nothing of others.
    let worker = authority.process("spiffe://skein/ns/a/replica/tiny-r0/stage/0");
    let router = worker.identity.name().router().expect("of its namespace");
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{one_at}")).expect("an address");
    let channel = endpoint.connect_with_connector(Dialer::new(Some((worker.identity.clone(), router)))).await.expect("it is admitted");
    let mut client = PoolClient::new(channel);
    let asked = client.state(with(Some(TOKEN), StateRequest {})).await;
    assert_eq!(asked.err().map(|s| s.code()), Some(Code::PermissionDenied));
    let announcement =
        |replica: &str| Announcement { replica: replica.to_owned(), address: "10.9.8.7:7071".to_owned(), ..Announcement::default() };
    for (replica, code) in [("tiny-r1", Some(Code::PermissionDenied)), ("tiny-r0", None)] {
        let said = client.announce(with(Some(WORKERS), announcement(replica))).await;
        assert_eq!(said.err().map(|s| s.code()), code, "{replica}");
    }
    // Who proves nothing gets no connection.
    let plain = PoolClient::connect(format!("http://{one_at}")).await;
    if let Ok(mut plain) = plain {
        plain.state(with(Some(TOKEN), StateRequest {})).await.expect_err("no plain calls");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_announces_itself_is_driven_where_it_is_now() {
    let (connector, first, second) = pair().await;
    // It asks any router, which may not be the one that drives its replica.
    let replica = second.drives().remove(0);
    let number = replica.trim_start_matches("tiny-r").to_owned();
    let address = first.store.current().routers[0].address.parse().expect("an address");
    let announcement = |revision: &str| Announcement {
        replica: replica.clone(),
        stage: 0,
        rank: 0,
        revision: revision.to_owned(),
        address: "10.9.8.7:7071".to_owned(),
        incarnation: 3,
    };
    let mut client = client(address).await;
    let mut refused = async |token, revision| client.announce(with(Some(token), announcement(revision))).await.err().map(|s| s.code());
    assert_eq!(refused("other", "1").await, Some(Code::Unauthenticated));
    assert_eq!(refused(WORKERS, "2").await, Some(Code::FailedPrecondition));
    assert_eq!(connector.addresses(&replica), [format!("worker-{number}:7071")]);
    assert_eq!(refused(WORKERS, "1").await, None);
    let there = || connector.addresses(&replica).contains(&"10.9.8.7:7071".to_owned());
    until("its owner to look there", || there() && second.drives().contains(&replica)).await;
    until("both to reach it", || first.is_complete() && second.is_complete()).await;
    // A state that names another address knows better.
    let mut later = first.store.current();
    later.number += 1;
    let moved = later.deployments[0].replicas.iter_mut().find(|r| r.name == replica).expect("it is there");
    moved.workers[0][0] = "10.9.8.8:7071".to_owned();
    for router in [&first, &second] {
        router.store.take(later.clone()).await.expect("no file");
    }
    until("the place of the later state", || connector.addresses(&replica).contains(&"10.9.8.8:7071".to_owned())).await;
    until("it to be driven there", || second.drives().contains(&replica)).await;
}
