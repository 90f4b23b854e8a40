//! The same model in another file: what its metadata says, and which of the model's tensors each tensor of the file is made of.
//!
//! Nothing is trusted to be expressible: what was made is read again as any file is, and has to describe the model that it was made from.

mod gguf;
mod hf;
#[cfg(test)]
mod tests;

pub(super) use hf::{decoder, encoder, number};

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use super::{Biases, HeaderError, families, from_gguf, from_safetensors, tensors};
use crate::{
    gguf::{GgmlType, Header as GgufHeader, Tensor as GgufTensor, Value},
    model::{Format, LayerConfig, ModelConfig, ModelFile, ModelHeader, PoolerActivation, Role, RopeLayout, RopeScaling, TensorId},
    safetensors,
};

/// A model as files of a format hold it.
#[derive(Clone, Debug)]
pub struct Target {
    /// What the metadata says, where the format is another than the model's.
    pub metadata: Option<Metadata>,
    /// The tensors, in the order in which they are written.
    pub tensors: Vec<Made>,
}

/// What files say of a model beside its tensors.
#[derive(Clone, Debug)]
pub enum Metadata {
    /// Entries of a GGUF header, without the tokenizer.
    Gguf(Vec<(String, Value)>),
    /// Fields of `config.json`.
    Hf(Map<String, Json>),
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// Its name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// It holds the columns of its parts rather than their rows.
    pub columns: bool,
    /// What it is made of, one below the other (beside each other, where it holds columns).
    pub parts: Vec<Part>,
}

/// A tensor of the model, or what one is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Which one.
    pub id: TensorId,
    /// The order of its rows, where it is another one.
    pub turn: Option<Turn>,
    /// What is added to its values.
    pub add: f32,
}

/// Rows of heads in the order of another rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Rows of a head.
    pub head_dim: usize,
    /// Rotated rows of each, from its start.
    pub dims: usize,
    /// The order wanted; the tensor has the other one.
    pub to: RopeLayout,
}

impl Turn {
    /// The row that becomes row `row`; of the same head.
    pub fn source(&self, row: usize) -> usize {
        let (head, row, half) = (row / self.head_dim * self.head_dim, row % self.head_dim, self.dims / 2);
        if row >= self.dims {
            return head + row;
        }
        head + match self.to {
            RopeLayout::Adjacent => row % 2 * half + row / 2,
            RopeLayout::Halves => row % half * 2 + row / half,
        }
    }
}

/// Why a model has no files of a format.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum TargetError {
    #[error("{format:?} files of {family} do not tell {what}")]
    Inexpressible { format: Format, family: &'static str, what: String },
    #[error("what {format:?} files of {family} would say is not this model")]
    Other { format: Format, family: &'static str, source: Box<HeaderError> },
}

/// The files of `model` in `format`, whose rotary divisors are in its config, not in tensors.
///
/// # Errors
/// When that format cannot say what the model is.
pub fn target(model: &ModelHeader, format: Format) -> Result<Target, TargetError> {
    let family = families::in_format(&model.config, format);
    if model.config.latent.is_some_and(|l| l.apart) {
        let what = "keys and values that are unpacked apart".to_owned();
        return Err(TargetError::Inexpressible { format, family: family.name, what });
    }
    let relu = model.config.encoder.and_then(|e| e.classifier).is_some_and(|c| c.activation == PoolerActivation::Relu);
    if relu && format == Format::GGUF && model.format != format {
        let what = "a classification head with relu, in place of which programs compute tanh".to_owned();
        return Err(TargetError::Inexpressible { format, family: family.name, what });
    }
    let mut config = model.config.clone();
    let unnamed = |layer: &LayerConfig| matches!(layer.rope.scaling, RopeScaling::Tensor | RopeScaling::LongRopeTensors { .. });
    if format == Format::Safetensors && model.format != format && config.layers.iter().any(unnamed) {
        let what = "rotary divisors of which the scaling is not known".to_owned();
        return Err(TargetError::Inexpressible { format, family: family.name, what });
    }
    config.layers.iter_mut().for_each(|layer| layer.rope.scaling = expressed(&layer.rope.scaling, format));
    let wanted = tensors::wanted(family, &config, format, None);
    let held = |id: &TensorId| model.tensors.contains_key(id) || is_divisors(id.role);
    let mut made: Vec<Made> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    // Files of an encoder without a head have its names alone.
    let bare = format == Format::Safetensors && model.config.encoder.is_some_and(|e| e.classifier.is_none());
    for mut want in wanted.into_iter().filter(|want| held(&want.id)) {
        if bare && let Some(rest) = want.name.strip_prefix(family.hf_base) {
            want.name = rest.to_owned();
        }
        let place = *places.entry(want.name.clone()).or_insert_with(|| {
            made.push(Made { name: want.name, shape: want.stored, columns: want.columns, parts: Vec::new() });
            made.len() - 1
        });
        made[place].parts.push(Part { id: want.id, turn: None, add: 0.0 });
    }
    if format == model.format {
        return Ok(Target { metadata: None, tensors: made });
    }
    let metadata = match format {
        Format::GGUF => Metadata::Gguf(gguf::entries(family, &config)),
        Format::Safetensors => Metadata::Hf((family.to_hf)(family, &config, &biases(model))),
    };
    let read =
        read_back(&metadata, &made).map_err(|source| TargetError::Other { format, family: family.name, source: Box::new(source) })?;
    let layout = |config: &ModelConfig| config.layers.first().map(|layer| layer.rope.layout);
    if config.latent.is_some() && layout(&config) != layout(&read.config) {
        let what = "rotated pairs half a head apart".to_owned();
        return Err(TargetError::Inexpressible { format, family: family.name, what });
    }
    if let Some(what) = difference(&config, &read.config) {
        return Err(TargetError::Inexpressible { format, family: family.name, what });
    }
    for part in made.iter_mut().flat_map(|made| &mut made.parts) {
        part.add = offset(&model.config, part.id.role) - offset(&read.config, part.id.role);
        part.turn = turn(&config, &read.config, part.id);
    }
    Ok(Target { metadata: Some(metadata), tensors: made })
}

/// What is added to a stored tensor at load.
fn offset(config: &ModelConfig, role: Role) -> f32 {
    let norm = matches!(
        role,
        Role::AttnNorm | Role::QNorm | Role::KNorm | Role::PostAttnNorm | Role::FfnNorm | Role::PostFfnNorm | Role::OutputNorm
    );
    if norm { config.norm_weight_offset } else { 0.0 }
}

/// The order of a tensor's rows, where the two files rotate other pairs.
fn turn(from: &ModelConfig, to: &ModelConfig, id: TensorId) -> Option<Turn> {
    let layer = id.layer? as usize;
    let rotated = matches!(id.role, Role::Q | Role::QBias | Role::K | Role::KBias | Role::QNorm | Role::KNorm);
    let (from_rope, to_rope) = (&from.layers[layer].rope, &to.layers[layer].rope);
    (rotated && from_rope.layout != to_rope.layout && to_rope.dims > 0).then_some(Turn {
        head_dim: to.head_dim,
        dims: to_rope.dims,
        to: to_rope.layout,
    })
}

/// Whether a tensor is made of the config rather than of another tensor.
fn is_divisors(role: Role) -> bool {
    matches!(role, Role::RopeFactors | Role::ShortRopeFactors | Role::LongRopeFactors)
}

/// How files of a format say how frequencies are scaled.
fn expressed(scaling: &RopeScaling, format: Format) -> RopeScaling {
    match (scaling, format) {
        (RopeScaling::Llama3 { .. }, Format::GGUF) => RopeScaling::Tensor,
        (RopeScaling::LongRope { original_context, .. }, Format::GGUF) => {
            RopeScaling::LongRopeTensors { original_context: *original_context }
        }
        (scaling, _) => scaling.clone(),
    }
}

/// Which products of a model have biases.
fn biases(model: &ModelHeader) -> Biases {
    let has = |role: Role| model.tensors.keys().any(|id| id.role == role);
    Biases { qkv: has(Role::QBias), o: has(Role::OBias), mlp: has(Role::UpBias) }
}

/// The type of tensors that are not written yet.
const FLOATS: GgmlType = GgmlType { id: 0, name: "F32", block_len: 1, block_bytes: 4 };

/// What a reader makes of these files; tensors hold floats here, whatever they will hold.
fn read_back(metadata: &Metadata, made: &[Made]) -> Result<ModelHeader, HeaderError> {
    let mut offset = 0;
    let mut place = |shape: &[usize]| {
        let bytes = shape.iter().product::<usize>() as u64 * 4;
        offset += bytes;
        (offset - bytes, bytes)
    };
    match metadata {
        Metadata::Gguf(entries) => {
            let entries = entries.iter().map(|(key, value)| crate::gguf::Entry { key: key.clone(), value: value.clone(), offset: 0 });
            let tensors = made.iter().map(|t| {
                let (offset, bytes) = place(&t.shape);
                let kind = FLOATS;
                let dims = t.shape.iter().rev().map(|&n| n as u64).collect();
                GgufTensor { name: t.name.clone(), dims, kind, offset, bytes, entry_offset: 0 }
            });
            let header = GgufHeader { version: 3, alignment: 32, metadata: entries.collect(), tensors: tensors.collect(), data_offset: 0 };
            from_gguf(ModelFile { name: "the file to be written".to_owned(), bytes: u64::MAX }, &header)
        }
        Metadata::Hf(map) => {
            let tensors = made.iter().map(|t| {
                let (offset, bytes) = place(&t.shape);
                let shape = t.shape.iter().map(|&n| n as u64).collect();
                safetensors::Tensor { name: t.name.clone(), dtype: "F32".to_owned(), shape, offset, bytes, entry_offset: 0 }
            });
            let header = safetensors::Header { tensors: tensors.collect(), ..safetensors::Header::default() };
            let file = ModelFile { name: "the file to be written".to_owned(), bytes: u64::MAX };
            from_safetensors(Json::Object(map.clone()).to_string().as_bytes(), &[(file, header)])
        }
    }
}

/// What one config says and the other does not, how tensors are stored aside; in words.
fn difference(wanted: &ModelConfig, got: &ModelConfig) -> Option<String> {
    let plain = |config: &ModelConfig| {
        let mut config = ModelConfig { architecture: got.architecture, norm_weight_offset: 0.0, ..config.clone() };
        for layer in &mut config.layers {
            layer.rope.layout = RopeLayout::Halves;
            // Files hold 32 bits of it.
            layer.rope.amplitude = f64::from(layer.rope.amplitude as f32);
        }
        config
    };
    let (wanted, got) = (plain(wanted), plain(got));
    if wanted == got {
        return None;
    }
    let table = |config: &ModelConfig| serde_json::to_value(config).unwrap_or_default();
    Some(unequal("", &table(&wanted), &table(&got)).unwrap_or_else(|| "all of it".to_owned()))
}

/// The first place where two values differ.
fn unequal(path: &str, wanted: &Json, got: &Json) -> Option<String> {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (wanted, got) {
        (Json::Object(a), Json::Object(b)) if a.keys().eq(b.keys()) => a.iter().find_map(|(key, a)| unequal(&below(key), a, &b[key])),
        (Json::Array(a), Json::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().find_map(|(i, (a, b))| unequal(&below(&i.to_string()), a, b))
        }
        _ => (wanted != got).then(|| format!("{path} = {wanted} (they would say {got})")),
    }
}
