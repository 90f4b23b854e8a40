//! Real handshakes on loopback, with authorities made for each test.

use std::{fs, net::SocketAddr, time::SystemTime};

use futures_util::StreamExt;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Duration, timeout},
};

use super::{
    testing::{Authority, Process, connect_unnamed},
    *,
};

/// Nothing here takes this long unless it hangs.
const LONG: Duration = Duration::from_secs(20);

const ROUTER: &str = "spiffe://skein/ns/a/router";
const WORKER: &str = "spiffe://skein/ns/a/replica/r0/stage/0";

async fn listen(identity: &Identity, protocol: Protocol) -> (SocketAddr, Incoming) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    (address, Incoming::new(listener, Some(identity.clone()), protocol))
}

/// Sends a byte from `client` to whoever listens at `address`, and has one come back.
async fn call(client: &Identity, expected: &str, protocol: Protocol, address: SocketAddr) -> std::io::Result<u8> {
    let stream = TcpStream::connect(address).await?;
    let mut proven = connect(client, &expected.parse().expect("a name"), protocol, stream).await?;
    proven.write_all(&[7]).await?;
    proven.read_u8().await
}

/// Takes connections and gives every byte back, plus one; says who came.
fn echo(mut incoming: Incoming) -> tokio::sync::mpsc::Receiver<Option<Name>> {
    // No test opens more connections.
    let (peers, seen) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        while let Some(Ok(mut accepted)) = incoming.next().await {
            peers.send(accepted.peer.0.clone()).await.expect("somebody listens");
            tokio::spawn(async move {
                if let Ok(byte) = accepted.read_u8().await {
                    accepted.write_all(&[byte + 1]).await.expect("written");
                }
            });
        }
    });
    seen
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let ca = Authority::new();
    let (router, worker) = (ca.process(ROUTER), ca.process(WORKER));
    let (address, incoming) = listen(&worker.identity, Protocol::Grpc).await;
    let mut seen = echo(incoming);
    let answer = timeout(LONG, call(&router.identity, WORKER, Protocol::Grpc, address)).await.expect("in time");
    assert_eq!(answer.expect("an answer"), 8);
    assert_eq!(seen.recv().await, Some(Some(router.identity.name())));
}

#[tokio::test]
async fn whoever_is_not_expected_or_not_admitted_is_refused() {
    let (ca, other) = (Authority::new(), Authority::new());
    let worker = ca.process(WORKER);
    let (address, incoming) = listen(&worker.identity, Protocol::Grpc).await;
    let mut seen = echo(incoming);
    let refused = |client: Identity, expected: &'static str, protocol| async move {
        timeout(LONG, call(&client, expected, protocol, address)).await.expect("in time").expect_err("a refusal")
    };
    // Another stage answers than was asked for.
    let error = refused(ca.process(ROUTER).identity, "spiffe://skein/ns/a/replica/r0/stage/1", Protocol::Grpc).await;
    assert!(error.to_string().contains("stage/0 answered, expected"), "{error}");
    // A router of another namespace, and a worker of another replica.
    for stranger in ["spiffe://skein/ns/b/router", "spiffe://skein/ns/a/replica/r1/stage/0", "spiffe://skein/operator"] {
        refused(ca.process(stranger).identity, WORKER, Protocol::Grpc).await;
    }
    // The right name from a stranger's authority.
    let stranger = other.process(ROUTER);
    other.write(stranger.folder.path(), &[&other, &ca], &[ROUTER]);
    refused(Identity::open(stranger.folder.path()).expect("an identity"), WORKER, Protocol::Grpc).await;
    // The wrong kind of connection.
    refused(ca.process(ROUTER).identity, WORKER, Protocol::Collective).await;
    // No certificate at all, encrypted or not. A client hears so when it reads.
    let unnamed = connect_unnamed(Protocol::Grpc, TcpStream::connect(address).await.expect("a connection")).await;
    if let Ok(mut unnamed) = unnamed {
        timeout(LONG, unnamed.read_u8()).await.expect("in time").expect_err("it has no name");
    }
    let mut plain = TcpStream::connect(address).await.expect("a connection");
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("written");
    let mut rest = Vec::new();
    // Closed, with an alert or without.
    let _ = timeout(LONG, plain.read_to_end(&mut rest)).await.expect("in time");
    assert!(seen.try_recv().is_err(), "a refused connection was handed on");
}

#[tokio::test]
async fn a_certificate_is_replaced_under_a_running_process() {
    let (old, new) = (Authority::new(), Authority::new());
    let (router, worker) = (old.process(ROUTER), old.process(WORKER));
    let (address, incoming) = listen(&worker.identity, Protocol::Grpc).await;
    let _seen = echo(incoming);
    let call = || async { timeout(LONG, call(&router.identity, WORKER, Protocol::Grpc, address)).await.expect("in time") };
    let standing = TcpStream::connect(address).await.expect("a connection");
    let mut standing = connect(&router.identity, &WORKER.parse().expect("a name"), Protocol::Grpc, standing).await.expect("proven");
    // The worker goes over to a new authority, which the router does not know yet.
    let replace = |process: &Process, by: &Authority, trusted: &[&Authority], name: &str| {
        by.write(process.folder.path(), trusted, &[name]);
        let file = fs::File::options().append(true).open(process.folder.path().join(CERTIFICATE)).expect("the file");
        file.set_modified(SystemTime::now() + Duration::from_secs(60)).expect("a time");
        process.identity.look_now();
    };
    replace(&worker, &new, &[&old, &new], WORKER);
    call().await.expect_err("the router does not know the new authority");
    replace(&router, &old, &[&old, &new], ROUTER);
    assert_eq!(call().await.expect("an answer"), 8);
    replace(&router, &new, &[&new], ROUTER);
    assert_eq!(call().await.expect("an answer"), 8);
    // A certificate of another process is not taken, and neither is a damaged one.
    replace(&router, &new, &[&new], "spiffe://skein/ns/a/replica/r9/stage/0");
    assert_eq!(call().await.expect("an answer"), 8);
    fs::write(router.folder.path().join(KEY), "no key").expect("written");
    router.identity.look_now();
    assert_eq!(call().await.expect("an answer"), 8);
    // What stood before stands.
    standing.write_all(&[1]).await.expect("written");
    assert_eq!(timeout(LONG, standing.read_u8()).await.expect("in time").expect("an answer"), 2);
}

#[tokio::test]
async fn files_can_be_handed_over() {
    let (ca, other) = (Authority::new(), Authority::new());
    let given = |by: &Authority, name: &str| {
        let process = by.process(name);
        [CERTIFICATE, KEY, TRUSTED].map(|file| fs::read_to_string(process.folder.path().join(file)).expect("the file"))
    };
    let files = given(&ca, "spiffe://skein/operator");
    let operator = Identity::given([&files[0], &files[1], &files[2]]).expect("an identity");
    let (address, incoming) = listen(&operator, Protocol::Grpc).await;
    let _seen = echo(incoming);
    let call = |client: Identity| async move {
        timeout(LONG, call(&client, "spiffe://skein/operator", Protocol::Grpc, address)).await.expect("in time")
    };
    assert_eq!(call(ca.process(ROUTER).identity).await.expect("an answer"), 8);
    let files = given(&other, "spiffe://skein/operator");
    operator.replace([&files[0], &files[1], &files[2]]).expect("other files");
    assert_eq!(call(other.process(ROUTER).identity).await.expect("an answer"), 8);
    call(ca.process(ROUTER).identity).await.expect_err("an authority of before");
    operator.replace([&files[0], "", &files[2]]).expect_err("no key");
    assert_eq!(call(other.process(ROUTER).identity).await.expect("an answer"), 8);
}

#[test]
fn damaged_folders_are_refused_by_file() {
    let ca = Authority::new();
    let folder = TempDir::new().expect("a folder");
    let open = || Identity::open(folder.path()).expect_err("a refusal").to_string();
    assert!(open().contains("failed to read") && open().contains(CERTIFICATE), "{}", open());
    ca.write(folder.path(), &[&ca], &[]);
    assert!(open().contains("no URI name"), "{}", open());
    ca.write(folder.path(), &[&ca], &[ROUTER, WORKER]);
    assert!(open().contains("several URI names"), "{}", open());
    ca.write(folder.path(), &[&ca], &["https://example.com"]);
    assert!(open().contains("no name of a router"), "{}", open());
    ca.write(folder.path(), &[], &[ROUTER]);
    assert!(open().contains(TRUSTED), "{}", open());
    ca.write(folder.path(), &[&ca], &[ROUTER]);
    let certificate = fs::read(folder.path().join(CERTIFICATE)).expect("the file");
    ca.write(folder.path(), &[&ca], &[ROUTER]);
    fs::write(folder.path().join(CERTIFICATE), certificate).expect("written");
    assert!(open().contains("do not belong together"), "{}", open());
}
