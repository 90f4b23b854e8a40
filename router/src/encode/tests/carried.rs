//! Tokenizers carried from one kind of file to the other give the recorded ids.

use plan::gguf::Writer;

use super::*;

/// The header of a GGUF file with what `card` says.
fn header(card: &ModelCard) -> ModelCard {
    let mut file = Writer::new();
    file.metadata("general.architecture", plan::gguf::Value::String("llama".to_owned()));
    for (key, value) in gguf_entries(card, 0).unwrap() {
        file.metadata(&key, value);
    }
    ModelCard { files: vec![CardFile { name: GGUF_HEADER.to_owned(), bytes: file.to_bytes().unwrap() }] }
}

fn folder(card: &ModelCard) -> ModelCard {
    ModelCard { files: tokenizer_files(card).unwrap() }
}

/// The same header without the whole tokenizer.json, as other programs see it.
fn without_json(card: &ModelCard) -> ModelCard {
    let bytes = card.file(GGUF_HEADER).unwrap();
    let keys = ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores", "tokenizer.ggml.merges"];
    let read = plan::gguf::read(&mut &*bytes, bytes.len() as u64, plan::gguf::Keep::Keys(&keys), false).unwrap();
    let mut file = Writer::new();
    for entry in read.metadata.into_iter().filter(|e| e.key != plan::gguf::HUGGINGFACE_KEY) {
        file.metadata(&entry.key, entry.value);
    }
    ModelCard { files: vec![CardFile { name: GGUF_HEADER.to_owned(), bytes: file.to_bytes().unwrap() }] }
}

fn tokenizer(card: &ModelCard) -> Tokenizer {
    Tokenizer::from_card(card).unwrap()
}

#[test]
fn a_byte_level_tokenizer_goes_to_gguf_and_back() {
    let cases = golden("llama-fixture.json");
    let there = header(&card("llama"));
    assert_eq!(differing(tokenizer(&there), &cases), [""; 0]);
    assert_eq!(differing(tokenizer(&without_json(&there)), &cases), [""; 0], "by its keys alone");
    for back in [folder(&there), folder(&without_json(&there))] {
        let t = tokenizer(&back);
        assert!(t.has_own_template());
        assert_eq!((t.end_ids(), t.bos(), t.eos(), t.adds_bos()), (&[1, 4][..], Some(0), Some(4), true));
        assert_eq!(t.defaults(), llama().defaults());
        let messages = [json!({"role": "user", "content": "hi <|eot_id|>"})];
        let chat = |t: &Tokenizer| t.chat(&messages, ChatOptions::default()).unwrap();
        assert_eq!(chat(&t), chat(&llama()));
        assert_eq!(differing(t, &cases), [""; 0]);
    }
    // A model without a beginning token, with more rows than tokens.
    let wide = gguf_entries(&card("qwen2"), 600).unwrap();
    let tokens = wide.iter().find(|(key, _)| key == "tokenizer.ggml.tokens").unwrap().1.as_array().unwrap();
    assert_eq!(tokens.values.as_ref().unwrap()[599].as_str(), Some("[PAD599]"));
    assert!(!tokenizer(&header(&card("qwen2"))).adds_bos());
}

#[test]
fn a_boundary_tokenizer_goes_to_gguf_and_back() {
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"});
    let mut json = golden_json("boundary.tokenizer.json");
    let prefixed = golden_json("boundary-prefixed.json");
    for name in ["boundary.json", "boundary-prefixed.json"] {
        let there = header(&card_of(&[("tokenizer.json", &json), ("tokenizer_config.json", &config)]));
        assert_eq!(differing(tokenizer(&there), &golden(name)), [""; 0], "{name}");
        assert_eq!(differing(tokenizer(&folder(&there)), &golden(name)), [""; 0], "{name}");
        for key in ["normalizer", "pre_tokenizer", "decoder"] {
            json[key] = prefixed[key].clone();
        }
    }
}

/// By the keys where they say all there is; whole where text keeps its case, which they cannot say.
#[test]
fn word_pieces_go_to_gguf_and_back() {
    let mut files = card("bert");
    for (golden, exact) in [("random-bert.json", true), ("random-bert-cased.json", false)] {
        let there = header(&files);
        assert_eq!(without_json(&there) == there, exact, "{golden}");
        let back = folder(&there);
        assert_eq!(back.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["tokenizer.json", "tokenizer_config.json"]);
        let before = tokenizer(&files);
        for (name, card) in [("header", &there), ("folder", &back)] {
            let after = tokenizer(card);
            random::matches(golden, &after);
            let (ends, vocab) = ((before.end_ids(), before.eos()), before.vocab());
            assert_eq!(((after.end_ids(), after.eos()), after.vocab()), (ends, vocab), "{name}");
            let ids = |t: &Tokenizer| (t.encode_prompt("the fox", true).unwrap(), t.encode_pair("the fox", "geese", true).unwrap());
            assert_eq!(ids(&after), ids(&before), "{name}");
        }
        let file = files.files.iter_mut().find(|f| f.name == "tokenizer.json").unwrap();
        let mut json: Value = serde_json::from_slice(&file.bytes).unwrap();
        json["normalizer"]["lowercase"] = false.into();
        file.bytes = json.to_string().into_bytes();
    }
    // vocab.txt says the same as its tokenizer.json.
    let mut lines = card("bert");
    let json: Value = serde_json::from_slice(lines.file("tokenizer.json").unwrap()).unwrap();
    let mut tokens: Vec<(&String, u64)> =
        json["model"]["vocab"].as_object().unwrap().iter().map(|(t, id)| (t, id.as_u64().unwrap())).collect();
    tokens.sort_by_key(|t| t.1);
    let text: String = tokens.iter().map(|(token, _)| format!("{token}\n")).collect();
    lines.files.retain(|f| f.name != "tokenizer.json");
    lines.files.push(CardFile { name: "vocab.txt".to_owned(), bytes: text.into_bytes() });
    assert_eq!(header(&lines), header(&card("bert")));
}

#[test]
#[should_panic(expected = "random-bert-cased.json")]
fn keys_alone_lose_the_case() {
    let mut card = card("bert");
    let file = card.files.iter_mut().find(|f| f.name == "tokenizer.json").unwrap();
    let mut json: Value = serde_json::from_slice(&file.bytes).unwrap();
    json["normalizer"]["lowercase"] = false.into();
    file.bytes = json.to_string().into_bytes();
    random::matches("random-bert-cased.json", &tokenizer(&without_json(&header(&card))));
}

/// Every way to make a piece of two others is a merge; so the reference's ids come from a tokenizer.json too.
#[test]
fn the_reference_models_tokenizer_goes_to_tokenizer_json() {
    let files = tokenizer_files(&gemma_card()).unwrap();
    assert_eq!(differing(tokenizer(&ModelCard { files }), &golden("gemma3-270m.json")), [""; 0]);
}
