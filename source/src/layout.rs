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
pub(crate) const CARD_FILES: [&str; 6] =
    ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"];

impl Layout {
    /// Finds the model among the files of a folder.
    ///
    /// # Errors
    /// Says what was looked for, when there is none or more than one.
    pub(crate) fn find(names: &[String]) -> Result<Self, String> {
        let has = |name: &str| names.iter().any(|n| n == name);
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
    use super::Layout;

    fn find(names: &[&str]) -> Result<Layout, String> {
        Layout::find(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>())
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
