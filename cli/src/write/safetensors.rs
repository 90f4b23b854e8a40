//! A folder as Hugging Face has them: config.json, tokenizer, and safetensors files with their index.

use std::{fs, io::Write, path::Path};

use anyhow::Context;
use plan::{card::CardFile, dtype::DType, header::Metadata};
use router::encode::{Tokenizer, tokenizer_files, vector_files};
use serde_json::{Map, Value, json};

use super::{Typed, Types, Writing, Written, parts, place};
use crate::exit::{BadInput, Outcome};

/// Name of the file that lists which tensor is in which.
const INDEX: &str = "model.safetensors.index.json";
/// Most bytes of a file where nothing else is said, as other writers have it.
const FILE_BYTES: u64 = 5_000_000_000;

/// Writes the folder.
pub(super) fn write(writing: &Writing<'_>, metadata: Option<&Metadata>, tensors: &[Typed]) -> Outcome<Written> {
    let out = writing.order.out;
    let folder = place::folder(out)?;
    let small = small_files(writing, metadata, tensors)?;
    for file in &small {
        put(&folder.path().join(&file.name), &file.bytes)?;
    }
    let parts = parts(tensors, Some(writing.order.file_bytes.unwrap_or(FILE_BYTES)));
    let count = parts.len();
    let mut written = Written { files: Vec::new(), bytes: 0, tensors: tensors.len() };
    let mut index = Map::new();
    for (number, part) in parts.into_iter().enumerate() {
        let name = if count == 1 { "model.safetensors".to_owned() } else { format!("model-{:05}-of-{count:05}.safetensors", number + 1) };
        let header = header(part)?;
        let path = folder.path().join(&name);
        let total = header.len() as u64 + part.iter().map(|t| t.bytes).sum::<u64>();
        let file = fs::File::create_new(&path).with_context(|| format!("failed to create {}", path.display()))?;
        let mut stream = place::Stream::new(file, &out.join(&name), total);
        stream.put(&header)?;
        for tensor in part {
            writing.tensor(tensor, &mut |bytes| stream.put(bytes))?;
            index.insert(tensor.made.name.clone(), json!(name));
        }
        written.bytes += stream.written;
        place::sync_file(&stream.finish()?, &path)?;
        written.files.push(out.join(&name));
    }
    if count > 1 {
        let total: u64 = tensors.iter().map(|t| t.bytes).sum();
        let json = json!({"metadata": {"total_size": total}, "weight_map": index});
        put(&folder.path().join(INDEX), pretty(&json)?.as_bytes())?;
    }
    writing.verify(folder.path())?;
    place::keep_folder(folder, out)?;
    Ok(written)
}

fn put(path: &Path, bytes: &[u8]) -> Outcome {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    }
    let written = fs::File::create_new(path).and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    Ok(written.with_context(|| format!("failed to write {}", path.display()))?)
}

fn pretty(json: &Value) -> Outcome<String> {
    let mut text = serde_json::to_string_pretty(json).context("failed to write JSON")?;
    text.push('\n');
    Ok(text)
}

/// The header of a safetensors file, padded so that the data is aligned.
fn header(tensors: &[Typed]) -> Outcome<Vec<u8>> {
    let mut map = Map::new();
    map.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut begin = 0;
    for tensor in tensors {
        let end = begin + tensor.bytes;
        let dtype = format!("{:?}", tensor.dtype);
        map.insert(tensor.made.name.clone(), json!({"dtype": dtype, "shape": tensor.made.shape, "data_offsets": [begin, end]}));
        begin = end;
    }
    let mut json = serde_json::to_vec(&Value::Object(map)).context("failed to write the header")?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

/// config.json, the tokenizer's files and what else stands beside the weights.
fn small_files(writing: &Writing<'_>, metadata: Option<&Metadata>, tensors: &[Typed]) -> Outcome<Vec<CardFile>> {
    let Some(Metadata::Hf(config)) = metadata else {
        let mut files = writing.card.files.clone();
        if let Some(config) = files.iter_mut().find(|f| f.name == "config.json") {
            let mut json: Map<String, Value> = serde_json::from_slice(&config.bytes).context("config.json is not JSON").bad_input()?;
            let before = json.clone();
            // What was packed is written as floats.
            json.shift_remove("quantization_config");
            if let Types::All(dtype) = writing.order.types {
                let field = if json.contains_key("dtype") { "dtype" } else { "torch_dtype" };
                json.insert(field.to_owned(), json!(torch(dtype)));
            }
            if json != before {
                config.bytes = pretty(&Value::Object(json))?.into_bytes();
            }
        }
        return Ok(files);
    };
    let mut config = config.clone();
    let most = tensors.iter().max_by_key(|t| t.bytes).map_or(DType::F32, |t| t.dtype);
    config.insert("torch_dtype".to_owned(), json!(torch(most)));
    let mut files = tokenizer_files(writing.card).bad_input()?;
    if writing.header.config.encoder.is_some() {
        let (more, fields) = vector_files(writing.card).bad_input()?;
        files.extend(more);
        config.extend(fields);
    } else {
        let tokenizer = Tokenizer::from_card(writing.card).bad_input()?;
        config.insert("bos_token_id".to_owned(), json!(tokenizer.bos()));
        config.insert("eos_token_id".to_owned(), json!(tokenizer.eos()));
    }
    files.push(CardFile { name: "config.json".to_owned(), bytes: pretty(&Value::Object(config))?.into_bytes() });
    Ok(files)
}

/// PyTorch's name of a type.
fn torch(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}
