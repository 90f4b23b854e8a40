//! Headers of models: the fixtures, both layouts of config.json, every refusal, and headers with any byte damaged.

mod damaged;
mod latent;

use std::{borrow::Cow, fs, path::PathBuf};

use ::safetensors::{Dtype, View, serialize};
use serde_json::{Value as Json, json};

use super::{Biases, HeaderError, HfConfig, from_gguf, from_safetensors};
use crate::{
    dtype::DType,
    gguf::{self, Array, Entry, GgmlType, Kind, Value},
    model::{Activation, Architecture, Format, ModelFile, ModelHeader, Role, Rope, RopeLayout, RopeScaling, TensorId},
    safetensors,
    samples::Sample,
    shard::TensorSlice,
};

fn fixture(model: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(model)
}

fn fixture_config(model: &str) -> Json {
    serde_json::from_slice(&fs::read(fixture(model).join("config.json")).unwrap()).unwrap()
}

fn fixture_header(model: &str) -> ModelHeader {
    let index = fs::read(fixture(model).join("model.safetensors.index.json"));
    let part = |name: String| {
        let bytes = fs::read(fixture(model).join(&name)).unwrap();
        let header = safetensors::read(&mut &*bytes, bytes.len() as u64).unwrap();
        (ModelFile { name, bytes: bytes.len() as u64 }, header)
    };
    let names = index.map_or_else(|_| vec!["model.safetensors".to_owned()], |index| safetensors::Index::parse(&index).unwrap().files());
    let parts: Vec<_> = names.into_iter().map(part).collect();
    from_safetensors(&fs::read(fixture(model).join("config.json")).unwrap(), &parts).unwrap()
}

fn hf(config: &Json) -> Result<HfConfig, HeaderError> {
    HfConfig::parse(config.to_string().as_bytes())
}

/// A copy of `config` without the fields that `with` sets to null, and with the others.
fn changed(config: &Json, with: Json) -> Json {
    let mut config = config.clone();
    for (key, value) in with.as_object().unwrap() {
        match value {
            Json::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value.clone(),
        }
    }
    config
}

fn rope(base: f64, dims: usize, layout: RopeLayout) -> Rope {
    Rope { base, dims, layout, scaling: RopeScaling::None, amplitude: 1.0 }
}

#[test]
fn the_llama_fixture_has_its_shape() {
    let header = fixture_header("llama");
    let c = &header.config;
    assert_eq!((header.format, c.architecture, header.files.len()), (Format::Safetensors, Architecture::Llama, 5));
    assert_eq!((c.hidden, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, c.context), (128, 8, 4, 16, 256, 512, 512));
    assert_eq!((c.norm_eps, c.norm_weight_offset, c.embedding_scale, c.attention_scale), (1e-5, 0.0, 1.0, 0.25));
    assert_eq!((c.activation, c.tied_embeddings, c.layers.len()), (Activation::Silu, false, 4));
    assert!(c.layers.iter().all(|l| l.window.is_none() && l.rope == rope(10_000.0, 16, RopeLayout::Halves)));
    assert_eq!(header.tensors.len(), 3 + 4 * 9);
    let q = &header.tensors[&TensorId { layer: Some(3), role: Role::Q }];
    assert_eq!((q.name.as_str(), q.dtype, q.shape.as_slice()), ("model.layers.3.self_attn.q_proj.weight", DType::BF16, &[128, 128][..]));
    assert!(header.tensors.values().all(|t| t.offset + t.bytes <= header.files[t.file].bytes));
}

#[test]
fn the_gemma3_fixture_has_its_shape() {
    let header = fixture_header("gemma3");
    let c = &header.config;
    assert_eq!((c.architecture, c.heads, c.kv_heads, c.head_dim, c.tied_embeddings), (Architecture::Gemma3, 4, 1, 32, true));
    assert_eq!((c.norm_weight_offset, c.activation, c.norm_eps), (1.0, Activation::GeluTanh, 1e-6));
    assert_eq!((c.embedding_scale, c.attention_scale), (128f32.sqrt(), (1.0 / 32f64.sqrt()) as f32));
    // `layer_types` wins over `_sliding_window_pattern`, which is 6 in this file.
    let windows: Vec<_> = c.layers.iter().map(|l| l.window).collect();
    assert_eq!(windows, [Some(8), Some(8), Some(8), None]);
    assert_eq!(c.layers[0].rope, rope(10_000.0, 32, RopeLayout::Halves));
    assert_eq!(c.layers[3].rope, rope(1_000_000.0, 32, RopeLayout::Halves));
    assert_eq!(header.tensors.len(), 2 + 4 * 13);
    assert!(header.tensors.contains_key(&TensorId { layer: Some(0), role: Role::PostFfnNorm }));
}

#[test]
fn older_and_newer_layouts_of_config_json_are_the_same_model() {
    let new = fixture_config("llama");
    let old = changed(
        &new,
        json!({"rope_parameters": null, "rope_theta": 10000.0, "rope_scaling": null, "dtype": null, "torch_dtype": "bfloat16"}),
    );
    assert_eq!(hf(&old).unwrap(), hf(&new).unwrap());
    let other = changed(&old, json!({"rope_theta": 5000.0}));
    assert_ne!(hf(&other).unwrap(), hf(&new).unwrap(), "the comparison sees the base");

    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = json!(10000.0);
    let new = hf(&changed(&new, json!({"rope_parameters": parameters}))).unwrap();
    let expected = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64.0 };
    assert_eq!(new.config.layers[0].rope.scaling, expected);
    assert_eq!(hf(&changed(&old, json!({"rope_scaling": scaling}))).unwrap(), new);
    let linear = hf(&changed(&old, json!({"rope_scaling": {"type": "linear", "factor": 2}}))).unwrap();
    assert_eq!(linear.config.layers[0].rope.scaling, RopeScaling::Linear { factor: 2.0 });

    let new = fixture_config("gemma3");
    let old = changed(&new, json!({"rope_parameters": null, "rope_theta": 1e6, "rope_local_base_freq": 1e4}));
    assert_eq!(hf(&old).unwrap(), hf(&new).unwrap());
    // Older Gemma files rely on the defaults of transformers.
    assert_eq!(hf(&changed(&new, json!({"rope_parameters": null}))).unwrap(), hf(&new).unwrap());
    let scaled = hf(&changed(&old, json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}))).unwrap();
    assert_eq!(scaled.config.layers[3].rope.scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(scaled.config.layers[0].rope.scaling, RopeScaling::None, "local layers are not scaled");
}

#[test]
fn layer_patterns_and_defaults() {
    let gemma = fixture_config("gemma3");
    let windows = |with: Json| hf(&changed(&gemma, with)).unwrap().config.layers.iter().map(|l| l.window.is_some()).collect::<Vec<_>>();
    assert_eq!(
        windows(json!({"layer_types": null, "sliding_window_pattern": 2, "_sliding_window_pattern": null})),
        [true, false, true, false]
    );
    assert_eq!(windows(json!({"layer_types": null, "_sliding_window_pattern": 3})), [true, true, false, true]);
    let twelve = json!({"layer_types": null, "_sliding_window_pattern": null, "num_hidden_layers": 12});
    assert_eq!(windows(twelve).iter().filter(|local| **local).count(), 10);

    let llama = fixture_config("llama");
    let config = |with: Json| hf(&changed(&llama, with)).unwrap();
    let bare = config(json!({"head_dim": null, "num_key_value_heads": null, "hidden_act": null, "tie_word_embeddings": null}));
    assert_eq!((bare.config.head_dim, bare.config.kv_heads, bare.config.tied_embeddings), (16, 8, false));
    assert!(config(json!({"tie_word_embeddings": true})).config.tied_embeddings);
    assert!(hf(&changed(&gemma, json!({"tie_word_embeddings": null}))).unwrap().config.tied_embeddings);
    assert_eq!(hf(&changed(&gemma, json!({"query_pre_attn_scalar": 64}))).unwrap().config.attention_scale, 0.125);
    assert_eq!(
        (config(json!({"attention_bias": true})).biases, config(json!({"mlp_bias": true})).biases),
        (Biases { qkv: true, o: true, mlp: false }, Biases { mlp: true, ..Biases::default() })
    );
    let by_type = config(json!({"architectures": null}));
    assert_eq!(by_type.config.architecture, Architecture::Llama);
    let partial = config(json!({"partial_rotary_factor": 0.5}));
    assert_eq!(partial.config.layers[0].rope.dims, 8);
}

#[test]
fn refusals_of_config_json_name_field_value_and_expectation() {
    let (llama, gemma) = (fixture_config("llama"), fixture_config("gemma3"));
    let of = |base: &Json, with: Json| {
        let config = changed(base, with.clone());
        (with, hf(&config).expect_err(&config.to_string()))
    };
    let l = |with| of(&llama, with);
    let g = |with| of(&gemma, with);
    let cases = [
        (l(json!({"architectures": ["MambaForCausalLM"]})), ["architectures", "MambaForCausalLM", "LlamaForCausalLM"]),
        (l(json!({"architectures": null, "model_type": "mamba"})), ["model_type", "mamba", "gemma3_text"]),
        (l(json!({"architectures": null, "model_type": null})), ["architectures", "missing", "a list of names"]),
        (l(json!({"architectures": "LlamaForCausalLM"})), ["architectures", "\"LlamaForCausalLM\"", "a list"]),
        // The multimodal form nests the text model; only the text form is supported.
        (
            g(json!({"architectures": ["Gemma3ForConditionalGeneration"]})),
            ["architectures", "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"],
        ),
        (l(json!({"hidden_size": null})), ["hidden_size", "missing", "an integer"]),
        (l(json!({"hidden_size": "big"})), ["hidden_size", "\"big\"", "an integer from 1"]),
        (l(json!({"hidden_size": 1.5})), ["hidden_size", "1.5", "an integer from 1"]),
        (l(json!({"hidden_size": 0})), ["hidden_size", "0", "an integer from 1"]),
        (l(json!({"hidden_size": -1})), ["hidden_size", "-1", "an integer from 1"]),
        (l(json!({"hidden_size": 1u64 << 40})), ["hidden_size", "1099511627776", "an integer from 1 to 16777216"]),
        (l(json!({"num_hidden_layers": 5000})), ["num_hidden_layers", "5000", "at most 4096"]),
        (l(json!({"num_key_value_heads": 3})), ["num_key_value_heads", "3", "a divisor of the 8 heads"]),
        (l(json!({"num_key_value_heads": 16})), ["num_key_value_heads", "16", "a divisor of the 8 heads"]),
        (
            l(json!({"num_attention_heads": 7, "head_dim": null, "num_key_value_heads": 7})),
            ["num_attention_heads", "7", "a divisor of the hidden size 128"],
        ),
        (l(json!({"rms_norm_eps": 0.0})), ["rms_norm_eps", "0.0", "a positive number"]),
        (l(json!({"rms_norm_eps": null})), ["rms_norm_eps", "missing", "a positive number"]),
        (l(json!({"hidden_act": "relu"})), ["hidden_act", "relu", "silu"]),
        (g(json!({"hidden_activation": "silu"})), ["hidden_activation", "silu", "gelu_pytorch_tanh"]),
        (l(json!({"tie_word_embeddings": 1})), ["tie_word_embeddings", "1", "true or false"]),
        (
            l(json!({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}})),
            ["rope_parameters.rope_type", "spiral", "default, linear, dynamic, yarn, longrope or llama3"],
        ),
        (
            l(json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}})),
            ["rope_parameters.factor", "missing", "a positive number"],
        ),
        (l(json!({"rope_parameters": {"rope_theta": -1}})), ["rope_parameters.rope_theta", "-1", "a positive number"]),
        (l(json!({"rope_parameters": 3})), ["rope_parameters", "3", "an object"]),
        (
            l(
                json!({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 64}}),
            ),
            ["rope_parameters.low_freq_factor", "4", "less than high_freq_factor"],
        ),
        (l(json!({"partial_rotary_factor": 0.05})), ["head_dim", "0", "an even number"]),
        (l(json!({"quantization_config": {"bits": 4}})), ["quantization_config.quant_method", "missing", "gptq"]),
        (g(json!({"final_logit_softcapping": 30.0})), ["final_logit_softcapping", "30", "without"]),
        (g(json!({"attn_logit_softcapping": 50.0})), ["attn_logit_softcapping", "50", "without"]),
        (g(json!({"use_bidirectional_attention": true})), ["use_bidirectional_attention", "true", "causal"]),
        (g(json!({"sliding_window": null})), ["sliding_window", "missing", "an integer"]),
        (g(json!({"layer_types": ["full_attention"]})), ["layer_types", "[\"full_attention\"]", "4 of sliding_attention"]),
        (g(json!({"layer_types": ["a", "b", "c", "d"]})), ["layer_types", "\"a\"", "4 of sliding_attention"]),
        (g(json!({"rope_parameters": {"full_attention": {}}})), ["rope_parameters.sliding_attention", "missing", "an object"]),
    ];
    for ((with, error), parts) in cases {
        let text = error.to_string();
        for part in parts.into_iter().chain(["config.json"]) {
            assert!(text.contains(part), "{with} says {text:?}, without {part:?}");
        }
    }
    assert!(HfConfig::parse(b"{").unwrap_err().to_string().contains("config.json"));
    assert!(HfConfig::parse(b"[]").is_err());
}

/// A tensor of zeros in BF16.
#[derive(Clone)]
struct Zeros(Vec<usize>);

impl View for Zeros {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.0
    }

    fn data(&self) -> Cow<'_, [u8]> {
        vec![0; self.data_len()].into()
    }

    fn data_len(&self) -> usize {
        2 * self.0.iter().product::<usize>()
    }
}

/// A small llama for safetensors: config.json and tensors.
fn small() -> (Json, Vec<(String, Zeros)>) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
        "intermediate_size": 6, "vocab_size": 3, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    let mut tensors = vec![("model.embed_tokens.weight", vec![3, 4]), ("model.norm.weight", vec![4]), ("lm_head.weight", vec![3, 4])];
    tensors.extend([
        ("model.layers.0.input_layernorm.weight", vec![4]),
        ("model.layers.0.self_attn.q_proj.weight", vec![4, 4]),
        ("model.layers.0.self_attn.k_proj.weight", vec![2, 4]),
        ("model.layers.0.self_attn.v_proj.weight", vec![2, 4]),
        ("model.layers.0.self_attn.o_proj.weight", vec![4, 4]),
        ("model.layers.0.post_attention_layernorm.weight", vec![4]),
        ("model.layers.0.mlp.gate_proj.weight", vec![6, 4]),
        ("model.layers.0.mlp.up_proj.weight", vec![6, 4]),
        ("model.layers.0.mlp.down_proj.weight", vec![4, 6]),
    ]);
    (config, tensors.into_iter().map(|(name, shape)| (name.to_owned(), Zeros(shape))).collect())
}

fn assemble(config: &Json, tensors: &[(String, Zeros)]) -> Result<ModelHeader, HeaderError> {
    let bytes = serialize(tensors.to_vec(), None).unwrap();
    let header = safetensors::read(&mut &*bytes, bytes.len() as u64).unwrap();
    from_safetensors(config.to_string().as_bytes(), &[(ModelFile { name: "one.safetensors".into(), bytes: bytes.len() as u64 }, header)])
}

#[test]
fn tensors_of_safetensors_files_are_checked() {
    let (config, tensors) = small();
    assert_eq!(assemble(&config, &tensors).unwrap().tensors.len(), 12);
    let without = |name: &str| tensors.iter().filter(|t| t.0 != name).cloned().collect::<Vec<_>>();
    let with = |name: &str, shape: &[usize]| [without(name), vec![(name.to_owned(), Zeros(shape.to_vec()))]].concat();
    let error = |tensors: &[(String, Zeros)]| assemble(&config, tensors).unwrap_err().to_string();
    let missing = error(&without("model.norm.weight"));
    assert!(missing.contains("model.norm.weight is missing from one.safetensors") && missing.contains("[4]"), "{missing}");
    let shape = error(&with("model.norm.weight", &[5]));
    assert!(shape.contains("model.norm.weight at byte ") && shape.contains("[5], expected [4]"), "{shape}");
    let extra = error(&with("model.layers.0.self_attn.q_norm.weight", &[2]));
    assert!(extra.contains("q_norm.weight at byte ") && extra.contains("not part of the architecture llama"), "{extra}");

    // Tied: the head may be absent, or there and unused. Buffers of rotary frequencies are no weights.
    let tied = changed(&config, json!({"tie_word_embeddings": true}));
    for tensors in [&without("lm_head.weight"), &tensors] {
        let header = assemble(&tied, tensors).unwrap();
        assert!(!header.tensors.contains_key(&TensorId { layer: None, role: Role::Output }));
    }
    assert!(assemble(&config, &with("model.layers.0.self_attn.rotary_emb.inv_freq", &[1])).is_ok());

    // Biases: exactly those that config.json announces.
    let names = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|n| format!("model.layers.0.self_attn.{n}.bias"));
    let biased: Vec<_> = names.into_iter().zip([4, 2, 2, 4]).map(|(name, len)| (name, Zeros(vec![len]))).collect();
    let biased = [tensors.clone(), biased].concat();
    let attention = changed(&config, json!({"attention_bias": true}));
    assert_eq!(assemble(&attention, &biased).unwrap().tensors.len(), 16);
    assert!(assemble(&attention, &tensors).unwrap_err().to_string().contains("q_proj.bias is missing"));
    assert!(assemble(&config, &biased).unwrap_err().to_string().contains("bias"));
}

#[test]
fn one_tensor_in_two_files_is_refused() {
    let (config, tensors) = small();
    let bytes = serialize(tensors, None).unwrap();
    let header = safetensors::read(&mut &*bytes, bytes.len() as u64).unwrap();
    let file = |name: &str| ModelFile { name: name.into(), bytes: bytes.len() as u64 };
    let parts = [(file("one"), header.clone()), (file("two"), header)];
    let text = from_safetensors(config.to_string().as_bytes(), &parts).unwrap_err().to_string();
    assert!(text.contains(" of one appears again at byte ") && text.ends_with(" of two"), "{text}");
}

fn gguf_model(header: &gguf::Header) -> Result<ModelHeader, HeaderError> {
    from_gguf(ModelFile { name: "m.gguf".into(), bytes: 1 << 30 }, header)
}

/// The header of `sample` with these metadata values set, or removed where there is `None`.
fn set(sample: &Sample, changes: &[(&str, Option<Value>)]) -> gguf::Header {
    let mut header = sample.header();
    for (key, value) in changes {
        header.metadata.retain(|e| e.key != *key);
        header.metadata.extend(value.clone().map(|value| Entry { key: (*key).to_owned(), value, offset: 777 }));
    }
    header
}

fn list(kind: Kind, values: Vec<Value>) -> Value {
    Value::Array(Box::new(Array { kind, len: values.len() as u64, values: Some(values) }))
}

#[test]
fn gguf_metadata_is_the_models_shape() {
    let model = Sample::llama().model();
    let c = &model.config;
    assert_eq!((model.format, c.architecture, c.tied_embeddings), (Format::GGUF, Architecture::Llama, false));
    assert_eq!((c.hidden, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, c.context), (8, 4, 2, 2, 12, 6, 64));
    assert_eq!((c.layers.len(), c.layers[0].window, c.layers[0].rope.clone()), (2, None, rope(5e5, 2, RopeLayout::Adjacent)));
    assert_eq!((c.norm_weight_offset, c.embedding_scale, c.norm_eps), (0.0, 1.0, 1e-5));

    let model = Sample::gemma3().model();
    let c = &model.config;
    let windows: Vec<_> = c.layers.iter().map(|l| l.window).collect();
    assert_eq!(windows, [Some(8), Some(8), Some(8), Some(8), Some(8), None, Some(8)]);
    assert_eq!(c.layers[5].rope, rope(5e5, 2, RopeLayout::Halves));
    assert_eq!(c.layers[0].rope, rope(1e4, 2, RopeLayout::Halves));
    assert_eq!((c.tied_embeddings, c.norm_weight_offset, c.embedding_scale), (true, 0.0, 8f32.sqrt()));
}

#[test]
fn gguf_settings_have_their_defaults_and_forms() {
    let (llama, gemma) = (Sample::llama(), Sample::gemma3());
    let config = |sample: &Sample, changes: &[(&str, Option<Value>)]| gguf_model(&set(sample, changes)).unwrap().config;
    let plain =
        config(&llama, &[("llama.attention.key_length", None), ("llama.attention.value_length", None), ("llama.rope.freq_base", None)]);
    assert_eq!((plain.head_dim, plain.layers[0].rope.base), (2, 10_000.0));
    // Counts of other widths, and one per layer where they are equal.
    let wide = [("llama.block_count", Some(Value::U64(2))), ("llama.context_length", Some(Value::I32(64)))];
    assert_eq!(config(&llama, &wide), config(&llama, &[]));
    let per_layer = |n: u32| Some(list(Kind::U32, vec![Value::U32(n); 2]));
    let arrays = [
        ("llama.attention.head_count", per_layer(4)),
        ("llama.attention.head_count_kv", per_layer(2)),
        ("llama.feed_forward_length", per_layer(12)),
    ];
    assert_eq!(config(&llama, &arrays), config(&llama, &[]));
    // Linear scaling by its new and its old name.
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        assert_eq!(config(&llama, &[(key, Some(Value::F32(4.0)))]).layers[0].rope.scaling, RopeScaling::Linear { factor: 4.0 });
    }
    let none = [("llama.rope.scaling.type", Some(Value::String("none".into()))), ("llama.rope.scaling.factor", Some(Value::F32(4.0)))];
    assert_eq!(config(&llama, &none).layers[0].rope.scaling, RopeScaling::None);
    // The vocabulary by key, by the tokenizer's length, by the table's rows.
    for (key, value) in [("llama.vocab_size", Some(Value::U32(6))), ("tokenizer.ggml.tokens", None)] {
        assert_eq!(config(&llama, &[(key, value)]).vocab, 6);
    }
    // Local layers by a number and by one flag per layer; their rotary base by its key.
    let key = "gemma3.attention.sliding_window_pattern";
    let local = |value| config(&gemma, &[(key, Some(value))]).layers.iter().map(|l| l.window.is_some()).collect::<Vec<_>>();
    assert_eq!(local(Value::U32(2)), [true, false, true, false, true, false, true]);
    let flags = [false, true, true, false, true, true, true];
    assert_eq!(local(list(Kind::Bool, flags.map(Value::Bool).to_vec())), flags);
    assert_eq!(local(list(Kind::U32, flags.map(|f| Value::U32(f.into())).to_vec())), flags);
    assert_eq!(config(&gemma, &[("gemma3.rope.freq_base_swa", Some(Value::F32(2e4)))]).layers[0].rope.base, 2e4);
    let scaled = config(&gemma, &[("gemma3.rope.scaling.factor", Some(Value::F32(8.0)))]);
    let scaling = |layer: usize| scaled.layers[layer].rope.scaling.clone();
    assert_eq!((scaling(0), scaling(5)), (RopeScaling::None, RopeScaling::Linear { factor: 8.0 }));
    // 27B: the score scale is that of hidden / heads.
    let large = Sample { layers: 62, hidden: 36, ..gemma }.model();
    assert_eq!(large.config.attention_scale, 1.0 / 3.0);
}

#[test]
fn refusals_of_gguf_metadata_name_key_place_value_and_expectation() {
    let text = |s: &str| Some(Value::String(s.into()));
    let count = |n| Some(Value::U32(n));
    let different = Some(list(Kind::U32, vec![Value::U32(1), Value::U32(2)]));
    let cases: Vec<(Sample, &str, Option<Value>, [&str; 2])> = vec![
        (Sample::llama(), "general.architecture", text("mamba"), ["mamba", "llama, gemma3, qwen2"]),
        (Sample::llama(), "general.architecture", None, ["missing", "the model's architecture"]),
        (Sample::llama(), "general.architecture", count(1), ["u32", "text"]),
        (Sample::llama(), "split.count", count(5), ["is 5", "expected 1"]),
        (Sample::llama(), "llama.block_count", None, ["missing", "an integer"]),
        (Sample::llama(), "llama.block_count", count(0), ["0", "at least 1"]),
        (Sample::llama(), "llama.block_count", count(5000), ["5000", "at most 4096"]),
        (Sample::llama(), "llama.embedding_length", Some(Value::U64(1 << 40)), ["1099511627776", "an integer from 0 to 16777216"]),
        (Sample::llama(), "llama.embedding_length", Some(Value::I32(-8)), ["-8", "an integer"]),
        (Sample::llama(), "llama.embedding_length", Some(Value::F32(8.0)), ["F32(8.0)", "an integer"]),
        (Sample::llama(), "llama.feed_forward_length", different, ["different", "the same in every layer"]),
        (Sample::llama(), "llama.attention.head_count_kv", count(3), ["3", "a divisor of the 4 heads"]),
        (Sample::llama(), "llama.attention.value_length", count(4), ["4", "the key length, 2"]),
        (Sample::llama(), "llama.attention.layer_norm_rms_epsilon", None, ["missing", "a positive number"]),
        (Sample::llama(), "llama.attention.layer_norm_rms_epsilon", Some(Value::F32(f32::NAN)), ["NaN", "a positive number"]),
        (Sample::llama(), "llama.attention.sliding_window_pattern", count(4), ["a pattern", "one window for all layers"]),
        (Sample { arch: "qwen2", ..Sample::llama() }, "qwen2.attention.sliding_window", count(4), ["4", "no sliding window"]),
        (Sample::llama(), "llama.attention.causal", Some(Value::Bool(false)), ["false", "causal attention"]),
        (Sample::llama(), "llama.expert_count", count(2000), ["2000", "at most 1024 experts"]),
        (Sample::gemma3(), "gemma3.expert_count", count(8), ["8 experts", "a dense model"]),
        (Sample::llama(), "llama.rope.dimension_count", count(3), ["3", "an even number up to the head's 2"]),
        (Sample::llama(), "llama.rope.freq_base", Some(Value::F32(0.0)), ["0", "a positive number"]),
        (Sample::llama(), "llama.rope.scaling.type", text("spiral"), ["spiral", "none, linear or yarn"]),
        (Sample::llama(), "llama.rope.scaling.type", text("linear"), ["missing", "a positive number"]),
        (Sample::llama(), "llama.rope.scaling.attn_factor", Some(Value::F32(-2.0)), ["-2", "a positive number"]),
        (Sample::llama(), "llama.rope.scaling.yarn_ext_factor", Some(Value::F32(0.5)), ["0.5", "its default"]),
        (Sample::llama(), "llama.vocab_size", count(5), ["5", "at least the 6 tokens"]),
        (Sample::gemma3(), "gemma3.attention.sliding_window", None, ["missing", "an integer"]),
        (Sample::gemma3(), "gemma3.final_logit_softcapping", Some(Value::F32(30.0)), ["30", "without logit soft-capping"]),
        (Sample::gemma3(), "gemma3.attn_logit_softcapping", Some(Value::F32(50.0)), ["50", "without logit soft-capping"]),
        (Sample::gemma3(), "gemma3.attention.sliding_window_pattern", count(0), ["0", "a positive integer"]),
        (
            Sample::gemma3(),
            "gemma3.attention.sliding_window_pattern",
            Some(list(Kind::Bool, vec![])),
            ["0 of bool", "one flag for each of 7 layers"],
        ),
    ];
    for (sample, key, value, parts) in cases {
        let place = if value.is_some() { "at byte 777" } else { "before byte 4096" };
        let said = gguf_model(&set(&sample, &[(key, value)])).expect_err(key).to_string();
        // What is missing beside a type is its factor.
        let key = if key.ends_with("scaling.type") && said.contains("missing") { "llama.rope.scaling.factor" } else { key };
        let place = if said.contains("missing") { "before byte 4096" } else { place };
        for part in parts.into_iter().chain([key, "m.gguf", place]) {
            assert!(said.contains(part), "{key} says {said:?}, without {part:?}");
        }
    }
}

#[test]
fn tensors_of_gguf_files_are_checked() {
    let base = Sample::llama().header();
    let said = |change: &dyn Fn(&mut gguf::Header)| {
        let mut header = base.clone();
        change(&mut header);
        gguf_model(&header).expect_err("a refusal").to_string()
    };
    let at = base.tensors.iter().position(|t| t.name == "blk.1.attn_q.weight").unwrap();
    let place = format!("tensor blk.1.attn_q.weight at byte {} of m.gguf", base.tensors[at].entry_offset);
    let shape = said(&|h| h.tensors[at].dims = vec![8, 9]);
    assert!(shape.contains(&place) && shape.contains("[9, 8], expected [8, 8]"), "{shape}");
    let unknown = said(&|h| h.tensors[at].kind = GgmlType::from_id(16).expect("IQ2_XXS"));
    assert!(unknown.contains(&place) && unknown.contains("IQ2_XXS") && unknown.contains("Q6_K"), "{unknown}");
    let missing = said(&|h| drop(h.tensors.remove(at)));
    assert!(missing.contains("blk.1.attn_q.weight is missing from m.gguf") && missing.contains("byte 1000"), "{missing}");
    let extra = said(&|h| h.tensors[at + 1].name = "blk.1.attn_q_norm.weight".into());
    assert!(extra.contains("blk.1.attn_k.weight is missing"), "{extra}");
    let extra = said(&|h| h.tensors.push(gguf::Tensor { name: "v.patch_embd.weight".into(), ..h.tensors[at].clone() }));
    assert!(extra.contains("v.patch_embd.weight at byte") && extra.contains("architecture llama"), "{extra}");
    let norm = base.tensors.iter().position(|t| t.name == "output_norm.weight").unwrap();
    let vector = said(&|h| h.tensors[norm].kind = GgmlType::from_id(8).expect("Q8_0"));
    assert!(vector.contains("Q8_0, expected F32, F16 or BF16"), "{vector}");

    // Without output.weight the table is tied; biases are those that are there; rotary divisors come from their tensor.
    let mut header = base.clone();
    header.tensors.retain(|t| t.name != "output.weight");
    for (name, len) in [("blk.0.attn_q.bias", 8), ("blk.0.ffn_down.bias", 8), ("rope_freqs.weight", 1)] {
        let kind = GgmlType::from_id(0).expect("F32");
        header.tensors.push(gguf::Tensor { name: name.into(), dims: vec![len], kind, offset: 0, bytes: 4 * len, entry_offset: 0 });
    }
    let model = gguf_model(&header).unwrap();
    assert!(model.config.tied_embeddings && model.tensors.contains_key(&TensorId { layer: Some(0), role: Role::QBias }));
    assert!(!model.tensors.contains_key(&TensorId { layer: Some(1), role: Role::QBias }));
    assert_eq!(model.config.layers[0].rope.scaling, RopeScaling::Tensor);
    assert!(model.tensors.contains_key(&TensorId { layer: None, role: Role::RopeFactors }));
}

/// Rotary scaling of `config.json` and of GGUF.
#[test]
fn every_rotary_scaling_is_read() {
    let llama = fixture_config("llama");
    let of = |with: Json| hf(&changed(&llama, with)).unwrap().config;
    let close = |a: f64, b: f64| (a - b).abs() < 1e-12;
    let yarn =
        of(json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}}));
    let scaling = |factor| RopeScaling::Yarn { factor, original_context: 512.0, beta_fast: 32.0, beta_slow: 1.0, truncate: true };
    assert_eq!((&yarn.layers[0].rope.scaling, yarn.context), (&scaling(4.0), 2048));
    assert!(close(yarn.layers[0].rope.amplitude, 0.1 * 4f64.ln() + 1.0));
    // The factor may be that of the contexts; the amplitude may be given, or come from two scales.
    let older = json!({"rope_parameters": null, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 256, "attention_factor": 1.5}});
    let older = of(older);
    assert!(matches!(older.layers[0].rope.scaling, RopeScaling::Yarn { factor: 2.0, original_context: 256.0, .. }));
    assert!(close(older.layers[0].rope.amplitude, 1.5));
    let both = of(json!({"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0}, "rope_parameters": null}));
    assert!(close(both.layers[0].rope.amplitude, (0.0707 * 40f64.ln() + 1.0) / (0.1 * 40f64.ln() + 1.0)));

    let dynamic = of(json!({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}));
    assert_eq!((&dynamic.layers[0].rope.scaling, dynamic.context), (&RopeScaling::Dynamic { factor: 4.0, trained_context: 512.0 }, 2048));
    assert!(dynamic.layers[0].rope.scaling.depends_on_length() && !yarn.layers[0].rope.scaling.depends_on_length());

    let list = |x: f64| vec![x; 8];
    let long = json!({"rope_scaling": {"type": "longrope", "short_factor": list(1.5), "long_factor": list(3.0)}, "rope_parameters": null, "original_max_position_embeddings": 128});
    let rope = of(long.clone()).layers[0].rope.clone();
    assert_eq!(rope.scaling, RopeScaling::LongRope { short: vec![1.5; 8], long: vec![3.0; 8], original_context: 128.0 });
    assert!(close(rope.amplitude, (1.0 + 4f64.ln() / 128f64.ln()).sqrt()));
    let mut short = long;
    short["rope_scaling"]["long_factor"] = json!(list(3.0)[..7]);
    let said = hf(&changed(&llama, short)).unwrap_err().to_string();
    assert!(said.contains("rope_scaling.long_factor") && said.contains("8 positive numbers"), "{said}");

    let text = |s: &str| Some(Value::String(s.into()));
    let keys = [
        ("llama.rope.scaling.type", text("yarn")),
        ("llama.rope.scaling.factor", Some(Value::F32(4.0))),
        ("llama.rope.scaling.original_context_length", Some(Value::U32(512))),
    ];
    let rope = gguf_model(&set(&Sample::llama(), &keys)).unwrap().config.layers[0].rope.clone();
    assert_eq!(rope.scaling, scaling(4.0));
    assert!(close(rope.amplitude, 0.1 * 4f64.ln() + 1.0));
}

/// What a family's `config.json` cannot ask for.
#[test]
fn features_of_families_that_are_absent_are_named() {
    let qwen2 = fixture_config("qwen2");
    let said = |base: &Json, with: Json| hf(&changed(base, with)).expect_err("a refusal").to_string();
    let kinds = json!(["full_attention", "sliding_attention", "full_attention", "full_attention"]);
    let text = said(&qwen2, json!({"layer_types": kinds}));
    assert!(text.contains("layer_types") && text.contains("use_sliding_window"), "{text}");
    let text = said(&qwen2, json!({"use_sliding_window": true, "max_window_layers": 0, "layer_types": null}));
    assert!(text.contains("sliding_window") && text.contains("missing"), "{text}");
    let moe = fixture_config("qwen3-moe");
    let text = said(&moe, json!({"use_sliding_window": true}));
    assert!(text.contains("use_sliding_window"), "{text}");
    let text = said(&moe, json!({"num_experts_per_tok": 9}));
    assert!(text.contains("num_experts_per_tok") && text.contains("at most the 8 experts"), "{text}");
    let gpt2 = fixture_config("gpt2");
    for (field, value) in [("scale_attn_by_inverse_layer_idx", json!(true)), ("activation_function", json!("relu"))] {
        let text = said(&gpt2, json!({field: value}));
        assert!(text.contains(field), "{text}");
    }
}

/// Layers without experts among those with, and experts that one rank alone holds.
#[test]
fn experts_have_their_layers_and_tensors() {
    let moe = fixture_config("qwen3-moe");
    let layers = |with: Json| hf(&changed(&moe, with)).unwrap().config.layers.iter().map(|l| l.experts).collect::<Vec<_>>();
    assert_eq!(layers(json!({})), [true; 4]);
    assert_eq!(layers(json!({"decoder_sparse_step": 2})), [false, true, false, true]);
    assert_eq!(layers(json!({"mlp_only_layers": [1, 2]})), [true, false, false, true]);
    let header = fixture_header("qwen3-moe");
    let expert = &header.tensors[&TensorId { layer: Some(3), role: Role::ExpertDown(7) }];
    assert_eq!((expert.name.as_str(), expert.shape.as_slice()), ("model.layers.3.mlp.experts.7.down_proj.weight", &[128, 96][..]));
}

/// Columns of GPT-2's fused tensor, of which each rank reads its part of every column.
#[test]
fn matrices_stored_by_columns_are_cut_into_strides() {
    let header = fixture_header("gpt2");
    let of = |role| &header.tensors[&TensorId { layer: Some(1), role }];
    let (q, k) = (of(Role::Q), of(Role::K));
    assert_eq!(
        (q.name.as_str(), q.shape.as_slice(), q.column_stride),
        ("transformer.h.1.attn.c_attn.weight", &[128, 128][..], Some(4 * 384))
    );
    assert_eq!((q.bytes, k.offset - q.offset), (4 * 128 * 128, 4 * 128));
    let slice = TensorSlice::new(TensorId { layer: Some(1), role: Role::K }, k, 32..64);
    assert_eq!(slice.len(), 4 * 32 * 128);
    assert_eq!(slice.bytes, k.offset + 4 * 32..k.offset + 127 * 4 * 384 + 4 * 64);
}

#[test]
fn headers_survive_json() {
    for model in [Sample::llama().model(), Sample::gemma3().model(), fixture_header("gemma3")] {
        let json = serde_json::to_string(&model).unwrap();
        assert_eq!(serde_json::from_str::<ModelHeader>(&json).unwrap(), model);
    }
}
