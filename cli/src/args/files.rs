//! Arguments of the commands that look at model files and write them.

use std::{num::NonZeroUsize, path::PathBuf};

use clap::{Args, ValueEnum};
use plan::{dtype::DType, manifest::parse_quantity};

use super::{LoadIn, Placement};

#[derive(Clone, Debug, Args)]
pub(crate) struct InspectArgs {
    /// Folder, file or source of a model.
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// List every tensor.
    #[arg(long)]
    pub(crate) tensors: bool,
    /// Say on one line what was read, for the operator, or why nothing was; how it reads volumes.
    #[arg(long, hide = true, conflicts_with_all = ["json", "tensors"])]
    pub(crate) header: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Folder, file or source of a model: PyTorch, safetensors or GGUF.
    #[arg(value_name = "IN")]
    pub(crate) input: String,
    /// What to write, where nothing is yet: a name that ends with .gguf is a GGUF file, any other a folder of safetensors.
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Type of the floats written [default: as they are; what is quantized becomes f32 in safetensors].
    #[arg(long, value_enum, value_name = "TYPE", ignore_case = true)]
    pub(crate) dtype: Option<FloatType>,
    /// Most bytes of a file, such as 5G [default: 5 GB for safetensors, no limit for GGUF].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) file_size: Option<u64>,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// GGUF file, folder or source of a model.
    #[arg(value_name = "IN")]
    pub(crate) input: String,
    /// GGUF file to write.
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Type of the matrices; those that are of it already stay as they are.
    #[arg(long, value_enum, value_name = "TYPE", ignore_case = true)]
    pub(crate) to: LoadIn,
    /// Text on which both models are compared; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Text from which it is learnt which weights matter: an importance matrix is computed of it; `-` reads standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "imatrix")]
    pub(crate) imatrix_text: Option<PathBuf>,
    /// Keep the importance matrix that was computed, for other types, where no file is yet.
    #[arg(long, value_name = "FILE", requires = "imatrix_text")]
    pub(crate) save_imatrix: Option<PathBuf>,
    /// Importance matrix in GGUF, as --save-imatrix and llama.cpp write it.
    #[arg(long, value_name = "FILE")]
    pub(crate) imatrix: Option<PathBuf>,
    /// Tokens of a chunk of a text; where models are compared, the second half of each is scored.
    #[arg(long, default_value_t = 256, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(4..))]
    pub(crate) context: u32,
    /// Chunks of the text that are compared.
    #[arg(long, default_value = "4", value_name = "N")]
    pub(crate) chunks: NonZeroUsize,
    /// One JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) placement: Placement,
}

/// Type of floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FloatType {
    F32,
    F16,
    #[value(name = "bf16")]
    BF16,
}

impl FloatType {
    /// The type.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }
}

/// A number of bytes, as in `5G` or `512Mi`.
fn bytes(text: &str) -> Result<u64, String> {
    let whole = parse_quantity(text).filter(|bytes| (1.0..1e18).contains(bytes)).map(|bytes| bytes as u64);
    whole.ok_or_else(|| "expected a number of bytes, such as 5G or 512Mi".to_owned())
}
