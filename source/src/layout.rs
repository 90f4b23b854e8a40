//! Which files of a folder are the model.

use crate::split;

/// A model's weight files by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One GGUF file, or the first of several parts.
    Gguf(String),
    /// One safetensors file.
    Single(String),
    /// One PyTorch file.
    Pytorch(String),
    /// Several safetensors or PyTorch files, listed in this index.
    Index(String),
}

/// The index of a model in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// A model in one safetensors file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The same two of PyTorch files.
pub(crate) const PYTORCH_INDEX: &str = "pytorch_model.bin.index.json";
const PYTORCH: &str = "pytorch_model.bin";
/// Files that become the model card, beside a GGUF header; ascending.
pub(crate) const CARD_FILES: [&str; 10] = [
    "1_Pooling/config.json",
    "chat_template.jinja",
    "config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "modules.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
];

/// The settings of an adapter of PEFT, and its weights in either form.
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
pub(crate) const ADAPTER_SINGLE: &str = "adapter_model.safetensors";
pub(crate) const ADAPTER_PYTORCH: &str = "adapter_model.bin";

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Model,
    /// A low-rank adapter.
    Adapter,
}

impl Kind {
    /// The file that says what the weights are for, where it is not in them.
    pub(crate) fn config(self) -> &'static str {
        match self {
            Self::Model => "config.json",
            Self::Adapter => ADAPTER_CONFIG,
        }
    }

    /// The small files beside the weights; ascending.
    pub(crate) fn beside(self) -> &'static [&'static str] {
        match self {
            Self::Model => &CARD_FILES,
            Self::Adapter => &[ADAPTER_CONFIG],
        }
    }
}

impl Layout {
    /// Finds the model, or the adapter, among the files of a folder.
    ///
    /// # Errors
    /// Says what was looked for, when there is none or more than one.
    pub(crate) fn find(names: &[String], kind: Kind) -> Result<Self, String> {
        let has = |name: &str| names.iter().any(|n| n == name);
        if kind == Kind::Adapter {
            return Self::adapter(names);
        }
        if has(INDEX) {
            return Ok(Self::Index(INDEX.to_owned()));
        }
        if has(SINGLE) {
            return Ok(Self::Single(SINGLE.to_owned()));
        }
        let mut gguf: Vec<&String> = names.iter().filter(|n| n.ends_with(".gguf")).collect();
        // The parts of one model are one model.
        let parts = gguf.iter().find_map(|name| split::gguf_parts(name)).filter(|parts| gguf.iter().all(|name| parts.contains(name)));
        if parts.is_some() {
            gguf.truncate(1);
        }
        let tensors: Vec<&String> = names.iter().filter(|n| n.ends_with(".safetensors")).collect();
        match (gguf.as_slice(), tensors.as_slice()) {
            ([one], []) => Ok(Self::Gguf((*one).clone())),
            ([], [one]) => Ok(Self::Single((*one).clone())),
            ([], []) => Self::pytorch(names),
            (many, more) => {
                let names: Vec<&str> = many.iter().chain(more).take(8).map(|n| n.as_str()).collect();
                Err(format!("expected one model, got {}; name one of the files", names.join(", ")))
            }
        }
    }
}

impl Layout {
    /// The adapter among the files of a folder.
    fn adapter(names: &[String]) -> Result<Self, String> {
        let has = |name: &str| names.iter().any(|n| n == name);
        if has(ADAPTER_SINGLE) {
            return Ok(Self::Single(ADAPTER_SINGLE.to_owned()));
        }
        if has(ADAPTER_PYTORCH) {
            return Ok(Self::Pytorch(ADAPTER_PYTORCH.to_owned()));
        }
        let gguf: Vec<&String> = names.iter().filter(|n| n.ends_with(".gguf")).collect();
        match gguf.as_slice() {
            [one] => Ok(Self::Gguf((*one).clone())),
            [] => Err(format!("expected an adapter, {ADAPTER_SINGLE}, {ADAPTER_PYTORCH} or a .gguf file, among {} files", names.len())),
            many => {
                let names: Vec<&str> = many.iter().take(8).map(|n| n.as_str()).collect();
                Err(format!("expected one adapter, got {}; name one of the files", names.join(", ")))
            }
        }
    }

    /// As [`Layout::find`], where there is nothing else.
    fn pytorch(names: &[String]) -> Result<Self, String> {
        let has = |name: &str| names.iter().any(|n| n == name);
        if has(PYTORCH_INDEX) {
            return Ok(Self::Index(PYTORCH_INDEX.to_owned()));
        }
        if has(PYTORCH) {
            return Ok(Self::Pytorch(PYTORCH.to_owned()));
        }
        // What trainers leave beside their models.
        let other = ["training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt"];
        let files: Vec<&String> = names.iter().filter(|n| split::is_pytorch_name(n) && !other.contains(&n.as_str())).collect();
        match files.as_slice() {
            [one] => Ok(Self::Pytorch((*one).clone())),
            [] => Err(format!("expected a .gguf file, {SINGLE}, {INDEX}, {PYTORCH} or {PYTORCH_INDEX} among {} files", names.len())),
            many => {
                let names: Vec<&str> = many.iter().take(8).map(|n| n.as_str()).collect();
                Err(format!("expected one model, got {}; name one of the files", names.join(", ")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, Layout};

    fn find_kind(names: &[&str], kind: Kind) -> Result<Layout, String> {
        Layout::find(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>(), kind)
    }

    fn find(names: &[&str]) -> Result<Layout, String> {
        find_kind(names, Kind::Model)
    }

    #[test]
    fn one_adapter_or_none() {
        let adapter = |names: &[&str]| find_kind(names, Kind::Adapter);
        let (single, pytorch) = ("adapter_model.safetensors", "adapter_model.bin");
        assert_eq!(adapter(&["adapter_config.json", single, pytorch, "a.gguf"]), Ok(Layout::Single(single.into())));
        assert_eq!(adapter(&["adapter_config.json", pytorch, "training_args.bin"]), Ok(Layout::Pytorch(pytorch.into())));
        assert_eq!(adapter(&["a.gguf"]), Ok(Layout::Gguf("a.gguf".into())));
        assert!(adapter(&["a.gguf", "b.gguf"]).is_err_and(|e| e.contains("a.gguf, b.gguf")));
        assert!(adapter(&["model.safetensors", "config.json"]).is_err_and(|e| e.contains(single)));
    }

    #[test]
    fn one_model_or_none() {
        assert_eq!(find(&["a.gguf", "README.md"]), Ok(Layout::Gguf("a.gguf".into())));
        assert_eq!(find(&["model.safetensors", "a.gguf"]), Ok(Layout::Single("model.safetensors".into())));
        assert_eq!(find(&["model.safetensors.index.json"]), Ok(Layout::Index("model.safetensors.index.json".into())));
        assert_eq!(find(&["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]), Ok(Layout::Gguf("a-00001-of-00002.gguf".into())));
        assert!(find(&["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf"]).is_err());
        assert_eq!(find(&["model.pt", "training_args.bin"]), Ok(Layout::Pytorch("model.pt".into())));
        assert_eq!(find(&["pytorch_model.bin.index.json", "x.bin"]), Ok(Layout::Index("pytorch_model.bin.index.json".into())));
        assert_eq!(find(&["pytorch_model.bin", "model.safetensors"]), Ok(Layout::Single("model.safetensors".into())));
        assert!(find(&["a.pt", "b.pt"]).is_err_and(|e| e.contains("a.pt, b.pt")));
        assert!(find(&["a.gguf", "b.gguf"]).is_err_and(|e| e.contains("a.gguf, b.gguf")));
        assert!(find(&["README.md"]).is_err());
    }
}
