//! Tokenizers against recorded ids, templates against hostile input.

mod carried;
mod chat;
mod random;
mod stored;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::decode::{self, Decoder};

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

/// The reference model's tokenizer, from its header in Skein's cache.
fn gemma() -> Tokenizer {
    Tokenizer::from_card(&gemma_card()).unwrap()
}

fn gemma_card() -> ModelCard {
    use std::io::Read;
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    let xdg = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|c| c.join("skein"));
    let cache = std::env::var_os("SKEIN_CACHE").map(PathBuf::from).or_else(xdg).expect("SKEIN_CACHE, XDG_CACHE_HOME or HOME is set");
    let blob = cache.join("blobs/sha256/a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818");
    let mut bytes = Vec::new();
    let file = std::fs::File::open(&blob).unwrap_or_else(|e| panic!("{}: {e}; run `cargo xtask model` first", blob.display()));
    file.take(16 << 20).read_to_end(&mut bytes).unwrap();
    let files = vec![CardFile { name: GGUF_HEADER.to_owned(), bytes }];
    ModelCard { files }
}

/// A card of these files.
fn card_of(files: &[(&str, &Value)]) -> ModelCard {
    let file = |(name, json): &(&str, &Value)| CardFile { name: (*name).to_owned(), bytes: json.to_string().into_bytes() };
    ModelCard { files: files.iter().map(file).collect() }
}

/// The bytes of a golden file.
fn golden_json(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/encode/golden").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// One text and what the reference made of it.
#[derive(serde::Deserialize)]
struct Case {
    text: String,
    plain: Vec<TokenId>,
    special: Vec<TokenId>,
    /// With the tokens around a text.
    prompt: Option<Vec<TokenId>>,
    /// The text of `plain`.
    decoded: Option<String>,
}

fn golden(name: &str) -> Vec<Case> {
    serde_json::from_value(golden_json(name)["cases"].take()).unwrap()
}

/// The text of `ids` as a stream gives it.
fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[TokenId]) -> String {
    let mut decoder = Decoder::new(Arc::clone(tokenizer), Arc::default(), None);
    let mut text = String::new();
    for &id in ids {
        decoder.push(id, true, &mut text);
    }
    decoder.finish(true, &mut text);
    text
}

/// Texts that are encoded or decoded differently from what was recorded, with what differs.
fn differing(tokenizer: Tokenizer, cases: &[Case]) -> Vec<String> {
    let tokenizer = Arc::new(tokenizer);
    let differs = |c: &Case| {
        let mut what = Vec::new();
        let mut check = |name, same: bool| what.extend((!same).then_some(name));
        check("plain", tokenizer.encode(&c.text, false).unwrap() == c.plain);
        check("special", tokenizer.encode(&c.text, true).unwrap() == c.special);
        if let Some(prompt) = &c.prompt {
            // A BOS that the text spells is not put there twice.
            let expected = if prompt.get(1) == prompt.first() { &prompt[1..] } else { prompt };
            check("prompt", tokenizer.encode_prompt(&c.text, true).unwrap() == expected);
        }
        if let Some(decoded) = &c.decoded {
            check("text", decode::text(&tokenizer, &c.plain, false) == *decoded);
            check("stream", streamed(&tokenizer, &c.plain) == *decoded);
        }
        (!what.is_empty()).then(|| format!("{:?}: {}", c.text, what.join(", ")))
    };
    cases.iter().filter_map(differs).collect()
}

#[test]
fn reference_model_gives_the_recorded_ids() {
    let tokenizer = gemma();
    let prompts: [(&str, &[TokenId]); 3] = [
        ("The capital of France is", &[2, 818, 5279, 529, 7001, 563]),
        ("def fibonacci(n):\n", &[2, 2063, 10779, 78113, 236769, 236749, 1473, 107]),
        ("Kubernetes is an open source", &[2, 114107, 43604, 563, 614, 1932, 3738]),
    ];
    for (text, ids) in prompts {
        assert_eq!(tokenizer.encode_prompt(text, false).unwrap(), ids);
        assert_eq!(decode::text(&tokenizer, &ids[1..], false), text);
    }
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab(), tokenizer.strips_space()), (Some(2), Some(1), 262_144, false));
    assert_eq!(tokenizer.end_ids(), [1, 106]);
    assert!(!tokenizer.has_template() && tokenizer.adds_bos());
    assert_eq!(differing(tokenizer, &golden("gemma3-270m.json")), [""; 0]);
}

#[test]
fn byte_level_tokenizer_json_gives_the_recorded_ids_and_texts() {
    for model in ["llama", "gemma3"] {
        let tokenizer = Tokenizer::from_card(&card(model)).unwrap();
        assert_eq!(differing(tokenizer, &golden("llama-fixture.json")), [""; 0]);
    }
}

#[test]
fn boundary_tokenizer_json_gives_the_recorded_ids_and_texts() {
    let mut json = golden_json("boundary.tokenizer.json");
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"});
    let tokenizer = |json: &Value| Tokenizer::from_card(&card_of(&[("tokenizer.json", json), ("tokenizer_config.json", &config)])).unwrap();
    assert!(!tokenizer(&json).strips_space());
    assert_eq!(differing(tokenizer(&json), &golden("boundary.json")), [""; 0]);
    assert!(!differing(tokenizer(&json), &golden("boundary-prefixed.json")).is_empty(), "the comparison sees the prefix");
    // Llama 2's form: a space before the text, dropped again when decoding.
    let prefixed = golden_json("boundary-prefixed.json");
    for key in ["normalizer", "pre_tokenizer", "decoder"] {
        json[key] = prefixed[key].clone();
    }
    assert!(tokenizer(&json).strips_space());
    assert_eq!(differing(tokenizer(&json), &golden("boundary-prefixed.json")), [""; 0]);
}

#[test]
fn the_comparison_sees_differences() {
    let case = |text: &str, plain: &[TokenId]| Case {
        text: text.to_owned(),
        plain: plain.to_vec(),
        special: llama().encode(text, true).unwrap(),
        prompt: None,
        decoded: None,
    };
    assert_eq!(differing(llama(), &[case("a", &[1])]), ["\"a\": plain"]);
    let right = case("a", &llama().encode("a", false).unwrap());
    assert_eq!(differing(llama(), &[Case { decoded: Some("b".to_owned()), ..right }]), ["\"a\": text, stream"]);
}

#[test]
fn end_ids_are_those_of_all_files() {
    let tokenizer = llama();
    // generation_config.json names 1 and 4, both are also known by their texts.
    assert_eq!((tokenizer.end_ids(), tokenizer.bos(), tokenizer.eos()), (&[1, 4][..], Some(0), Some(4)));
    let json: Value = serde_json::from_slice(card("llama").file("tokenizer.json").unwrap()).unwrap();
    let ends = |generation: Value, config: Value| {
        let files = card_of(&[("tokenizer.json", &json), ("generation_config.json", &generation), ("config.json", &config)]);
        Tokenizer::from_card(&files).unwrap().end_ids().to_vec()
    };
    assert_eq!(ends(json!({"eos_token_id": 7}), json!({"eos_token_id": 9})), [1, 4, 7], "generation_config.json wins");
    assert_eq!(ends(json!({}), json!({"eos_token_id": [9, 8]})), [1, 4, 8, 9]);
    assert_eq!(ends(json!({"eos_token_id": null}), json!({})), [1, 4]);
    assert_eq!(ends(json!({"eos_token_id": 5000}), json!({})), [1, 4], "ids outside the vocabulary never come");
}

#[test]
fn generation_defaults_are_read_and_checked() {
    let json: Value = serde_json::from_slice(card("llama").file("tokenizer.json").unwrap()).unwrap();
    let read = |generation: Value| Tokenizer::from_card(&card_of(&[("tokenizer.json", &json), ("generation_config.json", &generation)]));
    let all = json!({"do_sample": true, "temperature": 0.5, "top_k": 64, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1, "eos_token_id": [1]});
    let tokenizer = read(all).unwrap();
    let d = tokenizer.defaults();
    assert_eq!((d.do_sample, d.temperature, d.top_k, d.top_p), (Some(true), Some(0.5), Some(64), Some(0.95)));
    assert_eq!((d.min_p, d.repetition_penalty), (Some(0.1), Some(1.1)));
    let none = read(json!({"temperature": null})).unwrap();
    assert_eq!((none.defaults().temperature, none.defaults().top_k), (None, None));
    for (wrong, parts) in [
        (json!({"temperature": -1.0}), ["generation_config.json", "temperature", "-1", "0 to 100"]),
        (json!({"top_p": 1.5}), ["generation_config.json", "top_p", "1.5", "0 to 1"]),
        (json!({"repetition_penalty": 0.0}), ["generation_config.json", "repetition_penalty", "0", "positive"]),
        (json!({"eos_token_id": "x"}), ["generation_config.json", "eos_token_id", "\"x\"", "a token id or a list"]),
        (json!({"eos_token_id": [1, -1]}), ["generation_config.json", "eos_token_id", "-1", "a token id or a list"]),
        (json!({"top_k": "many"}), ["generation_config.json", "many", "u32", "line 1"]),
    ] {
        let said = read(wrong.clone()).unwrap_err().to_string();
        assert!(parts.iter().all(|p| said.contains(p)), "{wrong} says {said:?}, expected {parts:?}");
    }
}

#[test]
fn cards_without_a_usable_tokenizer_are_refused() {
    let refused = |files: &[(&str, &Value)]| Tokenizer::from_card(&card_of(files)).unwrap_err();
    let none = refused(&[("config.json", &json!({}))]);
    assert!(none.to_string().contains("found config.json") && none.reason() == "tokenizer_missing", "{none}");
    assert!(refused(&[]).to_string().contains("no files"));
    let json = golden_json("boundary.tokenizer.json");
    let with = |key: &str, value: Value| {
        let mut json = json.clone();
        json[key] = value;
        refused(&[("tokenizer.json", &json)]).to_string()
    };
    assert!(
        with("decoder", json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true}))
            .contains("decoder \"CTC\"")
    );
    assert!(with("model", json!({"type": "Psychic"})).contains("tokenizer.json"));
    assert!(with("added_tokens", json!([{"id": 1_000_000_000, "content": "x"}])).contains("tokenizer.json"));
    assert!(refused(&[("tokenizer.json", &json), ("tokenizer_config.json", &json!([1]))]).to_string().contains("tokenizer_config.json"));
    let damaged = ModelCard { files: vec![CardFile { name: GGUF_HEADER.to_owned(), bytes: b"GGUF\x03".to_vec() }] };
    assert!(Tokenizer::from_card(&damaged).unwrap_err().to_string().contains("header.gguf"));
}
