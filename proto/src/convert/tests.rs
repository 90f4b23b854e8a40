//! What is sent is what arrives; what means nothing is refused by field.

use plan::{
    adapter::AdapterSource,
    fleet::{
        ChatTemplate, FleetAdapter, FleetDeployment, FleetDraft, FleetReplica, FleetRouter, FleetState, HoldSettings, ReplicaLimits,
        RoutingPolicy, ServingSettings, Stopped,
    },
    shard::{KvDType, KvGeometry, KvGroup},
    step::{
        Begin, BlockCopy, Input, Logprobs, Mask, Output, OutputValue, Pooled, Pooling, Sampling, SequenceStep, Step, TableChange, Want,
        WantKind,
    },
    worker::Epoch,
};
use proptest::{collection::vec, option, prelude::*};
use prost::Message;

use super::{
    decode_epoch, decode_fleet, decode_load, decode_mask, decode_output, decode_step, encode_fleet, encode_load, encode_mask,
    encode_output, encode_step,
};
use crate::{fleet as fleet_wire, worker as wire};

const EPOCH: Epoch = Epoch { number: 7, session: 0xdead_beef };

/// A message after its way through bytes.
fn sent<M: Message + Default>(message: &M) -> M {
    M::decode(message.encode_to_vec().as_slice()).expect("its own bytes")
}

fn ids() -> impl Strategy<Value = Vec<u32>> {
    vec(any::<u32>(), 0..5)
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let numbers = (0f32..100.0, any::<u32>(), 0f32..=1.0, 0f32..=1.0, 0.01f32..10.0, -2f32..2.0, -2f32..2.0);
    let rest = (vec((any::<u32>(), -100f32..100.0), 0..4), ids(), any::<(u32, u64, u32, bool)>(), option::of(any::<u32>()));
    (numbers, rest).prop_map(|((temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty), rest)| {
        let (mut logit_bias, suppress, (min_tokens, seed, choice, masked), logprobs) = rest;
        logit_bias.sort_by_key(|b| b.0);
        logit_bias.dedup_by_key(|b| b.0);
        let numbers =
            Sampling { temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, ..Sampling::default() };
        Sampling { logit_bias, suppress, min_tokens, seed, choice, masked, logprobs, ..numbers }
    })
}

fn sequence() -> impl Strategy<Value = SequenceStep> {
    let input = prop_oneof![
        vec(any::<u32>(), 1..6).prop_map(Input::Ids),
        (any::<u64>(), ids()).prop_map(|(step, drafts)| Input::Sampled { step, drafts })
    ];
    let kind = prop_oneof![
        Just(WantKind::Sample),
        Just(WantKind::Logits),
        Just(WantKind::Classes),
        (prop_oneof![Just(Pooling::Token), Just(Pooling::First), Just(Pooling::Mean)], any::<u32>(), any::<bool>())
            .prop_map(|(over, dimensions, normalize)| WantKind::Pooled(Pooled { over, dimensions, normalize })),
        any::<(u32, u32)>().prop_map(|(target, top)| WantKind::Score { target, top })
    ];
    let begin = (ids(), any::<prop::sample::Index>(), sampling()).prop_map(|(ids, at, sampling)| {
        let prompt_len = at.index(ids.len() + 1) as u32;
        Box::new(Begin { ids, prompt_len, sampling })
    });
    let table = (any::<(u32, u32)>(), ids()).prop_map(|((group, first), blocks)| TableChange { group, first, blocks });
    let wants = vec((any::<prop::sample::Index>(), kind), 0..4);
    (any::<(u64, u32, u32, u32)>(), input, vec(table, 0..3), wants, option::of(begin)).prop_map(
        |((sequence, first_position, adapter, second), input, tables, wants, begin)| {
            let mut wants: Vec<Want> = wants.into_iter().map(|(at, kind)| Want { offset: at.index(input.len()) as u32, kind }).collect();
            wants.sort_by_key(|w| w.offset);
            SequenceStep { sequence, first_position, input, tables, wants, begin, adapter, second }
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let copy = any::<(u32, u32, u32)>().prop_map(|(group, from, to)| BlockCopy { group, from, to });
    (1u64.., vec(any::<u64>(), 0..4), vec(copy, 0..3), vec(sequence(), 0..4)).prop_map(|(id, frees, copies, sequences)| Step {
        id,
        frees,
        copies,
        sequences,
        masks: Vec::new(),
    })
}

fn output() -> impl Strategy<Value = Output> {
    let logprobs = || (-50f32..0.0, vec((any::<u32>(), -50f32..0.0), 0..4)).prop_map(|(token, top)| Logprobs { token, top });
    let value = prop_oneof![
        (any::<u32>(), option::of(logprobs())).prop_map(|(id, logprobs)| OutputValue::Token { id, logprobs }),
        logprobs().prop_map(OutputValue::Score),
        vec(-1e9f32..1e9, 0..9).prop_map(OutputValue::Logits),
        vec(-1e9f32..1e9, 0..9).prop_map(OutputValue::Vector),
        ".{0,9}".prop_map(OutputValue::Failed)
    ];
    (any::<(u64, u32)>(), value).prop_map(|((sequence, position), value)| Output { sequence, position, value })
}

proptest! {
    #[test]
    fn steps_arrive_as_they_were_sent(step in step()) {
        let message = sent(&encode_step(EPOCH, &step));
        prop_assert_eq!(decode_epoch(message.epoch, "step.epoch"), Ok(EPOCH));
        prop_assert_eq!(decode_step(message), Ok(step));
    }

    #[test]
    fn outputs_arrive_as_they_were_sent(output in output()) {
        prop_assert_eq!(decode_output(sent(&encode_output(&output))), Ok(output));
    }

    /// Any bytes at all are a message, and then a step or a refusal, or neither.
    #[test]
    fn noise_never_panics(noise in vec(any::<u8>(), 0..200)) {
        let _ = wire::Step::decode(noise.as_slice()).map(decode_step);
        let _ = wire::Output::decode(noise.as_slice()).map(decode_output);
        let _ = wire::MaskUpdate::decode(noise.as_slice()).map(decode_mask);
        let _ = fleet_wire::FleetState::decode(noise.as_slice()).map(decode_fleet);
    }
}

#[test]
fn floats_keep_every_bit() {
    let values = [0.0, -0.0, f32::MIN_POSITIVE / 2.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7fc1_2345)];
    let output = Output { sequence: 1, position: 2, value: OutputValue::Logits(values.to_vec()) };
    let OutputValue::Logits(got) = decode_output(sent(&encode_output(&output))).unwrap().value else { panic!("logits") };
    assert!(got.iter().zip(values).all(|(g, v)| g.to_bits() == v.to_bits()), "{got:?}");
}

#[test]
fn masks_arrive_as_they_were_sent() {
    for mask in [Mask::Unchanged, Mask::Ids(vec![1, 5]), Mask::Ids(vec![]), Mask::Bits(vec![0x81, 0])] {
        assert_eq!(decode_mask(sent(&encode_mask(EPOCH, 3, 4, &mask))), Ok((3, 4, mask)));
    }
    let refused = |mask| decode_mask(wire::MaskUpdate { epoch: None, step: 1, sequence: 1, mask }).unwrap_err().to_string();
    assert_eq!(refused(None), "mask.mask is missing");
    let ids = |ids: &[u32]| Some(wire::mask_update::Mask::Ids(wire::Ids { ids: ids.to_vec() }));
    assert_eq!(refused(ids(&[2, 1])), "mask.ids is out of order, expected ids that ascend");
    assert_eq!(refused(ids(&[2, 2])), "mask.ids is out of order, expected ids that ascend");
    assert_eq!(refused(Some(wire::mask_update::Mask::Unchanged(false))), "mask.unchanged is false, expected true");
}

fn one_sequence() -> wire::Step {
    let want = Want { offset: 1, kind: WantKind::Sample };
    let begin = Begin { ids: vec![1, 2], prompt_len: 2, sampling: Sampling::default() };
    let input = Input::Ids(vec![1, 2]);
    let sequence = SequenceStep {
        sequence: 9,
        first_position: 0,
        input,
        tables: Vec::new(),
        wants: vec![want],
        begin: Some(Box::new(begin)),
        adapter: 0,
        second: 0,
    };
    encode_step(EPOCH, &Step { id: 1, sequences: vec![sequence], ..Step::default() })
}

#[test]
fn steps_that_mean_nothing_are_refused_by_field() {
    assert!(decode_step(one_sequence()).is_ok());
    let refused = |change: &dyn Fn(&mut wire::Step)| {
        let mut step = one_sequence();
        change(&mut step);
        decode_step(step).expect_err("a refusal").to_string()
    };
    let sampling = |change: &dyn Fn(&mut wire::Sampling)| {
        refused(&|s| change(s.sequences[0].begin.as_mut().and_then(|b| b.sampling.as_mut()).expect("sampling")))
    };
    for (said, parts) in [
        (refused(&|s| s.id = 0), ["step.id is 0", "1 or more"]),
        (refused(&|s| s.sequences[0].input = None), ["step.sequences[0].input", "is missing"]),
        (
            refused(&|s| s.sequences[0].input = Some(wire::sequence_step::Input::Ids(wire::Ids::default()))),
            ["step.sequences[0].input.ids", "at least one id"],
        ),
        (refused(&|s| s.sequences[0].wants[0].offset = 2), ["step.sequences[0].wants[0].offset is 2", "within the input"]),
        (refused(&|s| s.sequences[0].wants[0].kind = None), ["step.sequences[0].wants[0].kind", "is missing"]),
        (
            refused(&|s| {
                let mut want = s.sequences[0].wants[0];
                want.offset = 0;
                s.sequences[0].wants.push(want)
            }),
            ["wants[1].offset is 0", "ascend"],
        ),
        (
            refused(&|s| s.sequences[0].begin.as_mut().expect("begin").prompt_len = 3),
            ["step.sequences[0].begin.prompt_len is 3", "at most"],
        ),
        (refused(&|s| s.sequences[0].begin.as_mut().expect("begin").sampling = None), ["step.sequences[0].begin.sampling", "is missing"]),
        (sampling(&|s| s.temperature = -1.0), ["temperature is -1", "0 or more"]),
        (sampling(&|s| s.temperature = f32::NAN), ["temperature is NaN", "finite"]),
        (sampling(&|s| s.top_p = 1.5), ["top_p is 1.5", "from 0 to 1"]),
        (sampling(&|s| s.min_p = -0.5), ["min_p is -0.5", "from 0 to 1"]),
        (sampling(&|s| s.repetition_penalty = 0.0), ["repetition_penalty is 0", "above 0"]),
        (sampling(&|s| s.presence_penalty = f32::INFINITY), ["presence_penalty is inf", "finite"]),
        (
            sampling(&|s| s.logit_bias = vec![wire::LogitBias { id: 2, bias: 1.0 }, wire::LogitBias { id: 1, bias: 1.0 }]),
            ["logit_bias", "ascend"],
        ),
        (sampling(&|s| s.logit_bias = vec![wire::LogitBias { id: 2, bias: f32::NAN }]), ["logit_bias", "finite"]),
    ] {
        assert!(parts.iter().all(|p| said.contains(p)), "{said:?}, expected {parts:?}");
    }
}

#[test]
fn outputs_that_mean_nothing_are_refused_by_field() {
    let refused = |value| decode_output(wire::Output { sequence: 1, position: 1, value }).unwrap_err().to_string();
    assert_eq!(refused(None), "output.value is missing");
    let score = wire::Logprobs { token: 0.0, top_ids: vec![1, 2], top: vec![0.0] };
    assert_eq!(refused(Some(wire::output::Value::Score(score))), "output.score.top is 1 long beside 2 ids, expected one value for each id");
    let logits = wire::output::Value::Logits(vec![0; 7].into());
    assert_eq!(refused(Some(logits)), "output.logits is 7 bytes long, expected a multiple of 4 bytes");
    assert_eq!(decode_epoch(None, "hello.epoch").unwrap_err().to_string(), "hello.epoch is missing");
}

fn fleet(chat_template: Option<ChatTemplate>, policy: RoutingPolicy, dtype: KvDType) -> FleetState {
    stopped_fleet(chat_template, policy, dtype, None)
}

fn stopped_fleet(chat_template: Option<ChatTemplate>, policy: RoutingPolicy, dtype: KvDType, stopped: Option<Stopped>) -> FleetState {
    let groups = vec![KvGroup { window: None, layers: vec![3], blocks: 9 }, KvGroup { window: Some(8), layers: vec![0, 1, 2], blocks: 5 }];
    let limits = |max_batch_tokens| ReplicaLimits {
        kv: KvGeometry { dtype, groups: groups.clone() },
        max_context: 512,
        max_batch_sequences: 64,
        max_batch_tokens,
        prefix_caching: true,
    };
    let replica = FleetReplica {
        name: "r0".into(),
        revision: "1".into(),
        numerics: "n".into(),
        weight: 3,
        draining: true,
        limits: limits(256),
        workers: vec![vec!["a:1".into(), "b:2".into()], vec!["c:3".into()]],
        draft: Some(FleetDraft { worker: "d:4".into(), limits: limits(16), cost: 90, compared: true }),
    };
    let deployment = FleetDeployment {
        name: "d".into(),
        model: "m".into(),
        aliases: vec!["x".into(), "y".into()],
        limits: limits(128),
        adapters: vec![FleetAdapter {
            name: "a".into(),
            source: AdapterSource { uri: "hf://o/a".into(), digest: Some("sha256:0".into()), numerics: "n".into() },
        }],
        serving: ServingSettings {
            chat_template,
            system_prompt: Some("s".into()),
            policy,
            queue_requests: 7,
            queue_seconds: 8,
            prompt_lookup: 12,
            hold: Some(HoldSettings { requests: 9, seconds: 10 }),
            stopped,
        },
        drivers: "d".into(),
        replicas: vec![replica],
    };
    let routers = vec![FleetRouter { name: "router".into(), address: "h:1".into(), pool: "d".into() }];
    FleetState { term: 1, number: 2, deployments: vec![deployment], routers }
}

#[test]
fn fleets_arrive_as_they_were_sent() {
    let templates =
        [None, Some(ChatTemplate::Gemma), Some(ChatTemplate::ChatML), Some(ChatTemplate::Llama3), Some(ChatTemplate::Inline("x".into()))];
    let policies = [RoutingPolicy::PrefixAware, RoutingPolicy::LeastLoad, RoutingPolicy::RoundRobin, RoutingPolicy::Random];
    for template in templates {
        for policy in policies {
            for dtype in [KvDType::F32, KvDType::F16, KvDType::Q8] {
                let state = fleet(template.clone(), policy, dtype);
                assert_eq!(decode_fleet(sent(&encode_fleet(&state))), Ok(state));
            }
        }
    }
}

#[test]
fn why_a_deployment_has_no_replicas_arrives() {
    let sent_as = |stopped| {
        let message = sent(&encode_fleet(&stopped_fleet(None, RoutingPolicy::Random, KvDType::F16, stopped)));
        decode_fleet(message).expect("it means something").deployments[0].serving.stopped
    };
    for stopped in [None, Some(Stopped::Suspended), Some(Stopped::ScaledToZero)] {
        assert_eq!(sent_as(stopped), stopped);
    }
}

#[test]
fn fleets_of_a_later_version_are_refused_by_deployment_and_field() {
    let refused = |change: &dyn Fn(&mut fleet_wire::Deployment)| {
        let mut message = encode_fleet(&fleet(None, RoutingPolicy::Random, KvDType::F16));
        change(&mut message.deployments[0]);
        decode_fleet(message).expect_err("a refusal").to_string()
    };
    assert_eq!(refused(&|d| d.limits = None), "deployments[d].limits is missing");
    assert_eq!(refused(&|d| d.replicas[0].limits = None), "deployments[d].replicas[r0].limits is missing");
    assert_eq!(refused(&|d| d.serving = None), "deployments[d].serving is missing");
    assert_eq!(
        refused(&|d| d.limits.as_mut().expect("limits").kv_dtype = "q4".into()),
        "deployments[d].limits.kv_dtype is q4, expected f32, f16 or q8"
    );
    let stopped = refused(&|d| d.serving.as_mut().expect("serving").stopped = "x".into());
    assert_eq!(stopped, "deployments[d].serving.stopped is x, expected suspended, scaled-to-zero or nothing");
    let policy = refused(&|d| d.serving.as_mut().expect("serving").policy = "psychic".into());
    assert!(policy.starts_with("deployments[d].serving.policy is psychic, expected prefix-aware"), "{policy}");
    let template =
        refused(&|d| d.serving.as_mut().expect("serving").chat_template = Some(fleet_wire::serving::ChatTemplate::Builtin("x".into())));
    assert_eq!(template, "deployments[d].serving.chat_template is x, expected gemma, chatml or llama3");
}

#[test]
fn adapters_survive_and_what_means_none_is_refused() {
    let adapter = AdapterSource { uri: "file:/a".into(), digest: None, numerics: "n".into() };
    assert_eq!(decode_load(sent(&encode_load(3, &adapter))), Ok((3, adapter.clone())));
    let refused = |change: fn(&mut wire::LoadAdapter)| {
        let mut load = encode_load(3, &adapter);
        change(&mut load);
        decode_load(load).expect_err("a refusal").to_string()
    };
    assert!(refused(|load| load.slot = 0).contains("load_adapter.slot is 0"));
    assert!(refused(|load| load.uri.clear()).contains("load_adapter.uri is missing"));
    assert!(refused(|load| load.numerics.clear()).contains("load_adapter.numerics is missing"));
}
