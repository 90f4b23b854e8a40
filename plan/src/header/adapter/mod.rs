//! Headers of low-rank adapters: PEFT folders and GGUF files, checked against the shape of the model they are for.

mod gguf;
mod peft;
mod targets;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use gguf::adapter_from_gguf;
pub use peft::adapter_from_peft;

use super::{Biases, Found, HeaderError, Place, VECTOR_DTYPES, families::Family, tensors};
use crate::{
    adapter::{AdapterHeader, Pair, RowOrder},
    dtype::DType,
    model::{Format, ModelConfig, ModelFile, Role, RopeLayout, TensorId, TensorInfo},
};

/// What adapters may change, for messages.
const PRODUCTS: &str = "query, key, value, attention output, gate, up and down products";

/// A matrix of a model as one file stores it: the rows of one product, or of several.
struct Module {
    /// Name of the tensor, without `.weight`.
    name: String,
    layer: Option<u32>,
    /// The products, with their first rows; empty where adapters of it are not supported.
    parts: Vec<(TensorId, usize)>,
    rows: usize,
    input: usize,
}

/// The matrices of a model under the names of a format.
fn modules(family: &Family, config: &ModelConfig, format: Format) -> Vec<Module> {
    let mut modules: Vec<Module> = Vec::new();
    for want in tensors::wanted(family, config, format, Some(Biases::default())) {
        let [_, input] = want.shape[..] else { continue };
        let name = want.name.strip_suffix(".weight").unwrap_or(&want.name);
        let supported = matches!(want.id.role, Role::Q | Role::K | Role::V | Role::O | Role::Gate | Role::Up | Role::Down);
        let part = supported.then_some((want.id, want.first_row));
        match modules.iter_mut().rev().take(3).find(|module| module.name == name) {
            Some(module) => module.parts.extend(part),
            None => {
                let rows = if want.columns { want.stored[1] } else { want.stored[0] };
                modules.push(Module { name: name.to_owned(), layer: want.id.layer, parts: part.into_iter().collect(), rows, input });
            }
        }
    }
    modules
}

/// The two tensors of a pair, as far as they were found.
#[derive(Default)]
struct Halves<'a> {
    a: Option<&'a Found>,
    b: Option<&'a Found>,
}

/// Where a module's pair is expected, and with which rank and factor.
struct Expected {
    rank: usize,
    scale: f32,
    /// Names of both tensors.
    names: [String; 2],
}

/// Collects the pairs of a file.
struct Collector<'a> {
    config: &'a ModelConfig,
    files: Vec<ModelFile>,
    pairs: BTreeMap<TensorId, Pair>,
    /// In which of llama's row orders the file is.
    layout: RopeLayout,
}

impl Collector<'_> {
    fn place(&self, found: &Found) -> Place {
        Place { file: self.files.get(found.file).map_or_else(String::new, |f| f.name.clone()), offset: found.entry_offset }
    }

    /// The tensor tables, for messages.
    fn tables(&self) -> String {
        self.files.first().map_or_else(|| "an adapter without weight files".to_owned(), |f| f.name.clone())
    }

    /// Takes the pair of a module.
    fn take(&mut self, module: &Module, halves: &Halves<'_>, expected: &Expected) -> Result<(), HeaderError> {
        let Expected { rank, scale, names } = expected;
        let shapes = [[*rank, module.input], [module.rows, *rank]];
        let mut tensors = Vec::with_capacity(2);
        for ((found, name), shape) in [halves.a, halves.b].into_iter().zip(names).zip(shapes) {
            let Some(found) = found else {
                return Err(HeaderError::MissingTensor { name: name.clone(), place: self.tables(), shape: shape.to_vec() });
            };
            if !found.shape.iter().copied().eq(shape.iter().map(|&d| d as u64)) {
                let (place, got) = (self.place(found), found.shape.clone());
                return Err(HeaderError::Shape { name: found.name.clone(), place, got, expected: shape.to_vec() });
            }
            let wrong =
                |got: String| HeaderError::TensorType { name: found.name.clone(), place: self.place(found), got, expected: VECTOR_DTYPES };
            let dtype = match &found.dtype {
                Ok(dtype) if dtype.block_len() == 1 => *dtype,
                Ok(dtype) => return Err(wrong(format!("{dtype:?}"))),
                Err(got) => return Err(wrong(got.clone())),
            };
            tensors.push(info(found, dtype, shape));
        }
        let [a, b] = &tensors[..] else { return Ok(()) };
        for &(id, first_row) in &module.parts {
            let rows = self.config.shape(id.role)[0];
            let row = (rank * b.dtype.block_bytes()) as u64;
            let (offset, bytes) = (b.offset + first_row as u64 * row, rows as u64 * row);
            let part = TensorInfo { offset, bytes, shape: vec![rows, *rank], ..b.clone() };
            self.pairs.insert(id, Pair { id, a: a.clone(), b: part, scale: *scale, order: self.order(id) });
        }
        Ok(())
    }

    /// How the rows of a query or key product stand in the file.
    fn order(&self, id: TensorId) -> RowOrder {
        let layer = id.layer.and_then(|layer| self.config.layers.get(layer as usize));
        // Files of latent attention have one order.
        let heads = matches!(id.role, Role::Q | Role::K) && self.config.head_dim.is_multiple_of(2) && self.config.latent.is_none();
        let head_dim = self.config.head_dim;
        match layer.filter(|_| heads).map(|l| (l.rope.layout, self.layout)) {
            Some((RopeLayout::Adjacent, RopeLayout::Halves)) => RowOrder::ToAdjacent { head_dim },
            Some((RopeLayout::Halves, RopeLayout::Adjacent)) => RowOrder::ToHalves { head_dim },
            _ => RowOrder::Same,
        }
    }

    fn finish(self) -> AdapterHeader {
        AdapterHeader { files: self.files, pairs: self.pairs.into_values().collect() }
    }
}

fn info(found: &Found, dtype: DType, shape: [usize; 2]) -> TensorInfo {
    TensorInfo {
        name: found.name.clone(),
        dtype,
        stored: None,
        shape: shape.to_vec(),
        file: found.file,
        offset: found.offset,
        bytes: found.bytes,
        column_stride: None,
        turned: None,
    }
}

/// Refuses a tensor that changes what no adapter here changes.
fn unsupported(file: &str, tensor: &str, what: String) -> HeaderError {
    HeaderError::UnsupportedFeature { file: file.to_owned(), field: format!("tensor {tensor}"), expected: PRODUCTS, got: what }
}
