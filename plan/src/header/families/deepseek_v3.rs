//! DeepSeek V3 and R1: DeepSeek-AI 2024, arXiv:2412.19437. [DeepSeek V2](super::deepseek_v2) with another router:
//!
//! ```text
//! p  = sigmoid(Wrouter h)
//! e  : the best by p + b, of the groups whose two best sum to most
//! x += s · Σ_e p_e / Σ_chosen p · expert_e(h) + shared(h)      h = rms(x)
//! ```
//! Files may hold layers behind the last one that predict further tokens; they are left alone.

use serde_json::{Map, Value, json};

use super::{
    Family,
    deepseek_v2::{self, DEEPSEEK_V2},
};
use crate::{
    header::{HeaderError, fields::Fields, hf::HfConfig, tensors::Biases},
    model::{Architecture, ModelConfig, RopeLayout, Scoring},
};

pub(super) const DEEPSEEK_V3: Family =
    Family { name: "deepseek_v3", class: "DeepseekV3ForCausalLM", model_type: "deepseek_v3", from_hf, to_hf, gguf: None, ..DEEPSEEK_V2 };

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let layout = if fields.flag("rope_interleave")?.unwrap_or(true) { RopeLayout::Adjacent } else { RopeLayout::Halves };
    let mut config = deepseek_v2::decoder(fields, Architecture::DeepseekV3, layout)?;
    for (name, known) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
        match fields.text(name)? {
            Some(got) if got != known => return Err(fields.unsupported(name, known, got)),
            _ => {}
        }
    }
    if let Some(experts) = deepseek_v2::mixture(fields, &mut config)? {
        experts.scoring = Scoring::Sigmoid;
        experts.normalize = fields.flag("norm_topk_prob")?.unwrap_or(true);
        experts.groups = deepseek_v2::groups(fields, experts, 2)?;
    }
    Ok(HfConfig { config, biases: Biases::default() })
}

fn to_hf(family: &Family, config: &ModelConfig, biases: &Biases) -> Map<String, Value> {
    let mut map = deepseek_v2::to_hf(family, config, biases);
    let adjacent = config.layers.first().is_none_or(|layer| layer.rope.layout == RopeLayout::Adjacent);
    map.insert("rope_interleave".to_owned(), json!(adjacent));
    map.insert("topk_method".to_owned(), json!("noaux_tc"));
    map
}
