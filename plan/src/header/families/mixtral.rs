//! Mixtral: Jiang et al. 2024, arXiv:2401.04088. [Mistral](super::mistral) whose feed-forward blocks are mixtures of experts:
//!
//! ```text
//! p  = softmax(Wrouter h)                                        over all experts
//! x += Σ_e p_e / Σ_chosen p · Wdown_e (silu(Wgate_e h) ⊙ Wup_e h)     over the chosen experts      h = rms(x)
//! ```
//! In GGUF its files are those of `llama`.

use serde_json::{Map, Value, json};

use super::{Family, llama::LLAMA};
use crate::{
    header::{
        HeaderError,
        fields::Fields,
        hf,
        hf::HfConfig,
        target,
        tensors::{self, Biases, Name},
    },
    model::{Architecture, Experts, ModelConfig, Role},
};

pub(super) const MIXTRAL: Family =
    Family { name: "mixtral", class: "MixtralForCausalLM", model_type: "mixtral", from_hf, to_hf, hf_name, gguf: None, ..LLAMA };

fn from_hf(fields: &Fields<'_>) -> Result<HfConfig, HeaderError> {
    let mut config = hf::decoder(fields, Architecture::Mixtral)?;
    hf::window_everywhere(fields, &mut config)?;
    let (count, used) = hf::experts(fields, &["num_local_experts"])?;
    config.experts = Some(Experts::softmax(count, used, config.ffn, true));
    config.layers.iter_mut().for_each(|layer| layer.experts = true);
    Ok(HfConfig { config, biases: Biases::default() })
}

fn to_hf(family: &Family, config: &ModelConfig, biases: &Biases) -> Map<String, Value> {
    let mut map = target::decoder(family, config, biases);
    if let Some(experts) = config.experts {
        map.insert("num_local_experts".to_owned(), json!(experts.count));
        map.insert("num_experts_per_tok".to_owned(), json!(experts.used));
        map.insert("intermediate_size".to_owned(), json!(experts.ffn));
    }
    map
}

fn hf_name(role: Role) -> Name {
    match role {
        Role::Router => Name::own("block_sparse_moe.gate.weight"),
        Role::ExpertGate(_) => Name::own("block_sparse_moe.experts.{}.w1.weight"),
        Role::ExpertDown(_) => Name::own("block_sparse_moe.experts.{}.w2.weight"),
        Role::ExpertUp(_) => Name::own("block_sparse_moe.experts.{}.w3.weight"),
        role => tensors::hf_name(role),
    }
}
