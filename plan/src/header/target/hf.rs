//! `config.json` of a model: the fields that transformers reads.

use serde_json::{Map, Value, json};

use crate::{
    header::{families::Family, hf::EncoderFields, tensors::Biases},
    model::{Activation, ModelConfig, Rope, RopeScaling},
};

/// The shortest number that is `x` again in 32 bits.
pub(in crate::header) fn number(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// The fields of a decoder with the usual names.
pub(in crate::header) fn decoder(family: &Family, config: &ModelConfig, biases: &Biases) -> Map<String, Value> {
    let mut map = Map::new();
    let mut put = |name: &str, value: Value| drop(map.insert(name.to_owned(), value));
    put("architectures", json!([family.class]));
    put("model_type", json!(family.model_type));
    put("attention_bias", json!(biases.o));
    put("mlp_bias", json!(biases.mlp));
    put("head_dim", json!(config.head_dim));
    put("hidden_act", json!(activation(config.activation)));
    put("hidden_size", json!(config.hidden));
    put("intermediate_size", json!(config.ffn));
    put("max_position_embeddings", json!(config.context));
    put("num_attention_heads", json!(config.heads));
    put("num_hidden_layers", json!(config.layers.len()));
    put("num_key_value_heads", json!(config.kv_heads));
    put("rms_norm_eps", number(config.norm_eps));
    put("tie_word_embeddings", json!(config.tied_embeddings));
    put("vocab_size", json!(config.vocab));
    if let Some(window) = config.layers.iter().find_map(|layer| layer.window) {
        put("sliding_window", json!(window));
    }
    // Where layers differ, a family's own fields say how local ones are rotated.
    if let Some(layer) = config.layers.iter().find(|layer| layer.window.is_none()).or(config.layers.first()) {
        rope(config, &layer.rope, &mut put);
    }
    map
}

/// The fields of an encoder under its family's names; `classifies` is its class with a head.
pub(in crate::header) fn encoder(
    family: &Family,
    config: &ModelConfig,
    names: &EncoderFields,
    classifies: &str,
) -> impl Iterator<Item = (&'static str, Value)> {
    let labels = config.encoder.and_then(|e| e.classifier).map(|c| c.labels);
    let class = if labels.is_some() { classifies } else { family.class };
    let name = |label: usize| format!("LABEL_{label}");
    let by_id = |n| (0..n).map(|i| (i.to_string(), json!(name(i)))).collect::<Map<_, _>>();
    let by_name = |n| (0..n).map(|i| (name(i), json!(i))).collect::<Map<_, _>>();
    let head = labels.map(|n| [("id2label", json!(by_id(n))), ("label2id", json!(by_name(n)))]);
    [
        ("architectures", json!([class])),
        ("model_type", json!(family.model_type)),
        (names.activation, json!(activation(config.activation))),
        (names.hidden, json!(config.hidden)),
        (names.ffn, json!(config.ffn)),
        (names.layers, json!(config.layers.len())),
        (names.heads, json!(config.heads)),
        ("max_position_embeddings", json!(config.context)),
        ("vocab_size", json!(config.vocab)),
    ]
    .into_iter()
    .chain(head.into_iter().flatten())
}

fn activation(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::Gelu => "gelu",
    }
}

fn rope(config: &ModelConfig, rope: &Rope, put: &mut impl FnMut(&str, Value)) {
    if rope.dims == 0 {
        return;
    }
    put("rope_theta", json!(rope.base));
    if rope.dims != config.head_dim {
        put("partial_rotary_factor", json!(rope.dims as f64 / config.head_dim as f64));
    }
    let scaling = match &rope.scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": *original_context as u64,
        }),
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": *original_context as u64,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "truncate": truncate,
            "attention_factor": rope.amplitude,
        }),
        RopeScaling::LongRope { short, long, original_context } => {
            put("original_max_position_embeddings", json!(*original_context as u64));
            let list = |values: &[f32]| values.iter().map(|&x| number(x)).collect::<Vec<_>>();
            json!({"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long), "attention_factor": rope.amplitude})
        }
        // Nothing to say, or not to be said: then what is read again is another model.
        _ => return,
    };
    put("rope_scaling", scaling);
}
