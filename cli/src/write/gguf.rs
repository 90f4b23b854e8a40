//! GGUF files: one, or parts of one.

use std::path::{Path, PathBuf};

use anyhow::Context;
use plan::{
    card::GGUF_HEADER,
    dtype::DType,
    gguf::{self, Keep, Value, Writer},
    header::Metadata,
};
use router::encode::{gguf_entries, vector_entries};

use super::{Typed, Types, Writing, Written, gguf_metadata, parts, place};
use crate::{
    exit::{BadInput, Outcome},
    importance::Importance,
};

/// Entries of a file that are said anew.
const OWN: [&str; 5] = ["general.file_type", "general.quantization_version", "split.no", "split.count", "split.tensors.count"];

/// Writes the model; the first part has all metadata.
pub(super) fn write(writing: &Writing<'_>, metadata: Option<&Metadata>, tensors: &[Typed]) -> Outcome<Written> {
    let out = writing.order.out;
    let entries = entries(writing, metadata, tensors)?;
    let parts = parts(tensors, writing.order.file_bytes);
    let count = parts.len();
    let mut files = Vec::new();
    for (number, part) in parts.into_iter().enumerate() {
        let path = if count == 1 { out.to_owned() } else { part_path(out, number, count) };
        place::check_free(&path)?;
        let mut file = Writer::new();
        if number == 0 {
            for (key, value) in &entries {
                file.metadata(key, value.clone());
            }
        }
        if count > 1 {
            file.metadata("split.no", Value::U16(number as u16))
                .metadata("split.count", Value::U16(count as u16))
                .metadata("split.tensors.count", Value::I32(tensors.len() as i32));
        }
        for t in part {
            file.tensor(&t.made.name, &t.made.shape, t.dtype, Vec::new());
        }
        let header = file.header().context("the tensors do not fit a GGUF file")?;
        let total = header.len() as u64 + part.iter().map(|t| t.bytes.next_multiple_of(gguf::ALIGNMENT)).sum::<u64>();
        let temporary = place::file(&path)?;
        let mut stream = place::Stream::new(temporary, &path, total);
        stream.put(&header)?;
        for tensor in part {
            writing.tensor(tensor, &mut |bytes| stream.put(bytes))?;
            let padding = stream.written.next_multiple_of(gguf::ALIGNMENT) - stream.written;
            stream.put(&vec![0; padding as usize])?;
        }
        let bytes = stream.written;
        let temporary = stream.finish()?;
        place::sync_file(temporary.as_file(), &path)?;
        files.push((temporary, path, bytes));
    }
    let mut written = Written { files: Vec::new(), bytes: 0, tensors: tensors.len() };
    let kept = files.into_iter().try_for_each(|(temporary, path, bytes)| {
        place::keep_file(temporary, &path)?;
        written.files.push(path);
        written.bytes += bytes;
        Ok(())
    });
    // What cannot be read again, and parts without the others, are no model.
    if let Err(failure) = kept.and_then(|()| writing.verify(&written.files[0])) {
        for path in &written.files {
            std::fs::remove_file(path).with_context(|| format!("failed to remove {}", path.display()))?;
        }
        return Err(failure);
    }
    Ok(written)
}

/// The name of a part, as llama.cpp's splitter has it.
fn part_path(out: &Path, number: usize, count: usize) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    out.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", number + 1))
}

/// All metadata.
fn entries(writing: &Writing<'_>, metadata: Option<&Metadata>, tensors: &[Typed]) -> Outcome<Vec<(String, Value)>> {
    let mut entries = match gguf_metadata(metadata) {
        Some(entries) => {
            let name = writing.order.out.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let general =
                [("general.type".to_owned(), Value::String("model".to_owned())), ("general.name".to_owned(), Value::String(name))];
            let tokenizer = gguf_entries(writing.card, writing.header.config.vocab).bad_input()?;
            let vectors = match writing.header.config.encoder {
                Some(_) => vector_entries(writing.card).bad_input()?,
                None => Vec::new(),
            };
            [entries.as_slice(), &general, &vectors, &tokenizer].concat()
        }
        None => stored(writing)?,
    };
    let most = match writing.order.types {
        Types::All(to) => to,
        Types::Kept => usual(tensors),
    };
    entries.push(("general.file_type".to_owned(), Value::U32(file_type(most))));
    entries.push(("general.quantization_version".to_owned(), Value::U32(2)));
    entries.extend(writing.order.importance.map(Importance::entries).unwrap_or_default());
    Ok(entries)
}

/// The entries of the file that is read, its vocabulary too.
fn stored(writing: &Writing<'_>) -> Outcome<Vec<(String, Value)>> {
    let bytes = writing.card.file(GGUF_HEADER).context("the model has no GGUF header")?;
    let read = |keep: Keep<'_>| gguf::read(&mut &*bytes, bytes.len() as u64, keep, false).bad_input();
    let short = read(Keep::Short)?;
    let skipped = |e: &&gguf::Entry| matches!(&e.value, Value::Array(array) if array.values.is_none());
    let keys: Vec<&str> = short.metadata.iter().filter(skipped).map(|e| e.key.as_str()).collect();
    let all = read(Keep::Keys(&keys))?.metadata;
    // How the types came about that the tensors had.
    let before = |key: &str| writing.order.types != Types::Kept && key.starts_with("quantize.");
    let own = |key: &str| OWN.contains(&key) || key == "general.alignment" || before(key);
    Ok(all.into_iter().filter(|e| !own(&e.key)).map(|e| (e.key, e.value)).collect())
}

/// The type of most bytes.
fn usual(tensors: &[Typed]) -> DType {
    let bytes = |dtype: DType| tensors.iter().filter(|t| t.dtype == dtype).map(|t| t.bytes).sum::<u64>();
    DType::ALL.into_iter().max_by_key(|&dtype| bytes(dtype)).unwrap_or(DType::F32)
}

/// The number that tells which type most tensors of a file have.
fn file_type(to: DType) -> u32 {
    match to {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 7,
        DType::Q5_0 => 8,
        DType::Q5_1 => 9,
        DType::Q2_K => 10,
        DType::Q3_K => 11,
        DType::Q4_K => 14,
        DType::Q5_K => 16,
        DType::Q6_K => 18,
        DType::IQ4_NL => 25,
        DType::BF16 => 32,
        DType::MXFP4 => 38,
    }
}
