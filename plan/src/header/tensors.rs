//! Which tensors a model has, by what name and with what shape.

use super::families::Family;
use crate::model::{Format, LayerConfig, ModelConfig, Role, RopeScaling, Scoring, TensorId};

/// Where the values of a role are stored.
#[derive(Clone, Copy)]
pub(super) struct Name {
    /// Name of the tensor, within its layer for layer tensors; `{}` stands for an expert's number.
    pub(super) stem: &'static str,
    pub(super) form: Form,
}

/// How a tensor holds the values of a role.
#[derive(Clone, Copy)]
pub(super) enum Form {
    /// It holds nothing else.
    Own,
    /// It holds the rows of several roles, in this order.
    Fused(&'static [Role]),
    /// It holds the matrices of all experts, in their order.
    Stacked,
    /// It holds the rows of each head, one head after the other.
    Heads,
    /// It holds the columns of each head, `[heads, in, rows of a head]`.
    TurnedHeads,
    /// It holds the columns, `[in, out]`: alone, or those of several roles side by side.
    Columns(&'static [Role]),
}

impl Name {
    /// A tensor of its own.
    pub(super) const fn own(stem: &'static str) -> Self {
        Self { stem, form: Form::Own }
    }

    /// Rows of a tensor that several roles share, in the order of `parts`.
    pub(super) const fn fused(stem: &'static str, parts: &'static [Role]) -> Self {
        Self { stem, form: Form::Fused(parts) }
    }

    /// One expert's matrix of a tensor that holds those of all.
    pub(super) const fn stacked(stem: &'static str) -> Self {
        Self { stem, form: Form::Stacked }
    }

    /// A matrix of heads, stored as three dimensions.
    pub(super) const fn heads(stem: &'static str) -> Self {
        Self { stem, form: Form::Heads }
    }

    /// A matrix of heads, each stored by columns.
    pub(super) const fn turned_heads(stem: &'static str) -> Self {
        Self { stem, form: Form::TurnedHeads }
    }

    /// A matrix stored by columns; `parts` share the tensor, where there are any.
    pub(super) const fn columns(stem: &'static str, parts: &'static [Role]) -> Self {
        Self { stem, form: Form::Columns(parts) }
    }
}

/// A tensor that a model should have.
pub(super) struct Wanted {
    pub(super) id: TensorId,
    /// Name of the tensor in the file.
    pub(super) name: String,
    /// Shape of that tensor.
    pub(super) stored: Vec<usize>,
    /// The row of it (the column, where it is stored by columns) at which this one begins.
    pub(super) first_row: usize,
    /// It is stored by columns.
    pub(super) columns: bool,
    /// Each head of so many rows is.
    pub(super) turned: Option<usize>,
    /// Shape of this one.
    pub(super) shape: Vec<usize>,
    pub(super) optional: bool,
}

/// Which products of the layers have biases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Query, key and value.
    pub qkv: bool,
    /// Attention output.
    pub o: bool,
    /// The feed-forward block.
    pub mlp: bool,
}

const QKV_BIASES: [Role; 3] = [Role::QBias, Role::KBias, Role::VBias];
const MLP_BIASES: [Role; 3] = [Role::GateBias, Role::UpBias, Role::DownBias];

/// Tensors that some files carry and no forward pass needs.
pub(super) fn ignorable(name: &str, config: &ModelConfig) -> bool {
    // GPT-2's files may hold its causal mask.
    // Some files of latent attention have products both together and apart.
    let again = config.latent.is_some_and(|l| !l.apart) && [".attn_k_b.weight", ".attn_v_b.weight"].iter().any(|end| name.ends_with(end));
    let mask = again || [".attn.bias", ".attn.masked_bias"].iter().any(|end| name.ends_with(end));
    mask || name.ends_with(".rotary_emb.inv_freq") || (config.tied_embeddings && name == "lm_head.weight") || beside_encoder(name, config)
}

/// The layer behind the last one to which a tensor belongs, if it is of one that predicts a further token: it stands among `names` with the
/// product of such layers. Training uses them, no forward pass here does.
pub(super) fn of_predictor(name: &str, family: &Family, config: &ModelConfig, has: impl Fn(&str) -> bool) -> bool {
    let number = name.strip_prefix(family.hf_layers).and_then(|rest| rest.split_once('.')).and_then(|(number, _)| number.parse().ok());
    let behind = number.filter(|&number: &usize| config.latent.is_some() && number >= config.layers.len());
    behind.is_some_and(|number| has(&format!("{}{number}.eh_proj.weight", family.hf_layers)))
}

/// What files of encoders carry beside what is run: positions as numbers, the pooler of a model that does not classify, and the head
/// that words were guessed with in training.
fn beside_encoder(name: &str, config: &ModelConfig) -> bool {
    let Some(encoder) = config.encoder else { return false };
    let head = ["cls.predictions.", "cls.seq_relationship.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector."]
        .iter()
        .any(|begin| name.starts_with(begin));
    let pooler = encoder.classifier.is_none() && (name.starts_with("pooler.dense.") || name.contains(".pooler.dense."));
    head || pooler || name.ends_with("embeddings.position_ids")
}

/// The name under which old files have a tensor, if it is another.
pub(super) fn older_name(name: &str) -> Option<String> {
    let norm = |new: &str, old: &str| name.strip_suffix(new).filter(|n| n.ends_with("LayerNorm")).map(|n| format!("{n}{old}"));
    norm(".weight", ".gamma").or_else(|| norm(".bias", ".beta"))
}

/// Every tensor of a model, in the order of [`Role`]. Without `biases` those that the file has are taken (GGUF).
pub(super) fn wanted(family: &Family, config: &ModelConfig, format: Format, biases: Option<Biases>) -> Vec<Wanted> {
    let mut outer = outer_roles(config);
    if config.layers.iter().any(|l| l.rope.scaling == RopeScaling::Tensor) {
        outer.push(Role::RopeFactors);
    }
    if config.layers.iter().any(|l| matches!(l.rope.scaling, RopeScaling::LongRopeTensors { .. })) {
        outer.extend([Role::ShortRopeFactors, Role::LongRopeFactors]);
    }
    let biases = match biases {
        // Compressed queries, keys and values have no biases in any file here.
        None if config.latent.is_some() => Vec::new(),
        None => QKV_BIASES.into_iter().chain([Role::OBias]).chain(MLP_BIASES).map(|role| (role, true)).collect(),
        Some(b) => {
            let with = |roles: &[Role], wanted: bool| roles.iter().filter(|_| wanted).map(|&role| (role, false)).collect::<Vec<_>>();
            let mlp = if config.gated { &MLP_BIASES[..] } else { &MLP_BIASES[1..] };
            [with(&QKV_BIASES, b.qkv), with(&[Role::OBias], b.o), with(mlp, b.mlp)].concat()
        }
    };
    let make = |layer: Option<u32>, role: Role, optional: bool| {
        let name = match format {
            Format::GGUF => (family.gguf_name)(role),
            Format::Safetensors => (family.hf_name)(role),
        };
        let shape = config.shape(role);
        let rows = |roles: &[Role]| roles.iter().map(|&role| config.shape(role)[0]).sum::<usize>();
        let before = |parts: &[Role]| rows(&parts[..parts.iter().position(|&part| part == role).unwrap_or(0)]);
        let (mut stored, mut turned) = (shape.clone(), None);
        let (first_row, columns) = match name.form {
            Form::Own | Form::Columns([]) => (0, matches!(name.form, Form::Columns(_))),
            Form::Fused(parts) | Form::Columns(parts) => {
                stored[0] = rows(parts);
                (before(parts), matches!(name.form, Form::Columns(_)))
            }
            Form::Heads | Form::TurnedHeads => {
                let rows = shape[0] / config.kv_heads;
                stored = vec![config.kv_heads, rows, shape[1]];
                if matches!(name.form, Form::TurnedHeads) {
                    stored.swap(1, 2);
                    turned = Some(rows);
                }
                (0, false)
            }
            Form::Stacked => {
                stored.insert(0, config.experts.map_or(0, |e| e.count));
                (role.expert().unwrap_or(0) as usize * shape[0], false)
            }
        };
        if columns {
            stored.reverse();
        }
        let stem = match role.expert() {
            Some(expert) => name.stem.replace("{}", &expert.to_string()),
            None => name.stem.to_owned(),
        };
        let name = match (layer, format) {
            (Some(layer), Format::GGUF) => format!("blk.{layer}.{stem}"),
            (Some(layer), Format::Safetensors) => format!("{}{layer}.{stem}", family.hf_layers),
            (None, _) => stem,
        };
        Wanted { id: TensorId { layer, role }, name, stored, first_row, columns, turned, shape, optional }
    };
    let mut all: Vec<Wanted> = outer.into_iter().map(|role| make(None, role, false)).collect();
    for (index, layer) in config.layers.iter().enumerate() {
        let index = Some(index as u32);
        all.extend(layer_roles(config, layer).into_iter().map(|role| make(index, role, false)));
        all.extend(biases.iter().map(|&(role, optional)| make(index, role, optional)));
    }
    all
}

/// The roles outside the layers, factors of rotations aside.
fn outer_roles(config: &ModelConfig) -> Vec<Role> {
    let mut roles = vec![Role::Embedding];
    if config.learned_positions {
        roles.push(Role::Positions);
    }
    if config.embedding_norm {
        roles.extend([Role::EmbeddingNorm, Role::EmbeddingNormBias]);
    }
    let Some(encoder) = config.encoder else {
        roles.push(Role::OutputNorm);
        roles.extend([Role::Output].into_iter().filter(|_| !config.tied_embeddings));
        roles.extend([Role::OutputNormBias].into_iter().filter(|_| config.layer_norms));
        return roles;
    };
    if encoder.token_types > 0 {
        roles.push(Role::TokenTypes);
    }
    if encoder.classifier.is_some() {
        roles.extend([Role::Pooler, Role::PoolerBias, Role::Classifier, Role::ClassifierBias]);
    }
    roles
}

/// The roles of a layer, biases of products aside.
fn layer_roles(config: &ModelConfig, layer: &LayerConfig) -> Vec<Role> {
    let mut roles = vec![Role::AttnNorm];
    match config.latent {
        None => roles.extend([Role::Q, Role::K, Role::V]),
        Some(latent) => {
            match latent.q_rank {
                None => roles.push(Role::Q),
                Some(_) => roles.extend([Role::QDown, Role::QDownNorm, Role::QUp]),
            }
            roles.extend([Role::KvDown, Role::KvDownNorm]);
            match latent.apart {
                false => roles.push(Role::KvUp),
                true => roles.extend([Role::KeyUp, Role::ValueUp]),
            }
        }
    }
    roles.extend([Role::O, Role::FfnNorm]);
    match config.experts.filter(|_| layer.experts) {
        Some(experts) => {
            roles.push(Role::Router);
            if experts.scoring == Scoring::Sigmoid {
                roles.push(Role::RouterBias);
            }
            if experts.shared > 0 {
                roles.extend([Role::SharedGate, Role::SharedUp, Role::SharedDown]);
            }
            roles.extend((0..experts.count as u32).flat_map(|e| [Role::ExpertGate(e), Role::ExpertUp(e), Role::ExpertDown(e)]));
        }
        None if config.gated => roles.extend([Role::Gate, Role::Up, Role::Down]),
        None => roles.extend([Role::Up, Role::Down]),
    }
    if config.head_norms {
        roles.extend([Role::QNorm, Role::KNorm]);
    }
    if config.block_norms {
        roles.extend([Role::PostAttnNorm, Role::PostFfnNorm]);
    }
    if config.layer_norms {
        roles.extend([Role::AttnNormBias, Role::FfnNormBias]);
    }
    roles
}

/// Names in GGUF that most families share.
pub(super) const fn gguf_name(role: Role) -> Name {
    Name::own(match role {
        Role::Embedding => "token_embd.weight",
        Role::RopeFactors => "rope_freqs.weight",
        Role::ShortRopeFactors => "rope_factors_short.weight",
        Role::LongRopeFactors => "rope_factors_long.weight",
        Role::OutputNorm => "output_norm.weight",
        Role::Output => "output.weight",
        Role::AttnNorm => "attn_norm.weight",
        Role::Q => "attn_q.weight",
        Role::QBias => "attn_q.bias",
        Role::K => "attn_k.weight",
        Role::KBias => "attn_k.bias",
        Role::V => "attn_v.weight",
        Role::VBias => "attn_v.bias",
        Role::QNorm => "attn_q_norm.weight",
        Role::KNorm => "attn_k_norm.weight",
        Role::O => "attn_output.weight",
        Role::OBias => "attn_output.bias",
        Role::PostAttnNorm => "post_attention_norm.weight",
        Role::FfnNorm => "ffn_norm.weight",
        Role::Gate => "ffn_gate.weight",
        Role::GateBias => "ffn_gate.bias",
        Role::Up => "ffn_up.weight",
        Role::UpBias => "ffn_up.bias",
        Role::Down => "ffn_down.weight",
        Role::DownBias => "ffn_down.bias",
        Role::PostFfnNorm => "post_ffw_norm.weight",
        Role::Positions => "position_embd.weight",
        Role::TokenTypes => "token_types.weight",
        Role::EmbeddingNorm => "token_embd_norm.weight",
        Role::EmbeddingNormBias => "token_embd_norm.bias",
        Role::Pooler => "cls.weight",
        Role::PoolerBias => "cls.bias",
        Role::Classifier => "cls.output.weight",
        Role::ClassifierBias => "cls.output.bias",
        Role::AttnNormBias => "attn_norm.bias",
        Role::FfnNormBias => "ffn_norm.bias",
        Role::OutputNormBias => "output_norm.bias",
        Role::Router => "ffn_gate_inp.weight",
        Role::RouterBias => "exp_probs_b.bias",
        Role::SharedGate => "ffn_gate_shexp.weight",
        Role::SharedUp => "ffn_up_shexp.weight",
        Role::SharedDown => "ffn_down_shexp.weight",
        Role::QDown => "attn_q_a.weight",
        Role::QDownNorm => "attn_q_a_norm.weight",
        Role::QUp => "attn_q_b.weight",
        Role::KvDown => "attn_kv_a_mqa.weight",
        Role::KvDownNorm => "attn_kv_a_norm.weight",
        Role::KvUp => "attn_kv_b.weight",
        Role::KeyUp => return Name::turned_heads("attn_k_b.weight"),
        Role::ValueUp => return Name::heads("attn_v_b.weight"),
        Role::ExpertGate(_) => return Name::stacked("ffn_gate_exps.weight"),
        Role::ExpertUp(_) => return Name::stacked("ffn_up_exps.weight"),
        Role::ExpertDown(_) => return Name::stacked("ffn_down_exps.weight"),
    })
}

/// Names in Hugging Face's files that most families share, those of Llama; layer tensors come behind `model.layers.N.`.
pub(super) const fn hf_name(role: Role) -> Name {
    Name::own(match role {
        Role::Embedding => "model.embed_tokens.weight",
        Role::RopeFactors => "rope_freqs.weight",
        Role::ShortRopeFactors => "rope_factors_short.weight",
        Role::LongRopeFactors => "rope_factors_long.weight",
        Role::OutputNorm => "model.norm.weight",
        Role::Output => "lm_head.weight",
        Role::AttnNorm => "input_layernorm.weight",
        Role::Q => "self_attn.q_proj.weight",
        Role::QBias => "self_attn.q_proj.bias",
        Role::K => "self_attn.k_proj.weight",
        Role::KBias => "self_attn.k_proj.bias",
        Role::V => "self_attn.v_proj.weight",
        Role::VBias => "self_attn.v_proj.bias",
        Role::QNorm => "self_attn.q_norm.weight",
        Role::KNorm => "self_attn.k_norm.weight",
        Role::O => "self_attn.o_proj.weight",
        Role::OBias => "self_attn.o_proj.bias",
        Role::PostAttnNorm => "post_attention_layernorm.weight",
        Role::FfnNorm => "post_attention_layernorm.weight",
        Role::Gate => "mlp.gate_proj.weight",
        Role::GateBias => "mlp.gate_proj.bias",
        Role::Up => "mlp.up_proj.weight",
        Role::UpBias => "mlp.up_proj.bias",
        Role::Down => "mlp.down_proj.weight",
        Role::DownBias => "mlp.down_proj.bias",
        Role::PostFfnNorm => "post_feedforward_layernorm.weight",
        Role::Positions => "model.embed_positions.weight",
        Role::TokenTypes => "model.embed_token_types.weight",
        Role::EmbeddingNorm => "model.embed_layernorm.weight",
        Role::EmbeddingNormBias => "model.embed_layernorm.bias",
        Role::Pooler => "pooler.weight",
        Role::PoolerBias => "pooler.bias",
        Role::Classifier => "classifier.weight",
        Role::ClassifierBias => "classifier.bias",
        Role::AttnNormBias => "input_layernorm.bias",
        Role::FfnNormBias => "post_attention_layernorm.bias",
        Role::OutputNormBias => "model.norm.bias",
        Role::Router => "mlp.gate.weight",
        Role::RouterBias => "mlp.gate.e_score_correction_bias",
        Role::SharedGate => "mlp.shared_experts.gate_proj.weight",
        Role::SharedUp => "mlp.shared_experts.up_proj.weight",
        Role::SharedDown => "mlp.shared_experts.down_proj.weight",
        Role::QDown => "self_attn.q_a_proj.weight",
        Role::QDownNorm => "self_attn.q_a_layernorm.weight",
        Role::QUp => "self_attn.q_b_proj.weight",
        Role::KvDown => "self_attn.kv_a_proj_with_mqa.weight",
        Role::KvDownNorm => "self_attn.kv_a_layernorm.weight",
        Role::KvUp => "self_attn.kv_b_proj.weight",
        Role::KeyUp => "self_attn.k_b_proj.weight",
        Role::ValueUp => "self_attn.v_b_proj.weight",
        Role::ExpertGate(_) => "mlp.experts.{}.gate_proj.weight",
        Role::ExpertUp(_) => "mlp.experts.{}.up_proj.weight",
        Role::ExpertDown(_) => "mlp.experts.{}.down_proj.weight",
    })
}
