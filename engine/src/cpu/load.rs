//! Loading: each slice of the shard is read once, in file order, through bounded buffers, and packed as it comes.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use half::{bf16, f16};
use kernels::{Matrix, MatrixBuilder, WeightType, convert_rows, dequantize_rows};
use plan::{
    dtype::DType,
    model::{ModelConfig, Role, RopeScaling, Scoring, TensorId},
    shard::{Shard, TensorSlice},
};

use super::weights::{
    ClassifierWeights, Dense, Expert, Experts, FeedForward, HeadNorms, Latent, LayerWeights, Linear, Norm, Plain, Projection, RopeFactors,
    Unpack, Weights, weight_type,
};
use crate::{LoadShardError, WeightReader, compute::Compute};

/// Most bytes read at a time, unless one row is longer.
const BUFFER_BYTES: usize = 8 << 20;

/// What loading needs beside the weights.
pub(super) struct Loading<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) shard: &'a Shard,
    pub(super) reader: &'a dyn WeightReader,
    pub(super) loaded: &'a (dyn Fn(u64) + Sync),
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
    let count = Count { bytes: Mutex::new(0), loaded: loading.loaded };
    for slice in &loading.shard.slices {
        check(loading, slice)?;
        let mut read = |range: Range<u64>, into: &mut [u8]| {
            let len = range.end - range.start;
            loading.reader.read(slice.tensor.file, range.clone(), into).map_err(|source| read_error(slice, range, source))?;
            count.add(len);
            Ok(())
        };
        if slice.tensor.shape.len() == 1 {
            let vector = vector(slice, offset(loading.config, slice.id.role), &mut buffer, &mut read)?;
            tensors.vectors.insert(slice.id, vector);
        } else {
            let matrix = if is_read_by_threads(loading, slice) {
                by_threads(loading, slice, &count)?
            } else {
                matrix(loading, slice, &mut buffer, &mut read)?
            };
            tensors.matrices.insert(slice.id, matrix);
        }
    }
    assemble(loading, tensors)
}

/// Bytes read so far, by any thread; who is told of them never hears a smaller number.
struct Count<'a> {
    bytes: Mutex<u64>,
    loaded: &'a (dyn Fn(u64) + Sync),
}

impl Count<'_> {
    fn add(&self, read: u64) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        *bytes += read;
        (self.loaded)(*bytes);
    }
}

fn read_error(slice: &TensorSlice, range: Range<u64>, source: io::Error) -> LoadShardError {
    LoadShardError::Read { name: slice.tensor.name.clone(), offset: range.start, len: range.end - range.start, source }
}

/// Whether the rows are stored as they are held, one after the other, in a file at hand.
fn is_read_by_threads(loading: &Loading<'_>, slice: &TensorSlice) -> bool {
    let TensorSlice { tensor, bytes, .. } = slice;
    let as_held = tensor.stored_type() == tensor.dtype && tensor.turned.is_none() && tensor.column_stride.is_none();
    as_held && loading.reader.is_at_hand(tensor.file, bytes)
}

/// A matrix whose rows each thread reads and packs in small pieces.
fn by_threads(loading: &Loading<'_>, slice: &TensorSlice, count: &Count<'_>) -> Result<Matrix, LoadShardError> {
    let pack = |error: kernels::MatrixError| LoadShardError::Pack { name: slice.tensor.name.clone(), detail: error.to_string() };
    let (k, dtype) = (slice.tensor.shape.get(1).copied().unwrap_or(0), weight_type(slice.tensor.dtype));
    let row_bytes = dtype.row_bytes(k).unwrap_or(0) as u64;
    let mut builder = MatrixBuilder::new(loading.compute.isa, dtype, slice.rows.len(), k).map_err(pack)?;
    builder.fill(&loading.compute.pool, |rows, into| {
        let start = slice.bytes.start + rows.start as u64 * row_bytes;
        let range = start..start + into.len() as u64;
        loading.reader.read(slice.tensor.file, range.clone(), into).map_err(|source| read_error(slice, range, source))?;
        count.add(into.len() as u64);
        Ok(())
    })?;
    builder.finish().map_err(pack)
}

/// Reads a range of the slice's file.
type Read<'a> = dyn FnMut(Range<u64>, &mut [u8]) -> Result<(), LoadShardError> + 'a;

fn matrix(loading: &Loading<'_>, slice: &TensorSlice, buffer: &mut Vec<u8>, read: &mut Read<'_>) -> Result<Matrix, LoadShardError> {
    let pack = |error: kernels::MatrixError| LoadShardError::Pack { name: slice.tensor.name.clone(), detail: error.to_string() };
    let k = slice.tensor.shape.get(1).copied().unwrap_or(0);
    let rows = slice.rows.len();
    let (stored, held) = (weight_type(slice.tensor.stored_type()), weight_type(slice.tensor.dtype));
    let mut builder = MatrixBuilder::new(loading.compute.isa, held, rows, k).map_err(pack)?;
    let Some(row_bytes) = stored.row_bytes(k).filter(|&bytes| bytes > 0) else { return builder.finish().map_err(pack) };
    let piece = (BUFFER_BYTES / row_bytes).max(1);
    let pool = &loading.compute.pool;
    let push = |builder: &mut MatrixBuilder, bytes: &[u8]| {
        if stored == held {
            return builder.push(bytes, pool).map_err(pack);
        }
        // Row by row: what a rank makes of its rows does not depend on whose the others are.
        let converted = convert_rows(pool, (stored, held), k, bytes, None)
            .map_err(|error| LoadShardError::Pack { name: slice.tensor.name.clone(), detail: error.to_string() })?;
        builder.push(&converted, pool).map_err(pack)
    };
    if let Some(head) = slice.tensor.turned.filter(|&head| head > 0 && rows.is_multiple_of(head)) {
        let heads = rows / head;
        let bytes = resized(buffer, (slice.len() as usize).checked_div(heads).unwrap_or(0));
        for at in 0..heads {
            let start = slice.bytes.start + (at * bytes.len()) as u64;
            read(start..start + bytes.len() as u64, bytes)?;
            builder.push(&head_by_rows(stored, (head, k), bytes), pool).map_err(pack)?;
        }
        return builder.finish().map_err(pack);
    }
    if let Some(stride) = slice.tensor.column_stride {
        let mut turned = Vec::new();
        for first in (0..rows).step_by(piece) {
            let rows = first..rows.min(first + piece);
            by_columns(slice, (rows, k, stride), &mut turned, buffer, read)?;
            push(&mut builder, &turned)?;
        }
        return builder.finish().map_err(pack);
    }
    for first in (0..rows).step_by(piece) {
        let rows = first..rows.min(first + piece);
        let bytes = resized(buffer, rows.len() * row_bytes);
        let start = slice.bytes.start + (first * row_bytes) as u64;
        read(start..start + bytes.len() as u64, bytes)?;
        push(&mut builder, bytes)?;
    }
    builder.finish().map_err(pack)
}

/// A head of `rows` rows of `k` values, stored by columns in blocks of their own, by rows in F32.
fn head_by_rows(stored: WeightType, (rows, k): (usize, usize), columns: &[u8]) -> Vec<u8> {
    let values = dequantize_rows(stored, rows, columns);
    let mut turned = Vec::with_capacity(rows * k * size_of::<f32>());
    for row in 0..rows {
        turned.extend((0..k).flat_map(|column| values[column * rows + row].to_le_bytes()));
    }
    turned
}

/// Reads some rows, counted from the slice's first, of a matrix of `k` columns stored one after the other, `stride` bytes from each to the next.
fn by_columns(
    slice: &TensorSlice,
    (rows, k, stride): (Range<usize>, usize, u64),
    turned: &mut Vec<u8>,
    buffer: &mut Vec<u8>,
    read: &mut Read<'_>,
) -> Result<(), LoadShardError> {
    let element = slice.tensor.stored_type().block_bytes();
    let part = rows.len() * element;
    let bytes = resized(buffer, part * k);
    let start = slice.bytes.start + (rows.start * element) as u64;
    if stride == part as u64 {
        // The rows are all there are: their columns lie together.
        read(start..start + bytes.len() as u64, bytes)?;
    } else {
        for (column, bytes) in bytes.chunks_exact_mut(part).enumerate() {
            let start = start + column as u64 * stride;
            read(start..start + part as u64, bytes)?;
        }
    }
    turned.clear();
    for row in 0..rows.len() {
        for column in bytes.chunks_exact(part) {
            turned.extend_from_slice(&column[row * element..(row + 1) * element]);
        }
    }
    Ok(())
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
    let (shape, rows) =
        (loading.config.shape(slice.id.role), shard.splits.held(loading.config, slice.id.role, shard.rank, shard.is_first()));
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
    if tensor.turned.is_some() != (slice.id.role == Role::KeyUp) {
        return Err(wrong(format!("heads by columns: {:?}", tensor.turned), "them in what unpacks keys, and there alone".to_owned()));
    }
    if let Some(head) = tensor.turned {
        let columns = tensor.stored_type().row_bytes(head).filter(|_| head > 0 && shape.len() == 2 && shape[0].is_multiple_of(head));
        let bytes = columns.and_then(|bytes| (shape[0] / head * width).checked_mul(bytes));
        let whole = rows.start.is_multiple_of(head.max(1)) && rows.end.is_multiple_of(head.max(1));
        let placed = bytes.map(|n| n as u64) == Some(tensor.bytes) && tensor.offset.checked_add(tensor.bytes).is_some();
        if !whole || !placed || tensor.dtype != DType::F32 || tensor.column_stride.is_some() {
            return Err(wrong(format!("{} bytes of heads of {head} rows", tensor.bytes), "whole heads by columns, held as F32".to_owned()));
        }
        let slices = TensorSlice::new(slice.id, tensor, rows);
        return if slice.bytes == slices.bytes {
            Ok(())
        } else {
            Err(wrong(format!("bytes {:?}", slice.bytes), format!("{:?}", slices.bytes)))
        };
    }
    let Some(row_bytes) = tensor.stored_type().row_bytes(width) else {
        return Err(wrong(format!("rows of {width} values"), format!("whole blocks of {}", tensor.dtype.block_len())));
    };
    let count = shape[0] as u64;
    if Some(tensor.bytes) != count.checked_mul(row_bytes as u64) || tensor.offset.checked_add(tensor.bytes).is_none() {
        return Err(wrong(format!("{} bytes from {}", tensor.bytes, tensor.offset), format!("{count} rows of {row_bytes}")));
    }
    if let Some(stride) = tensor.column_stride {
        let column = count * tensor.stored_type().block_bytes() as u64;
        let end = (width as u64).checked_mul(stride).and_then(|n| n.checked_add(tensor.offset));
        if tensor.stored_type().block_len() != 1 || shape.len() != 2 || stride < column || end.is_none() {
            return Err(wrong(
                format!("columns of {:?} every {stride} bytes", tensor.stored_type()),
                format!("columns of {column} bytes of floats"),
            ));
        }
    }
    let whole = TensorSlice::new(slice.id, tensor, rows);
    if slice.bytes == whole.bytes { Ok(()) } else { Err(wrong(format!("bytes {:?}", slice.bytes), format!("{:?}", whole.bytes))) }
}

/// Gives every tensor its place.
fn assemble(loading: &Loading<'_>, mut tensors: Tensors) -> Result<Weights, LoadShardError> {
    let (config, shard) = (loading.config, loading.shard);
    let missing = |id: TensorId| LoadShardError::Missing { role: id.role, layer: id.layer, stage: shard.stage, rank: shard.rank };
    let mut layers = Vec::with_capacity(shard.layers.len());
    for layer in shard.layers.clone() {
        let id = |role| TensorId { layer: Some(layer as u32), role };
        let norm = |t: &mut Tensors, role| t.vectors.remove(&id(role)).ok_or_else(|| missing(id(role)));
        let centred = |t: &mut Tensors, role, bias| {
            let bias = if config.layer_norms { norm(t, bias)? } else { Vec::new() };
            Ok::<_, LoadShardError>(Norm { weight: norm(t, role)?, bias })
        };
        let linear = |t: &mut Tensors, role, bias| {
            let matrix = t.matrices.remove(&id(role)).ok_or_else(|| missing(id(role)))?;
            Ok::<_, LoadShardError>(Linear { id: id(role), matrix, bias: t.vectors.remove(&id(bias)).unwrap_or_default() })
        };
        let plain = |t: &mut Tensors, role| {
            let matrix = t.matrices.remove(&id(role)).ok_or_else(|| missing(id(role)))?;
            Ok::<_, LoadShardError>(Linear { id: id(role), matrix, bias: Vec::new() })
        };
        let t = &mut tensors;
        let projection = match config.latent {
            None => Projection::Plain(Box::new(Plain {
                q: linear(t, Role::Q, Role::QBias)?,
                k: linear(t, Role::K, Role::KBias)?,
                v: linear(t, Role::V, Role::VBias)?,
                head_norms: if config.head_norms { Some(HeadNorms { q: norm(t, Role::QNorm)?, k: norm(t, Role::KNorm)? }) } else { None },
            })),
            Some(latent) => {
                let (q_down, q) = match latent.q_rank {
                    None => (None, plain(t, Role::Q)?),
                    Some(_) => (Some((plain(t, Role::QDown)?, norm(t, Role::QDownNorm)?)), plain(t, Role::QUp)?),
                };
                let (kv_down, kv_norm) = (plain(t, Role::KvDown)?, norm(t, Role::KvDownNorm)?);
                let unpack = match latent.apart {
                    false => Unpack::Together(plain(t, Role::KvUp)?),
                    true => Unpack::Apart(plain(t, Role::KeyUp)?, plain(t, Role::ValueUp)?),
                };
                Projection::Latent(Box::new(Latent { q_down, q, kv_down, kv_norm, unpack }))
            }
        };
        let feed_forward = match config.experts.filter(|_| config.layers[layer].experts) {
            Some(experts) => {
                let own = shard.splits.experts[shard.rank].clone().map(|e| e as u32).map(|e| {
                    let (gate, up) = (plain(t, Role::ExpertGate(e))?, plain(t, Role::ExpertUp(e))?);
                    Ok::<_, LoadShardError>(Expert { gate, up, down: plain(t, Role::ExpertDown(e))? })
                });
                let own = own.collect::<Result<_, _>>()?;
                let biased = experts.scoring == Scoring::Sigmoid;
                let router_bias = if biased { norm(t, Role::RouterBias)? } else { Vec::new() };
                let shared = match experts.shared {
                    0 => None,
                    _ => Some(Dense {
                        gate: Some(plain(t, Role::SharedGate)?),
                        up: plain(t, Role::SharedUp)?,
                        down: plain(t, Role::SharedDown)?,
                    }),
                };
                FeedForward::Experts(Box::new(Experts { router: plain(t, Role::Router)?, router_bias, own, shared }))
            }
            None => FeedForward::Dense(Box::new(Dense {
                gate: if config.gated { Some(linear(t, Role::Gate, Role::GateBias)?) } else { None },
                up: linear(t, Role::Up, Role::UpBias)?,
                down: linear(t, Role::Down, Role::DownBias)?,
            })),
        };
        layers.push(LayerWeights {
            attn_norm: centred(t, Role::AttnNorm, Role::AttnNormBias)?,
            projection,
            o: linear(t, Role::O, Role::OBias)?,
            post_attn_norm: if config.block_norms { Some(norm(t, Role::PostAttnNorm)?) } else { None },
            ffn_norm: centred(t, Role::FfnNorm, Role::FfnNormBias)?,
            feed_forward,
            post_ffn_norm: if config.block_norms { Some(norm(t, Role::PostFfnNorm)?) } else { None },
        });
    }
    let outer = |role| TensorId { layer: None, role };
    let (first, last, tied) = (shard.is_first(), shard.is_last(), config.tied_embeddings);
    let decodes = config.encoder.is_none();
    let mut table = |wanted: bool, role| {
        if !wanted {
            return Ok(None);
        }
        tensors.matrices.remove(&outer(role)).map(Some).ok_or_else(|| missing(outer(role)))
    };
    let embedding = table(first || (last && tied), Role::Embedding)?;
    let output = table(last && !tied && decodes, Role::Output)?;
    let positions = table(first && config.learned_positions, Role::Positions)?;
    let token_types = table(first && config.encoder.is_some_and(|e| e.token_types > 0), Role::TokenTypes)?;
    let classifies = last && config.labels() > 0;
    let head = (table(classifies, Role::Pooler)?, table(classifies, Role::Classifier)?);
    let mut vector = |wanted: bool, role| {
        if !wanted {
            return Ok(None);
        }
        tensors.vectors.remove(&outer(role)).map(Some).ok_or_else(|| missing(outer(role)))
    };
    let scaled = |with: fn(&RopeScaling) -> bool| config.layers.iter().any(|l| with(&l.rope.scaling));
    let one = scaled(|s| *s == RopeScaling::Tensor);
    let two = scaled(|s| matches!(s, RopeScaling::LongRopeTensors { .. }));
    let rope_factors = RopeFactors {
        all: vector(one, Role::RopeFactors)?.unwrap_or_default(),
        short: vector(two, Role::ShortRopeFactors)?.unwrap_or_default(),
        long: vector(two, Role::LongRopeFactors)?.unwrap_or_default(),
    };
    let output_norm = Norm {
        weight: vector(last && decodes, Role::OutputNorm)?.unwrap_or_default(),
        bias: vector(last && decodes && config.layer_norms, Role::OutputNormBias)?.unwrap_or_default(),
    };
    let normed = first && config.embedding_norm;
    let embedding_norm = vector(normed, Role::EmbeddingNorm)?.zip(vector(normed, Role::EmbeddingNormBias)?);
    let biases = (vector(classifies, Role::PoolerBias)?, vector(classifies, Role::ClassifierBias)?);
    let classifier = match (head, biases) {
        ((Some(pooler), Some(output)), (Some(pooler_bias), Some(output_bias))) => Some(ClassifierWeights {
            pooler: Linear { id: outer(Role::Pooler), matrix: pooler, bias: pooler_bias },
            output: Linear { id: outer(Role::Classifier), matrix: output, bias: output_bias },
        }),
        _ => None,
    };
    match tensors.matrices.keys().chain(tensors.vectors.keys()).next() {
        Some(left) => Err(LoadShardError::Plan {
            what: "a tensor of the shard",
            got: format!("{:?} of layer {:?}", left.role, left.layer),
            expected: format!("one that stage {} of the {:?} family uses", shard.stage, config.architecture),
        }),
        None => Ok(Weights {
            embedding,
            positions,
            token_types,
            embedding_norm: embedding_norm.map(|(weight, bias)| Norm { weight, bias }),
            layers,
            output_norm,
            output,
            classifier,
            rope_factors,
        }),
    }
}
