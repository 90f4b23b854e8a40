//! How much an error in each column of a matrix counts: the mean square of what the column is multiplied with. An importance matrix.
//!
//! It comes from a text that the model reads, or from a file.

mod file;
mod text;

use std::{collections::HashMap, path::Path};

use kernels::WeightType;
use plan::{
    dtype::DType,
    gguf::Value,
    model::{ModelHeader, Role, TensorId},
};

use crate::{
    exit::{Outcome, bad_input},
    model::Model,
    write::weight_type,
};

pub(crate) use file::{read, save};
pub(crate) use text::of_text;

/// What went into one matrix.
#[derive(Clone, Debug)]
struct Squares {
    /// Sums of squares, by column.
    sums: Vec<f32>,
    /// Rows that were summed.
    rows: f32,
}

impl Squares {
    /// The mean of each column, if they are means of squares.
    fn means(&self) -> Option<Vec<f32>> {
        let means: Vec<f32> = self.sums.iter().map(|sum| sum / self.rows).collect();
        means.iter().all(|mean| mean.is_finite() && *mean >= 0.0).then_some(means)
    }
}

/// An importance matrix, and where it is from.
#[derive(Debug)]
pub(crate) struct Importance {
    squares: HashMap<TensorId, Squares>,
    /// A number for each column of each matrix that is known.
    pub(crate) columns: HashMap<TensorId, Vec<f32>>,
    /// Name of the text, or of the file.
    pub(crate) source: String,
    /// Chunks of the text.
    pub(crate) chunks: Option<usize>,
    from_text: bool,
}

impl Importance {
    /// Matrices of the model of which nothing is known: experts that no token reached.
    pub(crate) fn unknown(&self, header: &ModelHeader) -> usize {
        products(header).filter(|id| !self.columns.contains_key(id)).count()
    }

    /// What a file made with it says of it, under llama.cpp's keys.
    pub(crate) fn entries(&self) -> Vec<(String, Value)> {
        let entry = |key: &str, value| (format!("quantize.imatrix.{key}"), value);
        let source = if self.from_text { "dataset" } else { "file" };
        let mut entries =
            vec![entry(source, Value::String(self.source.clone())), entry("entries_count", Value::U32(self.columns.len() as u32))];
        entries.extend(self.chunks.map(|chunks| entry("chunks_count", Value::U32(chunks as u32))));
        entries
    }
}

/// Refuses an importance matrix where it would change nothing, or nobody knows what.
///
/// # Errors
/// Bad input, if that is so.
pub(crate) fn check(to: DType) -> Outcome {
    let kind: WeightType = weight_type(to)?;
    if kind.heeds_importance() {
        return Ok(());
    }
    let types: Vec<String> = WeightType::ALL.into_iter().filter(|t| t.heeds_importance()).map(|t| t.to_string()).collect();
    Err(bad_input!("an importance matrix changes nothing of {kind}, only of {}", types.join(", ")))
}

/// Refuses an encoder.
///
/// # Errors
/// Bad input, if the model is one.
pub(crate) fn check_model(model: &Model) -> Outcome {
    match model.header.config.encoder {
        None => Ok(()),
        Some(_) => Err(bad_input!("{} is an encoder; an importance matrix is supported for models that generate alone", model.name)),
    }
}

/// Matrices that something is multiplied with, and that may get another type.
fn products(header: &ModelHeader) -> impl Iterator<Item = TensorId> {
    let table = if header.config.tied_embeddings { Role::Embedding } else { Role::Output };
    header.tensors.iter().filter(|(_, tensor)| tensor.shape.len() == 2).map(|(id, _)| *id).filter(move |id| match id.role {
        Role::Embedding | Role::Output => id.role == table,
        Role::Positions | Role::TokenTypes | Role::Router => false,
        _ => true,
    })
}

/// The last part of a path.
fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
