//! The forward pass as a textbook has it, in f64: no blocks, tiles, chunks or ranks.

use std::{cell::RefCell, collections::BTreeMap};

use half::{bf16, f16};
use plan::{
    dtype::DType,
    model::{Activation, Experts, Latent, Role, Rope, RopeLayout, RopeScaling, Scoring, TensorId},
    step::TokenId,
};

use crate::model::Model;

/// Values of a float tensor.
fn values(model: &Model, layer: Option<usize>, role: Role) -> Option<Vec<f64>> {
    let t = model.header.tensors.get(&TensorId { layer: layer.map(|l| l as u32), role })?;
    let bytes = &model.bytes[t.offset as usize..(t.offset + t.bytes) as usize];
    Some(match t.stored_type() {
        DType::F32 => bytes.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().expect("4 bytes")))).collect(),
        DType::F16 => bytes.chunks(2).map(|b| f16::from_le_bytes(b.try_into().expect("2 bytes")).to_f64()).collect(),
        DType::BF16 => bytes.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().expect("2 bytes")).to_f64()).collect(),
        other => panic!("{other:?} is not a float type"),
    })
}

/// Sums of the squares of a product's input by column, and its rows.
pub(crate) type Squares = BTreeMap<TensorId, (Vec<f64>, u64)>;

thread_local! {
    /// Of the products of this thread.
    static SQUARES: RefCell<Squares> = RefCell::default();
}

fn note(layer: Option<usize>, role: Role, x: &[f64]) {
    SQUARES.with_borrow_mut(|squares| {
        let (sums, rows) = squares.entry(TensorId { layer: layer.map(|l| l as u32), role }).or_insert((vec![0.0; x.len()], 0));
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
        *rows += 1;
    });
}

/// What goes into the products of a pass.
pub(crate) fn squares(model: &Model, ids: &[TokenId]) -> Squares {
    SQUARES.take();
    logits(model, ids);
    SQUARES.take()
}

fn linear(model: &Model, layer: Option<usize>, role: Role, bias: Option<Role>, x: &[f64]) -> Vec<f64> {
    note(layer, role, x);
    let w = values(model, layer, role).expect("a matrix");
    let bias = bias.and_then(|b| values(model, layer, b));
    w.chunks(x.len()).enumerate().map(|(r, row)| dot(row, x) + bias.as_ref().map_or(0.0, |b| b[r])).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(model: &Model, layer: Option<usize>, role: Role, x: &mut [f64]) {
    let Some(w) = values(model, layer, role) else { return };
    let c = &model.header.config;
    let bias = match role {
        Role::AttnNorm => Some(Role::AttnNormBias),
        Role::FfnNorm => Some(Role::FfnNormBias),
        Role::OutputNorm => Some(Role::OutputNormBias),
        _ => None,
    };
    if c.layer_norms
        && let Some(bias) = bias.and_then(|role| values(model, layer, role))
    {
        let n = w.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let scale = 1.0 / (variance + f64::from(c.norm_eps)).sqrt();
        for ((x, w), b) in x.iter_mut().zip(&w).zip(&bias) {
            *x = (*x - mean) * scale * w + b;
        }
        return;
    }
    for row in x.chunks_mut(w.len()) {
        let scale = 1.0 / (dot(row, row) / w.len() as f64 + f64::from(c.norm_eps)).sqrt();
        row.iter_mut().zip(&w).for_each(|(x, w)| *x *= scale * (w + f64::from(c.norm_weight_offset)));
    }
}

fn rotate(model: &Model, rope: &Rope, position: usize, heads: &mut [f64], head_dim: usize) {
    let factors = values(model, None, Role::RopeFactors);
    // With latent attention the end of a head is rotated.
    let first = if model.header.config.latent.is_some() { head_dim - rope.dims } else { 0 };
    for head in heads.chunks_mut(head_dim) {
        let head = &mut head[first..];
        for i in 0..rope.dims / 2 {
            let divisor = match rope.scaling {
                RopeScaling::Linear { factor } => factor,
                RopeScaling::Tensor => factors.as_ref().expect("factors")[i],
                _ => 1.0,
            };
            let angle = position as f64 * rope.base.powf(-2.0 * i as f64 / rope.dims as f64) / divisor;
            let (a, b) = match rope.layout {
                RopeLayout::Adjacent => (2 * i, 2 * i + 1),
                RopeLayout::Halves => (i, i + rope.dims / 2),
            };
            let (x, y) = (head[a], head[b]);
            head[a] = x * angle.cos() - y * angle.sin();
            head[b] = x * angle.sin() + y * angle.cos();
        }
    }
}

/// Logits at every position.
pub(crate) fn logits(model: &Model, ids: &[TokenId]) -> Vec<Vec<f64>> {
    let c = &model.header.config;
    let table = values(model, None, Role::Embedding).expect("a table");
    let row = |id: TokenId| table[id as usize * c.hidden..][..c.hidden].iter().map(|x| x * f64::from(c.embedding_scale)).collect();
    let mut states: Vec<Vec<f64>> = ids.iter().map(|&id| row(id)).collect();
    if let Some(table) = values(model, None, Role::Positions) {
        for (x, p) in states.iter_mut().zip(table.chunks(c.hidden)) {
            x.iter_mut().zip(p).for_each(|(x, p)| *x += p);
        }
    }
    for (index, layer) in c.layers.iter().enumerate() {
        let l = Some(index);
        let (mut keys, mut cached) = (Vec::new(), Vec::new());
        for (position, x) in states.iter_mut().enumerate() {
            let mut h = x.clone();
            norm(model, l, Role::AttnNorm, &mut h);
            let (mut q, mut k, v) = match c.latent {
                Some(latent) => unpacked(model, l, latent, &h),
                None => {
                    let mut q = linear(model, l, Role::Q, Some(Role::QBias), &h);
                    let mut k = linear(model, l, Role::K, Some(Role::KBias), &h);
                    norm(model, l, Role::QNorm, &mut q);
                    norm(model, l, Role::KNorm, &mut k);
                    (q, k, linear(model, l, Role::V, Some(Role::VBias), &h))
                }
            };
            rotate(model, &layer.rope, position, &mut q, c.head_dim);
            rotate(model, &layer.rope, position, &mut k, c.head_dim);
            keys.push(k);
            cached.push(v);
            let from = layer.window.map_or(0, |w| (position + 1).saturating_sub(w as usize));
            let mut attention = Vec::new();
            for head in 0..c.heads {
                let of = head / (c.heads / c.kv_heads);
                let (kv, value, width) = (of * c.head_dim, of * c.value_dim(), c.value_dim());
                let q = &q[head * c.head_dim..][..c.head_dim];
                let scores: Vec<f64> =
                    keys[from..].iter().map(|k| (dot(q, &k[kv..][..c.head_dim]) * f64::from(c.attention_scale)).exp()).collect();
                let sum: f64 = scores.iter().sum();
                attention.extend((0..width).map(|d| scores.iter().zip(&cached[from..]).map(|(s, v)| s * v[value + d]).sum::<f64>() / sum));
            }
            let mut o = linear(model, l, Role::O, Some(Role::OBias), &attention);
            norm(model, l, Role::PostAttnNorm, &mut o);
            x.iter_mut().zip(o).for_each(|(x, o)| *x += o);
            let mut h = x.clone();
            norm(model, l, Role::FfnNorm, &mut h);
            let mut down = match c.experts.filter(|_| layer.experts) {
                Some(experts) => mixture(model, l, experts, &h),
                None => feed_forward(model, l, (Role::Gate, Role::Up, Role::Down), &h),
            };
            norm(model, l, Role::PostFfnNorm, &mut down);
            x.iter_mut().zip(down).for_each(|(x, d)| *x += d);
        }
    }
    let output = if c.tied_embeddings { Role::Embedding } else { Role::Output };
    states.iter_mut().for_each(|x| norm(model, None, Role::OutputNorm, x));
    states.iter().map(|x| linear(model, None, output, None, x)).collect()
}

/// Queries, keys and values of latent attention, before rotation: arXiv:2405.04434, equations 9 to 19.
fn unpacked(model: &Model, l: Option<usize>, latent: Latent, h: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let c = &model.header.config;
    let rms = |role: Role, x: &mut [f64]| {
        let w = values(model, l, role).expect("a norm");
        let scale = 1.0 / (dot(x, x) / w.len() as f64 + f64::from(latent.norm_eps)).sqrt();
        x.iter_mut().zip(&w).for_each(|(x, w)| *x *= scale * w);
    };
    let q = match latent.q_rank {
        None => linear(model, l, Role::Q, None, h),
        Some(_) => {
            let mut compressed = linear(model, l, Role::QDown, None, h);
            rms(Role::QDownNorm, &mut compressed);
            linear(model, l, Role::QUp, None, &compressed)
        }
    };
    let mut compressed = linear(model, l, Role::KvDown, None, h);
    let shared = compressed.split_off(latent.kv_rank);
    rms(Role::KvDownNorm, &mut compressed);
    let (mut k, mut v) = (Vec::new(), Vec::new());
    let unrotated = c.head_dim - latent.rotated;
    if latent.apart {
        v = linear(model, l, Role::ValueUp, None, &compressed);
        note(l, Role::KeyUp, &compressed);
        // `[heads, in, rows of a head]`.
        let columns = values(model, l, Role::KeyUp).expect("a matrix");
        for head in columns.chunks(latent.kv_rank * unrotated) {
            k.extend((0..unrotated).map(|row| compressed.iter().enumerate().map(|(i, x)| x * head[i * unrotated + row]).sum::<f64>()));
            k.extend(&shared);
        }
        return (q, k, v);
    }
    for head in linear(model, l, Role::KvUp, None, &compressed).chunks(unrotated + latent.value_dim) {
        let (own, value) = head.split_at(unrotated);
        k.extend(own.iter().chain(&shared));
        v.extend(value);
    }
    (q, k, v)
}

fn feed_forward(model: &Model, l: Option<usize>, (gate, up, down): (Role, Role, Role), h: &[f64]) -> Vec<f64> {
    let c = &model.header.config;
    let act = |x: &f64| activation(c.activation, *x);
    let up = linear(model, l, up, Some(Role::UpBias), h);
    let inner: Vec<f64> = if c.gated {
        linear(model, l, gate, Some(Role::GateBias), h).iter().zip(up).map(|(g, u)| act(g) * u).collect()
    } else {
        up.iter().map(act).collect()
    };
    linear(model, l, down, Some(Role::DownBias), &inner)
}

fn mixture(model: &Model, l: Option<usize>, experts: Experts, h: &[f64]) -> Vec<f64> {
    let scores = linear(model, l, Role::Router, None, h);
    let (p, by): (Vec<f64>, Vec<f64>) = match experts.scoring {
        Scoring::Softmax => {
            let p: Vec<f64> = scores.iter().map(|x| x.exp() / scores.iter().map(|x| x.exp()).sum::<f64>()).collect();
            (p.clone(), p)
        }
        Scoring::Sigmoid => {
            let bias = values(model, l, Role::RouterBias).expect("biases");
            scores.iter().zip(bias).map(|(x, b)| (1.0 / (1.0 + (-x).exp()), b)).map(|(p, b)| (p, p + b)).unzip()
        }
    };
    let mut best: Vec<usize> = (0..experts.count).collect();
    if let Some(groups) = experts.groups {
        let size = experts.count / groups.count;
        let score = |group: usize| {
            let mut of = by[group * size..(group + 1) * size].to_vec();
            of.sort_by(|a, b| b.total_cmp(a));
            of[..groups.best].iter().sum::<f64>()
        };
        let mut ranked: Vec<usize> = (0..groups.count).collect();
        ranked.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
        best.retain(|e| ranked[..groups.used].contains(&(e / size)));
    }
    best.sort_by(|&a, &b| by[b].total_cmp(&by[a]));
    best.truncate(experts.used);
    let all: f64 = if experts.normalize { best.iter().map(|&e| p[e]).sum() } else { 1.0 };
    let mut sum = match experts.shared {
        0 => vec![0.0; h.len()],
        _ => feed_forward(model, l, (Role::SharedGate, Role::SharedUp, Role::SharedDown), h),
    };
    for e in best {
        let roles = (Role::ExpertGate(e as u32), Role::ExpertUp(e as u32), Role::ExpertDown(e as u32));
        let out = feed_forward(model, l, roles, h);
        sum.iter_mut().zip(out).for_each(|(sum, y)| *sum += f64::from(experts.scale) * p[e] / all * y);
    }
    sum
}

fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => panic!("encoders are held against their reference implementation"),
        Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()),
    }
}
