//! Peers that stall, that are somebody else or carry no token; workers that announce themselves.

use std::sync::atomic::{AtomicBool, Ordering};

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

/// A router that welcomes another and says that it drives everything, and then does nothing more.
#[derive(Default)]
struct Stalled(AtomicBool);

#[tonic::async_trait]
impl pool_server::Pool for Stalled {
    type JoinStream = ReceiverStream<Result<OwnerMessage, Status>>;

    async fn join(&self, _: Request<Streaming<EdgeMessage>>) -> Result<Response<Self::JoinStream>, Status> {
        if self.0.swap(true, Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let (sender, messages) = mpsc::channel(4);
        let replica = |i: usize| proto::pool::ReplicaStatus { replica: format!("tiny-r{i}"), ready: true, ..Default::default() };
        let status = Said { term: 1, number: 1, leaving: false, replicas: (0..REPLICAS).map(replica).collect() };
        let welcome = proto::pool::Welcome { version: 1, name: "router-1".to_owned() };
        for message in [owner_message::Message::Welcome(welcome), owner_message::Message::Status(status)] {
            sender.send(Ok(OwnerMessage { message: Some(message) })).await.expect("room");
        }
        // The stream stays open, and nothing that comes is read.
        tokio::spawn(async move { sender.closed().await });
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
    until("the other to say that it has everything", || router.is_complete()).await;
    assert!(router.drives().is_empty());
    let generation = generation(5, 30);
    let stuck: Vec<TokenStream> = (0..4).map(|_| router.edge.submit("tiny", generation.clone()).expect("admitted")).collect();
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
