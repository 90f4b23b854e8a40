//! Generated models: random weights of every stored type.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use engine::WeightReader;
use half::{bf16, f16};
use plan::{
    dtype::DType,
    model::{
        Activation, Architecture, Classifier, Encoder, ExpertGroups, Experts, Format, Latent, LayerConfig, ModelConfig, ModelFile,
        ModelHeader, PoolerActivation, Role, Rope, RopeLayout, RopeScaling, Scoring, TensorId, TensorInfo,
    },
};

/// Numbers that look random and are the same every time.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }

    /// In (-1, 1).
    pub(crate) fn float(&mut self) -> f32 {
        self.bits() as f32 / (1_u32 << 30) as f32 - 1.0
    }

    fn byte(&mut self) -> u8 {
        (self.bits() >> 8) as u8
    }
}

/// A model in memory.
pub(crate) struct Model {
    pub(crate) header: ModelHeader,
    pub(crate) bytes: Vec<u8>,
    /// Bytes read, and the reads that lay outside of what was there.
    pub(crate) read: AtomicU64,
}

impl WeightReader for Model {
    fn read(&self, file: usize, range: Range<u64>, into: &mut [u8]) -> io::Result<()> {
        assert_eq!((file, range.end - range.start), (0, into.len() as u64));
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        let bytes = self.bytes.get(range.start as usize..range.end as usize);
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    /// Every other line of the bytes: matrices are read in both ways.
    fn is_at_hand(&self, _: usize, range: &Range<u64>) -> bool {
        (range.start / 64).is_multiple_of(2)
    }
}

/// Random stored values of about ±`size`, `rows` rows of `k`.
fn stored(noise: &mut Noise, dtype: DType, rows: usize, k: usize, size: f32) -> Vec<u8> {
    let blocks = rows * k / dtype.block_len();
    let mut out = Vec::with_capacity(blocks * dtype.block_bytes());
    let scale = |noise: &mut Noise, most: f32| f16::from_f32(size / most * (1.0 + 0.3 * noise.float())).to_le_bytes();
    for _ in 0..blocks {
        match dtype {
            DType::F32 => out.extend((size * noise.float()).to_le_bytes()),
            DType::F16 => out.extend(f16::from_f32(size * noise.float()).to_le_bytes()),
            DType::BF16 => out.extend(bf16::from_f32(size * noise.float()).to_le_bytes()),
            DType::Q8_0 => {
                out.extend(scale(noise, 127.0));
                out.extend((0..32).map(|_| noise.byte()));
            }
            DType::Q4_0 | DType::IQ4_NL => {
                out.extend(scale(noise, if dtype == DType::Q4_0 { 8.0 } else { 120.0 }));
                out.extend((0..16).map(|_| noise.byte()));
            }
            DType::Q4_1 | DType::Q5_1 => {
                let half = if dtype == DType::Q4_1 { 8.0 } else { 16.0 };
                let d = f16::from_f32(size / half * (1.0 + 0.3 * noise.float()));
                out.extend(d.to_le_bytes());
                out.extend(f16::from_f32(-d.to_f32() * half).to_le_bytes());
                out.extend((4..dtype.block_bytes()).map(|_| noise.byte()));
            }
            DType::Q5_0 => {
                out.extend(scale(noise, 16.0));
                out.extend((0..20).map(|_| noise.byte()));
            }
            DType::MXFP4 => {
                // 2^(e − 128) · 12 is the largest value.
                out.push((128.0 + (size / 12.0).log2()).round() as u8);
                out.extend((0..16).map(|_| noise.byte()));
            }
            DType::Q2_K => {
                out.extend((0..80).map(|_| noise.byte()));
                out.extend(scale(noise, 2.0 * 15.0));
                out.extend(scale(noise, 15.0));
            }
            DType::Q3_K => {
                out.extend((0..108).map(|_| noise.byte()));
                out.extend(scale(noise, 4.0 * 32.0));
            }
            DType::Q5_K => {
                out.extend(scale(noise, 16.0 * 63.0));
                out.extend(scale(noise, 63.0));
                out.extend((0..172).map(|_| noise.byte()));
            }
            DType::Q4_K => {
                out.extend(scale(noise, 8.0 * 63.0));
                out.extend(scale(noise, 63.0));
                out.extend((0..140).map(|_| noise.byte()));
            }
            DType::Q6_K => {
                out.extend((0..208).map(|_| noise.byte()));
                out.extend(scale(noise, 32.0 * 128.0));
            }
        }
    }
    out
}

/// The shape of a model, and the type of each matrix.
pub(crate) struct Recipe {
    pub(crate) config: ModelConfig,
    pub(crate) biases: bool,
    /// Type of a matrix in a layer (`None` outside the layers).
    pub(crate) dtype: fn(Option<usize>, Role) -> DType,
    pub(crate) seed: u64,
}

impl Recipe {
    pub(crate) fn build(&self) -> Model {
        let c = &self.config;
        let mut model = Builder { noise: Noise::new(self.seed), tensors: BTreeMap::new(), bytes: vec![0; 96] };
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let dtype = |layer, role| (self.dtype)(layer, role);
        model.matrix(None, Role::Embedding, dtype(None, Role::Embedding), c.vocab, c.hidden);
        for (i, layer) in c.layers.iter().enumerate() {
            let l = Some(i);
            let norms = if c.block_norms {
                &[Role::AttnNorm, Role::PostAttnNorm, Role::FfnNorm, Role::PostFfnNorm][..]
            } else {
                &[Role::AttnNorm, Role::FfnNorm]
            };
            for &norm in norms {
                model.norm(l, norm, c.hidden, c.norm_weight_offset);
            }
            if c.layer_norms {
                model.vector(l, Role::AttnNormBias, c.hidden, 0.0, 0.3);
                model.vector(l, Role::FfnNormBias, c.hidden, 0.0, 0.3);
            }
            if c.head_norms {
                model.norm(l, Role::QNorm, c.head_dim, c.norm_weight_offset);
                model.norm(l, Role::KNorm, c.head_dim, c.norm_weight_offset);
            }
            let matrices = [
                (Role::Q, Role::QBias, q, c.hidden),
                (Role::K, Role::KBias, kv, c.hidden),
                (Role::V, Role::VBias, kv, c.hidden),
                (Role::O, Role::OBias, c.hidden, c.heads * c.value_dim()),
                (Role::Gate, Role::GateBias, c.ffn, c.hidden),
                (Role::Up, Role::UpBias, c.ffn, c.hidden),
                (Role::Down, Role::DownBias, c.hidden, c.ffn),
            ];
            let experts = c.experts.filter(|_| layer.experts);
            if let Some(latent) = c.latent {
                let mut compressed = vec![(Role::KvDown, Role::KvDownNorm, Role::KvUp, latent.kv_rank)];
                compressed.extend(latent.q_rank.map(|rank| (Role::QDown, Role::QDownNorm, Role::QUp, rank)));
                for (down, norm, up, rank) in compressed {
                    if latent.apart && up == Role::KvUp {
                        model.turned_heads(l, dtype(l, Role::KeyUp), c.kv_heads, &c.shape(Role::KeyUp));
                    }
                    let up = if latent.apart && up == Role::KvUp { Role::ValueUp } else { up };
                    for role in [down, up] {
                        let shape = c.shape(role);
                        model.matrix(l, role, dtype(l, role), shape[0], shape[1]);
                    }
                    model.norm(l, norm, rank, 0.0);
                }
            }
            if let Some(e) = experts {
                model.matrix(l, Role::Router, dtype(l, Role::Router), e.count, c.hidden);
                if e.scoring == Scoring::Sigmoid {
                    model.vector(l, Role::RouterBias, e.count, 0.0, 0.3);
                }
                for role in [Role::SharedGate, Role::SharedUp, Role::SharedDown].into_iter().filter(|_| e.shared > 0) {
                    let shape = c.shape(role);
                    model.matrix(l, role, dtype(l, role), shape[0], shape[1]);
                }
                for expert in 0..e.count as u32 {
                    for (role, rows, k) in [
                        (Role::ExpertGate(expert), e.ffn, c.hidden),
                        (Role::ExpertUp(expert), e.ffn, c.hidden),
                        (Role::ExpertDown(expert), c.hidden, e.ffn),
                    ] {
                        model.matrix(l, role, dtype(l, role), rows, k);
                    }
                }
            }
            for (role, bias, rows, k) in matrices {
                let ffn = matches!(role, Role::Gate | Role::Up | Role::Down);
                let unpacked = match role {
                    Role::Q => c.latent.is_some_and(|l| l.q_rank.is_some()),
                    Role::K | Role::V => c.latent.is_some(),
                    _ => false,
                };
                if unpacked {
                    continue;
                }
                if ffn && (experts.is_some() || (role == Role::Gate && !c.gated)) {
                    continue;
                }
                model.matrix(l, role, dtype(l, role), rows, k);
                if self.biases {
                    model.vector(l, bias, rows, 0.0, 0.2);
                }
            }
            if i == 0 && layer.rope.scaling == RopeScaling::Tensor {
                model.vector(None, Role::RopeFactors, layer.rope.dims / 2, 2.0, 1.0);
            }
        }
        match c.encoder {
            None => {
                model.norm(None, Role::OutputNorm, c.hidden, c.norm_weight_offset);
                if c.layer_norms {
                    model.vector(None, Role::OutputNormBias, c.hidden, 0.0, 0.3);
                }
            }
            Some(encoder) => {
                model.norm(None, Role::EmbeddingNorm, c.hidden, 0.0);
                model.vector(None, Role::EmbeddingNormBias, c.hidden, 0.0, 0.3);
                model.matrix(None, Role::TokenTypes, DType::F32, encoder.token_types, c.hidden);
                model.matrix(None, Role::Pooler, dtype(None, Role::Pooler), c.hidden, c.hidden);
                model.vector(None, Role::PoolerBias, c.hidden, 0.0, 0.2);
                model.matrix(None, Role::Classifier, DType::F32, c.labels(), c.hidden);
                model.vector(None, Role::ClassifierBias, c.labels(), 0.0, 0.2);
            }
        }
        if c.learned_positions {
            model.matrix(None, Role::Positions, DType::F32, c.context, c.hidden);
        }
        if !c.tied_embeddings && c.encoder.is_none() {
            model.matrix(None, Role::Output, dtype(None, Role::Output), c.vocab, c.hidden);
        }
        let files = vec![ModelFile { name: "generated".to_owned(), bytes: model.bytes.len() as u64 }];
        let header = ModelHeader { format: Format::GGUF, config: c.clone(), files, tensors: model.tensors };
        Model { header, bytes: model.bytes, read: AtomicU64::new(0) }
    }
}

struct Builder {
    noise: Noise,
    tensors: BTreeMap<TensorId, TensorInfo>,
    bytes: Vec<u8>,
}

impl Builder {
    fn add(&mut self, layer: Option<usize>, role: Role, dtype: DType, shape: Vec<usize>, data: &[u8]) {
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(32), 0xff);
        let name = format!("{role:?}.{layer:?}");
        let tensor =
            TensorInfo { name, dtype, stored: None, shape, file: 0, offset, bytes: data.len() as u64, column_stride: None, turned: None };
        self.tensors.insert(TensorId { layer: layer.map(|l| l as u32), role }, tensor);
    }

    fn matrix(&mut self, layer: Option<usize>, role: Role, dtype: DType, rows: usize, k: usize) {
        // Rows of about unit length, so that activations keep their size; embeddings larger, so that tokens differ.
        // Logits of about 1, so that draws are not always the same.
        let size = match role {
            Role::Embedding => 1.0,
            Role::Output => 0.2,
            Role::Positions | Role::TokenTypes => 0.5,
            _ => 2.0 / (k as f32).sqrt(),
        };
        let data = stored(&mut self.noise, dtype, rows, k, size);
        self.add(layer, role, dtype, vec![rows, k], &data);
    }

    /// What makes keys of compressed vectors, each head by columns in blocks of their own.
    fn turned_heads(&mut self, layer: Option<usize>, dtype: DType, heads: usize, shape: &[usize]) {
        let (rows, k) = (shape[0] / heads, shape[1]);
        let data = stored(&mut self.noise, dtype, heads * k, rows, 2.0 / (k as f32).sqrt());
        self.add(layer, Role::KeyUp, dtype, shape.to_vec(), &data);
        let id = TensorId { layer: layer.map(|l| l as u32), role: Role::KeyUp };
        let tensor = self.tensors.get_mut(&id).expect("the tensor");
        (tensor.turned, tensor.dtype) = (Some(rows), DType::F32);
        tensor.stored = Some(dtype).filter(|dtype| *dtype != DType::F32);
    }

    fn vector(&mut self, layer: Option<usize>, role: Role, len: usize, middle: f32, size: f32) {
        let dtype = [DType::F32, DType::F16, DType::BF16][self.noise.below(3)];
        let values: Vec<f32> = (0..len).map(|_| middle + size * self.noise.float()).collect();
        let data: Vec<u8> = match dtype {
            DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let dtype = if matches!(dtype, DType::F16 | DType::BF16) { dtype } else { DType::F32 };
        self.add(layer, role, dtype, vec![len], &data);
    }

    fn norm(&mut self, layer: Option<usize>, role: Role, len: usize, offset: f32) {
        self.vector(layer, role, len, 1.0 - offset, 0.3);
    }
}

fn rope(base: f64, dims: usize, layout: RopeLayout, scaling: RopeScaling) -> Rope {
    Rope { base, dims, layout, scaling, amplitude: 1.0 }
}

/// A llama with biases, an untied vocabulary matrix of three tiles (the last one short), and rotary factors; types as `dtype` says.
pub(crate) fn llama(dtype: fn(Option<usize>, Role) -> DType) -> Recipe {
    let rope = rope(10_000.0, 48, RopeLayout::Adjacent, RopeScaling::Tensor);
    let config = ModelConfig {
        architecture: Architecture::Llama,
        hidden: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        ffn: 512,
        vocab: 2500,
        context: 4096,
        norm_eps: 1e-5,
        norm_weight_offset: 0.0,
        activation: Activation::Silu,
        embedding_scale: 1.0,
        attention_scale: 0.125,
        tied_embeddings: false,
        head_norms: false,
        block_norms: false,
        layer_norms: false,
        gated: true,
        learned_positions: false,
        embedding_norm: false,
        post_norms: false,
        encoder: None,
        experts: None,
        latent: None,
        layers: vec![LayerConfig { window: None, rope, experts: false }; 3],
    };
    Recipe { config, biases: true, dtype, seed: 11 }
}

/// A gemma of three window layers and one full layer, tied, with stored norms one too small.
pub(crate) fn gemma(window: u32, dtype: fn(Option<usize>, Role) -> DType) -> Recipe {
    let local = LayerConfig { window: Some(window), rope: rope(10_000.0, 32, RopeLayout::Halves, RopeScaling::None), experts: false };
    let full = LayerConfig { window: None, rope: rope(1e6, 32, RopeLayout::Halves, RopeScaling::Linear { factor: 8.0 }), experts: false };
    let config = ModelConfig {
        architecture: Architecture::Gemma3,
        hidden: 96,
        heads: 4,
        kv_heads: 1,
        head_dim: 32,
        ffn: 160,
        vocab: 1500,
        context: 4096,
        norm_eps: 1e-6,
        norm_weight_offset: 1.0,
        activation: Activation::GeluTanh,
        embedding_scale: 96_f32.sqrt(),
        attention_scale: 1.0 / 32_f32.sqrt(),
        tied_embeddings: true,
        head_norms: true,
        block_norms: true,
        layer_norms: false,
        gated: true,
        learned_positions: false,
        embedding_norm: false,
        post_norms: false,
        encoder: None,
        experts: None,
        latent: None,
        layers: vec![local.clone(), local.clone(), full, local],
    };
    Recipe { config, biases: false, dtype, seed: 12 }
}

/// A GPT-2: layer norms, learned positions, no gate, biases everywhere.
pub(crate) fn gpt2(dtype: fn(Option<usize>, Role) -> DType) -> Recipe {
    let mut recipe = llama(dtype);
    recipe.config = ModelConfig {
        architecture: Architecture::Gpt2,
        kv_heads: 4,
        context: 400,
        activation: Activation::GeluTanh,
        tied_embeddings: true,
        layer_norms: true,
        gated: false,
        learned_positions: true,
        layers: vec![LayerConfig { window: None, rope: Rope::NONE, experts: false }; 3],
        ..recipe.config
    };
    recipe
}

/// A BERT that classifies into three labels.
pub(crate) fn bert(dtype: fn(Option<usize>, Role) -> DType) -> Recipe {
    let mut recipe = gpt2(dtype);
    let classifier = Classifier { labels: 3, activation: PoolerActivation::Tanh };
    recipe.config = ModelConfig {
        architecture: Architecture::Bert,
        activation: Activation::Gelu,
        tied_embeddings: false,
        embedding_norm: true,
        post_norms: true,
        encoder: Some(Encoder { token_types: 2, classifier: Some(classifier) }),
        ..recipe.config
    };
    recipe
}

/// A mixture of 6 experts, 3 of them for a token, in the first and the last of three layers; heads normed.
pub(crate) fn mixture(dtype: fn(Option<usize>, Role) -> DType) -> Recipe {
    let mut recipe = llama(dtype);
    let layer = |experts| LayerConfig { window: None, rope: rope(10_000.0, 64, RopeLayout::Halves, RopeScaling::None), experts };
    recipe.config = ModelConfig {
        architecture: Architecture::Qwen3Moe,
        head_norms: true,
        experts: Some(Experts::softmax(6, 3, 256, true)),
        layers: vec![layer(true), layer(false), layer(true)],
        ..recipe.config
    };
    recipe.biases = false;
    recipe
}

/// Compressed queries, keys and values, and two layers of three mixtures with shared experts, routed by sigmoids and groups.
pub(crate) fn latent(dtype: fn(Option<usize>, Role) -> DType) -> Recipe {
    let mut recipe = llama(dtype);
    let layer = |experts| LayerConfig { window: None, rope: rope(10_000.0, 16, RopeLayout::Adjacent, RopeScaling::None), experts };
    let groups = Some(ExpertGroups { count: 2, used: 1, best: 2 });
    let experts = Experts { scoring: Scoring::Sigmoid, groups, scale: 2.5, shared: 2, ..Experts::softmax(8, 3, 256, true) };
    recipe.config = ModelConfig {
        architecture: Architecture::DeepseekV3,
        kv_heads: 4,
        head_dim: 48,
        attention_scale: 1.0 / 48_f32.sqrt(),
        latent: Some(Latent {
            q_rank: Some(256),
            kv_rank: 256,
            rotated: 16,
            value_dim: 64,
            norm_eps: 1e-6,
            apart: false,
            temperature: 0.0,
        }),
        experts: Some(experts),
        layers: vec![layer(false), layer(true), layer(true)],
        ..recipe.config
    };
    recipe.biases = false;
    recipe
}

/// Compressed keys and values alone, of heads whose values are narrower than their keys, and softmax routers.
pub(crate) fn latent_keys(dtype: fn(Option<usize>, Role) -> DType) -> Recipe {
    let mut recipe = latent(dtype);
    let layer =
        |experts| LayerConfig { window: None, rope: rope(9_000.0, 32, RopeLayout::Halves, RopeScaling::Linear { factor: 4.0 }), experts };
    let groups = Some(ExpertGroups { count: 4, used: 2, best: 1 });
    recipe.config = ModelConfig {
        architecture: Architecture::DeepseekV2,
        head_dim: 96,
        latent: Some(Latent { q_rank: None, kv_rank: 64, rotated: 32, value_dim: 24, norm_eps: 1e-5, apart: false, temperature: 0.0 }),
        experts: Some(Experts { groups, scale: 1.5, shared: 1, ..Experts::softmax(8, 3, 160, false) }),
        layers: vec![layer(true), layer(false), layer(true)],
        ..recipe.config
    };
    recipe
}

/// The same, keys and values unpacked apart: keys' products by columns of each head, in blocks or not.
pub(crate) fn latent_apart(dtype: fn(Option<usize>, Role) -> DType) -> Recipe {
    let mut recipe = latent(dtype);
    recipe.config.latent = recipe.config.latent.map(|l| Latent { apart: true, ..l });
    recipe
}

/// Every stored type somewhere; inputs shared by products with blocks of 32, of 256 and none.
pub(crate) fn mixed(layer: Option<usize>, role: Role) -> DType {
    match (layer, role) {
        (None, Role::Embedding) => DType::Q6_K,
        (None, _) => DType::Q8_0,
        (Some(0), Role::Q) => DType::Q5_0,
        (Some(0), Role::K) => DType::Q4_K,
        (Some(0), Role::V) => DType::Q8_0,
        (Some(0), Role::O | Role::Gate) => DType::Q4_K,
        (Some(0), Role::Up) => DType::BF16,
        (Some(0), _) => DType::Q6_K,
        (Some(1), Role::Q | Role::K) => DType::F16,
        (Some(1), Role::O) => DType::Q5_0,
        (Some(1), Role::Down) => DType::Q8_0,
        (Some(1), _) => DType::Q8_0,
        (_, Role::Q | Role::O) => DType::F32,
        (_, Role::V) => DType::Q6_K,
        (_, Role::Down) => DType::BF16,
        _ => DType::Q4_K,
    }
}

/// The block types that `mixed` has not.
pub(crate) fn more(layer: Option<usize>, role: Role) -> DType {
    match (layer, role) {
        (None, Role::Embedding) => DType::Q4_1,
        (None, _) => DType::Q4_0,
        (Some(0), Role::Q | Role::Down) => DType::Q2_K,
        (Some(0), Role::K | Role::O) => DType::Q3_K,
        (Some(0), Role::V | Role::Gate) => DType::Q5_K,
        (Some(0), _) => DType::IQ4_NL,
        (Some(1), Role::Q | Role::Up) => DType::MXFP4,
        (Some(1), Role::K | Role::Gate) => DType::Q5_1,
        (Some(1), Role::O | Role::Down) => DType::IQ4_NL,
        (Some(1), _) => DType::Q4_0,
        (_, Role::Q | Role::Up) => DType::Q4_1,
        (_, Role::K | Role::O) => DType::Q5_K,
        (_, Role::V) => DType::Q2_K,
        (_, Role::Gate) => DType::Q3_K,
        _ => DType::MXFP4,
    }
}

/// Types with blocks of at most 32.
pub(crate) fn small(layer: Option<usize>, role: Role) -> DType {
    match (layer, role) {
        (None, _) => DType::Q8_0,
        (Some(0), _) => DType::Q5_0,
        (Some(1), Role::Q | Role::Down) => DType::F16,
        (Some(1), _) => DType::BF16,
        (Some(2), Role::V | Role::Gate) => DType::F32,
        _ => DType::Q8_0,
    }
}

/// Floats alone: nothing is rounded but to f32.
pub(crate) fn floats(layer: Option<usize>, role: Role) -> DType {
    match (layer, role) {
        (None, _) | (_, Role::Q | Role::Down) => DType::F32,
        (_, Role::K | Role::Gate) => DType::F16,
        _ => DType::BF16,
    }
}
