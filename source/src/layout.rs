//! Which files of a folder are the model.

/// A model's weight files by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One GGUF file.
    Gguf(String),
    /// One safetensors file.
    Single(String),
    /// Several safetensors files, listed in this index.
    Index(String),
}

/// The index of a model in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// A model in one safetensors file.
pub(crate) const SINGLE: &str = "model.safetensors";
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
        let gguf: Vec<&String> = names.iter().filter(|n| n.ends_with(".gguf")).collect();
        let tensors: Vec<&String> = names.iter().filter(|n| n.ends_with(".safetensors")).collect();
        match (gguf.as_slice(), tensors.as_slice()) {
            ([one], []) => Ok(Self::Gguf((*one).clone())),
            ([], [one]) => Ok(Self::Single((*one).clone())),
            ([], []) => Err(format!("expected a .gguf file, {SINGLE} or {INDEX} among {} files", names.len())),
            (many, more) => {
                let names: Vec<&str> = many.iter().chain(more).take(8).map(|n| n.as_str()).collect();
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
        assert!(find(&["a.gguf", "b.gguf"]).is_err_and(|e| e.contains("a.gguf, b.gguf")));
        assert!(find(&["README.md"]).is_err());
    }
}
