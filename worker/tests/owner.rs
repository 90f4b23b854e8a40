//! Owners that fall silent, do not read, or constrain what is drawn.

use std::time::Duration;

use plan::{
    step::{Begin, Input, Mask, OutputValue, Sampling, SequenceStep, Step, TableChange, Want, WantKind},
    worker::{CollectiveKind, Epoch},
};
use proto::{
    convert::{decode_output, encode_mask, encode_step},
    worker::{session_reply, session_request::Message},
};
use worker::Deadlines;

use crate::fleet::{LONG, Running, Talk, acquire, plan, start_with};

/// Step `id`: draws one sequence's token after `position`, under a mask or not.
fn step(id: u64, position: u32, masked: bool) -> Step {
    let sampling = Sampling { masked, ..Sampling::default() };
    let part = SequenceStep {
        sequence: 1,
        first_position: position,
        input: Input::Ids(vec![7]),
        tables: if id == 1 { vec![TableChange { group: 0, first: 0, blocks: (0..8).collect() }] } else { Vec::new() },
        wants: vec![Want { offset: 0, kind: WantKind::Sample }],
        begin: (id == 1).then(|| Box::new(Begin { ids: vec![7], prompt_len: 1, sampling })),
        adapter: 0,
        second: 0,
    };
    Step { id, sequences: vec![part], ..Step::default() }
}

async fn begin(workers: &[Running]) -> (Talk, Epoch) {
    let grant = acquire(workers).await.expect("a free replica");
    let mut talk = Talk::begin(&workers[0], &grant).await;
    talk.welcomed().await;
    (talk, grant.epoch)
}

async fn drawn(talk: &mut Talk) -> u32 {
    match talk.next().await {
        Some(session_reply::Message::Step(reply)) => match decode_output(reply.outputs[0].clone()).expect("an output").value {
            OutputValue::Token { id, .. } => id,
            other => panic!("{other:?} came, expected a token"),
        },
        other => panic!("{other:?} came, expected a reply"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mask_constrains_the_draw_it_follows() {
    let workers = start_with(&plan(1, 1), CollectiveKind::Unix, Deadlines { mask: LONG, ..Deadlines::default() }).await;
    let mut seen = Vec::new();
    for masked in [false, true] {
        let (mut talk, epoch) = begin(&workers).await;
        talk.say(Message::Step(encode_step(epoch, &step(1, 0, masked)))).await;
        if masked {
            let free = seen[0];
            let other = if free == 3 { 4 } else { 3 };
            talk.say(Message::Mask(encode_mask(epoch, 1, 1, &Mask::Ids(vec![other])))).await;
            assert_eq!(drawn(&mut talk).await, other);
            // The same for the next one.
            talk.say(Message::Step(encode_step(epoch, &step(2, 1, true)))).await;
            talk.say(Message::Mask(encode_mask(epoch, 2, 1, &Mask::Unchanged))).await;
            assert_eq!(drawn(&mut talk).await, other);
            // A mask ahead of its step is none.
            talk.say(Message::Mask(encode_mask(epoch, 3, 1, &Mask::Unchanged))).await;
            assert_eq!(talk.failure().await.reason, "protocol");
        } else {
            seen.push(drawn(&mut talk).await);
            talk.say(Message::Close(proto::worker::Close {})).await;
            assert_eq!(talk.next().await, None);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mask_that_does_not_come_ends_the_session() {
    let deadlines = Deadlines { mask: Duration::from_millis(200), ..Deadlines::default() };
    let workers = start_with(&plan(1, 1), CollectiveKind::Unix, deadlines).await;
    let (mut talk, epoch) = begin(&workers).await;
    talk.say(Message::Step(encode_step(epoch, &step(1, 0, true)))).await;
    assert_eq!(talk.failure().await.reason, "mask");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_owner_loses_its_session() {
    let deadlines = Deadlines { owner: Duration::from_millis(300), ..Deadlines::default() };
    let workers = start_with(&plan(1, 1), CollectiveKind::Unix, deadlines).await;
    let (mut talk, _) = begin(&workers).await;
    let failure = talk.failure().await;
    assert_eq!((failure.reason.as_str(), failure.detail.as_str()), ("peer_lost", "the owner has been silent for 300 ms"));
    // The replica is free.
    begin(&workers).await;
}
