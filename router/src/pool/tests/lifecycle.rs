//! Routers that come, go, die and stand still.

use std::time::Instant;

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
        assert!(router.replicas().iter().all(|r| r.sequences == 0));
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
