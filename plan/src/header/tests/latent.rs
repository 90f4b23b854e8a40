//! DeepSeek's models: their shapes from either kind of file, what is left alone, and every refusal.

use serde_json::{Value as Json, json};

use super::{HfConfig, changed, fixture, fixture_config, fixture_header, hf};
use crate::{
    gguf::{self, Entry, GgmlType, Tensor, Value},
    header::{HeaderError, Metadata, from_gguf, from_safetensors, target},
    model::{
        Architecture, ExpertGroups, Experts, Format, Latent, ModelFile, ModelHeader, Role, RopeLayout, RopeScaling, Scoring, TensorId,
    },
    planner::{Capacity, Spec, plan},
    safetensors,
    shard::KvDType,
};

fn layer(index: u32, role: Role) -> TensorId {
    TensorId { layer: Some(index), role }
}

#[test]
fn the_fixtures_have_their_shapes() {
    let v3 = fixture_header("deepseek-v3");
    let c = &v3.config;
    assert_eq!(
        (c.architecture, c.heads, c.kv_heads, c.head_dim, c.value_dim(), c.unpacked_dim()),
        (Architecture::DeepseekV3, 4, 4, 40, 20, 44)
    );
    let latent = Latent { q_rank: Some(40), kv_rank: 32, rotated: 16, value_dim: 20, norm_eps: 1e-6, apart: false, temperature: 1.0 };
    assert_eq!(c.latent, Some(latent));
    let groups = Some(ExpertGroups { count: 2, used: 1, best: 2 });
    let experts = Experts { scoring: Scoring::Sigmoid, groups, scale: 2.5, shared: 1, ..Experts::softmax(8, 3, 24, true) };
    assert_eq!(c.experts, Some(experts));
    assert_eq!(c.layers.iter().map(|l| l.experts).collect::<Vec<_>>(), [false, true, true]);
    // transformers: 40^-0.5 · (0.1 ln 8 + 1)², and the same factor twice over for cosines.
    let yarn = 0.1 * 8f64.ln() + 1.0;
    assert_eq!(c.attention_scale, (yarn * yarn / 40f64.sqrt()) as f32);
    assert_eq!((c.layers[0].rope.dims, c.layers[0].rope.layout, c.layers[0].rope.amplitude), (16, RopeLayout::Adjacent, 1.0));
    assert!(matches!(c.layers[0].rope.scaling, RopeScaling::Yarn { factor: 8.0, original_context: 64.0, .. }));
    let of = |id| (v3.tensors[&id].name.as_str(), v3.tensors[&id].shape.as_slice());
    assert_eq!(of(layer(2, Role::KvDown)), ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", &[48, 48][..]));
    assert_eq!(of(layer(2, Role::KvUp)), ("model.layers.2.self_attn.kv_b_proj.weight", &[176, 32][..]));
    assert_eq!(of(layer(0, Role::O)).1, [48, 80]);
    assert_eq!(of(layer(1, Role::RouterBias)), ("model.layers.1.mlp.gate.e_score_correction_bias", &[8][..]));
    assert!(!v3.tensors.contains_key(&layer(0, Role::SharedUp)) && !v3.tensors.contains_key(&layer(1, Role::K)));

    let v2 = fixture_header("deepseek-v2").config;
    assert_eq!((v2.architecture, v2.head_dim, v2.value_dim(), v2.latent.unwrap().q_rank), (Architecture::DeepseekV2, 24, 32, None));
    let groups = Some(ExpertGroups { count: 4, used: 2, best: 1 });
    assert_eq!(v2.experts, Some(Experts { groups, scale: 4.0, shared: 2, ..Experts::softmax(8, 3, 16, false) }));
    let (scale, all) = (0.1 * 1.2 * 4f64.ln() + 1.0, 0.1 * 0.707 * 4f64.ln() + 1.0);
    assert!((v2.layers[0].rope.amplitude - scale / all).abs() < 1e-12);
    assert_eq!(v2.attention_scale, (all * all / 24f64.sqrt()) as f32);
}

#[test]
fn settings_mean_what_the_reference_makes_of_them() {
    let (v2, v3) = (fixture_config("deepseek-v2"), fixture_config("deepseek-v3"));
    let of = |base: &Json, with: Json| hf(&changed(base, with)).unwrap().config;
    let experts = |base: &Json, with: Json| of(base, with).layers.iter().map(|l| l.experts).collect::<Vec<_>>();
    assert_eq!(experts(&v3, json!({"first_k_dense_replace": 2})), [false, false, true]);
    assert_eq!(experts(&v2, json!({"first_k_dense_replace": 0, "moe_layer_freq": 2})), [true, false, true]);
    assert!(of(&v2, json!({"first_k_dense_replace": 3})).experts.is_none());
    assert!(of(&v2, json!({"n_routed_experts": null})).experts.is_none());
    let groups = |base: &Json, with: Json| of(base, with).experts.unwrap().groups;
    assert_eq!(groups(&v2, json!({"topk_method": "greedy"})), None);
    assert_eq!(groups(&v3, json!({"n_group": 1, "topk_group": 1})), None);
    assert_eq!(groups(&v3, json!({"topk_group": 2})), None, "all groups are no limit");
    assert_eq!(of(&v3, json!({"rope_interleave": false})).layers[0].rope.layout, RopeLayout::Halves);
    assert_eq!(of(&v3, json!({"head_dim": 16})), of(&v3, json!({})), "transformers writes the rotated part as head_dim");
    let plain = of(&v3, json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}));
    assert_eq!((plain.attention_scale, plain.layers[0].rope.amplitude), ((1.0 / 40f64.sqrt()) as f32, 1.0));
    // The layout of DeepSeek's own files.
    let own = json!({"rope_parameters": null, "rope_theta": 10000, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}});
    assert_eq!(of(&v3, own), of(&v3, json!({})));
}

#[test]
fn what_the_families_do_not_do_is_refused_by_name() {
    let (v2, v3) = (fixture_config("deepseek-v2"), fixture_config("deepseek-v3"));
    for (base, with, parts) in [
        // As DeepSeek's own files of V3 are.
        (
            &v3,
            json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
            ["quantization_config.quant_method", "fp8, which is not supported yet"],
        ),
        (&v3, json!({"attention_bias": true}), ["attention_bias", "false"]),
        (&v2, json!({"mlp_bias": true}), ["mlp_bias", "false"]),
        (&v2, json!({"norm_topk_prob": true}), ["norm_topk_prob", "false"]),
        (&v2, json!({"topk_method": "noaux_tc"}), ["topk_method", "group_limited_greedy"]),
        (&v2, json!({"scoring_func": "sigmoid"}), ["scoring_func", "softmax"]),
        (&v3, json!({"scoring_func": "softmax"}), ["scoring_func", "sigmoid"]),
        (&v3, json!({"topk_method": "greedy"}), ["topk_method", "noaux_tc"]),
        (&v3, json!({"n_group": 3}), ["n_group", "groups of the same size"]),
        (&v3, json!({"n_group": 8, "topk_group": 4}), ["n_group", "at least 2"]),
        (&v3, json!({"n_group": 4}), ["n_group", "3 of 8 experts"]),
        (&v3, json!({"n_group": null}), ["n_group", "missing"]),
        (&v3, json!({"routed_scaling_factor": null}), ["routed_scaling_factor", "missing"]),
        (&v3, json!({"num_experts_per_tok": 9}), ["num_experts_per_tok", "at most the 8"]),
        (&v3, json!({"num_key_value_heads": 2}), ["num_key_value_heads", "keys of its own"]),
        (&v3, json!({"kv_lora_rank": null}), ["kv_lora_rank", "missing"]),
        (&v3, json!({"v_head_dim": 0}), ["v_head_dim", "from 1"]),
        (&v3, json!({"qk_rope_head_dim": 15}), ["qk_rope_head_dim", "even"]),
        (&v3, json!({"partial_rotary_factor": 0.5}), ["partial_rotary_factor", "all 16"]),
        (
            &v3,
            json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2, "mscale_all_dim": 1}}),
            ["rope_parameters.mscale_all_dim", "yarn"],
        ),
    ] {
        let text = hf(&changed(base, with.clone())).expect_err(&with.to_string()).to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{with} says {text}");
    }
}

/// The header of a fixture's file, changed.
fn altered(change: impl FnOnce(&mut safetensors::Header)) -> Result<ModelHeader, HeaderError> {
    let bytes = std::fs::read(fixture("deepseek-v3").join("model.safetensors")).unwrap();
    let mut header = safetensors::read(&mut &*bytes, bytes.len() as u64).unwrap();
    change(&mut header);
    let file = ModelFile { name: "model.safetensors".to_owned(), bytes: bytes.len() as u64 };
    from_safetensors(fixture_config("deepseek-v3").to_string().as_bytes(), &[(file, header)])
}

/// Layers behind the last one are left alone where they are what predicts further tokens, and nowhere else.
#[test]
fn layers_that_predict_further_tokens_are_left_alone() {
    let more = |names: &'static [&'static str]| {
        altered(|header| {
            for (at, name) in names.iter().enumerate() {
                let mut tensor = header.tensors[0].clone();
                (tensor.name, tensor.entry_offset) = ((*name).to_owned(), 1_000_000 + at as u64);
                header.tensors.push(tensor);
            }
        })
    };
    let plain = more(&[]).unwrap();
    let with =
        more(&["model.layers.3.eh_proj.weight", "model.layers.3.self_attn.q_a_proj.weight", "model.layers.3.shared_head.head.weight"]);
    assert_eq!(with.unwrap(), plain);
    for (names, said) in [
        (&["model.layers.3.self_attn.q_a_proj.weight"][..], "model.layers.3.self_attn.q_a_proj.weight"),
        (&["model.layers.2.eh_proj.weight"], "model.layers.2.eh_proj.weight"),
        (&["model.layers.3.eh_proj.weight", "model.layers.4.enorm.weight"], "model.layers.4.enorm.weight"),
        (&["model.layers.3.eh_proj.weight", "model.layers.x.enorm.weight"], "model.layers.x.enorm.weight"),
    ] {
        let error = more(names).unwrap_err();
        assert!(matches!(&error, HeaderError::UnexpectedTensor { name, .. } if name == said), "{error}");
    }
}

/// A tensor of eight bits with scales, as the files of V3 have them.
#[test]
fn eight_bit_floats_are_refused_by_name() {
    let text = altered(|header| {
        let tensor = header.tensors.iter_mut().find(|t| t.name.ends_with("layers.1.self_attn.kv_b_proj.weight")).unwrap();
        "F8_E4M3".clone_into(&mut tensor.dtype);
    });
    let text = text.unwrap_err().to_string();
    assert!(text.contains("kv_b_proj") && text.contains("F8_E4M3") && text.contains("BF16"), "{text}");
    let text = altered(|header| {
        let mut tensor = header.tensors[0].clone();
        "model.layers.0.mlp.up_proj.weight_scale_inv".clone_into(&mut tensor.name);
        header.tensors.push(tensor);
    });
    assert!(text.unwrap_err().to_string().contains("up_proj.weight_scale_inv"));
}

/// A fixture as a GGUF header whose metadata and tensors were changed.
fn in_gguf(change: impl FnOnce(&mut Vec<(String, Value)>, &mut Vec<Tensor>)) -> Result<ModelHeader, HeaderError> {
    let made = target(&fixture_header("deepseek-v3"), Format::GGUF).unwrap();
    let Some(Metadata::Gguf(mut entries)) = made.metadata else { panic!("no GGUF") };
    let kind = GgmlType::from_id(0).unwrap();
    let mut offset = 4096;
    let mut tensors: Vec<Tensor> = Vec::new();
    for (entry, made) in made.tensors.iter().enumerate() {
        let bytes = 4 * made.shape.iter().product::<usize>() as u64;
        let dims = made.shape.iter().rev().map(|&n| n as u64).collect();
        tensors.push(Tensor { name: made.name.clone(), dims, kind, offset, bytes, entry_offset: 1000 + entry as u64 });
        offset += bytes;
    }
    change(&mut entries, &mut tensors);
    let metadata = entries.into_iter().map(|(key, value)| Entry { key, value, offset: 24 }).collect();
    let header = gguf::Header { version: 3, alignment: 32, metadata, tensors, data_offset: 4096 };
    from_gguf(ModelFile { name: "m.gguf".to_owned(), bytes: offset }, &header)
}

/// Keys and values in tensors of their own, as llama.cpp's newer converter writes them.
fn unpack_apart(entries: &mut Vec<(String, Value)>, tensors: &mut Vec<Tensor>) {
    for (key, n) in [("head_count_kv", 1), ("key_length", 48), ("value_length", 32), ("key_length_mla", 40), ("value_length_mla", 20)] {
        put(entries, &format!("deepseek2.attention.{key}"), Value::U32(n));
    }
    let again: Vec<Tensor> = tensors
        .iter()
        .filter(|t| t.name.ends_with("attn_kv_b.weight"))
        .flat_map(|t| {
            let part = |part: &str, dims: [u64; 3], offset, at| Tensor {
                name: t.name.replace("attn_kv_b", part),
                dims: dims.to_vec(),
                offset,
                bytes: 4 * dims.iter().product::<u64>(),
                entry_offset: t.entry_offset * 1000 + at,
                ..t.clone()
            };
            let keys = part("attn_k_b", [24, 32, 4], t.offset, 0);
            let values = part("attn_v_b", [32, 20, 4], t.offset + keys.bytes, 1);
            [keys, values]
        })
        .collect();
    tensors.retain(|t| !t.name.ends_with("attn_kv_b.weight"));
    tensors.extend(again);
}

/// Each rank reads whole heads of them; where a file has both, those together are taken.
#[test]
fn keys_and_values_unpacked_apart_are_read() {
    let together = in_gguf(|_, _| {}).unwrap();
    let apart = in_gguf(unpack_apart).unwrap();
    let latent = Latent { apart: true, ..together.config.latent.unwrap() };
    assert_eq!(apart.config, crate::model::ModelConfig { latent: Some(latent), ..together.config.clone() });
    let keys = &apart.tensors[&layer(1, Role::KeyUp)];
    assert_eq!((keys.shape.as_slice(), keys.turned, keys.dtype, keys.stored), (&[96, 32][..], Some(24), crate::dtype::DType::F32, None));
    assert_eq!(apart.tensors[&layer(1, Role::ValueUp)].shape, [80, 32]);
    let plan = plan(&Spec { tensor: 2, ..Spec::default() }, &apart, &Capacity { memory_bytes: None }).unwrap();
    let slice = plan.stages[0].shards[1].slices.iter().find(|s| s.id == layer(1, Role::KeyUp)).unwrap();
    let head = 24 * 32 * 4;
    assert_eq!((slice.rows.clone(), slice.bytes.clone()), (48..96, keys.offset + 2 * head..keys.offset + 4 * head));
    assert_eq!((slice.len(), slice.ranges().collect::<Vec<_>>()), (2 * head, vec![slice.bytes.clone()]));
    let both = in_gguf(|entries, tensors| {
        let kv: Vec<Tensor> = tensors.iter().filter(|t| t.name.ends_with("attn_kv_b.weight")).cloned().collect();
        unpack_apart(entries, tensors);
        tensors.extend(kv);
    });
    assert_eq!(both.unwrap().tensors[&layer(1, Role::KvUp)].shape, [176, 32]);
    // Held as floats, whatever is loaded as what; and not to be written in another way.
    let loaded = apart.loaded_as(crate::dtype::DType::Q8_0);
    assert_eq!(loaded.tensors[&layer(1, Role::KeyUp)], *keys);
    assert_eq!(loaded.tensors[&layer(1, Role::ValueUp)].dtype, crate::dtype::DType::Q8_0);
    for format in [Format::GGUF, Format::Safetensors] {
        let said = target(&apart, format).unwrap_err().to_string();
        assert!(said.contains("unpacked apart"), "{said}");
    }
}

fn put(entries: &mut Vec<(String, Value)>, key: &str, value: Value) {
    entries.retain(|(k, _)| k != key);
    entries.push((key.to_owned(), value));
}

#[test]
fn gguf_says_the_same_model() {
    let same = in_gguf(|_, _| {}).unwrap();
    let v3 = fixture_header("deepseek-v3").config;
    assert_eq!(same.config, crate::model::ModelConfig { architecture: Architecture::DeepseekV2, ..v3.clone() });
    let names = |role| same.tensors[&layer(1, role)].name.as_str();
    assert_eq!((names(Role::KvDown), names(Role::RouterBias)), ("blk.1.attn_kv_a_mqa.weight", "blk.1.exp_probs_b.bias"));
    assert_eq!((names(Role::SharedGate), names(Role::ExpertUp(7))), ("blk.1.ffn_gate_shexp.weight", "blk.1.ffn_up_exps.weight"));
    let with = |key: &'static str, value: Value| in_gguf(|entries, _| put(entries, key, value)).unwrap().config;
    // What old files leave out.
    let old = with("deepseek2.rope.scaling.yarn_log_multiplier", Value::F32(0.0));
    assert_eq!((old.attention_scale, old.latent.unwrap().temperature), ((1.0 / 40f64.sqrt()) as f32, 0.0));
    assert_eq!(with("deepseek2.expert_weights_scale", Value::F32(0.0)).experts.unwrap().scale, 1.0);
    assert!(!with("deepseek2.expert_weights_norm", Value::Bool(false)).experts.unwrap().normalize);
    let lite = with("deepseek2.rope.scaling.yarn_log_multiplier", Value::F32(0.0707));
    assert_eq!(lite.latent.unwrap().temperature, 0.707);
    assert_eq!(with("deepseek2.expert_group_used_count", Value::U32(2)).experts.unwrap().groups, None);
}

#[test]
fn refusals_of_gguf_name_key_and_tensor() {
    let refused = |change: fn(&mut Vec<(String, Value)>, &mut Vec<Tensor>)| in_gguf(change).unwrap_err().to_string();
    for (change, parts) in [
        (
            (|e, _| put(e, "deepseek2.rope.dimension_count", Value::U32(40))) as fn(&mut Vec<(String, Value)>, &mut Vec<Tensor>),
            ["rope.dimension_count", "below the key's 40"],
        ),
        (
            |e, tensors| {
                unpack_apart(e, tensors);
                e.retain(|(k, _)| k != "deepseek2.attention.key_length_mla");
            },
            ["attention.key_length_mla", "missing"],
        ),
        (
            |e, tensors| {
                unpack_apart(e, tensors);
                tensors.retain(|t| t.name != "blk.1.attn_v_b.weight");
            },
            ["blk.1.attn_v_b.weight", "missing"],
        ),
        (
            |e, tensors| {
                unpack_apart(e, tensors);
                tensors.iter_mut().find(|t| t.name == "blk.1.attn_k_b.weight").unwrap().dims = vec![32, 24, 4];
            },
            ["blk.1.attn_k_b.weight", "[4, 32, 24]"],
        ),
        (|e, _| put(e, "deepseek2.rope.dimension_count", Value::U32(15)), ["rope.dimension_count", "even"]),
        (|e, _| e.retain(|(k, _)| !k.ends_with("kv_lora_rank")), ["attention.kv_lora_rank", "missing"]),
        (|e, _| put(e, "deepseek2.expert_gating_func", Value::U32(3)), ["expert_gating_func", "2, sigmoid"]),
        (|e, _| put(e, "deepseek2.expert_group_count", Value::U32(5)), ["expert_group_count", "groups of the same size"]),
        (|e, _| put(e, "deepseek2.expert_weights_scale", Value::F32(-1.0)), ["expert_weights_scale", "at least 0"]),
        (|e, _| put(e, "deepseek2.rope.scaling.attn_factor", Value::F32(1.2)), ["rope.scaling.attn_factor", "default"]),
        (|e, _| put(e, "deepseek2.rope.scaling.yarn_log_multiplier", Value::F32(-0.1)), ["yarn_log_multiplier", "at least 0"]),
        (|e, _| put(e, "deepseek2.attention.temperature_scale", Value::F32(0.1)), ["attention.temperature_scale", "none"]),
        (|e, _| put(e, "deepseek2.attention.sliding_window", Value::U32(8)), ["sliding_window", "no sliding window"]),
        (|_, tensors| tensors.retain(|t| t.name != "blk.2.exp_probs_b.bias"), ["blk.2.exp_probs_b.bias", "missing"]),
    ] {
        let text = refused(change);
        assert!(parts.iter().all(|part| text.contains(part)), "{text}, without {parts:?}");
    }
}

/// What is not said in GGUF is refused by what it is.
#[test]
fn what_gguf_cannot_say_is_named() {
    let said = |base: &str, with: Json| {
        let mut header = fixture_header(base);
        header.config = HfConfig::parse(changed(&fixture_config(base), with).to_string().as_bytes()).unwrap().config;
        let error = target(&header, Format::GGUF).unwrap_err();
        format!("{error} {error:?}")
    };
    for (base, with, what) in [
        ("deepseek-v3", json!({"rms_norm_eps": 1e-5}), "latent.norm_eps"),
        ("deepseek-v3", json!({"rope_interleave": false}), "half a head apart"),
        ("deepseek-v2", json!({"rms_norm_eps": 1e-6}), "attn_factor"),
    ] {
        let text = said(base, with);
        assert!(text.contains(what), "{text}");
    }
}

/// What compresses is on every rank, what unpacks is split by heads; the cache has both widths.
#[test]
fn ranks_have_their_heads_and_experts() {
    let model = fixture_header("deepseek-v3");
    let spec = Spec { tensor: 2, max_context: Some(512), kv_dtype: Some(KvDType::F32), ..Spec::default() };
    let plan = plan(&spec, &model, &Capacity { memory_bytes: None }).unwrap();
    let shards = &plan.stages[0].shards;
    let rows = |rank: usize, role| shards[rank].slices.iter().find(|s| s.id == layer(1, role)).map(|s| s.rows.clone());
    for rank in 0..2 {
        assert_eq!((rows(rank, Role::QDown), rows(rank, Role::KvDown)), (Some(0..40), Some(0..48)));
        assert_eq!(rows(rank, Role::RouterBias), Some(0..8));
    }
    assert_eq!((rows(0, Role::QUp), rows(1, Role::QUp)), (Some(0..80), Some(80..160)));
    assert_eq!((rows(0, Role::KvUp), rows(1, Role::KvUp)), (Some(0..88), Some(88..176)));
    let shared = &shards[0].splits.shared;
    assert_eq!((shared[0].start, shared[0].end, shared[1].end), (0, shared[1].start, 24));
    assert_eq!(rows(1, Role::SharedGate), Some(shared[1].clone()));
    assert_eq!((rows(1, Role::ExpertUp(3)), rows(1, Role::ExpertUp(4))), (None, Some(0..24)));
    // 3 layers of 2 heads of 40 and 20 values, 16 tokens a block, 4 bytes each.
    assert_eq!(shards[0].kv_bytes, plan.kv.groups[0].blocks as u64 * 3 * 2 * (40 + 20) * 16 * 4);
    // What is on both ranks is counted once more.
    let whole =
        [Role::QDown, Role::KvDown, Role::QDownNorm, Role::KvDownNorm, Role::AttnNorm, Role::FfnNorm, Role::Router, Role::RouterBias];
    let twice: u64 =
        model.tensors.iter().filter(|(id, _)| whole.contains(&id.role) || id.role == Role::OutputNorm).map(|(_, t)| t.bytes).sum();
    assert_eq!(plan.shared_bytes, twice);
}

/// Any number in place of any other: refused, or a model whose plan stays in its file.
#[test]
fn no_number_breaks_the_reader() {
    let planned = |model: ModelHeader| {
        for tensor in [1, 2, 4] {
            let Ok(plan) = plan(&Spec { tensor, ..Spec::default() }, &model, &Capacity { memory_bytes: Some(1 << 30) }) else { continue };
            let mut slices = plan.stages.iter().flat_map(|s| &s.shards).flat_map(|s| &s.slices);
            assert!(slices.all(|s| s.bytes.start <= s.bytes.end && s.bytes.end <= model.files[0].bytes));
        }
    };
    let (mut read, mut refused) = (0, 0);
    for name in ["deepseek-v2", "deepseek-v3"] {
        let bytes = std::fs::read(fixture(name).join("model.safetensors")).unwrap();
        let header = safetensors::read(&mut &*bytes, bytes.len() as u64).unwrap();
        let file = ModelFile { name: "model.safetensors".to_owned(), bytes: bytes.len() as u64 };
        let config = fixture_config(name);
        for (field, _) in config.as_object().unwrap().iter().filter(|(_, value)| value.is_number() || value.is_null()) {
            for value in [json!(0), json!(1), json!(2), json!(3), json!(7), json!(1 << 24), json!(-1), json!(1.5), json!(1e308), json!("x")]
            {
                let mut config = config.clone();
                config[field] = value;
                match from_safetensors(config.to_string().as_bytes(), &[(file.clone(), header.clone())]) {
                    Ok(model) => {
                        planned(model);
                        read += 1;
                    }
                    Err(_) => refused += 1,
                }
            }
        }
    }
    for apart in [false, true] {
        let mut count = 0;
        let _ = in_gguf(|entries, _| count = entries.len());
        for at in 0..count + if apart { 2 } else { 0 } {
            for n in [0, 1, 2, 3, 7, 1 << 24, u32::MAX] {
                let changed = in_gguf(|entries, tensors| {
                    if apart {
                        unpack_apart(entries, tensors);
                    }
                    match &mut entries[at].1 {
                        value @ Value::U32(_) => *value = Value::U32(n),
                        value @ Value::F32(_) => *value = Value::F32(f32::from_bits(n.rotate_right(3))),
                        _ => {}
                    }
                });
                match changed {
                    Ok(model) => {
                        planned(model);
                        read += 1;
                    }
                    Err(_) => refused += 1,
                }
            }
        }
    }
    assert!(read > 100 && refused > 100, "{read} read, {refused} refused");
}
