//! Adapters' headers: the fixtures, patterns and exceptions, products stored together, row orders, and every refusal.

use std::{fs, path::PathBuf};

use serde_json::{Value as Json, json};

use super::{adapter_from_gguf, adapter_from_peft};
use crate::{
    adapter::{AdapterHeader, RowOrder},
    dtype::DType,
    gguf::{self, Value},
    header::{HeaderError, HfConfig},
    model::{ModelConfig, ModelFile, Role, RopeLayout, TensorId},
    planner::{Capacity, Spec},
    safetensors::{Header, Tensor},
    samples::Sample,
};

fn fixture(model: &str, file: &str) -> Vec<u8> {
    fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(model).join(file)).unwrap()
}

fn base(model: &str) -> ModelConfig {
    HfConfig::parse(&fixture(model, "config.json")).unwrap().config
}

fn config(model: &str) -> Json {
    serde_json::from_slice(&fixture(model, "adapter_config.json")).unwrap()
}

fn weights(model: &str) -> Vec<(ModelFile, Header)> {
    let bytes = fixture(model, "adapter_model.safetensors");
    let header = crate::safetensors::read(&mut &*bytes, bytes.len() as u64).unwrap();
    vec![(ModelFile { name: "adapter_model.safetensors".into(), bytes: bytes.len() as u64 }, header)]
}

fn read(config: &Json, parts: &[(ModelFile, Header)], base: &ModelConfig) -> Result<AdapterHeader, HeaderError> {
    adapter_from_peft(config.to_string().as_bytes(), parts, base)
}

/// Headers of tensors of the given shapes, one after the other.
fn listed(tensors: &[(String, [u64; 2])]) -> Vec<(ModelFile, Header)> {
    let mut offset = 100;
    let tensor = |(name, shape): &(String, [u64; 2])| {
        let bytes = shape[0] * shape[1] * 4;
        offset += bytes;
        let name = name.clone();
        Tensor { name, dtype: "F32".into(), shape: shape.to_vec(), offset: offset - bytes, bytes, entry_offset: 8 }
    };
    let header = Header { tensors: tensors.iter().map(tensor).collect(), ..Header::default() };
    vec![(ModelFile { name: "adapter_model.safetensors".into(), bytes: offset }, header)]
}

/// The pairs of `modules`, `(name, out, in)`, of rank `rank`.
fn pairs(modules: &[(String, u64, u64)], rank: u64) -> Vec<(ModelFile, Header)> {
    let both = |(name, rows, input): &(String, u64, u64)| {
        let name = |half| format!("base_model.model.{name}.lora_{half}.weight");
        [(name("A"), [rank, *input]), (name("B"), [*rows, rank])]
    };
    listed(&modules.iter().flat_map(both).collect::<Vec<_>>())
}

fn minimal(targets: Json) -> Json {
    json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets })
}

fn id(layer: u32, role: Role) -> TensorId {
    TensorId { layer: Some(layer), role }
}

#[test]
fn the_fixtures_are_read() {
    let llama = base("llama");
    let a = read(&config("llama-lora-a"), &weights("llama-lora-a"), &llama).unwrap();
    let roles: Vec<Role> = a.pairs.iter().take(5).map(|p| p.id.role).collect();
    assert_eq!(roles, [Role::Q, Role::V, Role::O, Role::Gate, Role::Down]);
    assert_eq!((a.pairs.len(), a.pairs[0].scale, a.pairs[0].order), (20, 2.0, RowOrder::Same));
    let down = a.pairs.iter().find(|p| p.id == id(2, Role::Down)).unwrap();
    assert_eq!((&down.a.shape, &down.b.shape, down.a.bytes), (&vec![8, 256], &vec![128, 8], 8192));
    let b = read(&config("llama-lora-b"), &weights("llama-lora-b"), &llama).unwrap();
    assert_eq!((b.pairs.len(), b.pairs[0].scale), (12, 4.0));
    assert_ne!(a.numerics("x"), b.numerics("x"));
    assert_ne!(a.numerics("x"), a.numerics("y"));
    let mut other = config("llama-lora-a");
    other["lora_alpha"] = json!(17);
    assert_ne!(read(&other, &weights("llama-lora-a"), &llama).unwrap().numerics("x"), a.numerics("x"));
}

#[test]
fn ranks_hold_all_of_a_and_their_rows_of_b() {
    let llama = base("llama");
    let a = read(&config("llama-lora-a"), &weights("llama-lora-a"), &llama).unwrap();
    let header = Sample { layers: 4, hidden: 128, heads: 8, kv_heads: 4, head_dim: 16, ffn: 256, vocab: 512, ..Sample::llama() }.model();
    let spec = Spec { pipeline: 2, tensor: 3, ..Spec::default() };
    let plan = crate::planner::plan(&spec, &header, &Capacity { memory_bytes: None }).unwrap();
    let mut rows_of_q = Vec::new();
    for shard in plan.stages.iter().flat_map(|s| &s.shards) {
        let own = a.of(&llama, shard);
        assert!(own.pairs.iter().all(|p| shard.layers.contains(&(p.id.layer.unwrap() as usize))));
        assert!(own.pairs.iter().all(|p| p.a.rows == (0..8) && p.a.len() == p.a.tensor.bytes));
        assert!(own.weight_bytes() > 0 && own.working_bytes(10) >= 10 * 4 * (256 + 8));
        rows_of_q.push(own.pairs.iter().find(|p| p.id.role == Role::Q).unwrap().b.rows.clone());
    }
    assert_eq!(rows_of_q[..3], [0..48, 48..96, 96..128]);
}

#[test]
fn products_stored_together_share_a() {
    let phi = ModelConfig { architecture: crate::model::Architecture::Phi3, ..base("llama") };
    let parts = pairs(&[("model.layers.1.self_attn.qkv_proj".into(), 256, 128), ("model.layers.1.mlp.gate_up_proj".into(), 512, 128)], 2);
    let layered = |targets: Json| {
        let mut config = minimal(targets);
        config["layers_to_transform"] = json!([1]);
        config
    };
    let adapter = read(&layered(json!(["qkv_proj", "gate_up_proj"])), &parts, &phi).unwrap();
    let of = |role| adapter.pairs.iter().find(|p| p.id == id(1, role)).unwrap();
    assert_eq!(adapter.pairs.len(), 5);
    assert_eq!(of(Role::Q).a, of(Role::V).a);
    assert_eq!(of(Role::K).b.offset - of(Role::Q).b.offset, 128 * 2 * 4);
    assert_eq!((of(Role::V).b.offset - of(Role::K).b.offset, of(Role::V).b.bytes), (64 * 2 * 4, 64 * 2 * 4));
    assert_eq!(of(Role::Up).b.offset - of(Role::Gate).b.offset, 256 * 2 * 4);
    // GPT-2 stores matrices by columns, adapters do not.
    let gpt2 = base("gpt2");
    let width = gpt2.hidden as u64;
    let modules: Vec<_> = (0..gpt2.layers.len()).map(|l| (format!("transformer.h.{l}.attn.c_attn"), 3 * width, width)).collect();
    let adapter = read(&minimal(json!(["c_attn"])), &pairs(&modules, 2), &gpt2).unwrap();
    assert_eq!(adapter.pairs.len(), 3 * gpt2.layers.len());
    assert_eq!(adapter.pairs[1].b.offset - adapter.pairs[0].b.offset, width * 2 * 4);
}

#[test]
fn modules_are_chosen_as_peft_does() {
    let llama = base("llama");
    let q = |layers: &[u32]| layers.iter().map(|l| (format!("model.layers.{l}.self_attn.q_proj"), 128, 128)).collect::<Vec<_>>();
    let with = |targets: Json, more: Json| {
        let mut config = minimal(targets);
        more.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
        config
    };
    let cases = [
        (with(json!(["q_proj"]), json!({})), vec![0, 1, 2, 3]),
        (with(json!(["model.layers.2.self_attn.q_proj"]), json!({})), vec![2]),
        (with(json!(["self_attn.q_proj"]), json!({ "layers_to_transform": [1, 3] })), vec![1, 3]),
        (with(json!(["q_proj"]), json!({ "layers_to_transform": 2, "layers_pattern": "layers" })), vec![2]),
        (with(json!(["q_proj"]), json!({ "layers_to_transform": [1], "layers_pattern": ["layers"] })), vec![1]),
        (with(json!(r"model\.layers\.[0-2]\.self_attn\.q_proj"), json!({})), vec![0, 1, 2]),
        (with(json!(r".*\.q_proj"), json!({ "exclude_modules": r".*\.3\..*" })), vec![0, 1, 2]),
        (with(json!(["q_proj"]), json!({ "exclude_modules": ["layers.0.self_attn.q_proj"] })), vec![1, 2, 3]),
    ];
    for (config, layers) in &cases {
        let adapter = read(config, &pairs(&q(layers), 2), &llama).unwrap_or_else(|e| panic!("{config}: {e}"));
        assert_eq!(adapter.pairs.iter().map(|p| p.id.layer.unwrap()).collect::<Vec<_>>(), *layers);
        // One layer less is a damaged file.
        let missing = read(config, &pairs(&q(&layers[1..]), 2), &llama);
        assert!(matches!(missing, Err(HeaderError::MissingTensor { .. })), "{config}: {missing:?}");
    }
    let all: Vec<_> = (0..4)
        .flat_map(|l| {
            [("self_attn.q_proj", 128, 128), ("self_attn.k_proj", 64, 128), ("self_attn.v_proj", 64, 128), ("self_attn.o_proj", 128, 128)]
                .into_iter()
                .chain([("mlp.gate_proj", 256, 128), ("mlp.up_proj", 256, 128), ("mlp.down_proj", 128, 256)])
                .map(move |(name, rows, input)| (format!("model.layers.{l}.{name}"), rows, input))
        })
        .collect();
    assert_eq!(read(&minimal(json!("all-linear")), &pairs(&all, 2), &llama).unwrap().pairs.len(), 28);
    // The same of the model without its head.
    let bare: Vec<_> = all.iter().map(|(name, rows, input)| (name.replacen("model.", "", 1), *rows, *input)).collect();
    assert_eq!(read(&minimal(json!("all-linear")), &pairs(&bare, 2), &llama).unwrap().pairs.len(), 28);
    assert!(matches!(read(&minimal(json!("all-linear")), &pairs(&all[1..], 2), &llama), Err(HeaderError::MissingTensor { .. })));
}

#[test]
fn factors_follow_rank_and_alpha() {
    let llama = base("llama");
    let mut config = minimal(json!(["q_proj"]));
    config["rank_pattern"] = json!({ r"layers\.1\.self_attn\.q_proj": 4, "q_proj": 2 });
    config["alpha_pattern"] = json!({ "layers.0.self_attn.q_proj": 7.0 });
    let tensors: Vec<_> = (0..4_u32)
        .flat_map(|l| {
            let rank = if l == 1 { 4 } else { 2 };
            let name = move |half| format!("base_model.model.model.layers.{l}.self_attn.q_proj.lora_{half}.weight");
            [(name("A"), [rank, 128]), (name("B"), [128, rank])]
        })
        .collect();
    let scales = |config: &Json| read(config, &listed(&tensors), &llama).unwrap().pairs.iter().map(|p| p.scale).collect::<Vec<_>>();
    assert_eq!(scales(&config), [3.5, 1.0, 2.0, 2.0]);
    config["use_rslora"] = json!(true);
    assert_eq!(scales(&config), [(7.0 / 2_f64.sqrt()) as f32, 2.0, (4.0 / 2_f64.sqrt()) as f32, (4.0 / 2_f64.sqrt()) as f32]);
}

/// The GGUF twin of an adapter of rank 2 of the query products.
fn gguf_adapter(arch: &str, change: impl FnOnce(&mut gguf::Writer)) -> (ModelFile, gguf::Header) {
    let text = |s: &str| Value::String(s.to_owned());
    let mut writer = gguf::Writer::new();
    writer.metadata("general.type", text("adapter")).metadata("general.architecture", text(arch));
    writer.metadata("adapter.type", text("lora")).metadata("adapter.lora.alpha", Value::F32(8.0));
    for layer in 0..4 {
        writer.tensor(&format!("blk.{layer}.attn_q.weight.lora_a"), &[2, 128], DType::F32, vec![0; 1024]);
        writer.tensor(&format!("blk.{layer}.attn_q.weight.lora_b"), &[128, 2], DType::F32, vec![0; 1024]);
    }
    change(&mut writer);
    let mut bytes = Vec::new();
    writer.write(&mut bytes).unwrap();
    let header = gguf::read(&mut &*bytes, bytes.len() as u64, gguf::Keep::Short, true).unwrap();
    (ModelFile { name: "a.gguf".into(), bytes: bytes.len() as u64 }, header)
}

#[test]
fn gguf_adapters_are_read_and_rows_of_heads_are_put_in_the_models_order() {
    let halves = base("llama");
    let mut adjacent = halves.clone();
    adjacent.layers.iter_mut().for_each(|l| l.rope.layout = RopeLayout::Adjacent);
    let (file, header) = gguf_adapter("llama", |_| {});
    let own = adapter_from_gguf(file.clone(), &header, &adjacent).unwrap();
    assert_eq!((own.pairs.len(), own.pairs[0].scale, own.pairs[0].order), (4, 4.0, RowOrder::Same));
    let other = adapter_from_gguf(file, &header, &halves).unwrap();
    assert_eq!(other.pairs[0].order, RowOrder::ToHalves { head_dim: 16 });
    let peft = read(&config("llama-lora-a"), &weights("llama-lora-a"), &adjacent).unwrap();
    let order = |role| peft.pairs.iter().find(|p| p.id.role == role).unwrap().order;
    assert_eq!((order(Role::Q), order(Role::V)), (RowOrder::ToAdjacent { head_dim: 16 }, RowOrder::Same));
    let qwen = base("qwen2");
    let (file, header) = gguf_adapter("llama", |_| {});
    assert!(adapter_from_gguf(file, &header, &qwen).is_err_and(|e| e.to_string().contains("qwen2")));
}

#[test]
fn gguf_adapters_that_are_none_are_refused() {
    let llama = base("llama");
    let refused = |arch: &str, expected: &[&str], change: fn(&mut gguf::Writer)| {
        let (file, header) = gguf_adapter(arch, change);
        let text = adapter_from_gguf(file, &header, &llama).unwrap_err().to_string();
        expected.iter().for_each(|part| assert!(text.contains(part), "{text}: no {part}"));
    };
    refused("gemma3", &["general.architecture", "gemma3", "expected llama"], |_| {});
    refused("llama", &["adapter.alora.invocation_tokens"], |w| {
        w.array("adapter.alora.invocation_tokens", gguf::Kind::U32, vec![Value::U32(1)]);
    });
    refused("llama", &["blk.0.attn_k.weight.lora_b", "missing"], |w| {
        w.tensor("blk.0.attn_k.weight.lora_a", &[2, 128], DType::F32, vec![0; 1024]);
    });
    refused("llama", &["token_embd.weight.lora_a", "a change of token_embd"], |w| {
        w.tensor("token_embd.weight.lora_a", &[2, 128], DType::F32, vec![0; 1024]);
    });
    refused("llama", &["blk.0.attn_norm.weight.lora_a", "not part of"], |w| {
        w.tensor("blk.0.attn_norm.weight.lora_a", &[2, 128], DType::F32, vec![0; 1024]);
    });
    refused("llama", &["blk.0.attn_k.weight.lora_a", "F32, F16 or BF16"], |w| {
        w.tensor("blk.0.attn_k.weight.lora_a", &[2, 128], DType::Q8_0, vec![0; 272]);
        w.tensor("blk.0.attn_k.weight.lora_b", &[64, 2], DType::F32, vec![0; 512]);
    });
    let header = Sample::llama().header();
    let text = adapter_from_gguf(ModelFile { name: "m.gguf".into(), bytes: 1 }, &header, &llama).unwrap_err().to_string();
    assert!(text.contains("general.type") && text.contains("expected adapter"), "{text}");
}

#[test]
fn what_asks_for_another_computation_is_refused_by_name() {
    let llama = base("llama");
    let parts = weights("llama-lora-a");
    let cases = [
        (json!({ "peft_type": "IA3" }), "peft_type"),
        (json!({ "peft_type": null }), "peft_type"),
        (json!({ "use_dora": true }), "use_dora"),
        (json!({ "modules_to_save": ["lm_head"] }), "modules_to_save"),
        (json!({ "bias": "lora_only" }), "bias"),
        (json!({ "lora_bias": true }), "lora_bias"),
        (json!({ "layer_replication": [[0, 2]] }), "layer_replication"),
        (json!({ "target_parameters": ["mlp.experts.gate_up_proj"] }), "target_parameters"),
        (json!({ "alora_invocation_tokens": [1] }), "alora_invocation_tokens"),
        (json!({ "r": 0 }), "r"),
        (json!({ "r": 4 }), "lora_A"),
        (json!({ "lora_alpha": -1 }), "lora_alpha"),
        (json!({ "lora_alpha": "x" }), "lora_alpha"),
        (json!({ "target_modules": null }), "target_modules"),
        (json!({ "target_modules": ["nothing"] }), "target_modules"),
        (json!({ "target_modules": 7 }), "target_modules"),
        (json!({ "target_modules": "(?!x).*q_proj" }), "look-around"),
        (json!({ "target_modules": ["q_proj"] }), "target_modules"),
        (json!({ "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"] }), "up_proj"),
        (json!({ "rank_pattern": { "q_proj": 0 } }), "rank_pattern"),
        (json!({ "rank_pattern": { "q_proj": 3 } }), "lora_A"),
        (json!({ "alpha_pattern": { "q_proj": "a" } }), "alpha_pattern"),
        (json!({ "layers_to_transform": [0] }), "target_modules"),
    ];
    for (change, named) in cases {
        let mut config = config("llama-lora-a");
        change.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
        let text = read(&config, &parts, &llama).unwrap_err().to_string();
        assert!(text.contains(named), "{change}: {text}");
    }
    assert!(matches!(adapter_from_peft(b"{", &parts, &llama), Err(HeaderError::Json { .. })));
}

#[test]
fn tensors_that_do_not_belong_are_refused_by_name() {
    let (llama, moe) = (base("llama"), base("qwen3-moe"));
    let config = minimal(json!(["q_proj"]));
    let q = |l: u32, half: &str, shape| (format!("base_model.model.model.layers.{l}.self_attn.q_proj.lora_{half}.weight"), shape);
    let whole: Vec<_> = (0..4).flat_map(|l| [q(l, "A", [2, 128]), q(l, "B", [128, 2])]).collect();
    assert!(read(&config, &listed(&whole), &llama).is_ok());
    let more = |name: &str| [&whole[..], &[(name.to_owned(), [2, 128])]].concat();
    for (name, said) in [
        ("base_model.model.lm_head.lora_A.weight", "a change of lm_head"),
        ("base_model.model.model.embed_tokens.lora_A.weight", "a change of model.embed_tokens"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "neither"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "neither"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "layers.9"),
        ("model.layers.0.self_attn.q_proj.weight", "neither"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "again"),
    ] {
        let text = read(&config, &listed(&more(name)), &llama).unwrap_err().to_string();
        assert!(text.contains(said) && text.contains(name), "{name}: {text}");
    }
    let mut turned = whole.clone();
    turned[1].1 = [2, 128];
    assert!(matches!(read(&config, &listed(&turned), &llama), Err(HeaderError::Shape { .. })));
    let expert = [("base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_A.weight".to_owned(), [2, moe.hidden as u64])];
    let text = read(&minimal(json!("all-linear")), &listed(&expert), &moe).unwrap_err().to_string();
    assert!(text.contains("a change of model.layers.0.mlp.experts.0.gate_proj"), "{text}");
    assert!(read(&config, &[], &llama).is_err());
}

/// Of latent attention the products that other models have too; rows of queries stay where they are.
#[test]
fn adapters_of_compressing_products_are_refused() {
    let (v2, v3) = (base("deepseek-v2"), base("deepseek-v3"));
    let pair = |l: u32, module: &str, rows: u64, input: u64| {
        let name = |half| format!("base_model.model.model.layers.{l}.self_attn.{module}.lora_{half}.weight");
        [(name("A"), [2, input]), (name("B"), [rows, 2])]
    };
    let of = |module: &str, rows, input| listed(&(0..3).flat_map(|l| pair(l, module, rows, input)).collect::<Vec<_>>());
    let adapter = read(&minimal(json!(["q_proj"])), &of("q_proj", 96, 48), &v2).unwrap();
    assert!(adapter.pairs.len() == 3 && adapter.pairs.iter().all(|p| p.order == RowOrder::Same));
    let adapter = read(&minimal(json!(["o_proj"])), &of("o_proj", 48, 80), &v3).unwrap();
    assert_eq!(adapter.pairs.len(), 3);
    for (module, rows, input) in [("q_a_proj", 40, 48), ("q_b_proj", 160, 40), ("kv_a_proj_with_mqa", 48, 48), ("kv_b_proj", 176, 32)] {
        let text = read(&minimal(json!([module])), &of(module, rows, input), &v3).unwrap_err().to_string();
        assert!(text.contains(module) && text.contains("query, key, value"), "{text}");
    }
}

#[test]
fn broken_bytes_are_refused_and_never_panic() {
    let (llama, parts) = (base("llama"), weights("llama-lora-a"));
    let config = fixture("llama-lora-a", "adapter_config.json");
    for at in 0..config.len() {
        for byte in [0, b'"', b'-', b'9', b'[', 0xff] {
            let mut broken = config.clone();
            broken[at] = byte;
            let _ = adapter_from_peft(&broken, &parts, &llama);
        }
        assert!(adapter_from_peft(&config[..at], &parts, &llama).is_err() || config[at..].trim_ascii().is_empty());
    }
    let (file, header) = (&parts[0].0, &parts[0].1);
    for at in 0..header.tensors.len() {
        for shape in [vec![], vec![8], vec![0, 0], vec![u64::MAX, u64::MAX], vec![8, 128, 1]] {
            let mut broken = header.clone();
            broken.tensors[at].shape = shape;
            assert!(adapter_from_peft(&config, &[(file.clone(), broken)], &llama).is_err(), "{at}");
        }
    }
}
