//! DeepSeek V2 and V2.5: DeepSeek-AI 2024, arXiv:2405.04434. Queries, keys and values are made of compressed vectors, and most layers are
//! mixtures of many small experts beside which some are shared by all tokens:
//!
//! ```text
//! x  = E[id]
//! cq = rms(Wqa h)                    q  = Wqb cq, or Wq h at once
//! ckv, kr = Wkva h                   k, v = Wkvb rms(ckv)                   per head
//! x += Wo · attention([q, rope(qr)], [k, rope(kr)], v)      h = rms(x)       kr is one for all heads
//! x += s · Σ_e p_e · expert_e(h) + shared(h)                h = rms(x)       p = softmax(Wrouter h), over the chosen e
//! logits = Wout · rms(x)
//! ```
//! The first layers have one dense block in place of a mixture. In GGUF its files are of architecture `deepseek2`, and those of
//! [DeepSeek V3](super::deepseek_v3) too.

use serde_json::{Map, Value, json};

use super::{Family, llama::LLAMA};
use crate::{
    header::{
        HeaderError,
        fields::Fields,
        gguf, hf,
        hf::HfConfig,
        metadata::Meta,
        rope::{DEFAULT_BASE, RopeFields, gguf_latent_rope, hf_context, hf_rope, latent_scale, rope_fields},
        target,
        tensors::Biases,
    },
    model::{Activation, Architecture, ExpertGroups, Experts, Latent, LayerConfig, ModelConfig, RopeLayout, RopeScaling, Scoring},
};

pub(super) const DEEPSEEK_V2: Family = Family {
    name: "deepseek_v2",
    class: "DeepseekV2ForCausalLM",
    model_type: "deepseek_v2",
    from_hf,
    to_hf,
    gguf: Some("deepseek2"),
    from_gguf,
    ..LLAMA
};

/// Epsilon of the norms of compressed vectors, which `config.json` does not say.
const COMPRESSED_EPS: f32 = 1e-6;

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let mut config = decoder(fields, Architecture::DeepseekV2, RopeLayout::Adjacent)?;
    // Files of the models say how scores are made; the code of the family has this one alone.
    match fields.text("scoring_func")? {
        None | Some("softmax") => {}
        Some(got) => return Err(fields.unsupported("scoring_func", "softmax", got)),
    }
    // transformers does not divide the weights, DeepSeek's own code does and then leaves out their factor.
    if fields.flag("norm_topk_prob")?.unwrap_or(false) {
        return Err(fields.unsupported("norm_topk_prob", "false", "true"));
    }
    let limited = match fields.text("topk_method")? {
        None | Some("greedy") => false,
        Some("group_limited_greedy") => true,
        Some(got) => return Err(fields.unsupported("topk_method", "greedy or group_limited_greedy", got)),
    };
    if let Some(experts) = mixture(fields, &mut config)? {
        experts.scoring = Scoring::Softmax;
        experts.normalize = false;
        experts.groups = if limited { groups(fields, experts, 1)? } else { None };
    }
    Ok(HfConfig { config, biases: Biases::default() })
}

/// A decoder with latent attention, without experts; `layout` says which of the rotated values form pairs.
pub(super) fn decoder(fields: &Fields<'_>, architecture: Architecture, layout: RopeLayout) -> Result<ModelConfig, HeaderError> {
    for name in ["attention_bias", "mlp_bias"] {
        if fields.flag(name)?.unwrap_or(false) {
            return Err(fields.unsupported(name, "false", "true"));
        }
    }
    let (rotated, value_dim) = (fields.required("qk_rope_head_dim")?, fields.required("v_head_dim")?);
    if !rotated.is_multiple_of(2) {
        return Err(fields.wrong("qk_rope_head_dim", "an even number", &rotated.into()));
    }
    let head_dim = fields.required("qk_nope_head_dim")? + rotated;
    let mut config = hf::shape_with_heads(fields, architecture, head_dim)?;
    if config.kv_heads != config.heads {
        let expected = format!("the {} query heads, each of which has keys of its own", config.heads);
        return Err(fields.wrong("num_key_value_heads", &expected, &config.kv_heads.into()));
    }
    config.activation = hf::activation(fields, "hidden_act", Activation::Silu)?;
    let place = rope_fields(fields, None)?;
    let rope = crate::model::Rope { layout, ..hf_rope(&place, fields, DEFAULT_BASE, rotated)? };
    if rope.dims != rotated {
        return Err(fields.wrong("partial_rotary_factor", &format!("1, all {rotated} values of qk_rope_head_dim"), &rope.dims.into()));
    }
    let temperature = temperature(&place, fields, &rope.scaling)?;
    config.attention_scale = latent_scale(head_dim, &rope, temperature);
    config.latent = Some(Latent {
        q_rank: fields.count("q_lora_rank")?,
        kv_rank: fields.required("kv_lora_rank")?,
        rotated,
        value_dim,
        norm_eps: COMPRESSED_EPS,
        apart: false,
        temperature,
    });
    config.context = hf_context(config.context, &rope);
    config.layers = vec![LayerConfig { window: None, rope, experts: false }; hf::layers(fields, "num_hidden_layers")?];
    Ok(config)
}

/// `mscale_all_dim` of the rotary settings.
fn temperature(place: &RopeFields<'_>, fields: &Fields<'_>, scaling: &RopeScaling) -> Result<f64, HeaderError> {
    let old;
    let own = match place {
        RopeFields::New(own) => own,
        RopeFields::Old => match fields.object("rope_scaling")? {
            Some(own) => {
                old = own;
                &old
            }
            None => return Ok(0.0),
        },
    };
    match (own.positive("mscale_all_dim")?, scaling) {
        (Some(temperature), RopeScaling::Yarn { .. }) => Ok(temperature),
        (None, _) | (_, RopeScaling::None) => Ok(0.0),
        (Some(got), _) => Err(own.unsupported("mscale_all_dim", "yarn, where there is such a field", &got.to_string())),
    }
}

/// The experts of every layer behind the first dense ones, with what is shared; none where all layers are dense.
pub(super) fn mixture<'a>(fields: &Fields<'_>, config: &'a mut ModelConfig) -> Result<Option<&'a mut Experts>, HeaderError> {
    let dense = fields.number("first_k_dense_replace")?.unwrap_or(0);
    let step = fields.count("moe_layer_freq")?.unwrap_or(1);
    for (index, layer) in config.layers.iter_mut().enumerate().skip(dense) {
        layer.experts = index % step == 0;
    }
    if fields.present("n_routed_experts").is_none() || config.layers.iter().all(|layer| !layer.experts) {
        config.layers.iter_mut().for_each(|layer| layer.experts = false);
        return Ok(None);
    }
    let (count, used) = hf::experts(fields, &["n_routed_experts"])?;
    let mut experts = Experts::softmax(count, used, fields.required("moe_intermediate_size")?, false);
    experts.shared = fields.number("n_shared_experts")?.unwrap_or(0);
    let scale = fields.positive("routed_scaling_factor")?;
    experts.scale = scale.ok_or_else(|| fields.missing("routed_scaling_factor", "a positive number"))? as f32;
    Ok(Some(config.experts.insert(experts)))
}

/// The groups of experts, the score of each the sum over its `best` ones; none where all may be chosen.
pub(super) fn groups(fields: &Fields<'_>, experts: &Experts, best: usize) -> Result<Option<ExpertGroups>, HeaderError> {
    let count = fields.required("n_group")?;
    if count == 1 {
        return Ok(None);
    }
    let used = fields.required("topk_group")?;
    match grouped(experts, ExpertGroups { count, used, best }) {
        Ok(groups) => Ok(groups),
        Err(expected) => Err(fields.wrong("n_group", &expected, &format!("{count}, {used} of them for a token").into())),
    }
}

/// Checks groups; those that limit nothing are none.
fn grouped(experts: &Experts, groups: ExpertGroups) -> Result<Option<ExpertGroups>, String> {
    let ExpertGroups { count, used, best } = groups;
    let size = experts.count / count;
    if !experts.count.is_multiple_of(count) || size < best || used > count || used * size < experts.used {
        return Err(format!(
            "groups of the same size, at least {best}, that give each token {} of {} experts",
            experts.used, experts.count
        ));
    }
    Ok((used < count).then_some(groups))
}

pub(super) fn to_hf(family: &Family, config: &ModelConfig, biases: &Biases) -> Map<String, Value> {
    let mut map = target::decoder(family, config, biases);
    // Here these mean the rotated part alone, or nothing.
    for name in ["head_dim", "partial_rotary_factor"] {
        map.remove(name);
    }
    let mut put = |name: &str, value: Value| drop(map.insert(name.to_owned(), value));
    if let Some(latent) = config.latent {
        put("q_lora_rank", json!(latent.q_rank));
        put("kv_lora_rank", json!(latent.kv_rank));
        put("qk_rope_head_dim", json!(latent.rotated));
        put("qk_nope_head_dim", json!(config.head_dim - latent.rotated));
        put("v_head_dim", json!(latent.value_dim));
    }
    put("first_k_dense_replace", json!(config.layers.iter().take_while(|layer| !layer.experts).count()));
    if let Some(experts) = config.experts {
        put("n_routed_experts", json!(experts.count));
        put("num_experts_per_tok", json!(experts.used));
        put("moe_intermediate_size", json!(experts.ffn));
        put("n_shared_experts", json!(experts.shared));
        put("routed_scaling_factor", target::number(experts.scale));
        put("norm_topk_prob", json!(experts.normalize));
        put("scoring_func", json!(if experts.scoring == Scoring::Sigmoid { "sigmoid" } else { "softmax" }));
        let (count, used) = experts.groups.map_or((1, 1), |g| (g.count, g.used));
        put("n_group", json!(count));
        put("topk_group", json!(used));
        put("topk_method", json!(if experts.groups.is_some() { "group_limited_greedy" } else { "greedy" }));
    }
    if let (Some(latent), Some(Value::Object(scaling))) = (config.latent, map.get_mut("rope_scaling"))
        && latent.temperature > 0.0
    {
        scaling.insert("mscale_all_dim".to_owned(), json!(latent.temperature));
    }
    map
}

fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    gguf::refuse_window(meta)?;
    // Other models of this architecture in GGUF scale queries by their position.
    if let Some(scale) = meta.float("attention.temperature_scale")?.filter(|&scale| scale != 0.0) {
        return Err(meta.unsupported("attention.temperature_scale", "none", &scale.to_string()));
    }
    let has = |end: &str| meta.header.tensors.iter().any(|t| t.name.ends_with(end));
    // Newer files have keys and values of heads apart, for a cache of what is compressed, and describe that one as the heads' widths.
    let apart = has(".attn_k_b.weight") && !has(".attn_kv_b.weight");
    let of_heads = |own: &str, plain: &str| match meta.arch_count(own)? {
        None if !apart => meta.required(plain),
        None => Err(meta.wrong(own, "an integer", "missing")),
        Some(width) => Ok(width),
    };
    let head_dim = of_heads("attention.key_length_mla", "attention.key_length")?;
    let value_dim = of_heads("attention.value_length_mla", "attention.value_length")?;
    let rotated = meta.required("rope.dimension_count")?;
    if rotated >= head_dim || !rotated.is_multiple_of(2) {
        return Err(meta.wrong("rope.dimension_count", &format!("an even number below the key's {head_dim}"), &rotated.to_string()));
    }
    let heads = meta.required("attention.head_count")?;
    let mut config = gguf::shape_with_heads(meta, Architecture::DeepseekV2, "attention.layer_norm_rms_epsilon", (heads, head_dim))?;
    let (rope, temperature) = gguf_latent_rope(meta, rotated)?;
    config.attention_scale = latent_scale(head_dim, &rope, temperature);
    config.latent = Some(Latent {
        q_rank: meta.arch_count("attention.q_lora_rank")?,
        kv_rank: meta.required("attention.kv_lora_rank")?,
        rotated,
        value_dim,
        norm_eps: config.norm_eps,
        apart,
        temperature,
    });
    config.layers.iter_mut().for_each(|layer| layer.rope = rope.clone());
    config.experts = gguf_mixture(meta, &mut config.layers)?;
    Ok(config)
}

fn gguf_mixture(meta: &Meta<'_>, layers: &mut [LayerConfig]) -> Result<Option<Experts>, HeaderError> {
    let Some((count, used)) = gguf::expert_counts(meta)? else { return Ok(None) };
    let dense = meta.arch_count_or_zero("leading_dense_block_count")? as usize;
    layers.iter_mut().skip(dense).for_each(|layer| layer.experts = true);
    if dense >= layers.len() {
        return Ok(None);
    }
    let mut experts = Experts::softmax(count, used, meta.required("expert_feed_forward_length")?, false);
    experts.normalize = gguf::weights_norm(meta)?.unwrap_or(false);
    experts.shared = meta.arch_count_or_zero("expert_shared_count")? as usize;
    // Some writers say 0 where there is none.
    experts.scale = match meta.float("expert_weights_scale")? {
        None | Some(0.0) => 1.0,
        Some(scale) if scale.is_finite() && scale > 0.0 => scale as f32,
        Some(scale) => return Err(meta.wrong("expert_weights_scale", "a number of at least 0", &scale.to_string())),
    };
    // Files of V2 may say nothing.
    experts.scoring = match meta.arch_count_or_zero("expert_gating_func")? {
        0 | 1 => Scoring::Softmax,
        2 => Scoring::Sigmoid,
        got => return Err(meta.unsupported("expert_gating_func", "1, softmax, or 2, sigmoid", &got.to_string())),
    };
    let best = if experts.scoring == Scoring::Sigmoid { 2 } else { 1 };
    let groups = meta.arch_count_or_zero("expert_group_count")? as usize;
    if groups > 1 {
        let used = meta.required("expert_group_used_count")?;
        experts.groups = grouped(&experts, ExpertGroups { count: groups, used, best })
            .map_err(|expected| meta.wrong("expert_group_count", &expected, &format!("{groups}, {used} of them for a token")))?;
    }
    Ok(Some(experts))
}
