//! The model card: the files a router needs to turn text into ids and back, without weights.

use serde::{Deserialize, Serialize};

/// Name of the card's entry that holds a GGUF file's bytes up to its tensor data.
pub const GGUF_HEADER: &str = "header.gguf";

/// One file of a card.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CardFile {
    /// `header.gguf`, or the path in the model's folder: `config.json`, `tokenizer.json`, `1_Pooling/config.json` and others.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for CardFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.name, self.bytes.len())
    }
}

/// Everything a router needs to know of a model, by content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Files, ascending by name.
    pub files: Vec<CardFile>,
}

impl ModelCard {
    /// The bytes of the file called `name`.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.iter().find(|f| f.name == name).map(|f| f.bytes.as_slice())
    }
}
