//! Loading: each slice of the shard is read once, in file order, through one bounded buffer, and packed as it comes.

use std::{collections::BTreeMap, ops::Range};

use half::{bf16, f16};
use kernels::{Matrix, MatrixBuilder};
use plan::{
    dtype::DType,
    model::{ModelConfig, Role, RopeScaling, TensorId},
    shard::{Shard, TensorSlice},
};

use super::weights::{HeadNorms, LayerWeights, Linear, Weights, weight_type};
use crate::{LoadShardError, WeightReader, compute::Compute};

/// Most bytes read at a time, unless one row is longer.
const BUFFER_BYTES: usize = 8 << 20;

/// What loading needs beside the weights.
pub(super) struct Loading<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) shard: &'a Shard,
    pub(super) reader: &'a dyn WeightReader,
    pub(super) loaded: &'a dyn Fn(u64),
    pub(super) compute: &'a Compute,
}

/// Tensors read so far, by identity; what is left at the end is not part of the family.
#[derive(Default)]
struct Tensors {
    matrices: BTreeMap<TensorId, Matrix>,
    vectors: BTreeMap<TensorId, Vec<f32>>,
}

/// Loads every slice of the shard.
pub(super) fn load(loading: &Loading<'_>) -> Result<Weights, LoadShardError> {
    let mut tensors = Tensors::default();
    let mut buffer = Vec::new();
    let mut bytes = 0;
    for slice in &loading.shard.slices {
        check(loading, slice)?;
        let mut read = |range: Range<u64>, into: &mut [u8]| {
            let len = range.end - range.start;
            loading.reader.read(slice.tensor.file, range.clone(), into).map_err(|source| LoadShardError::Read {
                name: slice.tensor.name.clone(),
                offset: range.start,
                len,
                source,
            })?;
            bytes += len;
            (loading.loaded)(bytes);
            Ok(())
        };
        if slice.tensor.shape.len() == 1 {
            let vector = vector(slice, offset(loading.config, slice.id.role), &mut buffer, &mut read)?;
            tensors.vectors.insert(slice.id, vector);
        } else {
            let matrix = matrix(loading, slice, &mut buffer, &mut read)?;
            tensors.matrices.insert(slice.id, matrix);
        }
    }
    assemble(loading, tensors)
}

/// Reads a range of the slice's file.
type Read<'a> = dyn FnMut(Range<u64>, &mut [u8]) -> Result<(), LoadShardError> + 'a;

fn matrix(loading: &Loading<'_>, slice: &TensorSlice, buffer: &mut Vec<u8>, read: &mut Read<'_>) -> Result<Matrix, LoadShardError> {
    let pack = |error: kernels::MatrixError| LoadShardError::Pack { name: slice.tensor.name.clone(), detail: error.to_string() };
    let k = slice.tensor.shape.get(1).copied().unwrap_or(0);
    let rows = slice.rows.len();
    let mut builder = MatrixBuilder::new(loading.compute.isa, weight_type(slice.tensor.dtype), rows, k).map_err(pack)?;
    let Some(row_bytes) = slice.tensor.dtype.row_bytes(k).filter(|&bytes| bytes > 0) else { return builder.finish().map_err(pack) };
    let piece = (BUFFER_BYTES / row_bytes).max(1);
    for first in (0..rows).step_by(piece) {
        let rows = first..rows.min(first + piece);
        let bytes = resized(buffer, rows.len() * row_bytes);
        let start = slice.bytes.start + (first * row_bytes) as u64;
        read(start..start + bytes.len() as u64, bytes)?;
        builder.push(bytes, &loading.compute.pool).map_err(pack)?;
    }
    builder.finish().map_err(pack)
}

fn vector(slice: &TensorSlice, offset: f32, buffer: &mut Vec<u8>, read: &mut Read<'_>) -> Result<Vec<f32>, LoadShardError> {
    if slice.rows.is_empty() {
        return Ok(Vec::new());
    }
    let bytes = resized(buffer, (slice.bytes.end - slice.bytes.start) as usize);
    read(slice.bytes.clone(), bytes)?;
    let mut values: Vec<f32> = match slice.tensor.dtype {
        DType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        DType::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        dtype => return Err(LoadShardError::VectorType { name: slice.tensor.name.clone(), dtype }),
    };
    if offset != 0.0 {
        values.iter_mut().for_each(|v| *v += offset);
    }
    Ok(values)
}

/// The first `len` bytes of the buffer, which grows as needed.
fn resized(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

/// What is added to the stored values of a norm's weight.
fn offset(config: &ModelConfig, role: Role) -> f32 {
    match role {
        Role::AttnNorm | Role::QNorm | Role::KNorm | Role::PostAttnNorm | Role::FfnNorm | Role::PostFfnNorm | Role::OutputNorm => {
            config.norm_weight_offset
        }
        _ => 0.0,
    }
}

/// Checks a slice's shape, rows and bytes before anything of it is read.
fn check(loading: &Loading<'_>, slice: &TensorSlice) -> Result<(), LoadShardError> {
    let (shard, tensor) = (loading.shard, &slice.tensor);
    let (shape, rows) = (loading.config.shape(slice.id.role), shard.splits.rows(loading.config, slice.id.role, shard.rank));
    let wrong = |got: String, expected: String| LoadShardError::Shape {
        name: tensor.name.clone(),
        got,
        expected,
        stage: shard.stage,
        rank: shard.rank,
    };
    if tensor.shape != shape {
        return Err(wrong(format!("shape {:?}", tensor.shape), format!("{shape:?}")));
    }
    if slice.rows != rows {
        return Err(wrong(format!("rows {:?}", slice.rows), format!("{rows:?}")));
    }
    if shape.len() == 1 && tensor.dtype.block_len() != 1 {
        return Err(LoadShardError::VectorType { name: tensor.name.clone(), dtype: tensor.dtype });
    }
    let width = shape.get(1).copied().unwrap_or(1);
    let Some(row_bytes) = tensor.dtype.row_bytes(width) else {
        return Err(wrong(format!("rows of {width} values"), format!("whole blocks of {}", tensor.dtype.block_len())));
    };
    let at = |row: usize| (row as u64).checked_mul(row_bytes as u64).and_then(|n| n.checked_add(tensor.offset));
    match at(rows.start).zip(at(rows.end)) {
        Some((start, end)) if slice.bytes == (start..end) => Ok(()),
        range => Err(wrong(format!("bytes {:?}", slice.bytes), format!("{range:?}"))),
    }
}

/// Gives every tensor its place.
fn assemble(loading: &Loading<'_>, mut tensors: Tensors) -> Result<Weights, LoadShardError> {
    let (config, shard) = (loading.config, loading.shard);
    let missing = |id: TensorId| LoadShardError::Missing { role: id.role, layer: id.layer, stage: shard.stage, rank: shard.rank };
    let mut layers = Vec::with_capacity(shard.layers.len());
    for layer in shard.layers.clone() {
        let id = |role| TensorId { layer: Some(layer as u32), role };
        let norm = |t: &mut Tensors, role| t.vectors.remove(&id(role)).ok_or_else(|| missing(id(role)));
        let linear = |t: &mut Tensors, role, bias| {
            let matrix = t.matrices.remove(&id(role)).ok_or_else(|| missing(id(role)))?;
            Ok::<_, LoadShardError>(Linear { matrix, bias: t.vectors.remove(&id(bias)).unwrap_or_default() })
        };
        let t = &mut tensors;
        layers.push(LayerWeights {
            attn_norm: norm(t, Role::AttnNorm)?,
            q: linear(t, Role::Q, Role::QBias)?,
            k: linear(t, Role::K, Role::KBias)?,
            v: linear(t, Role::V, Role::VBias)?,
            head_norms: if config.head_norms { Some(HeadNorms { q: norm(t, Role::QNorm)?, k: norm(t, Role::KNorm)? }) } else { None },
            o: linear(t, Role::O, Role::OBias)?,
            post_attn_norm: if config.block_norms { Some(norm(t, Role::PostAttnNorm)?) } else { None },
            ffn_norm: norm(t, Role::FfnNorm)?,
            gate: linear(t, Role::Gate, Role::GateBias)?,
            up: linear(t, Role::Up, Role::UpBias)?,
            down: linear(t, Role::Down, Role::DownBias)?,
            post_ffn_norm: if config.block_norms { Some(norm(t, Role::PostFfnNorm)?) } else { None },
        });
    }
    let outer = |role| TensorId { layer: None, role };
    let (first, last, tied) = (shard.is_first(), shard.is_last(), config.tied_embeddings);
    let mut table = |wanted: bool, role| {
        if !wanted {
            return Ok(None);
        }
        tensors.matrices.remove(&outer(role)).map(Some).ok_or_else(|| missing(outer(role)))
    };
    let embedding = table(first || (last && tied), Role::Embedding)?;
    let output = table(last && !tied, Role::Output)?;
    let mut vector = |wanted: bool, role| {
        if !wanted {
            return Ok(None);
        }
        tensors.vectors.remove(&outer(role)).map(Some).ok_or_else(|| missing(outer(role)))
    };
    let factors = config.layers.iter().any(|l| l.rope.scaling == RopeScaling::Tensor);
    let rope_factors = vector(factors, Role::RopeFactors)?;
    let output_norm = vector(last, Role::OutputNorm)?.unwrap_or_default();
    match tensors.matrices.keys().chain(tensors.vectors.keys()).next() {
        Some(left) => Err(LoadShardError::Plan {
            what: "a tensor of the shard",
            got: format!("{:?} of layer {:?}", left.role, left.layer),
            expected: format!("one that stage {} of the {:?} family uses", shard.stage, config.architecture),
        }),
        None => Ok(Weights { embedding, layers, output_norm, output, rope_factors }),
    }
}
