//! Qwen 3, mixture of experts: Yang et al. 2025, arXiv:2505.09388. [Qwen 3](super::qwen3) whose feed-forward blocks, all of them or every
//! n-th, are mixtures of experts as in [Mixtral](super::mixtral); whether the chosen weights are made to sum to 1 is a setting.

use serde_json::{Map, Value, json};

use super::{Family, llama::LLAMA};
use crate::{
    header::{HeaderError, fields::Fields, gguf, hf, hf::HfConfig, metadata::Meta, target, tensors::Biases},
    model::{Architecture, Experts, ModelConfig, RopeLayout},
};

pub(super) const QWEN3_MOE: Family = Family {
    name: "qwen3_moe",
    class: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    from_hf,
    to_hf,
    gguf: Some("qwen3moe"),
    from_gguf,
    ..LLAMA
};

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let mut config = hf::decoder(fields, Architecture::Qwen3Moe)?;
    if fields.flag("use_sliding_window")?.unwrap_or(false) {
        return Err(fields.unsupported("use_sliding_window", "false", "true"));
    }
    config.head_norms = true;
    let (count, used) = hf::experts(fields, &["num_experts", "num_local_experts"])?;
    let normalize = fields.flag("norm_topk_prob")?.unwrap_or(false);
    config.experts = Some(Experts::softmax(count, used, fields.required("moe_intermediate_size")?, normalize));
    let step = fields.count("decoder_sparse_step")?.unwrap_or(1);
    let dense = fields.indices("mlp_only_layers")?;
    for (index, layer) in config.layers.iter_mut().enumerate() {
        layer.experts = (index + 1) % step == 0 && !dense.contains(&index);
    }
    let attention = fields.flag("attention_bias")?.unwrap_or(false);
    Ok(HfConfig { config, biases: Biases { qkv: attention, o: attention, mlp: false } })
}

fn to_hf(family: &Family, config: &ModelConfig, biases: &Biases) -> Map<String, Value> {
    let mut map = target::decoder(family, config, biases);
    let dense: Vec<usize> = (0..config.layers.len()).filter(|&layer| !config.layers[layer].experts).collect();
    map.insert("mlp_only_layers".to_owned(), json!(dense));
    if let Some(experts) = config.experts {
        map.insert("num_experts".to_owned(), json!(experts.count));
        map.insert("num_experts_per_tok".to_owned(), json!(experts.used));
        map.insert("moe_intermediate_size".to_owned(), json!(experts.ffn));
        map.insert("norm_topk_prob".to_owned(), json!(experts.normalize));
    }
    map
}

fn from_gguf(meta: &Meta<'_>) -> Result<ModelConfig, HeaderError> {
    gguf::refuse_window(meta)?;
    let mut config = gguf::decoder(meta, Architecture::Qwen3Moe, RopeLayout::Halves)?;
    config.head_norms = true;
    let ffn = meta.required("expert_feed_forward_length")?;
    gguf::experts_everywhere(meta, &mut config, ffn)?;
    Ok(config)
}
