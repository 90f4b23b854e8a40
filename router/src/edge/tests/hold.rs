//! Requests that arrive before there is a replica, or before its card is known.

use plan::fleet::{HoldSettings, Stopped};
use tokio::time::{Instant, advance};

use super::*;

const HOLD: HoldSettings = HoldSettings { requests: 2, seconds: 300 };

fn empty(hold: Option<HoldSettings>) -> FleetState {
    let mut state = state(&[]);
    state.deployments[0].serving.hold = hold;
    state
}

fn counts(world: &World) -> (usize, usize) {
    let load = &world.edge.load()[0];
    (load.held, load.queued)
}

/// Lets tasks go on until `condition` holds.
async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn without_replicas_requests_are_held_and_served_by_the_first() {
    let world = world(empty(Some(HOLD)));
    let card = tokio::spawn({
        let edge = world.edge.clone();
        async move { edge.card("small").await }
    });
    until(|| counts(&world) == (1, 0)).await;
    let generation = generation(1, 20, 10);
    let stream = world.edge.submit("small", generation.clone()).expect("held");
    assert_eq!(counts(&world), (2, 0));
    match world.edge.submit("small", generation.clone()) {
        Err(SubmitError::HoldFull { held: 2, .. }) => {}
        other => panic!("expected a full hold, got {other:?}"),
    }
    let served = tokio::spawn(collect(stream));
    // Longer than the queue takes, and not as long as the hold does.
    advance(Duration::from_secs(100)).await;
    assert_eq!(counts(&world), (2, 0));
    world.update(|state| state.deployments[0].replicas.push(replica("r0")));
    let (tokens, end) = served.await.expect("it does not panic");
    assert_eq!((tokens, end.is_ok()), (solo(&generation), true));
    card.await.expect("it does not panic").expect("a card");
    assert_eq!(counts(&world), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_hold_ends_with_its_client_or_its_time() {
    let world = world(empty(Some(HOLD)));
    let dropped = world.edge.submit("small", generation(1, 5, 5)).expect("held");
    assert_eq!(counts(&world), (1, 0));
    drop(dropped);
    assert_eq!(counts(&world), (0, 0));
    let begun = Instant::now();
    let (card, (tokens, end)) =
        tokio::join!(world.edge.card("small"), collect(world.edge.submit("small", generation(1, 5, 5)).expect("held")));
    assert!(matches!(card, Err(SubmitError::Queue { seconds: 300, .. })), "{card:?}");
    assert!(tokens.is_empty() && matches!(end, Err(StreamError::Queue(300))), "{end:?}");
    assert_eq!(begun.elapsed().as_secs(), 300);
    assert_eq!(counts(&world), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn without_a_hold_nothing_waits_for_a_first_replica() {
    let world = world(empty(None));
    let begun = Instant::now();
    assert!(matches!(world.edge.submit("small", generation(1, 5, 5)), Err(SubmitError::NotReady(_))));
    assert!(matches!(world.edge.card("small").await, Err(SubmitError::NotReady(_))));
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn where_no_replica_is_wanted_requests_are_told_why() {
    for (why, words) in [(Stopped::Suspended, "suspended"), (Stopped::ScaledToZero, "scaled to zero")] {
        // One that drains finishes what it has begun, and takes nothing new.
        let draining = FleetReplica { draining: true, ..replica("r0") };
        for replicas in [vec![], vec![draining]] {
            let mut state = state(&replicas);
            state.deployments[0].serving.stopped = Some(why);
            let (world, begun) = (world(state), Instant::now());
            let refused = world.edge.submit("small", generation(1, 5, 5)).expect_err("refused");
            assert!(matches!(&refused, SubmitError::Stopped(_, told) if *told == why), "{refused}");
            assert!(refused.to_string().contains(words), "{refused}");
            assert!(matches!(world.edge.card("small").await, Err(SubmitError::Stopped(..))));
            assert_eq!(begun.elapsed(), Duration::ZERO);
        }
    }
    // A replica that serves still, or again, takes requests whatever the words.
    let mut state = state(&[replica("r0")]);
    state.deployments[0].serving.stopped = Some(Stopped::Suspended);
    let (world, generation) = (world(state), generation(1, 5, 5));
    let (tokens, end) = collect(world.edge.submit("small", generation.clone()).expect("admitted")).await;
    assert_eq!((tokens, end.is_ok()), (solo(&generation), true));
}

#[tokio::test(start_paused = true)]
async fn what_waits_is_told_when_no_replica_is_wanted_any_more() {
    let world = world(empty(Some(HOLD)));
    let begun = Instant::now();
    let edge = world.edge.clone();
    let card = tokio::spawn(async move { edge.card("small").await });
    let stream = tokio::spawn(collect(world.edge.submit("small", generation(1, 5, 5)).expect("held")));
    until(|| counts(&world) == (2, 0)).await;
    world.update(|state| state.deployments[0].serving.stopped = Some(Stopped::Suspended));
    let (tokens, end) = stream.await.expect("it does not panic");
    assert!(tokens.is_empty() && matches!(end, Err(StreamError::Stopped(_, Stopped::Suspended))), "{end:?}");
    assert!(matches!(card.await.expect("it does not panic"), Err(SubmitError::Stopped(..))));
    assert_eq!((begun.elapsed(), counts(&world)), (Duration::ZERO, (0, 0)));
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_in_the_queue_until_a_worker_gives_the_card() {
    let mut state = state(&[replica("r0")]);
    state.deployments[0].serving.queue_requests = 1;
    let world = world(state);
    let made = world.connector.get("r0").expect("made");
    made.set_fault(Fault::Down);
    let waiting = tokio::spawn({
        let edge = world.edge.clone();
        async move { edge.card("small").await }
    });
    until(|| counts(&world) == (0, 1)).await;
    assert!(matches!(world.edge.card("small").await, Err(SubmitError::QueueFull { queued: 1, .. })));
    made.set_fault(Fault::None);
    waiting.await.expect("it does not panic").expect("a card");
    assert_eq!(counts(&world), (0, 0));
    // Known from now on, whatever the workers do.
    made.set_fault(Fault::Down);
    world.edge.card("small").await.expect("known");
}

#[tokio::test(start_paused = true)]
async fn a_replica_is_said_to_have_the_sequences_of_this_router() {
    let world = world(state(&[replica("r0")]));
    world.edge.wait_replica("r0").await;
    let on = || world.edge.load()[0].replicas[0].sequences;
    let long = Generation { end_ids: Arc::new([]), ..generation(1, 20, 300) };
    let mut streams: Vec<TokenStream> = (0..3).map(|_| world.edge.submit("small", long.clone()).expect("admitted")).collect();
    next_tokens(&mut streams[0], 1).await;
    assert_eq!(on(), 3);
    world.connector.get("r0").expect("made").set_fault(Fault::Down);
    // They left with the session, though nobody has read so from them.
    until(|| !world.edge.ready("small")).await;
    assert_eq!(on(), 0);
    world.connector.get("r0").expect("made").set_fault(Fault::None);
    for stream in &mut streams {
        next_tokens(stream, 1).await;
    }
    assert_eq!(on(), 3);
    drop(streams);
    until(|| on() == 0).await;
}
