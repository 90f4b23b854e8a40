//! GGUF metadata of a model, tokenizer aside: the keys of ggml's `docs/gguf.md`.

use crate::{
    gguf::{Array, Kind, Value},
    header::families::Family,
    model::{ModelConfig, RopeScaling, Scoring},
};

/// Of every 6 layers of Gemma 3 the first 5 are local where a file says nothing.
const PATTERN: usize = 6;
/// Rotary base of local layers where a file says nothing.
const LOCAL_BASE: f64 = 10_000.0;

/// The entries of a family's model.
pub(super) fn entries(family: &Family, config: &ModelConfig) -> Vec<(String, Value)> {
    let arch = family.gguf.unwrap_or(family.name);
    let mut entries = vec![("general.architecture".to_owned(), Value::String(arch.to_owned()))];
    let mut put = |name: &str, value: Value| entries.push((format!("{arch}.{name}"), value));
    let count = |n: usize| Value::U32(n as u32);
    put("vocab_size", count(config.vocab));
    put("context_length", count(config.context));
    put("embedding_length", count(config.hidden));
    put("block_count", count(config.layers.len()));
    put("feed_forward_length", count(config.ffn));
    put("attention.head_count", count(config.heads));
    put("attention.head_count_kv", count(config.kv_heads));
    let eps = if config.layer_norms { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    put(eps, Value::F32(config.norm_eps));
    if !config.learned_positions {
        put("attention.key_length", count(config.head_dim));
        put("attention.value_length", count(config.value_dim()));
    }
    if let Some(encoder) = config.encoder {
        put("attention.causal", Value::Bool(false));
        entries.push(("tokenizer.ggml.token_type_count".to_owned(), count(encoder.token_types.max(1))));
        return entries;
    }
    if let Some(latent) = config.latent {
        if let Some(rank) = latent.q_rank {
            put("attention.q_lora_rank", count(rank));
        }
        put("attention.kv_lora_rank", count(latent.kv_rank));
    }
    if let Some(experts) = config.experts {
        put("expert_count", count(experts.count));
        put("expert_used_count", count(experts.used));
        put("expert_feed_forward_length", count(experts.ffn));
        // Where files of latent attention say nothing, nothing is divided; others divide.
        if experts.normalize == config.latent.is_some() {
            put("expert_weights_norm", Value::Bool(experts.normalize));
        }
        if config.latent.is_some() {
            let dense = config.layers.iter().take_while(|layer| !layer.experts).count();
            put("leading_dense_block_count", count(dense));
            put("expert_shared_count", count(experts.shared));
            put("expert_weights_scale", Value::F32(experts.scale));
            put("expert_gating_func", count(if experts.scoring == Scoring::Sigmoid { 2 } else { 1 }));
        }
        if let Some(groups) = experts.groups {
            put("expert_group_count", count(groups.count));
            put("expert_group_used_count", count(groups.used));
        }
    }
    let local: Vec<bool> = config.layers.iter().map(|layer| layer.window.is_some()).collect();
    if let Some(window) = config.layers.iter().find_map(|layer| layer.window) {
        put("attention.sliding_window", Value::U32(window));
        let usual = |(index, &local): (usize, &bool)| local == ((index + 1) % PATTERN != 0);
        if local.contains(&false) && !local.iter().enumerate().all(usual) {
            let values = local.iter().map(|&local| Value::Bool(local)).collect();
            let array = Array { kind: Kind::Bool, len: local.len() as u64, values: Some(values) };
            put("attention.sliding_window_pattern", Value::Array(Box::new(array)));
        }
        let own = config.layers.iter().find(|layer| layer.window.is_some() && local.contains(&false)).map(|layer| layer.rope.base);
        if let Some(base) = own.filter(|&base| base != LOCAL_BASE) {
            put("rope.freq_base_swa", Value::F32(base as f32));
        }
    }
    // Gemma's local layers are rotated as they were trained; the others say how.
    let Some(rope) = config.layers.iter().find(|layer| layer.window.is_none()).or(config.layers.first()).map(|layer| &layer.rope) else {
        return entries;
    };
    if rope.dims > 0 {
        put("rope.dimension_count", count(rope.dims));
        put("rope.freq_base", Value::F32(rope.base as f32));
    }
    let mut factor = rope.amplitude;
    match &rope.scaling {
        RopeScaling::Linear { factor } => {
            put("rope.scaling.type", Value::String("linear".to_owned()));
            put("rope.scaling.factor", Value::F32(*factor as f32));
        }
        RopeScaling::Yarn { factor: stretch, original_context, beta_fast, beta_slow, .. } => {
            put("rope.scaling.type", Value::String("yarn".to_owned()));
            put("rope.scaling.factor", Value::F32(*stretch as f32));
            put("rope.scaling.original_context_length", Value::U32(*original_context as u32));
            put("rope.scaling.yarn_beta_fast", Value::F32(*beta_fast as f32));
            put("rope.scaling.yarn_beta_slow", Value::F32(*beta_slow as f32));
            match config.latent {
                None => factor /= crate::header::rope::yarn_amplitude(*stretch, 1.0),
                Some(latent) => put("rope.scaling.yarn_log_multiplier", Value::F32((0.1 * latent.temperature) as f32)),
            }
        }
        RopeScaling::LongRopeTensors { original_context } => {
            put("rope.scaling.original_context_length", Value::U32(*original_context as u32));
        }
        // Nothing to say, in a tensor, or not to be said: then what is read again is another model.
        _ => {}
    }
    if factor as f32 != 1.0 {
        put("rope.scaling.attn_factor", Value::F32(factor as f32));
    }
    entries
}
