//! The weights of a fixture in other files: under GGUF names, or with products stored together. The values stay as they are, bit for bit.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter},
    path::Path,
};

use plan::{
    dtype::DType,
    gguf::{Kind, Value, Writer},
    safetensors,
};
use serde_json::{Value as Json, json};

/// A stored tensor.
#[derive(Clone)]
pub struct Tensor {
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Stored type.
    pub dtype: DType,
    /// Values as stored.
    pub data: Vec<u8>,
}

/// `config.json` and the tensors of a folder, by name.
#[derive(Clone)]
pub struct Folder {
    /// `config.json`.
    pub config: Json,
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Tensor {
    fn rows(&self) -> impl Iterator<Item = &[u8]> {
        self.data.chunks_exact(self.data.len() / self.shape[0])
    }

    /// Several tensors' rows, one after the other.
    fn joined(parts: &[Tensor]) -> Self {
        let mut all = parts[0].clone();
        for part in &parts[1..] {
            all.shape[0] += part.shape[0];
            all.data.extend(&part.data);
        }
        all
    }

    /// Columns in place of rows.
    fn transposed(&self) -> Self {
        let (rows, columns) = (self.shape[0], self.shape[1]);
        let element = self.data.len() / rows / columns;
        let at = |row: usize, column: usize| &self.data[(row * columns + column) * element..][..element];
        let data = (0..columns).flat_map(|column| (0..rows).flat_map(move |row| at(row, column))).copied().collect();
        Self { shape: vec![columns, rows], data, ..self.clone() }
    }

    /// The rows of each of `heads` heads turned from halves into neighbours, as GGUF has those of Llama.
    fn permuted(&self, heads: usize) -> Self {
        let half = self.shape[0] / heads / 2;
        let rows: Vec<&[u8]> = self.rows().collect();
        let from = |to: usize| to / (2 * half) * 2 * half + to % 2 * half + to % (2 * half) / 2;
        Self { data: (0..self.shape[0]).flat_map(|to| rows[from(to)]).copied().collect(), ..self.clone() }
    }
}

impl Folder {
    /// Reads a folder of safetensors files.
    pub fn read(folder: &Path) -> io::Result<Self> {
        Ok(Self { config: serde_json::from_slice(&fs::read(folder.join("config.json"))?)?, tensors: tensors(folder)? })
    }

    /// Writes a low-rank adapter of PEFT, whose folder this is, as a GGUF file for a llama of this many heads.
    pub fn write_gguf_adapter(folder: &Path, path: &Path, (heads, kv_heads): (usize, usize)) -> io::Result<()> {
        let config: Json = serde_json::from_slice(&fs::read(folder.join("adapter_config.json"))?)?;
        let mut file = Writer::new();
        file.metadata("general.type", Value::String("adapter".into()))
            .metadata("general.architecture", Value::String("llama".into()))
            .metadata("adapter.type", Value::String("lora".into()))
            .metadata("adapter.lora.alpha", Value::F32(config["lora_alpha"].as_f64().expect("an alpha") as f32));
        for (name, t) in tensors(folder)? {
            let name = name.strip_prefix("base_model.model.").expect("a name of PEFT");
            let (module, half) = name.strip_suffix(".weight").and_then(|n| n.rsplit_once(".lora_")).expect("A or B");
            let t = match module {
                m if half == "B" && m.ends_with("q_proj") => t.permuted(heads),
                m if half == "B" && m.ends_with("k_proj") => t.permuted(kv_heads),
                _ => t,
            };
            let name = format!("{}.lora_{}", gguf_name(&format!("{module}.weight")), half.to_lowercase());
            file.tensor(&name, &t.shape, t.dtype, t.data);
        }
        file.write(&mut BufWriter::new(File::create(path)?))
    }

    fn count(&self, field: &str) -> usize {
        self.optional(field).unwrap_or_else(|| panic!("no count {field}"))
    }

    /// A count, by its usual name or by GPT-2's.
    fn optional(&self, field: &str) -> Option<usize> {
        let gpt2 = match field {
            "num_hidden_layers" => "n_layer",
            "max_position_embeddings" => "n_positions",
            "hidden_size" => "n_embd",
            "num_attention_heads" | "num_key_value_heads" => "n_head",
            other => other,
        };
        // An encoder has as many heads of keys and values as of queries, and does not say so.
        let heads = if field == "num_key_value_heads" { self.config["num_attention_heads"].as_u64() } else { None };
        self.config[field].as_u64().or(self.config[gpt2].as_u64()).or(heads).map(|n| n as usize)
    }

    fn take(&mut self, name: &str) -> Tensor {
        self.tensors.remove(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// A llama as a phi3: query, key and value in one tensor, gate and up in another.
    #[must_use]
    pub fn into_phi3(mut self) -> Self {
        self.config["architectures"] = json!(["Phi3ForCausalLM"]);
        self.config["model_type"] = json!("phi3");
        for layer in 0..self.count("num_hidden_layers") {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let qkv = ["q", "k", "v"].map(|p| self.take(&name(&format!("self_attn.{p}_proj"))));
            let gate_up = ["gate", "up"].map(|p| self.take(&name(&format!("mlp.{p}_proj"))));
            self.tensors.insert(name("self_attn.qkv_proj"), Tensor::joined(&qkv));
            self.tensors.insert(name("mlp.gate_up_proj"), Tensor::joined(&gate_up));
        }
        self
    }

    /// Writes `config.json` and one safetensors file, beside the other files of `like`.
    pub fn write(&self, folder: &Path, like: &Path) -> io::Result<()> {
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            if like.join(name).exists() {
                fs::copy(like.join(name), folder.join(name))?;
            }
        }
        fs::write(folder.join("config.json"), self.config.to_string())?;
        let mut header = serde_json::Map::new();
        let mut data: Vec<u8> = Vec::new();
        for (name, t) in &self.tensors {
            let end = data.len() + t.data.len();
            header.insert(name.clone(), json!({"dtype": format!("{:?}", t.dtype), "shape": t.shape, "data_offsets": [data.len(), end]}));
            data.extend(&t.data);
        }
        let header = Json::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.extend(data);
        fs::write(folder.join("model.safetensors"), file)
    }

    /// Writes a GGUF file with this architecture's keys and names.
    pub fn write_gguf(&self, path: &Path, arch: &str) -> io::Result<()> {
        let mut file = Writer::new();
        self.gguf_metadata(&mut file, arch);
        let (heads, kv_heads) = (self.count("num_attention_heads"), self.count("num_key_value_heads"));
        let mut stacks: BTreeMap<String, Vec<(usize, Tensor)>> = BTreeMap::new();
        for (name, t) in &self.tensors {
            // GGUF has no pooler of a model that does not classify.
            if name.starts_with("pooler.") {
                continue;
            }
            let t = match name {
                n if arch == "llama" && n.ends_with("q_proj.weight") => t.permuted(heads),
                n if arch == "llama" && n.ends_with("k_proj.weight") => t.permuted(kv_heads),
                n if arch == "gpt2" && n.contains(".c_") && n.ends_with(".weight") => t.transposed(),
                _ => t.clone(),
            };
            match expert(name) {
                Some((stack, index)) => stacks.entry(gguf_name(&stack)).or_default().push((index, t)),
                None => drop(file.tensor(&gguf_name(name), &t.shape, t.dtype, t.data)),
            }
        }
        for (name, mut experts) in stacks {
            experts.sort_by_key(|(index, _)| *index);
            let parts: Vec<Tensor> = experts.into_iter().map(|(_, t)| t).collect();
            let all = Tensor::joined(&parts);
            file.tensor(&name, &[parts.len(), parts[0].shape[0], parts[0].shape[1]], all.dtype, all.data);
        }
        file.write(&mut BufWriter::new(File::create(path)?))
    }

    fn gguf_metadata(&self, file: &mut Writer, arch: &str) {
        let key = |name: &str| format!("{arch}.{name}");
        let count = |field: &str| Value::U32(self.count(field) as u32);
        let vocab = self.count("vocab_size");
        file.metadata("general.architecture", Value::String(arch.into()))
            .metadata(&key("block_count"), count("num_hidden_layers"))
            .metadata(&key("context_length"), count("max_position_embeddings"))
            .metadata(&key("embedding_length"), count("hidden_size"))
            .metadata(&key("attention.head_count"), count("num_attention_heads"))
            .metadata(
                &key("attention.head_count_kv"),
                if self.config["apart"].is_boolean() { Value::U32(1) } else { count("num_key_value_heads") },
            );
        let width = self.optional("intermediate_size").unwrap_or_else(|| 4 * self.count("hidden_size"));
        file.metadata(&key("feed_forward_length"), Value::U32(width as u32));
        for (field, name) in [
            ("sliding_window", "attention.sliding_window"),
            ("head_dim", "attention.key_length"),
            ("num_local_experts", "expert_count"),
            ("num_experts_per_tok", "expert_used_count"),
            ("moe_intermediate_size", "expert_feed_forward_length"),
        ] {
            if let Some(n) = self.optional(field) {
                file.metadata(&key(name), Value::U32(n as u32));
            }
        }
        if arch == "deepseek2" {
            self.deepseek_metadata(file);
        }
        let rope = &self.config["rope_parameters"]["rope_theta"];
        for (value, name) in [
            (&self.config["rms_norm_eps"], "attention.layer_norm_rms_epsilon"),
            (&self.config["layer_norm_epsilon"], "attention.layer_norm_epsilon"),
            (&self.config["layer_norm_eps"], "attention.layer_norm_epsilon"),
            (if rope.is_null() { &self.config["rope_theta"] } else { rope }, "rope.freq_base"),
        ] {
            if let Some(x) = value.as_f64() {
                file.metadata(&key(name), Value::F32(x as f32));
            }
        }
        if arch == "bert" {
            file.metadata(&key("attention.causal"), Value::Bool(false)).metadata(&key("pooling_type"), Value::U32(1));
        }
        file.metadata("tokenizer.ggml.model", Value::String("llama".into()))
            .array("tokenizer.ggml.tokens", Kind::String, (0..vocab).map(|id| Value::String(format!("t{id}"))).collect())
            .array("tokenizer.ggml.scores", Kind::F32, (0..vocab).map(|id| Value::F32(-(id as f32))).collect())
            .array("tokenizer.ggml.token_type", Kind::I32, vec![Value::I32(1); vocab])
            .metadata("tokenizer.ggml.bos_token_id", Value::U32(1))
            .metadata("tokenizer.ggml.eos_token_id", Value::U32(2));
    }

    /// Writes the same with keys and values of latent attention in tensors of their own, keys by columns of each head, as llama.cpp's newer
    /// converter does.
    pub fn write_gguf_apart(&self, path: &Path) -> io::Result<()> {
        let mut folder = self.clone();
        let (heads, value) = (self.count("num_attention_heads"), self.count("v_head_dim"));
        let (key, rank) = (self.count("qk_nope_head_dim"), self.count("kv_lora_rank"));
        let names: Vec<String> = self.tensors.keys().filter(|name| name.ends_with("kv_b_proj.weight")).cloned().collect();
        for name in names {
            let both = folder.take(&name);
            let rows: Vec<&[u8]> = both.rows().collect();
            let part = |first: usize, count: usize, head: usize| Tensor {
                shape: vec![count, rank],
                data: rows[head * (key + value) + first..][..count].concat(),
                ..both.clone()
            };
            let keys: Vec<Tensor> = (0..heads).map(|head| part(0, key, head).transposed()).collect();
            let values: Vec<Tensor> = (0..heads).map(|head| part(key, value, head)).collect();
            for (stem, parts) in [("k_b_proj", keys), ("v_b_proj", values)] {
                let shape = vec![heads, parts[0].shape[0], parts[0].shape[1]];
                folder.tensors.insert(name.replace("kv_b_proj", stem), Tensor { shape, ..Tensor::joined(&parts) });
            }
        }
        folder.config["apart"] = true.into();
        folder.write_gguf(path, "deepseek2")
    }

    /// What llama.cpp's converter writes of latent attention and its mixtures.
    fn deepseek_metadata(&self, file: &mut Writer) {
        let c = &self.config;
        let mut put = |name: &str, value: Value| {
            file.metadata(&format!("deepseek2.{name}"), value);
        };
        let count = |field: &str| self.optional(field).unwrap_or(0) as u32;
        let rotated = count("qk_rope_head_dim");
        if count("q_lora_rank") > 0 {
            put("attention.q_lora_rank", Value::U32(count("q_lora_rank")));
        }
        put("attention.kv_lora_rank", Value::U32(count("kv_lora_rank")));
        let (key, value) = (count("qk_nope_head_dim") + rotated, count("v_head_dim"));
        let (mut cached, mut of_heads) = ((key, value), None);
        if c["apart"].is_boolean() {
            (cached, of_heads) = ((count("kv_lora_rank") + rotated, count("kv_lora_rank")), Some((key, value)));
        }
        put("attention.key_length", Value::U32(cached.0));
        put("attention.value_length", Value::U32(cached.1));
        if let Some((key, value)) = of_heads {
            put("attention.key_length_mla", Value::U32(key));
            put("attention.value_length_mla", Value::U32(value));
        }
        put("rope.dimension_count", Value::U32(rotated));
        put("leading_dense_block_count", Value::U32(count("first_k_dense_replace")));
        put("expert_count", Value::U32(count("n_routed_experts")));
        put("expert_shared_count", Value::U32(count("n_shared_experts")));
        put("expert_weights_scale", Value::F32(c["routed_scaling_factor"].as_f64().expect("a factor") as f32));
        put("expert_weights_norm", Value::Bool(c["norm_topk_prob"].as_bool().expect("a flag")));
        put("expert_gating_func", Value::U32(if c["model_type"] == "deepseek_v3" { 2 } else { 1 }));
        put("expert_group_count", Value::U32(count("n_group")));
        put("expert_group_used_count", Value::U32(count("topk_group")));
        let scaling = if c["rope_scaling"].is_object() { &c["rope_scaling"] } else { &c["rope_parameters"] };
        let number = |name: &str| Value::F32(scaling[name].as_f64().expect("a number") as f32);
        put("rope.scaling.type", Value::String("yarn".into()));
        put("rope.scaling.factor", number("factor"));
        put(
            "rope.scaling.original_context_length",
            Value::U32(scaling["original_max_position_embeddings"].as_u64().expect("a length") as u32),
        );
        put("rope.scaling.yarn_log_multiplier", Value::F32((0.1 * scaling["mscale_all_dim"].as_f64().expect("a number")) as f32));
    }
}

/// The tensors of a folder's safetensors files.
fn tensors(folder: &Path) -> io::Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = fs::read(&path)?;
        let header = safetensors::read(&mut &*bytes, bytes.len() as u64).expect("a safetensors header");
        for t in header.tensors {
            let dtype = match t.dtype.as_str() {
                "F32" => DType::F32,
                "F16" => DType::F16,
                "BF16" => DType::BF16,
                other => panic!("{other} in {}", path.display()),
            };
            let shape = t.shape.iter().map(|&n| n as usize).collect();
            let data = bytes[t.offset as usize..(t.offset + t.bytes) as usize].to_vec();
            tensors.insert(t.name, Tensor { shape, dtype, data });
        }
    }
    Ok(tensors)
}

/// Hugging Face's names in GGUF, within layers and outside.
const GGUF_NAMES: [(&str, &str); 59] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.ln_f", "output_norm"),
    ("ln_1", "attn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("ln_2", "ffn_norm"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b"),
    ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
    ("self_attn.k_b_proj", "attn_k_b"),
    ("self_attn.v_b_proj", "attn_v_b"),
    ("mlp.experts.gate_proj", "ffn_gate_exps"),
    ("mlp.experts.up_proj", "ffn_up_exps"),
    ("mlp.experts.down_proj", "ffn_down_exps"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.LayerNorm", "token_embd_norm"),
    ("attention.self.query", "attn_q"),
    ("attention.self.key", "attn_k"),
    ("attention.self.value", "attn_v"),
    ("attention.output.dense", "attn_output"),
    ("attention.output.LayerNorm", "attn_output_norm"),
    ("intermediate.dense", "ffn_up"),
    ("output.dense", "ffn_down"),
    ("output.LayerNorm", "layer_output_norm"),
    ("pre_classifier", "cls"),
    ("classifier", "cls.output"),
    ("block_sparse_moe.experts.w1", "ffn_gate_exps"),
    ("block_sparse_moe.experts.w2", "ffn_down_exps"),
    ("block_sparse_moe.experts.w3", "ffn_up_exps"),
];

/// The name without the expert's number, and the number.
fn expert(name: &str) -> Option<(String, usize)> {
    let (before, after) = name.split_once(".experts.")?;
    let (number, rest) = after.split_once('.')?;
    Some((format!("{before}.experts.{rest}"), number.parse().ok()?))
}

/// The GGUF name of a tensor.
fn gguf_name(name: &str) -> String {
    // The one tensor whose name does not end with its kind.
    let (stem, kind) = match name.ends_with(".e_score_correction_bias") {
        true => (name, "bias"),
        false => name.rsplit_once('.').expect("a name with its kind"),
    };
    let layer = ["model.layers.", "transformer.h.", "encoder.layer."].iter().find_map(|prefix| stem.strip_prefix(prefix)?.split_once('.'));
    let (prefix, stem) = match layer {
        Some((layer, stem)) => (format!("blk.{layer}."), stem),
        None => (String::new(), stem),
    };
    let known = GGUF_NAMES.iter().find(|(hf, _)| *hf == stem).unwrap_or_else(|| panic!("no GGUF name for {name}"));
    format!("{prefix}{}.{kind}", known.1)
}
