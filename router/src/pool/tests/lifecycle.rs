//! Routers that come, go, die and stand still.

use std::time::Instant;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_routers_share_replicas_and_each_reaches_every_one() {
    let (_connector, first, second) = pair().await;
    let (ours, theirs) = (first.drives(), second.drives());
    assert_eq!(ours.len() + theirs.len(), REPLICAS, "{ours:?} {theirs:?}");
    assert!(!ours.is_empty() && !theirs.is_empty() && ours.iter().all(|name| !theirs.contains(name)));
    // One sequence for each replica, least loaded first, from either router.
    for router in [&first, &second] {
        let generations: Vec<Generation> = (0..2 * REPLICAS as u64).map(|i| generation(i, 40)).collect();
        let mut streams = Vec::new();
        for generation in &generations {
            let mut stream = router.edge.submit("tiny", generation.clone()).expect("admitted");
            let begun = head(&mut stream, 1).await;
            streams.push((stream, begun));
        }
        assert!(router.replicas().iter().all(|r| r.sequences > 0), "every replica has some: {:?}", router.replicas());
        for ((stream, begun), generation) in streams.into_iter().zip(&generations) {
            let (tokens, end) = rest(stream).await;
            assert_eq!([begun, tokens].concat(), solo(generation));
            assert_eq!(end.expect("it finished"), FinishReason::Length);
        }
        // A router that drives for another counts a sequence until it knows that its end was taken.
        until("nothing left on any replica", || router.replicas().iter().all(|r| r.sequences == 0)).await;
        assert_eq!(router.edge.load()[0].resumed_total, 0, "nothing was lost on the way");
    }
    // Control: another seed is another stream.
    assert_ne!(solo(&generation(1, 40)), solo(&generation(2, 40)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_dies_leaves_the_streams_of_others_whole_and_its_replicas_to_them() {
    let (_connector, mut first, second) = pair().await;
    let generations: Vec<Generation> = (0..9).map(|i| generation(i, 300)).collect();
    let mut streams = Vec::new();
    for generation in &generations {
        let mut stream = second.edge.submit("tiny", generation.clone()).expect("admitted");
        let begun = head(&mut stream, 2).await;
        streams.push((stream, begun));
    }
    let lost = first.drives();
    assert!(second.replicas().iter().any(|r| lost.contains(&r.name) && r.sequences > 0), "some are on the router that dies");
    first.kill();
    let died = Instant::now();
    until("every replica at the router that is left", || second.drives().len() == REPLICAS).await;
    assert!(died.elapsed() < Duration::from_secs(2), "{:?}", died.elapsed());
    for ((stream, begun), generation) in streams.into_iter().zip(&generations) {
        let (tokens, end) = rest(stream).await;
        assert_eq!([begun, tokens].concat(), solo(generation));
        assert!(end.is_ok());
    }
    assert!(second.edge.load()[0].resumed_total > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_leaves_hands_over_and_serves_its_clients_to_the_end() {
    let (_connector, first, second) = pair().await;
    let generation = generation(7, 300);
    let mut streams = Vec::new();
    for _ in 0..8 {
        let mut stream = first.edge.submit("tiny", generation.clone()).expect("admitted");
        let begun = head(&mut stream, 2).await;
        streams.push((stream, begun));
    }
    first.edge.leave();
    until("the other to drive everything", || second.drives().len() == REPLICAS && first.drives().is_empty()).await;
    until("the one that leaves to reach it all", || first.is_complete()).await;
    // It takes what its clients ask for until it is gone.
    let late = first.edge.submit("tiny", generation.clone()).expect("admitted");
    streams.push((late, Vec::new()));
    for (stream, begun) in streams {
        let (tokens, end) = rest(stream).await;
        assert_eq!([begun, tokens].concat(), solo(&generation));
        assert!(end.is_ok());
    }
    // When the other leaves too, somebody still has to.
    second.edge.leave();
    let again = second.edge.submit("tiny", generation.clone()).expect("admitted");
    assert_eq!(rest(again).await.0, solo(&generation));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_comes_takes_its_share_and_the_state_from_a_peer() {
    let connector = Arc::new(Shared::default());
    let ((one, one_at), (two, two_at)) = (listener().await, listener().await);
    let first = Router::start("router-0", one, &connector, state(1, &[("router-0", one_at)]), Vec::new());
    until("a router alone to drive everything", || first.drives().len() == REPLICAS).await;
    let generation = generation(3, 400);
    let mut stream = first.edge.submit("tiny", generation.clone()).expect("admitted");
    let begun = head(&mut stream, 2).await;
    let both = state(2, &[("router-0", one_at), ("router-1", two_at)]);
    assert!(first.store.take(both.clone()).await.expect("no file"));
    // The other knows nothing but a router to ask.
    let second = Router::start("router-1", two, &connector, FleetState::default(), vec![format!("http://{one_at}")]);
    until("the share of the second", || !second.drives().is_empty() && second.is_complete() && first.is_complete()).await;
    assert_eq!(second.store.number(), (1, 2));
    assert_eq!(first.drives().len() + second.drives().len(), REPLICAS);
    let (tokens, end) = rest(stream).await;
    assert_eq!([begun, tokens].concat(), solo(&generation));
    assert!(end.is_ok());
    // A later state reaches it the same way, though nobody sends it there.
    assert!(first.store.take(FleetState { number: 3, ..both }).await.expect("no file"));
    until("the later state", || second.store.number() == (1, 3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_alone_waits_for_nobody() {
    let (one, one_at) = listener().await;
    let connector = Arc::new(Shared::default());
    let alone = Router::start("router-0", one, &connector, state(1, &[("router-0", one_at)]), Vec::new());
    assert!(alone.replicas().iter().all(|r| r.drives), "from the very first moment");
    // Control: with another one in the state it has to ask first.
    let ((two, two_at), (_kept, other_at)) = (listener().await, listener().await);
    let connector = Arc::new(Shared::default());
    let state = state(1, &[("router-0", two_at), ("router-1", other_at)]);
    let waits = Router::start("router-0", two, &connector, state, Vec::new());
    assert!(waits.replicas().iter().all(|r| !r.drives));
    until("its replicas, once the other is known not to answer", || waits.drives().len() == REPLICAS).await;
}

/// A deployment that changes from the routers of its namespace to its own: all know each other, then others drive it. Every stream at either
/// goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routers_of_another_pool_take_over_and_no_stream_ends() {
    let connector = Arc::new(Shared::default());
    let ((one, one_at), (two, two_at)) = (listener().await, listener().await);
    let told = |number: u64, drivers: &str| {
        let mut state = state(number, &[("shared", one_at), ("own", two_at)]);
        state.routers[1].pool = "tiny".to_owned();
        state.deployments[0].drivers = drivers.to_owned();
        state
    };
    // Each pool numbers its own states.
    let first = Router::start("shared", one, &connector, told(7, ""), Vec::new());
    until("the first one to drive everything", || first.drives().len() == REPLICAS).await;
    let second = Router::start_as("own", two, &connector, told(1, ""), (Vec::new(), None, "tiny"));
    until("the second one to reach everything", || second.is_complete()).await;
    assert_eq!((first.drives().len(), second.drives().len()), (REPLICAS, 0), "it reaches them through the first");
    let generations: Vec<Generation> = (0..8).map(|i| generation(i, 300)).collect();
    let mut streams = Vec::new();
    for (router, generation) in [&first, &second].into_iter().cycle().zip(&generations) {
        let mut stream = router.edge.submit("tiny", generation.clone()).expect("admitted");
        let begun = head(&mut stream, 2).await;
        streams.push((stream, begun));
    }
    assert_eq!((first.store.number(), second.store.number()), ((1, 7), (1, 1)), "a state of another pool is not taken");

    assert!(first.store.take(told(8, "tiny")).await.expect("no file"));
    assert!(second.store.take(told(2, "tiny")).await.expect("no file"));
    until("the second one to drive everything", || second.drives().len() == REPLICAS && first.drives().is_empty()).await;
    until("the first one to reach everything", || first.is_complete()).await;
    assert!(first.edge.is_driven_elsewhere("tiny") && !second.edge.is_driven_elsewhere("tiny"));
    let late = generation(9, 40);
    streams.extend([&first, &second].map(|router| (router.edge.submit("tiny", late.clone()).expect("admitted"), Vec::new())));
    for ((stream, begun), generation) in streams.into_iter().zip(generations.iter().chain([&late, &late])) {
        let (tokens, end) = rest(stream).await;
        assert_eq!([begun, tokens].concat(), solo(generation));
        assert!(end.is_ok());
    }
    // What only others may drive is left alone when they are gone.
    drop(second);
    until("the first one to reach nothing", || !first.is_complete()).await;
    assert!(first.drives().is_empty());
}

/// A client that keeps its connection is let go while a model changes to other routers, so that it comes back to where a service leads; and
/// only then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_not_kept_while_a_model_changes_routers() {
    let connector = Arc::new(Shared::default());
    let (one, one_at) = listener().await;
    let first = Router::start("shared", one, &connector, state(1, &[("shared", one_at)]), Vec::new());
    let ((http, http_at), (grpc, grpc_at)) = (listener().await, listener().await);
    let options = crate::ApiOptions { patience: Duration::from_secs(6), ..crate::ApiOptions::default() };
    let serving = tokio::spawn(crate::serve(first.edge.clone(), http, grpc, options, std::future::pending()));
    let mut idle = TcpStream::connect(http_at).await.expect("a server");
    let ask = async |idle: &mut TcpStream| {
        idle.write_all(b"GET /live HTTP/1.1\r\nhost: skein\r\n\r\n").await.expect("it reads");
        assert!(idle.read(&mut [0; 4096]).await.expect("it answers") > 0);
    };
    let mut http2 = TcpStream::connect(grpc_at).await.expect("a server");
    http2.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("it reads");
    ask(&mut idle).await;
    // Control: nothing changes, and both are kept.
    let kept = Duration::from_millis(2500);
    assert!(timeout(kept, idle.read(&mut [0; 1])).await.is_err() && timeout(kept, farewell(&mut http2)).await.is_err());
    ask(&mut idle).await;
    let mut moved = state(2, &[("shared", one_at)]);
    moved.deployments[0].drivers = "tiny".to_owned();
    assert!(first.store.take(moved).await.expect("no file"));
    let let_go = Duration::from_secs(4);
    assert_eq!(timeout(let_go, idle.read(&mut [0; 1])).await.expect("it is closed").expect("in good order"), 0);
    timeout(let_go, farewell(&mut http2)).await.expect("it is told to go");
    serving.abort();
}

/// Reads frames of HTTP/2 until one of them is GOAWAY (RFC 9113, section 6.8).
async fn farewell(stream: &mut TcpStream) {
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.expect("a frame");
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        stream.read_exact(&mut vec![0; length]).await.expect("the rest of it");
        if head[3] == 7 {
            return;
        }
    }
}
