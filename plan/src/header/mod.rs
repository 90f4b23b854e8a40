//! From file headers to a [`ModelHeader`]: the model's shape, and the place of every tensor its forward pass uses.

mod adapter;
mod families;
mod fields;
mod gguf;
mod hf;
mod metadata;
mod packed;
mod rope;
mod target;
mod tensors;
#[cfg(test)]
mod tests;

pub use adapter::{adapter_from_gguf, adapter_from_peft};
pub use gguf::{from_gguf, from_gguf_parts};
pub use hf::{HfConfig, from_safetensors};
pub use packed::{Packed, Packing, Part as PackedPart, Piece, take_packed};
pub use target::{Made, Metadata, Part, Target, TargetError, Turn, target};
pub use tensors::Biases;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
};

use crate::{
    dtype::DType,
    gguf::GgufError,
    model::{Format, ModelConfig, ModelFile, ModelHeader, TensorInfo},
    pytorch::PytorchError,
    safetensors::SafetensorsError,
};

/// Most layers, heads, and so on that a header may claim: far above any model, low enough that nothing overflows.
const MAX_COUNT: u64 = 1 << 24;
/// Most layers; each costs memory before its tensors are looked for.
const MAX_LAYERS: u64 = 4096;
/// Most experts of a layer; each costs memory before its tensors are looked for.
const MAX_EXPERTS: u64 = 1024;

/// A model that cannot be loaded: what is wrong, where.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum HeaderError {
    #[error("GGUF header of {file} is unusable")]
    Gguf { file: String, source: Box<GgufError> },
    #[error("safetensors header of {file} is unusable")]
    Safetensors { file: String, source: Box<SafetensorsError> },
    #[error("PyTorch file {file} is unusable")]
    Pytorch { file: String, source: Box<PytorchError> },
    #[error("{file} is not JSON")]
    Json { file: String, source: serde_json::Error },
    #[error("{field} in {file} is {got}, an architecture that is not supported; expected {expected}")]
    UnsupportedArchitecture { file: String, field: String, got: String, expected: String },
    #[error("{field} in {file} is {got}, expected {expected}")]
    Field { file: String, field: String, expected: String, got: String },
    #[error("{field} in {file} asks for {got}, which is not supported yet; supported: {expected}")]
    UnsupportedFeature { file: String, field: String, expected: &'static str, got: String },
    #[error("tensor {name} is missing from {place}, expected with shape {shape:?}")]
    MissingTensor { name: String, place: String, shape: Vec<usize> },
    #[error("tensor {name} at {place} is not part of the architecture {architecture}")]
    UnexpectedTensor { name: String, place: Place, architecture: &'static str },
    #[error("tensor {name} at {place} appears again at {again}")]
    DuplicateTensor { name: String, place: Place, again: Place },
    #[error("tensor {name} at {place} has type {got}, expected {expected}")]
    TensorType { name: String, place: Place, got: String, expected: &'static str },
    #[error("tensor {name} at {place} has shape {got:?}, expected {expected:?}")]
    Shape { name: String, place: Place, got: Vec<u64>, expected: Vec<usize> },
}

/// Where a tensor is declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The weight file.
    pub file: String,
    /// Byte of it at which the tensor's entry in the header begins.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {} of {}", self.offset, self.file)
    }
}

impl HeaderError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Gguf { source, .. } => source.reason(),
            Self::Safetensors { source, .. } => source.reason(),
            Self::Pytorch { source, .. } => source.reason(),
            Self::Json { .. } | Self::Field { .. } => "config_invalid",
            Self::UnsupportedArchitecture { .. } => "architecture_unsupported",
            Self::UnsupportedFeature { .. } => "feature_unsupported",
            Self::MissingTensor { .. } => "tensor_missing",
            Self::UnexpectedTensor { .. } | Self::DuplicateTensor { .. } => "tensor_unexpected",
            Self::TensorType { .. } => "tensor_type_unsupported",
            Self::Shape { .. } => "tensor_shape_mismatch",
        }
    }
}

/// Types Skein computes with, for messages.
const DTYPES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K";
/// Types of vectors and of matrices stored by columns, for messages.
const VECTOR_DTYPES: &str = "F32, F16 or BF16";

/// A tensor found in a file.
struct Found {
    name: String,
    file: usize,
    /// Byte of the file at which its entry in the header begins.
    entry_offset: u64,
    /// `Err` holds the name of a type that is not supported.
    dtype: Result<DType, String>,
    /// Row-major.
    shape: Vec<u64>,
    offset: u64,
    bytes: u64,
}

/// Gives every tensor its role and checks names, types and shapes.
fn assemble(
    family: &families::Family,
    format: Format,
    config: ModelConfig,
    files: Vec<ModelFile>,
    found: Vec<Found>,
    biases: Option<Biases>,
) -> Result<ModelHeader, HeaderError> {
    let place = |f: &Found| Place { file: files.get(f.file).map_or_else(String::new, |f| f.name.clone()), offset: f.entry_offset };
    let mut by_name: HashMap<&str, &Found> = HashMap::new();
    for f in &found {
        if let Some(first) = by_name.insert(&f.name, f) {
            return Err(HeaderError::DuplicateTensor { name: f.name.clone(), place: place(first), again: place(f) });
        }
    }
    let mut tensors = BTreeMap::new();
    let mut used = HashSet::new();
    let bare = format != Format::GGUF && !found.iter().any(|f| f.name.starts_with(family.hf_base));
    for mut want in tensors::wanted(family, &config, format, biases) {
        if bare && let Some(rest) = want.name.strip_prefix(family.hf_base) {
            want.name = rest.to_owned();
        }
        let old = || by_name.get(tensors::older_name(&want.name)?.as_str());
        let Some(&f) = by_name.get(want.name.as_str()).or_else(old) else {
            if want.optional {
                continue;
            }
            return Err(HeaderError::MissingTensor { name: want.name, place: tables(&files, &found), shape: want.stored });
        };
        used.insert(f.name.as_str());
        if !f.shape.iter().copied().eq(want.stored.iter().map(|&d| d as u64)) {
            return Err(HeaderError::Shape { name: want.name, place: place(f), got: f.shape.clone(), expected: want.stored });
        }
        let vector = want.shape.len() == 1;
        let wrong_type = |got: String| {
            let expected = if vector || want.columns { VECTOR_DTYPES } else { DTYPES };
            HeaderError::TensorType { name: f.name.clone(), place: place(f), got, expected }
        };
        let dtype = match &f.dtype {
            Ok(dtype) if !(vector || want.columns) || dtype.block_len() == 1 => *dtype,
            Ok(dtype) => return Err(wrong_type(format!("{dtype:?}"))),
            Err(got) => return Err(wrong_type(got.clone())),
        };
        tensors.insert(want.id, view(f, want, dtype));
    }
    let unused = found
        .iter()
        .filter(|f| !used.contains(f.name.as_str()) && !tensors::ignorable(&f.name, &config))
        .filter(|f| !tensors::of_predictor(&f.name, family, &config, |name| by_name.contains_key(name)))
        .min_by_key(|f| (f.file, f.entry_offset));
    if let Some(f) = unused {
        return Err(HeaderError::UnexpectedTensor { name: f.name.clone(), place: place(f), architecture: family.name });
    }
    Ok(ModelHeader { format, config, files, tensors })
}

/// A wanted tensor as what it is of the one that was found.
fn view(found: &Found, want: tensors::Wanted, dtype: DType) -> TensorInfo {
    let values: u64 = want.shape.iter().map(|&n| n as u64).product();
    if want.turned.is_some() {
        // Turned as they are read, and held as what blocks of columns say.
        let stored = Some(dtype).filter(|dtype| *dtype != DType::F32);
        return TensorInfo {
            name: want.name,
            dtype: DType::F32,
            stored,
            shape: want.shape,
            file: found.file,
            offset: found.offset,
            bytes: found.bytes,
            column_stride: None,
            turned: want.turned,
        };
    }
    // Where it is stored by columns, each of the stored rows holds one column of every role.
    let (step, bytes, column_stride) = if want.columns {
        let element = dtype.block_bytes() as u64;
        (element, values * element, Some(want.stored[1] as u64 * element))
    } else {
        let whole = want.stored.len().max(2) - 1;
        let row = found.bytes / want.stored[..whole].iter().map(|&n| n as u64).product::<u64>().max(1);
        (row, want.shape[0] as u64 * row, None)
    };
    let offset = found.offset + want.first_row as u64 * step;
    TensorInfo { name: want.name, dtype, stored: None, shape: want.shape, file: found.file, offset, bytes, column_stride, turned: None }
}

/// The tensor tables that were searched, in words.
fn tables(files: &[ModelFile], found: &[Found]) -> String {
    let Some((first, more)) = files.split_first() else { return "a model without weight files".to_owned() };
    if !more.is_empty() {
        return format!("{} and {} more files", first.name, more.len());
    }
    match (found.iter().map(|f| f.entry_offset).min(), found.iter().map(|f| f.entry_offset).max()) {
        (Some(low), Some(high)) => format!("{}, whose {} tensors are listed from byte {low} to byte {high}", first.name, found.len()),
        _ => format!("{}, whose list of tensors at byte 8 is empty", first.name),
    }
}
