//! Importance matrices as llama.cpp's `imatrix` writes them: GGUF files with, for a tensor NAME, `NAME.in_sum2` `[matrices, columns]`, sums of
//! squares, and `NAME.counts` `[matrices, 1]`, how many were summed.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use anyhow::Context;
use plan::{
    dtype::DType,
    gguf::{self, Keep, Kind, Tensor, Value, Writer},
    header::target,
    model::Format,
};

use super::{Importance, Squares, name};
use crate::{
    exit::{BadInput, Outcome, bad_input},
    model::Model,
    write,
};

/// Reads the importance matrix of `model` in the file at `path`.
///
/// # Errors
/// Bad input when it is no such file, or one of another model.
pub(crate) fn read(path: &Path, model: &Model) -> Outcome<Importance> {
    let shown = path.display();
    let file = File::open(path).with_context(|| format!("failed to open importance matrix {shown}")).bad_input()?;
    let bytes = file.metadata().with_context(|| format!("failed to read importance matrix {shown}")).bad_input()?.len();
    let mut file = BufReader::new(file);
    let header = gguf::read(&mut file, bytes, Keep::Short, true)
        .with_context(|| format!("{shown} is no importance matrix in GGUF, the form that llama.cpp writes since 2025"))
        .bad_input()?;
    match header.get("general.type").and_then(Value::as_str) {
        Some("imatrix") => {}
        other => {
            return Err(bad_input!("{shown} is no importance matrix: its general.type is {}, expected imatrix", other.unwrap_or("absent")));
        }
    }
    let tensors: HashMap<&str, &Tensor> = header.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let (mut columns, mut squares) = (HashMap::new(), HashMap::new());
    for made in target(&model.header, Format::GGUF).bad_input()?.tensors {
        let (Some(&k), Some(sums)) = (made.shape.last(), tensors.get(format!("{}.in_sum2", made.name).as_str())) else { continue };
        let wrong = |what: String| bad_input!("{shown}: tensor {} {what}", sums.name);
        let matrices = match sums.dims.as_slice() {
            [width] if *width == k as u64 => 1,
            [width, matrices] if *width == k as u64 => *matrices as usize,
            other => return Err(wrong(format!("has dims {other:?}, the model's {} has rows of {k} values", made.name))),
        };
        if matrices != 1 && matrices != made.parts.len() {
            return Err(wrong(format!("is of {matrices} matrices, the model's {} has {}", made.name, made.parts.len())));
        }
        let counts = tensors.get(format!("{}.counts", made.name).as_str()).ok_or_else(|| wrong("has no counts beside it".to_owned()))?;
        let (sums, counts) = (floats(&mut file, path, sums, matrices * k)?, floats(&mut file, path, counts, matrices)?);
        for (number, (sums, count)) in sums.chunks_exact(k).zip(counts).enumerate() {
            // Nothing reached this one.
            if count == 0.0 {
                continue;
            }
            let of = Squares { sums: sums.to_vec(), rows: count };
            let means = of.means().ok_or_else(|| wrong(format!("has a sum of matrix {number} that is no sum of {count} squares")))?;
            for part in if matrices == 1 { &made.parts[..] } else { &made.parts[number..=number] } {
                columns.insert(part.id, means.clone());
                squares.insert(part.id, of.clone());
            }
        }
    }
    if columns.is_empty() {
        return Err(bad_input!("{shown} has no importance of any matrix of {}: it is of another model", model.name));
    }
    let chunks = header.get("imatrix.chunk_count").and_then(Value::as_u64).map(|chunks| chunks as usize);
    Ok(Importance { squares, columns, source: name(path), chunks, from_text: false })
}

/// Writes the importance matrix of `model`, made of chunks of `context` tokens, where no file is yet.
///
/// # Errors
/// Bad input when there is one.
pub(crate) fn save(importance: &Importance, model: &Model, context: usize, path: &Path) -> Outcome {
    let mut file = Writer::new();
    file.metadata("general.type", Value::String("imatrix".to_owned()))
        .array("imatrix.datasets", Kind::String, vec![Value::String(importance.source.clone())])
        .metadata("imatrix.chunk_count", Value::U32(importance.chunks.unwrap_or(0) as u32))
        .metadata("imatrix.chunk_size", Value::U32(context as u32));
    for made in target(&model.header, Format::GGUF).bad_input()?.tensors {
        // Experts have each their own; what else is stored together has one input.
        let apart = made.parts.iter().all(|part| part.id.role.expert().is_some());
        let parts = if apart { &made.parts[..] } else { &made.parts[..1] };
        let known: Vec<Option<&Squares>> = parts.iter().map(|part| importance.squares.get(&part.id)).collect();
        let (Some(&k), true) = (made.shape.last(), known.iter().any(Option::is_some)) else { continue };
        let bytes = |values: &mut dyn Iterator<Item = f32>| values.flat_map(f32::to_le_bytes).collect();
        let sums = bytes(&mut known.iter().flat_map(|of| of.map_or_else(|| vec![0.0; k], |of| of.sums.clone())));
        let counts = bytes(&mut known.iter().map(|of| of.map_or(0.0, |of| of.rows)));
        file.tensor(&format!("{}.in_sum2", made.name), &[known.len(), k], DType::F32, sums);
        file.tensor(&format!("{}.counts", made.name), &[known.len(), 1], DType::F32, counts);
    }
    let bytes = file.to_bytes().context("the importance matrix does not fit a GGUF file")?;
    write::whole(path, &bytes)
}

/// The values of a tensor of `len` floats.
fn floats(file: &mut BufReader<File>, path: &Path, tensor: &Tensor, len: usize) -> Outcome<Vec<f32>> {
    let got = tensor.dims.iter().product::<u64>();
    if tensor.kind.name != "F32" || got != len as u64 {
        return Err(bad_input!(
            "{}: tensor {} has {got} values of {}, expected {len} of F32",
            path.display(),
            tensor.name,
            tensor.kind.name
        ));
    }
    let mut bytes = vec![0; tensor.bytes as usize];
    let read = file.seek(SeekFrom::Start(tensor.offset)).and_then(|_| file.read_exact(&mut bytes));
    read.with_context(|| format!("failed to read tensor {} at offset {} of {}", tensor.name, tensor.offset, path.display())).bad_input()?;
    Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}
