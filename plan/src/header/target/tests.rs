//! Models of every family in the other format and back.

use serde_json::json;

use super::*;
use crate::model::Architecture;

/// The header of a fixture as if its tensors were all there.
fn fixture(name: &str) -> ModelHeader {
    parsed(&config(name).to_string())
}

fn config(name: &str) -> Json {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(name);
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// The header of `config.json`, with every tensor that it asks for.
fn parsed(config: &str) -> ModelHeader {
    let parsed = super::super::HfConfig::parse(config.as_bytes()).unwrap();
    let family = families::in_format(&parsed.config, Format::Safetensors);
    let made = tensors::wanted(family, &parsed.config, Format::Safetensors, Some(parsed.biases)).into_iter();
    let mut all: Vec<Made> = Vec::new();
    for want in made {
        if all.iter().all(|m| m.name != want.name) {
            all.push(Made { name: want.name, shape: want.stored, columns: want.columns, parts: Vec::new() });
        }
    }
    read_back(&Metadata::Hf(serde_json::from_str(config).unwrap()), &all).unwrap()
}

/// The header that a target would have.
fn made(target: &Target) -> ModelHeader {
    read_back(target.metadata.as_ref().unwrap(), &target.tensors).unwrap()
}

#[test]
fn every_family_is_the_same_model_in_gguf_and_back() {
    let phi3 = json!({"architectures": ["Phi3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "sliding_window": 32,
        "partial_rotary_factor": 0.5});
    let names = ["llama", "llama-pt", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "gemma3", "gpt2", "deepseek-v3"];
    let mut deepseek_v2 = config("deepseek-v2");
    deepseek_v2["rms_norm_eps"] = json!(1e-6);
    deepseek_v2["rope_scaling"]["mscale"] = json!(0.707);
    let models = names.map(fixture).into_iter().chain([parsed(&phi3.to_string()), parsed(&deepseek_v2.to_string())]);
    for model in models {
        let architecture = model.config.architecture;
        let there = target(&model, Format::GGUF).unwrap_or_else(|e| panic!("{architecture:?}: {e:?}"));
        let gguf = made(&there);
        assert_eq!(difference(&model.config, &gguf.config), None, "{architecture:?}");
        let back = target(&gguf, Format::Safetensors).unwrap_or_else(|e| panic!("{architecture:?}: {e:?}"));
        let again = made(&back);
        assert_eq!(again.config, model.config, "{architecture:?}");
        let names = |h: &ModelHeader| h.tensors.iter().map(|(id, t)| (*id, t.name.clone(), t.shape.clone())).collect::<Vec<_>>();
        assert_eq!(names(&again), names(&model), "{architecture:?}");
        let turned = there.tensors.iter().flat_map(|t| &t.parts).filter(|p| p.turn.is_some()).count();
        let llamas = matches!(architecture, Architecture::Llama | Architecture::Mistral | Architecture::Mixtral);
        assert_eq!(turned, if llamas { 2 * model.config.layers.len() } else { 0 }, "{architecture:?}");
        let added: f32 = there.tensors.iter().flat_map(|t| &t.parts).map(|p| p.add).sum();
        assert_eq!(added > 0.0, architecture == Architecture::Gemma3);
        let taken: f32 = back.tensors.iter().flat_map(|t| &t.parts).map(|p| p.add).sum();
        assert_eq!(added + taken, 0.0);
    }
}

#[test]
fn rows_turned_there_and_back_are_where_they_were() {
    for (head_dim, dims) in [(8, 8), (16, 6), (4, 2)] {
        let turn = |to| Turn { head_dim, dims, to };
        let (there, back) = (turn(RopeLayout::Adjacent), turn(RopeLayout::Halves));
        let rows: Vec<usize> = (0..3 * head_dim).map(|row| there.source(back.source(row))).collect();
        assert_eq!(rows, (0..3 * head_dim).collect::<Vec<_>>());
        assert!((0..head_dim).any(|row| there.source(row) != row) || dims <= 2);
    }
    // As llama.cpp permutes: the halves of a head become neighbours.
    let turn = Turn { head_dim: 6, dims: 6, to: RopeLayout::Adjacent };
    assert_eq!((0..6).map(|row| turn.source(row)).collect::<Vec<_>>(), [0, 3, 1, 4, 2, 5]);
}

#[test]
fn rotary_scalings_are_said_in_both_formats_or_refused_by_name() {
    let with = |scaling: serde_json::Value| {
        let mut config = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 96, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5});
        config["rope_scaling"] = scaling;
        parsed(&config.to_string())
    };
    let list: Vec<f32> = (0..8).map(|i| 1.0 + i as f32 / 7.0).collect();
    for scaling in [
        json!({"rope_type": "linear", "factor": 4.0}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 1.5}),
    ] {
        let model = with(scaling);
        let back = made(&target(&made(&target(&model, Format::GGUF).unwrap()), Format::Safetensors).unwrap());
        assert_eq!(difference(&model.config, &back.config), None);
    }
    for (scaling, tensors) in [
        (
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
            1,
        ),
        (json!({"rope_type": "longrope", "short_factor": list, "long_factor": list, "original_max_position_embeddings": 64}), 2),
    ] {
        let there = target(&with(scaling), Format::GGUF).unwrap();
        assert_eq!(there.tensors.iter().filter(|t| t.parts.iter().any(|p| is_divisors(p.id.role))).count(), tensors);
        // The divisors alone do not tell what they were made of.
        assert!(target(&made(&there), Format::Safetensors).unwrap_err().to_string().contains("scaling"));
    }
    let dynamic = target(&with(json!({"rope_type": "dynamic", "factor": 4.0})), Format::GGUF).unwrap_err();
    assert!(dynamic.to_string().contains("layers.0.rope.scaling"), "{dynamic}");
}

#[test]
fn encoders_are_the_same_models_in_gguf_and_back() {
    let with = |name: &str, change: &[(&str, Json)]| {
        let mut config = config(name);
        change.iter().for_each(|(field, value)| config[*field] = value.clone());
        parsed(&config.to_string())
    };
    let head = json!({"0": "a", "1": "b", "2": "c"});
    for model in [
        fixture("bert"),
        with("bert", &[("architectures", json!(["BertForSequenceClassification"])), ("id2label", head)]),
        with("bert", &[("type_vocab_size", json!(1)), ("layer_norm_eps", json!(1e-5))]),
        with("distilbert-sst2", &[("architectures", json!(["DistilBertModel"]))]),
    ] {
        let there = target(&model, Format::GGUF).unwrap();
        let gguf = made(&there);
        assert_eq!((gguf.config.architecture, difference(&model.config, &gguf.config)), (Architecture::Bert, None));
        let back = target(&gguf, Format::Safetensors).unwrap();
        let again = made(&back);
        assert_eq!(again.config, model.config);
        assert!(again.tensors.keys().eq(model.tensors.keys()));
        assert!(there.tensors.iter().chain(&back.tensors).flat_map(|t| &t.parts).all(|p| p.turn.is_none() && p.add == 0.0));
        // Names of the files that transformers writes of the same class.
        let base = back.tensors.iter().all(|t| t.name.starts_with("bert.") || t.name.starts_with("classifier."));
        assert_eq!(base, model.config.encoder.unwrap().classifier.is_some());
        let kept = target(&model, Format::Safetensors).unwrap();
        assert!(kept.tensors.iter().map(|t| &t.name).eq(back.tensors.iter().map(|t| &t.name)));
    }
}

#[test]
fn what_gguf_does_not_say_of_encoders_is_refused_by_name() {
    let refused = |model: &ModelHeader| target(model, Format::GGUF).unwrap_err().to_string();
    assert!(refused(&fixture("distilbert-sst2")).contains("head with relu"));
    let mut tanh = fixture("bert");
    tanh.config.activation = crate::model::Activation::GeluTanh;
    assert!(refused(&tanh).contains("activation = \"GeluTanh\""), "{}", refused(&tanh));
    // Without token types a file is DistilBERT's, whose epsilon its config.json does not state.
    let mut odd = fixture("bert");
    odd.config.norm_eps = 1e-5;
    odd.config.encoder.as_mut().unwrap().token_types = 0;
    odd.tensors.retain(|id, _| id.role != Role::TokenTypes);
    let said = target(&made(&target(&odd, Format::GGUF).unwrap()), Format::Safetensors).unwrap_err().to_string();
    assert!(said.contains("norm_eps"), "{said}");
}

#[test]
fn what_gguf_does_not_say_is_refused_by_name() {
    let mut model = fixture("qwen2");
    model.config.layers[2].window = Some(8);
    let said = target(&model, Format::GGUF).unwrap_err();
    assert!(format!("{said:?}").contains("sliding_window"), "{said:?}");
    let mut model = fixture("qwen3-moe");
    model.config.layers[1].rope.base = 12_345.678_9;
    let said = target(&model, Format::GGUF).unwrap_err().to_string();
    assert!(said.contains("layers.") && said.contains("rope.base"), "{said}");
}
