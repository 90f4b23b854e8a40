//! From file headers to a [`ModelHeader`]: the model's shape, and the place of every tensor its forward pass uses.

mod gguf;
mod hf;
mod roles;
#[cfg(test)]
mod tests;

pub use gguf::from_gguf;
pub use hf::{HfConfig, from_safetensors};

use std::collections::{BTreeMap, HashMap};

use crate::{
    dtype::DType,
    gguf::GgufError,
    model::{Format, ModelConfig, ModelFile, ModelHeader, TensorInfo},
    safetensors::SafetensorsError,
};

/// Most layers, heads, and so on that a header may claim: far above any model, low enough that nothing overflows.
const MAX_COUNT: u64 = 1 << 24;
/// Most layers; each costs memory before its tensors are looked for.
const MAX_LAYERS: u64 = 4096;

/// A model that cannot be loaded: what is wrong, where.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum HeaderError {
    #[error("GGUF header of {file} is unusable")]
    Gguf { file: String, source: GgufError },
    #[error("safetensors header of {file} is unusable")]
    Safetensors { file: String, source: SafetensorsError },
    #[error("{file} is not JSON")]
    Json { file: String, source: serde_json::Error },
    #[error("architecture {got} is not supported, expected {expected}")]
    UnsupportedArchitecture { got: String, expected: &'static str },
    #[error("{field} in {file} is {got}, expected {expected}")]
    Field { file: String, field: String, expected: String, got: String },
    #[error("{field} in {file} asks for {got}, which is not supported yet; supported: {expected}")]
    UnsupportedFeature { file: String, field: String, expected: &'static str, got: String },
    #[error("tensor {name} is missing, expected with shape {shape:?}")]
    MissingTensor { name: String, shape: Vec<usize> },
    #[error("tensor {name} in {file} is not part of the architecture {architecture}")]
    UnexpectedTensor { name: String, file: String, architecture: &'static str },
    #[error("tensor {name} in {file} appears again in {again}")]
    DuplicateTensor { name: String, file: String, again: String },
    #[error("tensor {name} in {file} has type {got}, expected {expected}")]
    TensorType { name: String, file: String, got: String, expected: &'static str },
    #[error("tensor {name} in {file} has shape {got:?}, expected {expected:?}")]
    Shape { name: String, file: String, got: Vec<u64>, expected: Vec<usize> },
}

impl HeaderError {
    /// Stable, low-cardinality key for metrics and status conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Gguf { source, .. } => source.reason(),
            Self::Safetensors { source, .. } => source.reason(),
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
const DTYPES: &str = "F32, F16, BF16, Q8_0, Q5_0, Q4_K or Q6_K";
/// Types of vectors, for messages.
const VECTOR_DTYPES: &str = "F32, F16 or BF16";

/// A tensor found in a file.
struct Found {
    name: String,
    file: usize,
    /// `Err` holds the name of a type that is not supported.
    dtype: Result<DType, String>,
    /// Row-major.
    shape: Vec<u64>,
    offset: u64,
    bytes: u64,
}

/// Gives every tensor its role and checks names, types and shapes.
fn assemble(
    format: Format,
    config: ModelConfig,
    files: Vec<ModelFile>,
    found: Vec<Found>,
    wanted: Vec<roles::Wanted>,
) -> Result<ModelHeader, HeaderError> {
    let file_name = |i: usize| files.get(i).map_or_else(String::new, |f| f.name.clone());
    let mut by_name: HashMap<&str, &Found> = HashMap::new();
    for f in &found {
        if let Some(first) = by_name.insert(&f.name, f) {
            return Err(HeaderError::DuplicateTensor { name: f.name.clone(), file: file_name(first.file), again: file_name(f.file) });
        }
    }
    let mut tensors = BTreeMap::new();
    for want in wanted {
        let Some(f) = by_name.remove(want.name.as_str()) else {
            if want.optional {
                continue;
            }
            return Err(HeaderError::MissingTensor { name: want.name, shape: want.shape });
        };
        if !f.shape.iter().copied().eq(want.shape.iter().map(|&d| d as u64)) {
            return Err(HeaderError::Shape { name: want.name, file: file_name(f.file), got: f.shape.clone(), expected: want.shape });
        }
        let vector = want.shape.len() == 1;
        let dtype = match &f.dtype {
            Ok(dtype) if !vector || dtype.block_len() == 1 => *dtype,
            Ok(dtype) => return Err(wrong_type(f, file_name(f.file), format!("{dtype:?}"), VECTOR_DTYPES)),
            Err(got) => return Err(wrong_type(f, file_name(f.file), got.clone(), if vector { VECTOR_DTYPES } else { DTYPES })),
        };
        let info = TensorInfo { name: want.name, dtype, shape: want.shape, file: f.file, offset: f.offset, bytes: f.bytes };
        tensors.insert(want.id, info);
    }
    let unused = by_name.values().filter(|f| !roles::ignorable(&f.name, config.tied_embeddings)).min_by_key(|f| (f.file, f.offset));
    if let Some(f) = unused {
        let architecture = roles::architecture_name(config.architecture);
        return Err(HeaderError::UnexpectedTensor { name: f.name.clone(), file: file_name(f.file), architecture });
    }
    Ok(ModelHeader { format, config, files, tensors })
}

fn wrong_type(found: &Found, file: String, got: String, expected: &'static str) -> HeaderError {
    HeaderError::TensorType { name: found.name.clone(), file, got, expected }
}
