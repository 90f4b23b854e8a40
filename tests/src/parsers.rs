//! The parsers of what strangers write: one function each from bytes to "loads" or "is refused, because", as tests and fuzzing call them.
//!
//! What loads is used as far as it goes without weights: a model is planned, a tokenizer tokenizes, a template is rendered.

use plan::{
    adapter::AdapterHeader,
    card::{CardFile, GGUF_HEADER, ModelCard},
    gguf::{self, Keep},
    header::{HfConfig, adapter_from_peft, from_gguf, from_safetensors, take_packed},
    manifest::Manifest,
    model::{ModelFile, ModelHeader},
    planner::{Capacity, Spec, plan},
    pytorch, safetensors, sentencepiece,
};
use router::encode::{ChatOptions, Tokenizer};
use serde_json::json;

/// A parser of one kind of file.
#[derive(Clone, Copy, Debug)]
pub struct Parser {
    /// Its name: that of the fuzz target, and of its folder of `fuzz/corpus`.
    pub name: &'static str,
    /// Reads a file; why it is refused.
    pub read: fn(&[u8]) -> Result<(), String>,
    /// A refusal says one of these: the file, or that a byte of it is named.
    pub places: &'static [&'static str],
    /// What may be held at once: so many times the file, beside what every file costs.
    pub held: (usize, usize),
}

/// Every parser.
pub const PARSERS: [Parser; 12] = [
    Parser {
        name: "gguf",
        read: gguf,
        places: &["at byte ", "model.gguf", "header.gguf", "tokenizer", "chat template", "generation_config.json"],
        held: (40, 64 << 20),
    },
    Parser { name: "safetensors", read: safetensors, places: &["at byte ", "model.safetensors"], held: (20, 256 << 10) },
    Parser { name: "packed", read: packed, places: &["at byte ", "model.safetensors", "config.json"], held: (40, 512 << 10) },
    Parser { name: "index", read: index, places: &["at byte "], held: (20, 256 << 10) },
    Parser { name: "pytorch", read: pytorch, places: &["at byte "], held: (60, 256 << 10) },
    Parser { name: "tokenizer_json", read: tokenizer_json, places: &["tokenizer"], held: (200, 32 << 20) },
    Parser {
        name: "sentencepiece",
        read: sentencepiece,
        places: &["at byte ", "tokenizer.model", "tokenizer vocabulary"],
        held: (40, 1 << 20),
    },
    Parser { name: "vocab_txt", read: vocab_txt, places: &["vocab.txt", "tokenizer"], held: (100, 4 << 20) },
    Parser { name: "chat_template", read: chat_template, places: &["chat template", "chat_template.jinja"], held: (200, 1 << 30) },
    Parser { name: "config_json", read: config_json, places: &["config.json"], held: (40, 4 << 20) },
    Parser { name: "adapter_json", read: adapter_json, places: &["adapter_config.json", "adapter_model.safetensors"], held: (40, 4 << 20) },
    Parser { name: "manifest", read: manifest, places: &["model.yaml:"], held: (100, 32 << 20) },
];

impl Parser {
    /// The parser called `name`.
    ///
    /// # Panics
    /// If there is none.
    pub fn named(name: &str) -> Self {
        *PARSERS.iter().find(|parser| parser.name == name).unwrap_or_else(|| panic!("no parser is called {name}"))
    }

    /// Whether a file loads.
    ///
    /// # Panics
    /// If it is refused without a word of where.
    pub fn loads(&self, file: &[u8]) -> bool {
        match (self.read)(file) {
            Ok(()) => true,
            Err(said) => {
                assert!(self.places.iter().any(|place| said.contains(place)), "{} does not say where: {said}", self.name);
                false
            }
        }
    }
}

/// A GGUF file: its header, the model in it, its tokenizer and chat template.
pub fn gguf(bytes: &[u8]) -> Result<(), String> {
    let size = bytes.len() as u64;
    let header = gguf::read(&mut &*bytes, size, Keep::Short, true).map_err(chain)?;
    let model = from_gguf(ModelFile { name: "model.gguf".into(), bytes: size }, &header).map_err(chain)?;
    planned(&model);
    card(GGUF_HEADER, &bytes[..header.data_offset.min(size) as usize]).and_then(|card| tokenize(&card))
}

/// A safetensors file of the model that [`CONFIG`] describes.
pub fn safetensors(bytes: &[u8]) -> Result<(), String> {
    let size = bytes.len() as u64;
    let header = safetensors::read(&mut &*bytes, size).map_err(chain)?;
    let file = ModelFile { name: "model.safetensors".into(), bytes: size };
    planned(&from_safetensors(CONFIG.as_bytes(), &[(file, header)]).map_err(chain)?);
    Ok(())
}

/// A safetensors file of packed matrices, of a model that a `config.json` of its corpus describes.
pub fn packed(bytes: &[u8]) -> Result<(), String> {
    const CONFIG: &[u8] = include_bytes!("../../fuzz/corpus/config_json/good-gptq.json");
    let size = bytes.len() as u64;
    let header = safetensors::read(&mut &*bytes, size).map_err(chain)?;
    let mut parts = vec![(ModelFile { name: "model.safetensors".into(), bytes: size }, header)];
    for matrix in take_packed(CONFIG, &mut parts).map_err(chain)? {
        let (weights, scales, zeros) = matrix.parts(&(matrix.rows / 3..matrix.rows));
        for (piece, rows, columns) in [Some(weights), Some(scales), zeros].into_iter().flatten() {
            assert!(piece.ranges(rows, columns).iter().all(|range| range.end <= size), "{piece:?}");
        }
    }
    planned(&from_safetensors(CONFIG, &parts).map_err(chain)?);
    Ok(())
}

/// `model.safetensors.index.json`.
pub fn index(bytes: &[u8]) -> Result<(), String> {
    safetensors::Index::parse(bytes).map(drop).map_err(chain)
}

/// A PyTorch file: its archive and its pickle.
pub fn pytorch(bytes: &[u8]) -> Result<(), String> {
    let mut read = |at: u64, into: &mut [u8]| {
        let begin = usize::try_from(at).map_err(|_| std::io::ErrorKind::UnexpectedEof)?;
        let end = begin.checked_add(into.len()).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(bytes.get(begin..end).ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    };
    let size = bytes.len() as u64;
    for tensor in pytorch::read(&mut read, size).map_err(chain)? {
        let end = tensor.offset + tensor.span() * tensor.element;
        assert!(end <= size, "{tensor:?} ends past the {size} bytes of its file");
    }
    Ok(())
}

/// `tokenizer.json`.
pub fn tokenizer_json(bytes: &[u8]) -> Result<(), String> {
    card("tokenizer.json", bytes).and_then(|card| tokenize(&card))
}

/// SentencePiece's `tokenizer.model`.
pub fn sentencepiece(bytes: &[u8]) -> Result<(), String> {
    sentencepiece::read(bytes).map_err(chain)?;
    card("tokenizer.model", bytes).and_then(|card| tokenize(&card))
}

/// `vocab.txt`.
pub fn vocab_txt(bytes: &[u8]) -> Result<(), String> {
    card("vocab.txt", bytes).and_then(|card| tokenize(&card))
}

/// A chat template, rendered with two messages.
pub fn chat_template(bytes: &[u8]) -> Result<(), String> {
    const TOKENIZER: &str = include_str!("../../fuzz/corpus/tokenizer_json/good-bpe.json");
    let mut card = card("tokenizer.json", TOKENIZER.as_bytes())?;
    card.files.push(CardFile { name: "chat_template.jinja".into(), bytes: bytes.to_vec() });
    let tokenizer = Tokenizer::from_card(&card).map_err(chain)?;
    let messages = [json!({"role": "user", "content": "ab </s>"}), json!({"role": "assistant", "content": "b"})];
    tokenizer.chat(&messages, ChatOptions::default()).map(drop).map_err(chain)
}

/// `config.json`.
pub fn config_json(bytes: &[u8]) -> Result<(), String> {
    HfConfig::parse(bytes).map(drop).map_err(chain)
}

/// `adapter_config.json`, with no weights: what is left to say of a good one is that they are missing.
pub fn adapter_json(bytes: &[u8]) -> Result<(), String> {
    let base = HfConfig::parse(CONFIG.as_bytes()).map_err(chain)?.config;
    let whole = safetensors::Header { data_offset: 8, ..Default::default() };
    let file = ModelFile { name: "adapter_model.safetensors".into(), bytes: 8 };
    match adapter_from_peft(bytes, &[(file, whole)], &base) {
        Ok(AdapterHeader { .. }) => Ok(()),
        Err(plan::header::HeaderError::MissingTensor { .. }) => Ok(()),
        Err(error) => Err(chain(error)),
    }
}

/// A manifest.
pub fn manifest(bytes: &[u8]) -> Result<(), String> {
    match std::str::from_utf8(bytes) {
        Ok(yaml) => Manifest::parse("model.yaml", yaml).map(drop).map_err(chain),
        Err(error) => Err(format!("model.yaml: {error}")),
    }
}

/// The shape of the small model that headers are read for.
pub const CONFIG: &str = include_str!("../../fuzz/corpus/config_json/good-llama.json");

/// Plans a model: its slices lie in its files.
fn planned(model: &ModelHeader) {
    let spec = Spec { tensor: 2.min(model.config.heads), ..Spec::default() };
    if let Ok(plan) = plan(&spec, model, &Capacity { memory_bytes: Some(1 << 30) }) {
        let slices = plan.stages.iter().flat_map(|stage| &stage.shards).flat_map(|shard| &shard.slices);
        for slice in slices {
            let file = model.files[slice.tensor.file].bytes;
            assert!(slice.bytes.start <= slice.bytes.end && slice.bytes.end <= file, "{slice:?} of a file of {file} bytes");
        }
    }
}

fn card(name: &str, bytes: &[u8]) -> Result<ModelCard, String> {
    Ok(ModelCard { files: vec![CardFile { name: name.to_owned(), bytes: bytes.to_vec() }] })
}

/// Makes a tokenizer and has it read a text that every rule has to say something to.
fn tokenize(card: &ModelCard) -> Result<(), String> {
    const TEXT: &str =
        "ab a\u{301}b  <s>\u{65e5}\u{672c} 12345 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!\r\n\u{1f600}";
    let tokenizer = Tokenizer::from_card(card).map_err(chain)?;
    for special in [false, true] {
        // That a text cannot be tokenized is an answer too: the tokenizer's rules are its own.
        if let Ok(ids) = tokenizer.encode_prompt(TEXT, special) {
            ids.iter().for_each(|&id| drop(tokenizer.piece(id).to_vec()));
        }
    }
    if tokenizer.has_template() {
        let messages = [json!({"role": "user", "content": TEXT})];
        return tokenizer.chat(&messages, ChatOptions::default()).map(drop).map_err(chain);
    }
    Ok(())
}

/// An error with its causes, as whoever logs it prints it.
fn chain(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
