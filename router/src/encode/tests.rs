//! Tokenizers against recorded ids, templates against hostile input.

use std::path::{Path, PathBuf};

use plan::card::CardFile;
use serde_json::json;

use super::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

fn card(model: &str) -> ModelCard {
    let folder = fixtures().join("models").join(model);
    let names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    let file = |n: &str| std::fs::read(folder.join(n)).ok().map(|bytes| CardFile { name: n.to_owned(), bytes });
    ModelCard { files: names.iter().filter_map(|n| file(n)).collect() }
}

fn llama() -> Tokenizer {
    Tokenizer::from_card(&card("llama")).unwrap()
}

/// The reference model's header from Skein's cache; `None` where the model was never fetched.
fn gemma() -> Option<Tokenizer> {
    use std::io::Read;
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    let xdg = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|c| c.join("skein"));
    let cache = std::env::var_os("SKEIN_CACHE").map(PathBuf::from).or_else(xdg)?;
    let blob = cache.join("blobs/sha256/a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818");
    let mut bytes = Vec::new();
    std::fs::File::open(blob).ok()?.take(16 << 20).read_to_end(&mut bytes).ok()?;
    let files = vec![CardFile { name: GGUF_HEADER.to_owned(), bytes }];
    Some(Tokenizer::from_card(&ModelCard { files }).unwrap())
}

#[derive(serde::Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    text: String,
    plain: Vec<TokenId>,
    special: Vec<TokenId>,
}

fn golden(path: &Path) -> Vec<Case> {
    serde_json::from_slice::<Golden>(&std::fs::read(path).unwrap()).unwrap().cases
}

/// Texts whose ids differ from the recorded ones.
fn differing(tokenizer: &Tokenizer, cases: &[Case]) -> Vec<String> {
    let differs = |c: &&Case| tokenizer.encode(&c.text, false).unwrap() != c.plain || tokenizer.encode(&c.text, true).unwrap() != c.special;
    cases.iter().filter(differs).map(|c| c.text.clone()).collect()
}

#[test]
fn reference_model_gives_the_recorded_ids() {
    let Some(tokenizer) = gemma() else {
        eprintln!("skipped: the reference model is not in the cache (cargo xtask model)");
        return;
    };
    let golden = golden(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/encode/golden/gemma3-270m.json"));
    assert_eq!(differing(&tokenizer, &golden), [""; 0]);
    assert_eq!(tokenizer.encode_prompt("The capital of France is", false).unwrap(), [2, 818, 5279, 529, 7001, 563]);
    assert!(
        !differing(&tokenizer, &[Case { text: "a".to_owned(), plain: vec![1], special: vec![1] }]).is_empty(),
        "the comparison sees nothing"
    );
}
