//! The scheduler against a worker that checks every KV slot it reads.

mod drafts;
mod masks;
mod models;

use std::{
    cell::Cell,
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use plan::{
    fleet::{FleetDraft, ReplicaLimits},
    shard::{KvDType, KvGeometry, KvGroup},
    step::{Output, OutputValue, Pooled, Sampling, Step, TokenId, Want, WantKind},
};
use proptest::{prelude::*, test_runner::TestRunner};

use super::*;
use crate::replica::simulated::{CostModel, Pipeline, SimulatedEngine, SimulatedModel};

const MODEL: SimulatedModel = SimulatedModel { vocab: 97, labels: 0, period: 0 };
/// Repeats itself, but for some tokens.
const REPEATING: SimulatedModel = SimulatedModel { period: 12, ..MODEL };

fn limits(groups: &[(Option<u32>, usize)], batch: usize, tokens: usize) -> ReplicaLimits {
    let groups = groups.iter().map(|(window, blocks)| KvGroup { window: *window, layers: vec![0], blocks: *blocks }).collect();
    ReplicaLimits {
        kv: KvGeometry { dtype: KvDType::F32, groups },
        max_context: 512,
        max_batch_sequences: batch,
        max_batch_tokens: tokens,
        prefix_caching: true,
    }
}

/// A scheduler and its workers, with replies held back until they are asked for.
struct World {
    scheduler: Scheduler,
    engine: SimulatedEngine,
    replies: VecDeque<(u64, Vec<Output>)>,
    /// The draft model's worker.
    drafter: Option<SimulatedEngine>,
    drafted: VecDeque<(u64, Vec<Output>)>,
    events: BTreeMap<u64, Vec<EventKind>>,
    next: u64,
}

impl World {
    fn new(limits: ReplicaLimits, stages: usize) -> Self {
        Self::of(MODEL, limits, stages)
    }

    fn of(model: SimulatedModel, limits: ReplicaLimits, stages: usize) -> Self {
        let engine = SimulatedEngine::new(model, limits.kv.clone());
        let scheduler = Scheduler::new(SchedulerOptions { limits, stages, revision: b"r".to_vec() });
        Self { scheduler, engine, replies: VecDeque::new(), drafter: None, drafted: VecDeque::new(), events: BTreeMap::new(), next: 0 }
    }

    fn submit(&mut self, submission: Submission) -> u64 {
        self.next += 1;
        self.events.insert(self.next, Vec::new());
        self.scheduler.submit(self.next, submission).expect("admissible");
        self.next
    }

    fn step(&mut self) -> Option<Step> {
        let step = self.scheduler.next_step()?;
        let limits = &self.scheduler.options.limits;
        assert!(step.tokens() <= limits.max_batch_tokens && step.sequences.len() <= limits.max_batch_sequences);
        let outputs = self.engine.run(&step).expect("every read finds the sequence's own prefix");
        self.replies.push_back((step.id, outputs));
        self.settle();
        Some(step)
    }

    fn reply(&mut self) -> bool {
        let Some((step, outputs)) = self.replies.pop_front() else { return false };
        self.scheduler.reply(step, outputs).expect("a reply in order");
        self.settle();
        true
    }

    /// An empty worker of a draft model comes.
    fn draft_with(&mut self, model: SimulatedModel, draft: &FleetDraft) {
        let mut engine = SimulatedEngine::new(model, draft.limits.kv.clone());
        engine.goes_back = true;
        self.drafter = Some(engine);
        self.drafted.clear();
        self.scheduler.set_draft_model(Some(draft));
    }

    /// The draft model's worker goes.
    fn lose_drafter(&mut self) {
        self.drafter = None;
        self.drafted.clear();
        self.scheduler.set_draft_model(None);
    }

    fn draft_step(&mut self) -> Option<Step> {
        let step = self.scheduler.next_draft_step()?;
        let engine = self.drafter.as_mut().expect("there is a draft model");
        let outputs = engine.run(&step).expect("every read finds what the course holds");
        self.drafted.push_back((step.id, outputs));
        self.settle();
        Some(step)
    }

    fn draft_reply(&mut self) -> bool {
        let Some((step, outputs)) = self.drafted.pop_front() else { return false };
        self.scheduler.draft_reply(step, outputs).expect("a reply in order");
        self.settle();
        true
    }

    fn settle(&mut self) {
        self.scheduler.check().expect("blocks are conserved");
        for event in self.scheduler.take_events() {
            self.events.entry(event.ticket).or_default().push(event.kind);
        }
    }

    fn run(&mut self) {
        for _ in 0..100_000 {
            while self.step().is_some() {}
            while self.draft_step().is_some() {}
            if !self.draft_reply() && !self.reply() && self.scheduler.queued() + self.scheduler.running() == 0 {
                return;
            }
        }
        panic!("the scheduler makes no progress");
    }

    fn tokens(&self, ticket: u64) -> Vec<TokenId> {
        let token = |e: &EventKind| match e {
            EventKind::Token { id, .. } => Some(*id),
            _ => None,
        };
        self.events[&ticket].iter().filter_map(token).collect()
    }

    fn cached(&self, ticket: u64) -> u32 {
        let cached = |e: &EventKind| match e {
            EventKind::Prompt { cached_tokens, .. } => Some(*cached_tokens),
            _ => None,
        };
        self.events[&ticket].iter().find_map(cached).expect("the prompt ran")
    }
}

fn prompt(kind: u32, len: usize) -> Arc<[TokenId]> {
    (0..len as u32).map(|i| (i * 7 + kind * (i / 40)) % MODEL.vocab).collect()
}

fn sampled(seed: u64) -> Sampling {
    Sampling { temperature: 1.0, seed, ..Sampling::default() }
}

fn generate(prompt: Arc<[TokenId]>, seed: u64, max: u32) -> Submission {
    Submission::generate(prompt, sampled(seed), max, Arc::new([3, 5]))
}

/// Ways of drawing that depend on what was emitted, and where.
fn submissions() -> Vec<Submission> {
    let settings = [
        Sampling::default(),
        sampled(3),
        Sampling { logprobs: Some(2), ..sampled(4) },
        Sampling { repetition_penalty: 1.2, presence_penalty: 0.5, frequency_penalty: 0.1, ..sampled(5) },
        Sampling { min_tokens: 40, suppress: vec![3, 5], ..sampled(6) },
    ];
    let submission =
        |(i, sampling): (u32, &Sampling)| Submission::generate(prompt(i, 20 + i as usize), sampling.clone(), 150, Arc::new([3, 5]));
    (0..).zip(&settings).map(submission).collect()
}

fn solo(s: &Submission) -> Vec<TokenId> {
    solo_of(&MODEL, s)
}

fn solo_of(model: &SimulatedModel, s: &Submission) -> Vec<TokenId> {
    model.solo(&s.prompt, &s.sampling, s.max_tokens as usize, &s.end_ids)
}

#[derive(Clone, Debug)]
enum Op {
    Submit {
        kind: u32,
        len: usize,
        seed: u64,
        max: u32,
        chunk: Option<usize>,
        score: bool,
    },
    Step,
    Reply,
    Cancel(usize),
    Lose,
    /// From now on, so many drafts at most.
    Draft(usize),
    DraftStep,
    DraftReply,
    /// The draft model's worker is started again.
    DraftLose,
    DraftLate,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..4u32, 1..150usize, 0..4u64, 0..60u32, proptest::option::of(1..40usize), proptest::bool::weighted(0.1))
            .prop_map(|(kind, len, seed, max, chunk, score)| Op::Submit { kind, len, seed, max, chunk, score }),
        12 => Just(Op::Step),
        10 => Just(Op::Reply),
        1 => (0..64usize).prop_map(Op::Cancel),
        1 => Just(Op::Lose),
        1 => (0..17usize).prop_map(Op::Draft),
        14 => Just(Op::DraftStep),
        12 => Just(Op::DraftReply),
        1 => Just(Op::DraftLose),
        1 => Just(Op::DraftLate),
    ]
}

/// What a scheduler is made of, and what its workers say.
#[derive(Clone, Debug)]
struct Shape {
    stages: usize,
    full: usize,
    window: usize,
    batch: usize,
    tokens: usize,
    /// See [`SimulatedModel::period`].
    period: u32,
    /// Most tokens drafted.
    lookup: usize,
    /// Period and blocks of a draft model.
    draft: Option<(u32, usize)>,
}

fn shape() -> impl Strategy<Value = Shape> {
    let sizes = (1..4usize, 14..40usize, 12..40usize, 1..9usize, 1..200usize);
    let draft = proptest::option::of((prop_oneof![Just(0u32), 1..40u32], 4..60usize));
    (sizes, prop_oneof![Just(0u32), 1..20u32], prop_oneof![Just(0usize), 1..17usize], draft).prop_map(
        |((stages, full, window, batch, tokens), period, lookup, draft)| Shape {
            stages,
            full,
            window,
            batch,
            tokens,
            period,
            lookup,
            draft,
        },
    )
}

/// Whatever is submitted, cancelled, pre-empted or lost, in whatever order replies come, drafted or not: no block is lost or shared wrongly,
/// and every stream has exactly the tokens of its solo run.
#[test]
fn any_order_of_operations_gives_solo_tokens() {
    let config = ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() };
    let (drafted, accepted) = (Cell::new(0), Cell::new(0));
    let run = TestRunner::new(config).run(&(proptest::collection::vec(op(), 1..250), shape()), |(ops, shape)| {
        let counters = run_operations(ops, &shape)?;
        drafted.set(drafted.get() + counters.draft_tokens);
        accepted.set(accepted.get() + counters.accepted_tokens);
        Ok(())
    });
    if let Err(error) = run {
        panic!("{error}");
    }
    let (drafted, accepted) = (drafted.get(), accepted.get());
    assert!(accepted > 300 && drafted > accepted + 50, "{accepted} of {drafted} drafts accepted: both happen");
}

fn run_operations(ops: Vec<Op>, shape: &Shape) -> Result<Counters, TestCaseError> {
    let Shape { stages, full, window, batch, tokens, period, lookup, draft } = *shape;
    let model = SimulatedModel { period, ..MODEL };
    let limits = limits(&[(None, full), (Some(40), window), (None, full + 3)], batch, tokens);
    let drafting = |world: &mut World| {
        let Some((period, blocks)) = draft else { return };
        let limits = ReplicaLimits { max_context: 200, ..self::limits(&[(None, blocks), (Some(24), blocks)], 4, 100) };
        world.draft_with(SimulatedModel { period, ..MODEL }, &FleetDraft { worker: String::new(), limits, cost: 100, compared: true });
    };
    let fresh = |lookup: usize| {
        let mut world = World::of(model, limits.clone(), stages);
        world.scheduler.set_prompt_lookup(lookup);
        drafting(&mut world);
        world
    };
    let mut world = fresh(lookup);
    let mut live: BTreeMap<u64, Submission> = BTreeMap::new();
    let mut streams: BTreeMap<u64, (Submission, Vec<TokenId>)> = BTreeMap::new();
    let mut counters = Counters::default();
    for op in ops {
        match op {
            Op::Submit { kind, len, seed, max, chunk, score } => {
                let max = max.max(u32::from(!score));
                let submission = Submission { chunk, score_prompt: score.then_some(2), ..generate(prompt(kind, len), seed, max) };
                let ticket = world.submit(submission.clone());
                streams.insert(ticket, (submission.clone(), solo_of(&model, &submission)));
                live.insert(ticket, submission);
            }
            Op::Step => {
                world.step();
            }
            Op::Reply => {
                world.reply();
            }
            Op::Cancel(n) => {
                if let Some(ticket) = live.keys().nth(n).copied() {
                    world.scheduler.cancel(ticket);
                    live.remove(&ticket);
                    world.settle();
                }
            }
            Op::Lose => {
                // The session breaks: what is left is submitted to a fresh one with what it emitted.
                let left = world.scheduler.tickets();
                counters = counters + world.scheduler.counters();
                let mut after = fresh(lookup);
                after.next = world.next;
                for ticket in left {
                    let mut submission = live[&ticket].clone();
                    submission.emitted = world.tokens(ticket);
                    after.scheduler.submit(ticket, submission).expect("admissible");
                }
                after.events = world.events;
                world = after;
            }
            Op::DraftStep => {
                world.draft_step();
            }
            Op::DraftReply => {
                world.draft_reply();
            }
            Op::DraftLose => drafting(&mut world),
            Op::DraftLate => world.scheduler.go_on_without_drafts(),
            Op::Draft(most) => world.scheduler.set_prompt_lookup(if lookup > 0 { most } else { 0 }),
        }
    }
    world.run();
    for ticket in live.keys() {
        let (submission, expected) = &streams[ticket];
        if let Some(EventKind::Failed(message)) = world.events[ticket].last() {
            let blocks = (submission.prompt.len() + submission.max_tokens as usize).div_ceil(16);
            prop_assert!(blocks > full.min(window), "{message}");
            continue;
        }
        prop_assert_eq!(&world.tokens(*ticket), expected);
        if submission.score_prompt.is_some() {
            let scores = world.events[ticket].iter().find_map(|e| match e {
                EventKind::Prompt { scores, .. } => Some(scores.len()),
                _ => None,
            });
            prop_assert_eq!(scores, Some(submission.prompt.len() - 1));
        }
    }
    prop_assert_eq!(world.scheduler.pools.iter().map(BlockPool::used).sum::<usize>(), 0);
    for (pool, group) in world.scheduler.pools.iter().zip(&limits.kv.groups) {
        prop_assert_eq!(pool.available(), group.blocks);
    }
    Ok(counters + world.scheduler.counters())
}

#[test]
fn the_checking_worker_sees_a_block_shared_wrongly() {
    let mut world = World::new(limits(&[(None, 32)], 4, 64), 1);
    world.submit(generate(prompt(0, 30), 1, 40));
    world.submit(generate(prompt(0, 31)[1..].into(), 1, 40));
    let mut step = world.scheduler.next_step().expect("two prompts");
    let stolen = step.sequences[0].tables[0].blocks[1];
    step.sequences[1].tables[0].blocks[1] = stolen;
    assert!(world.engine.run(&step).is_err());
}

#[test]
fn a_shared_prefix_is_found_on_sliding_windows_and_changes_no_token() {
    for groups in [vec![(None, 300)], vec![(None, 300), (Some(64), 120)], vec![(Some(64), 120)]] {
        let mut world = World::new(limits(&groups, 8, 64), 1);
        let shared = prompt(0, 240);
        let (mut hits, mut queries) = (0, 0);
        for i in 0..24u32 {
            let ids: Arc<[TokenId]> = shared.iter().copied().chain([i, i + 1, i + 2]).collect();
            let submission = generate(ids.clone(), u64::from(i), 30);
            let expected = solo(&submission);
            let ticket = world.submit(submission);
            world.run();
            assert_eq!(world.tokens(ticket), expected);
            if i > 0 {
                hits += world.cached(ticket) as usize;
                queries += ids.len();
            }
        }
        assert!(hits as f64 / queries as f64 > 0.9, "{groups:?}: {hits} of {queries}");
    }
}

#[test]
fn prompts_that_arrive_together_compute_a_shared_prefix_once() {
    let mut world = World::new(limits(&[(None, 300), (Some(64), 200)], 8, 128), 1);
    let tickets: Vec<u64> = (0..4).map(|i| world.submit(generate(prompt(0, 240), i, 10))).collect();
    world.run();
    for ticket in &tickets[1..] {
        assert_eq!(world.cached(*ticket), 224);
    }
}

#[test]
fn caching_turned_off_finds_nothing() {
    let mut world = World::new(ReplicaLimits { prefix_caching: false, ..limits(&[(None, 300)], 8, 64) }, 1);
    for _ in 0..2 {
        let ticket = world.submit(generate(prompt(0, 240), 1, 5));
        world.run();
        assert_eq!(world.cached(ticket), 0);
    }
    assert_eq!(world.scheduler.counters().prefix_query_tokens, 0);
}

#[test]
fn a_cancelled_sequence_returns_its_blocks_and_the_workers_learn_it_with_the_next_step() {
    let mut world = World::new(ReplicaLimits { prefix_caching: false, ..limits(&[(None, 8)], 4, 64) }, 1);
    let ticket = world.submit(generate(prompt(0, 40), 1, 40));
    let other = world.submit(generate(prompt(1, 10), 1, 40));
    let sent = world.step().expect("two prompts");
    assert_eq!(world.scheduler.pools[0].available(), 4);
    world.scheduler.cancel(ticket);
    assert_eq!(world.scheduler.pools[0].available(), 7);
    let next = world.step().expect("the other goes on");
    assert_eq!(next.frees, [sent.sequences[0].sequence]);
    assert_eq!(next.sequences.len(), 1);
    world.run();
    assert!(world.tokens(ticket).is_empty());
    assert_eq!(world.tokens(other), solo(&generate(prompt(1, 10), 1, 40)));
    assert_eq!(world.engine.sequences(), 1, "the last one's end is told with a step that never came");
}

#[test]
fn steps_overlap_and_stages_get_micro_batches() {
    let mut world = World::new(limits(&[(None, 300)], 32, 256), 2);
    for i in 0..8 {
        world.submit(Submission::generate(prompt(i, 4), sampled(1), 50, Arc::new([])));
    }
    let prefill = world.step().expect("all prompts");
    assert_eq!(prefill.sequences.len(), 8);
    let sizes: Vec<usize> = std::iter::from_fn(|| world.step()).map(|s| s.sequences.len()).collect();
    assert_eq!(sizes, [4, 4], "as many steps in flight as stages, plus one, each with its share");
    world.reply();
    assert_eq!(world.step().map(|s| s.sequences.len()), Some(4));
    world.run();
}

#[test]
fn one_stage_runs_every_sequence_in_every_step() {
    let mut world = World::new(limits(&[(None, 300)], 32, 256), 1);
    for i in 0..8 {
        world.submit(Submission::generate(prompt(i, 4), sampled(1), 50, Arc::new([])));
    }
    let sizes: Vec<usize> = std::iter::from_fn(|| world.step()).map(|s| s.sequences.len()).collect();
    assert_eq!(sizes, [8, 8], "the second before the tokens of the first are back");
    for _ in 0..5 {
        world.reply();
        assert_eq!(world.step().map(|s| s.sequences.len()), Some(8));
        assert!(world.step().is_none());
    }
    world.run();
}

/// The lengths of the inputs of a step's sequences, by sequence.
fn lengths(step: &Step) -> BTreeMap<u64, usize> {
    step.sequences.iter().map(|s| (s.sequence, s.input.len())).collect()
}

#[test]
fn a_long_prompt_stalls_no_decode() {
    let mut world = World::new(limits(&[(None, 300)], 32, 64), 1);
    for i in 0..8 {
        world.submit(Submission::generate(prompt(i, 4), sampled(1), 200, Arc::new([])));
    }
    world.step();
    world.reply();
    world.submit(generate(prompt(9, 500), 1, 5));
    let mut chunks = 0;
    while let Some(step) = world.step() {
        let lengths = lengths(&step);
        assert!((1..=8).all(|id| lengths.get(&id) == Some(&1)), "every decode is in every step: {lengths:?}");
        match lengths.get(&9) {
            Some(&n) if n > 1 => chunks += 1,
            _ => break,
        }
        assert_eq!(step.tokens(), 64.min(8 + lengths[&9]), "and the prompt has the rest");
        world.reply();
    }
    assert_eq!(chunks, 500_usize.div_ceil(64 - 8));
    world.run();
}

#[test]
fn short_prompts_pass_a_long_one_which_keeps_half() {
    let mut world = World::new(limits(&[(None, 300), (Some(64), 200)], 32, 64), 1);
    // Prompts that share nothing.
    let own = |kind: u32, len: u32| generate((0..len).map(|i| (i * 7 + kind * 11 + 1) % MODEL.vocab).collect(), u64::from(kind), 5);
    let long = world.submit(own(8, 500));
    let second = world.submit(own(7, 400));
    let mut sent = world.step().expect("the first chunk").tokens();
    world.reply();
    let short: Vec<u64> = (0..6).map(|i| world.submit(own(i, 20))).collect();
    let mut steps = 0;
    while world.tokens(long).is_empty() {
        let Some(step) = world.step() else { panic!("it goes on") };
        steps += 1;
        let lengths = lengths(&step);
        // Sequences are numbered in the order of admission.
        sent += lengths[&1];
        assert!(lengths[&1] >= (64 - 6) / 2 || sent == 500, "{lengths:?}");
        world.reply();
        if steps == 8 {
            assert!(short.iter().all(|t| !world.tokens(*t).is_empty()), "each has its first token");
            assert!(world.tokens(second).is_empty(), "the second long one does not hold them up");
        }
    }
    assert!(steps > 8, "the long prompt was through first");
    world.run();
    for (ticket, submission) in short.iter().zip(0..).map(|(t, i)| (*t, own(i, 20))).chain([(long, own(8, 500)), (second, own(7, 400))]) {
        assert_eq!(world.tokens(ticket), solo(&submission));
    }
}

#[test]
fn blocks_that_run_out_are_taken_from_the_youngest() {
    let mut world = World::new(limits(&[(None, 10)], 8, 64), 1);
    let submissions: Vec<Submission> =
        (0..4).map(|i| Submission::generate(prompt(i, 30), sampled(u64::from(i)), 90, Arc::new([]))).collect();
    let tickets: Vec<u64> = submissions.iter().map(|s| world.submit(s.clone())).collect();
    world.run();
    assert!(world.scheduler.counters().preemptions > 0);
    for (ticket, submission) in tickets.iter().zip(&submissions) {
        assert_eq!(world.tokens(*ticket), solo(submission));
    }
}

#[test]
fn wants_are_answered_in_order_whatever_the_chunks() {
    let run = |chunk: Option<usize>| {
        let mut world = World::new(limits(&[(None, 40), (Some(40), 40)], 8, 64), 2);
        let ids = prompt(2, 50);
        let mut wants: Vec<Want> =
            (0..49).map(|i| Want { offset: i, kind: WantKind::Score { target: ids[i as usize + 1], top: 3 } }).collect();
        wants.push(Want { offset: 49, kind: WantKind::Logits });
        let submission =
            Submission { wants: wants.into(), logits: true, chunk, ..Submission::generate(ids, Sampling::default(), 5, Arc::new([])) };
        let ticket = world.submit(submission);
        world.run();
        world.events.remove(&ticket).expect("events")
    };
    let whole = run(None);
    let outputs = whole.iter().filter(|e| matches!(e, EventKind::Output(_))).count();
    assert_eq!(outputs, 49 + 1 + 5);
    for chunk in [1, 7, 16, 64] {
        assert_eq!(run(Some(chunk)), whole);
    }
}

#[test]
fn a_reply_that_fits_no_step_is_refused() {
    let mut world = World::new(limits(&[(None, 40)], 8, 64), 1);
    world.submit(generate(prompt(0, 5), 1, 5));
    let step = world.scheduler.next_step().expect("a prompt");
    let outputs = world.engine.run(&step).expect("runs");
    assert!(matches!(world.scheduler.reply(2, outputs.clone()), Err(ReplyError::Order { got: 2, .. })));
    let mut world = World::new(limits(&[(None, 40)], 8, 64), 1);
    world.submit(generate(prompt(0, 5), 1, 5));
    world.scheduler.next_step().expect("a prompt");
    assert!(matches!(world.scheduler.reply(1, Vec::new()), Err(ReplyError::Outputs { .. })));
}

#[test]
fn a_thousand_sequences_in_virtual_time() {
    let limits = limits(&[(None, 1500), (Some(64), 1200)], 64, 256);
    let cost = CostModel { step: Duration::from_millis(4), token: Duration::from_micros(100) };
    let throughput = |stages: usize| {
        let mut scheduler = Scheduler::new(SchedulerOptions { limits: limits.clone(), stages, revision: Vec::new() });
        let mut engine = SimulatedEngine::new(MODEL, limits.kv.clone());
        engine.verify = false;
        let mut pipeline = Pipeline::new(stages, cost);
        let mut expected = BTreeMap::new();
        for i in 0..1000u32 {
            let submission = generate(prompt(i % 5, 20 + (i as usize * 37) % 200), u64::from(i), 1 + i % 50);
            expected.insert(u64::from(i), solo(&submission));
            scheduler.submit(u64::from(i), submission).expect("admissible");
        }
        let (mut now, mut due) = (Duration::ZERO, VecDeque::new());
        let mut tokens: BTreeMap<u64, Vec<TokenId>> = BTreeMap::new();
        let mut busy = Duration::ZERO;
        loop {
            while let Some(step) = scheduler.next_step() {
                busy += cost.of(step.tokens());
                due.push_back((pipeline.run(now, &step), step.id, engine.run(&step).expect("consistent")));
            }
            let Some((at, step, outputs)) = due.pop_front() else { break };
            now = at;
            scheduler.reply(step, outputs).expect("in order");
            for event in scheduler.take_events() {
                if let EventKind::Token { id, .. } = event.kind {
                    tokens.entry(event.ticket).or_default().push(id);
                }
            }
        }
        assert_eq!(tokens, expected);
        // With every stage equal, the best is a pipeline that never waits.
        busy.as_secs_f64() / now.as_secs_f64()
    };
    for stages in [1, 2, 4] {
        let filled = throughput(stages);
        assert!(filled > 0.8, "{stages} stages are busy {filled} of the time");
    }
}

#[test]
fn a_lone_prompt_keeps_every_stage_busy() {
    let cost = CostModel { step: Duration::from_millis(8), token: Duration::from_millis(1) };
    // Time to the first token, and what the stages would need one after the other in one chunk.
    let first_token = |stages: usize, tokens: usize, others: u32| {
        let limits = ReplicaLimits { max_context: 1024, ..limits(&[(None, 400), (Some(64), 400)], 64, 512) };
        let mut scheduler = Scheduler::new(SchedulerOptions { limits: limits.clone(), stages, revision: Vec::new() });
        let (mut engine, mut pipeline) = (SimulatedEngine::new(MODEL, limits.kv.clone()), Pipeline::new(stages, cost));
        scheduler.submit(0, generate(prompt(1, tokens), 1, 1)).expect("admissible");
        for i in 0..others {
            scheduler.submit(1 + u64::from(i), generate(prompt(2 + i, tokens), 1, 1)).expect("admissible");
        }
        let (mut now, mut due, mut largest) = (Duration::ZERO, VecDeque::new(), 0);
        loop {
            while let Some(step) = scheduler.next_step() {
                largest = largest.max(step.tokens());
                due.push_back((pipeline.run(now, &step), step.id, engine.run(&step).expect("consistent")));
            }
            let (at, step, outputs) = due.pop_front().expect("the first token is still to come");
            now = at;
            scheduler.reply(step, outputs).expect("in order");
            if scheduler.take_events().iter().any(|e| matches!(e.kind, EventKind::Token { .. })) {
                return (now.as_secs_f64() / (stages as f64 * cost.of(tokens).as_secs_f64()), largest);
            }
        }
    };
    let (two, four) = (first_token(2, 512, 0).0, first_token(4, 512, 0).0);
    assert!(two < 0.7 && four < 0.55, "{two} {four} of one chunk's time");
    assert_eq!(first_token(1, 512, 0).1, 512, "one stage gains nothing by pieces");
    assert_eq!(first_token(2, 512, 3).1, 512, "nor do prompts that fill the pipeline together");
    assert_eq!(first_token(2, 100, 0), (1.0, 100), "nor does what is small");
}

/// Without KV groups, sequences are in one step each, whole, in the order of arrival; tables and settings are not sent.
#[test]
fn encoders_are_read_whole() {
    for stages in [1, 3] {
        let options = SchedulerOptions { limits: limits(&[], 8, 128), stages, revision: b"r".to_vec() };
        let mut scheduler = Scheduler::new(options);
        let ids = |n: u32| (0..n).collect::<Arc<[TokenId]>>();
        let wants: Arc<[Want]> = Arc::new([Want { offset: 0, kind: WantKind::Pooled(Pooled::HIDDEN) }]);
        for (ticket, tokens) in [(1, 60), (2, 60), (3, 20), (4, 128)] {
            scheduler.submit(ticket, Submission::encode(ids(tokens), u32::from(tokens == 20), wants.clone())).expect("it fits");
        }
        let too_long = scheduler.submit(5, Submission::encode(ids(129), 0, wants.clone())).expect_err("longer than a step");
        assert!(too_long.contains("129 tokens do not fit a step of 128 tokens"), "{too_long}");
        let draws = scheduler.submit(6, Submission::generate(ids(4), Sampling::default(), 1, Arc::new([]))).expect_err("an encoder");
        assert!(draws.contains("draws and scores no tokens"), "{draws}");
        for expected in [&[60, 60][..], &[20], &[128]] {
            let step = scheduler.next_step().expect("a step");
            let lengths: Vec<usize> = step.sequences.iter().map(|s| s.input.len()).collect();
            assert_eq!(lengths, expected);
            assert!(step.sequences.iter().all(|s| s.first_position == 0 && s.tables.is_empty() && s.begin.is_none() && s.wants.len() == 1));
            assert!(step.sequences.iter().all(|s| s.second == u32::from(s.input.len() == 20)));
            let value = OutputValue::Vector(vec![1.0]);
            let outputs = step.sequences.iter().map(|s| Output { sequence: s.sequence, position: 0, value: value.clone() }).collect();
            scheduler.reply(step.id, outputs).expect("an answer");
        }
        let ends = scheduler.take_events().into_iter().filter(|e| matches!(e.kind, EventKind::Finished(_))).map(|e| e.ticket);
        assert_eq!(ends.collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(scheduler.next_step().is_none());
        scheduler.check().expect("nothing is held");
    }
}
