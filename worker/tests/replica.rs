//! Replicas of several workers, driven by the router, give the bits of one engine.

use std::sync::Arc;

use engine::{Engine, EngineOptions, NoMasks, StageOutput, WeightReader, collective::Solo};
use kernels::Isa;
use plan::{
    planner::Vocabulary,
    shard::{BLOCK_TOKENS, ExecutionPlan},
    step::{Begin, Input, Output, OutputValue, Pooled, Sampling, SequenceStep, Step, TableChange, Want, WantKind},
    worker::CollectiveKind,
};
use router::replica::{Connector, Replica, ReplicaError, WorkersConnector};
use source::{Source, SourceOptions};
use tokio::time::timeout;

use crate::fleet::{LONG, Running, TOKEN, fleet, model, plan, plan_of, start, start_of, tied};

/// Sequences of the batch, and tokens each of them draws.
const SEQUENCES: u64 = 3;
const DRAWS: u64 = 10;

/// Prompts of different lengths, the longest in two chunks, then draws that continue before they were seen.
pub(crate) fn steps(plan: &ExecutionPlan, ids: impl Fn(u64, usize) -> u32) -> Vec<Step> {
    let length = |sequence: u64| 5 + 9 * sequence as usize;
    let blocks = (length(SEQUENCES) + DRAWS as usize).div_ceil(BLOCK_TOKENS);
    let prompt = |sequence: u64| (0..length(sequence)).map(|i| ids(sequence, i)).collect::<Vec<_>>();
    let tables = |sequence: u64| {
        let first = (sequence as usize - 1) * blocks;
        let table =
            |group: usize| TableChange { group: group as u32, first: 0, blocks: (first..first + blocks).map(|b| b as u32).collect() };
        (0..plan.kv.groups.len()).map(table).collect::<Vec<_>>()
    };
    let want = |offset: usize, kind| Want { offset: offset as u32, kind };
    let begin = |sequence: u64| {
        let sampling = Sampling {
            temperature: 0.5 * (sequence - 1) as f32,
            top_p: 0.9,
            repetition_penalty: 1.1,
            seed: 1234 + sequence,
            logprobs: Some(3),
            ..Sampling::default()
        };
        Some(Box::new(Begin { ids: prompt(sequence), prompt_len: length(sequence) as u32, sampling }))
    };
    let part = |sequence: u64, first: usize, input: Input| SequenceStep {
        sequence,
        first_position: first as u32,
        input,
        tables: Vec::new(),
        wants: Vec::new(),
        begin: None,
        adapter: 0,
        second: 0,
    };
    // Everything but the end of the last prompt.
    let cut = length(SEQUENCES) - 7;
    let mut first = Step { id: 1, ..Step::default() };
    for sequence in 1..=SEQUENCES {
        let (prompt, last) = (prompt(sequence), sequence == SEQUENCES);
        let input = if last { prompt[..cut].to_vec() } else { prompt };
        let mut wants = vec![want(1, WantKind::Score { target: 7, top: 2 })];
        if !last {
            wants.push(want(input.len() - 1, WantKind::Sample));
        }
        first.sequences.push(SequenceStep {
            tables: tables(sequence),
            begin: begin(sequence),
            wants,
            ..part(sequence, 0, Input::Ids(input))
        });
    }
    let mut steps = vec![first];
    for draw in 0..DRAWS {
        let id = 2 + draw;
        let mut step = Step { id, ..Step::default() };
        for sequence in 1..=SEQUENCES {
            let mut next = if sequence == SEQUENCES && draw == 0 {
                part(sequence, cut, Input::Ids(prompt(sequence)[cut..].to_vec()))
            } else {
                let drawn = length(sequence) + draw as usize - usize::from(sequence == SEQUENCES);
                part(sequence, drawn, Input::Sampled { step: id - 1, drafts: Vec::new() })
            };
            let end = next.input.len() - 1;
            next.wants = vec![want(end, WantKind::Sample), want(end, WantKind::Logits), want(end, WantKind::Pooled(Pooled::HIDDEN))];
            step.sequences.push(next);
        }
        if draw == DRAWS - 1 {
            step.frees.push(1);
            step.sequences.remove(0);
        }
        steps.push(step);
    }
    steps.push(Step { id: DRAWS + 2, frees: vec![2, 3], ..Step::default() });
    steps
}

pub(crate) fn ids(sequence: u64, i: usize) -> u32 {
    (sequence as u32 * 97 + i as u32 * 31 + 5) % 500
}

struct Reader(Source);

impl WeightReader for Reader {
    fn read(&self, file: usize, range: std::ops::Range<u64>, into: &mut [u8]) -> std::io::Result<()> {
        self.0.read(file, range, into).map_err(std::io::Error::other)
    }

    fn is_at_hand(&self, file: usize, range: &std::ops::Range<u64>) -> bool {
        self.0.is_at_hand(file, range)
    }
}

/// What one engine makes of the steps.
pub(crate) fn solo(steps: &[Step]) -> Vec<Vec<Output>> {
    solo_of(&model(), steps)
}

fn solo_of(model: &str, steps: &[Step]) -> Vec<Vec<Output>> {
    let plan = plan_of(model, 1, 1, Vocabulary::Auto);
    let source = Reader(Source::open(model, SourceOptions::default()).expect("the fixture"));
    let isa = Isa::named("auto").expect("an instruction set");
    let options = EngineOptions { isa, threads: 1, max_batch_tokens: plan.max_batch_tokens, max_context: plan.max_context };
    let shard = &plan.stages[0].shards[0];
    let mut engine = Engine::load(&plan.config, shard, &plan.kv, options, &source, Box::new(Solo), &|_| {}).expect("an engine");
    let mut all: Vec<Vec<Output>> = Vec::new();
    for step in steps {
        let mut step = step.clone();
        for part in &mut step.sequences {
            if let Input::Sampled { step: from, .. } = part.input {
                let drawn = all[from as usize - 1].iter().find_map(|o| match o.value {
                    OutputValue::Token { id, .. } if o.sequence == part.sequence => Some(id),
                    _ => None,
                });
                part.input = Input::Ids(vec![drawn.expect("a token")]);
            }
        }
        match engine.run(&step, &[], &mut NoMasks).expect("a step") {
            StageOutput::Outputs(outputs) => all.push(outputs),
            other => panic!("{other:?} of the last stage"),
        }
    }
    all
}

pub(crate) fn connect(workers: &[Running], token: &str) -> Arc<dyn Replica> {
    WorkersConnector::new(Some(token.to_owned())).replica(&fleet(workers))
}

/// What a replica makes of the steps, all sent as soon as it takes them.
pub(crate) async fn driven(replica: &dyn Replica, steps: &[Step]) -> Result<Vec<Vec<Output>>, ReplicaError> {
    let mut session = timeout(LONG, replica.open()).await.expect("a session in time")?;
    let (sender, steps) = (session.steps.clone(), steps.to_vec());
    let count = steps.len();
    let sending = tokio::spawn(async move {
        for step in steps {
            if sender.send(step).await.is_err() {
                return;
            }
        }
    });
    let mut all = Vec::new();
    while all.len() < count {
        let reply = timeout(LONG, session.replies.recv()).await.expect("a reply in time").expect("a session that lasts")?;
        assert_eq!(reply.step, all.len() as u64 + 1);
        all.push(reply.outputs);
    }
    sending.await.expect("the sender");
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stages_and_ranks_give_the_bits_of_one_engine() {
    let expected = solo(&steps(&plan(1, 1), ids));
    assert!(expected.iter().flatten().count() > 60, "the steps ask for much");
    let ways = [
        (1, 1, CollectiveKind::SharedMemory),
        (2, 1, CollectiveKind::SharedMemory),
        (4, 1, CollectiveKind::SharedMemory),
        (1, 2, CollectiveKind::SharedMemory),
        (1, 3, CollectiveKind::Unix),
        (2, 2, CollectiveKind::SharedMemory),
        (2, 2, CollectiveKind::Unix),
        (2, 2, CollectiveKind::Tcp),
    ];
    for (pipeline, tensor, kind) in ways {
        let plan = plan(pipeline, tensor);
        let workers = start(&plan, kind).await;
        let replica = connect(&workers, TOKEN);
        assert_eq!(replica.stages(), pipeline);
        let got = driven(&*replica, &steps(&plan, ids)).await.expect("replies");
        assert!(got == expected, "pp {pipeline}, tp {tensor}, {kind:?} differs from one engine");
        // A second session starts from nothing: the same again.
        let again = driven(&*replica, &steps(&plan, ids)).await.expect("replies");
        assert!(again == expected, "the second session at pp {pipeline}, tp {tensor}, {kind:?} differs");
        for worker in workers {
            worker.stop().await;
        }
    }
    // Control: one other id is seen.
    let other = solo(&steps(&plan(1, 1), |sequence, i| ids(sequence, i) ^ u32::from(sequence == 2 && i == 3)));
    assert!(other != expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stages_that_share_the_vocabulary_give_the_bits_of_one_engine() {
    let model = tied();
    let expected = solo_of(&model, &steps(&plan_of(&model, 1, 1, Vocabulary::Auto), ids));
    for (pipeline, tensor, kind) in [
        (2, 1, CollectiveKind::SharedMemory),
        (3, 1, CollectiveKind::SharedMemory),
        (4, 1, CollectiveKind::SharedMemory),
        (2, 2, CollectiveKind::Unix),
    ] {
        let plan = plan_of(&model, pipeline, tensor, Vocabulary::Spread);
        assert!(plan.stages[0].shards.iter().any(|shard| !shard.product().is_empty()), "the first stage multiplies");
        let workers = start_of(&model, &plan, kind).await;
        let replica = connect(&workers, TOKEN);
        for session in ["first", "second"] {
            let got = driven(&*replica, &steps(&plan, ids)).await.expect("replies");
            assert!(got == expected, "the {session} session at pp {pipeline}, tp {tensor} differs from one engine");
        }
        for worker in workers {
            worker.stop().await;
        }
    }
    let other = solo_of(&model, &steps(&plan_of(&model, 1, 1, Vocabulary::Auto), |sequence, i| ids(sequence, i) ^ u32::from(i == 3)));
    assert!(other != expected);
}

/// Starts a worker anew in the middle of a session, which ends.
async fn lose_in_a_session(workers: &mut Vec<Running>, victim: usize, step: &Step) {
    let replica = connect(workers, TOKEN);
    let mut session = timeout(LONG, replica.open()).await.expect("in time").expect("a session");
    session.steps.send(step.clone()).await.expect("a session");
    timeout(LONG, session.replies.recv()).await.expect("in time").expect("a reply").expect("a good one");
    let restarted = workers.remove(victim).restart().await;
    workers.insert(victim, restarted);
    let ended = timeout(LONG, session.replies.recv()).await.expect("in time").expect("an error");
    assert!(matches!(ended, Err(ReplicaError::Failed { .. } | ReplicaError::Lost { .. })), "{ended:?}");
}

/// Whoever of those that share the vocabulary is lost in the middle of a session, it ends, and the next one gives the same bits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_worker_ends_a_session_that_shares_the_vocabulary() {
    let model = tied();
    let plan = plan_of(&model, 2, 2, Vocabulary::Spread);
    let mut workers = start_of(&model, &plan, CollectiveKind::SharedMemory).await;
    let all = steps(&plan, ids);
    let expected = solo_of(&model, &all);
    for victim in 0..4 {
        lose_in_a_session(&mut workers, victim, &all[0]).await;
        let got = driven(&*connect(&workers, TOKEN), &all).await.expect("replies");
        assert!(got == expected, "after the loss of worker {victim}");
    }
}

/// Whoever sends without reading is made to wait, and loses no reply.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replies_that_are_not_read_hold_up_the_steps() {
    let plan = plan(2, 1);
    let workers = start(&plan, CollectiveKind::SharedMemory).await;
    let replica = connect(&workers, TOKEN);
    let mut session = timeout(LONG, replica.open()).await.expect("in time").expect("a session");
    // As many as fit: waiting, under way, answered and not read.
    let bound = (replica.stages() + 1) + (replica.stages() + 1);
    let count = 200_usize;
    let sender = session.steps.clone();
    let sending = tokio::spawn(async move {
        for id in 1..=count {
            sender.send(Step { id: id as u64, ..Step::default() }).await.expect("a session");
        }
    });
    for id in 1..=count {
        // A reply is read only when nothing more fits, or all the others are there.
        let most = bound.min(count - id + 1);
        crate::arbiter::until(|| async {
            tokio::task::yield_now().await;
            session.steps.is_closed() || session.replies.len() + session.steps.max_capacity() - session.steps.capacity() >= most
        })
        .await;
        assert!(session.replies.len() <= replica.stages() + 1);
        assert_eq!(session.replies.recv().await.expect("a reply").expect("a good one").step, id as u64);
    }
    sending.await.expect("the sender");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_worker_ends_the_session_and_the_others_keep_their_weights() {
    let plan = plan(2, 2);
    let mut workers = start(&plan, CollectiveKind::SharedMemory).await;
    let all = steps(&plan, ids);
    let expected = solo(&all);
    for victim in 0..4 {
        let incarnations = |probes: &[proto::worker::ProbeReply]| {
            probes.iter().map(|p| p.identity.as_ref().expect("an identity").incarnation).collect::<Vec<_>>()
        };
        let before = incarnations(&probes(&workers).await);
        lose_in_a_session(&mut workers, victim, &all[0]).await;
        let after = incarnations(&probes(&workers).await);
        let kept = before.iter().zip(&after).filter(|(a, b)| a == b).count();
        assert_eq!(kept, 3, "only the victim is another process");
        let got = driven(&*connect(&workers, TOKEN), &all).await.expect("replies");
        assert!(got == expected, "after the loss of worker {victim}");
    }
}

async fn probes(workers: &[Running]) -> Vec<proto::worker::ProbeReply> {
    let mut probes = Vec::new();
    for worker in workers {
        probes.push(worker.probe().await);
    }
    probes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_step_ends_the_session_with_its_reason() {
    let plan = plan(2, 1);
    let workers = start(&plan, CollectiveKind::SharedMemory).await;
    let replica = connect(&workers, TOKEN);
    let mut bad = steps(&plan, ids);
    bad.truncate(1);
    bad[0].sequences[0].tables.clear();
    match driven(&*replica, &bad).await {
        Err(ReplicaError::Failed { reason, .. }) => assert!(["engine", "peer_lost", "link"].contains(&reason.as_str()), "{reason}"),
        other => panic!("{other:?} came, expected a failure"),
    }
    // The workers are ready for the next one.
    let good = steps(&plan, ids);
    assert!(driven(&*replica, &good).await.expect("replies") == solo(&good));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_token_opens_nothing() {
    let workers = start(&plan(1, 1), CollectiveKind::SharedMemory).await;
    for token in ["another token", ""] {
        let refused = connect(&workers, token).open().await.map(|_| ());
        assert!(matches!(&refused, Err(ReplicaError::Failed { reason, .. }) if reason == "unauthenticated"), "{refused:?}");
    }
    connect(&workers, TOKEN).open().await.expect("a session");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_card_is_that_of_the_model() {
    let workers = start(&plan(1, 1), CollectiveKind::SharedMemory).await;
    let card = connect(&workers, TOKEN).card().await.expect("a card");
    assert_eq!(*card, Source::open(&model(), SourceOptions::default()).and_then(|s| s.card()).expect("a card"));
    assert!(card.file("tokenizer.json").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_absent_worker_is_named() {
    let mut workers = start(&plan(2, 1), CollectiveKind::SharedMemory).await;
    let replica = connect(&workers, TOKEN);
    let gone = workers.pop().expect("stage 1");
    let address = gone.address.to_string();
    gone.stop().await;
    match replica.open().await.map(|_| ()) {
        Err(ReplicaError::Lost { worker, .. }) => assert!(worker.contains(&address), "{worker}"),
        other => panic!("{other:?}"),
    }
}
