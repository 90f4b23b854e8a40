//! Random strings: the ids of the Python packages tokenizers and sentencepiece.

use plan::gguf::Writer;
use sha2::{Digest, Sha256};

use super::*;

#[derive(serde::Deserialize)]
struct Golden {
    strings: u64,
    /// SHA-256 of all ids.
    ids: String,
    /// Bit n: string n is decoded to itself.
    same: String,
    cases: Vec<One>,
}

#[derive(serde::Deserialize)]
struct One {
    text: String,
    ids: Vec<TokenId>,
    decoded: String,
}

/// Ranges of code points that characters are drawn from.
const POOLS: [(u32, u32); 16] = [
    (0x20, 0x7e),
    (0x61, 0x7a),
    (0x30, 0x39),
    (0x20, 0x20),
    (0x09, 0x0d),
    (0x00, 0x1f),
    (0xa0, 0x17f),
    (0x300, 0x36f),
    (0x5d0, 0x6ff),
    (0x2000, 0x206f),
    (0x2581, 0x2581),
    (0x3040, 0x30ff),
    (0x4e00, 0x9fff),
    (0xac00, 0xd7a3),
    (0x1f300, 0x1faff),
    (0x10_fff0, 0x10_ffff),
];

/// Vigna's SplitMix64.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// String `number` of tests/python/golden_tokenizers.py.
fn string(number: u64) -> String {
    let mut state = number;
    let length = 1 + splitmix(&mut state) % 24;
    let mut character = || {
        let (low, high) = POOLS[(splitmix(&mut state) % 16) as usize];
        char::from_u32(low + (splitmix(&mut state) % u64::from(high - low + 1)) as u32).unwrap()
    };
    (0..length).map(|_| character()).collect()
}

/// Asserts that `tokenizer` gives the ids of a golden file, and decodes to themselves the texts that the reference does.
pub(super) fn matches(name: &str, tokenizer: &Tokenizer) {
    let golden: Golden = serde_json::from_value(golden_json(name)).unwrap();
    for One { text, ids, decoded } in &golden.cases {
        assert_eq!(tokenizer.encode(text, false).unwrap(), *ids, "{name}: {text:?}");
        if text == decoded {
            assert_eq!(decode::text(tokenizer, ids, false), *text, "{name}");
        }
    }
    let (mut digest, mut same) = (Sha256::new(), 0);
    for number in 0..golden.strings {
        let text = string(number);
        let ids = tokenizer.encode(&text, false).unwrap();
        let list: Vec<String> = ids.iter().map(u32::to_string).collect();
        digest.update(list.join(",") + "\n");
        let byte = (number / 8 * 2) as usize;
        if u8::from_str_radix(&golden.same[byte..byte + 2], 16).unwrap() >> (number % 8) & 1 == 1 {
            assert_eq!(decode::text(tokenizer, &ids, false), text, "{name}: string {number}");
            same += 1;
        }
    }
    let hex: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, golden.ids, "{name}");
    assert!(
        same * 3 > golden.strings || ["plain", "bert", "unigram", "table"].iter().any(|kind| name.contains(kind)),
        "{name}: {same} strings are decoded to themselves"
    );
}

fn boundary(prefixed: bool) -> ModelCard {
    let mut json = golden_json("boundary.tokenizer.json");
    let other = golden_json("boundary-prefixed.json");
    for key in ["normalizer", "pre_tokenizer", "decoder"].iter().filter(|_| prefixed) {
        json[*key] = other[*key].clone();
    }
    card_of(&[("tokenizer.json", &json)])
}

/// A vocabulary with tokens across the borders of other splittings; text is split as DeepSeek V3's, or as Qwen's.
fn deepseek(own: bool) -> ModelCard {
    let mut json: Value = serde_json::from_slice(card("qwen2").file("tokenizer.json").unwrap()).unwrap();
    let other = golden_json("deepseek-v3.json");
    json["model"] = other["model"].clone();
    if own {
        json["pre_tokenizer"] = other["pre_tokenizer"].clone();
    }
    card_of(&[("tokenizer.json", &json)])
}

fn spm(name: &str) -> ModelCard {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/encode/golden").join(name);
    ModelCard { files: vec![CardFile { name: "tokenizer.model".to_owned(), bytes: std::fs::read(path).unwrap() }] }
}

#[test]
fn tokenizer_json_gives_the_ids_of_tokenizers() {
    for name in ["llama", "qwen2", "gpt2"] {
        matches(&format!("random-{name}.json"), &Tokenizer::from_card(&card(name)).unwrap());
    }
    matches("random-deepseek-v3.json", &Tokenizer::from_card(&deepseek(true)).unwrap());
    matches("random-boundary.json", &Tokenizer::from_card(&boundary(false)).unwrap());
    matches("random-boundary-prefixed.json", &Tokenizer::from_card(&boundary(true)).unwrap());
}

/// The keys of a GGUF header alone, with the pre-tokenizers llama-bpe, qwen2, gpt-2 and deepseek-v3.
#[test]
fn byte_level_headers_give_the_ids_of_tokenizers() {
    let named = ["llama", "qwen2", "gpt2"].map(|name| (name, card(name)));
    for (name, card) in named.into_iter().chain([("deepseek-v3", deepseek(true))]) {
        let mut file = Writer::new();
        for (key, value) in gguf_entries(&card, 0).unwrap() {
            if key == "tokenizer.ggml.pre" && name == "deepseek-v3" {
                assert_eq!(value.as_str(), Some(name));
            }
            if key != plan::gguf::HUGGINGFACE_KEY {
                file.metadata(&key, value);
            }
        }
        let bytes = file.to_bytes().unwrap();
        let header = ModelCard { files: vec![CardFile { name: GGUF_HEADER.to_owned(), bytes }] };
        matches(&format!("random-{name}.json"), &Tokenizer::from_card(&header).unwrap());
    }
}

#[test]
fn tokenizer_model_gives_the_ids_of_sentencepiece() {
    let tokenizer = Tokenizer::from_card(&spm("spm-bytes.model")).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos(), tokenizer.strips_space()), (Some(1), Some(2), true, true));
    matches("random-spm-bytes.json", &tokenizer);
    let tokenizer = Tokenizer::from_card(&spm("spm-plain.model")).unwrap();
    assert!(!tokenizer.strips_space());
    matches("random-spm-plain.json", &tokenizer);
}

/// Pieces that are taken by their probability, with the table of NFKC, bytes for what has no piece, pieces that are always matched, and
/// spaces that are removed; and without any of these. Then pieces that are merged, with a table of rules that overlap.
#[test]
fn other_kinds_of_tokenizer_model_give_the_ids_of_sentencepiece() {
    for name in ["unigram", "unigram-plain", "table"] {
        let tokenizer = Tokenizer::from_card(&spm(&format!("spm-{name}.model"))).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (Some(1), Some(2), true), "{name}");
        matches(&format!("random-spm-{name}.json"), &tokenizer);
    }
    let json = golden_json("unigram.tokenizer.json");
    matches("random-unigram-json.json", &Tokenizer::from_card(&card_of(&[("tokenizer.json", &json)])).unwrap());
}

/// The header of a GGUF file with the entries that `change` leaves.
fn header_of(name: &str, change: impl Fn(&str) -> bool) -> ModelCard {
    let mut file = Writer::new();
    for (key, value) in gguf_entries(&spm(name), 0).unwrap().into_iter().filter(|(key, _)| change(key)) {
        file.metadata(&key, value);
    }
    ModelCard { files: vec![CardFile { name: GGUF_HEADER.to_owned(), bytes: file.to_bytes().unwrap() }] }
}

/// GGUF's keys of such a model say all there is.
#[test]
fn likeliest_pieces_go_to_gguf() {
    for name in ["unigram", "unigram-plain"] {
        let card = header_of(&format!("spm-{name}.model"), |_| true);
        let (before, after) = (Tokenizer::from_card(&spm(&format!("spm-{name}.model"))).unwrap(), Tokenizer::from_card(&card).unwrap());
        matches(&format!("random-spm-{name}.json"), &after);
        let ids = |t: &Tokenizer| t.encode_prompt("The geese <s> ab", true).unwrap();
        assert_eq!(ids(&after), ids(&before));
        assert!(tokenizer_files(&card).unwrap_err().to_string().contains("likeliest pieces"));
    }
    // Where nothing says what is around a text, llama.cpp ends it and does not begin it.
    let bare = header_of("spm-unigram.model", |key| !key.contains("add_bos") && !key.contains("add_eos"));
    let ids = Tokenizer::from_card(&bare).unwrap().encode_prompt("a", true).unwrap();
    assert!(ids[0] != 1 && ids.ends_with(&[2]), "{ids:?}");
    // Files of T5 leave it to their class too.
    let mut files = spm("spm-unigram.model");
    files.files.push(CardFile { name: "tokenizer_config.json".to_owned(), bytes: br#"{"tokenizer_class": "T5Tokenizer"}"#.to_vec() });
    assert_eq!(Tokenizer::from_card(&files).unwrap().encode_prompt("a", true).unwrap(), ids);
    // A table beside merged pieces has no key.
    assert!(gguf_entries(&spm("spm-table.model"), 0).unwrap_err().to_string().contains("table of normalization"));
}

#[test]
#[should_panic(expected = "random-spm-unigram.json")]
fn the_comparison_sees_a_missing_table() {
    let card = header_of("spm-unigram.model", |key| key != plan::gguf::CHARSMAP);
    matches("random-spm-unigram.json", &Tokenizer::from_card(&card).unwrap());
}

#[test]
#[should_panic(expected = "random-spm-unigram.json")]
fn the_comparison_sees_spaces_that_stay() {
    let card = header_of("spm-unigram.model", |key| !key.ends_with("remove_extra_whitespaces"));
    matches("random-spm-unigram.json", &Tokenizer::from_card(&card).unwrap());
}

#[test]
#[should_panic(expected = "random-spm-unigram.json")]
fn the_comparison_sees_pieces_that_are_merged() {
    let mut card = spm("spm-unigram.model");
    // Field 3 of the settings says how: 1, the likeliest.
    let bytes = &mut card.files[0].bytes;
    let at = bytes.windows(4).rposition(|w| w == [0x18, 1, 0x20, 0xd8]).unwrap();
    bytes[at + 1] = 2;
    matches("random-spm-unigram.json", &Tokenizer::from_card(&card).unwrap());
}

/// Tables whose parts do not fit, or whose tree leads out of it.
#[test]
fn damaged_tables_are_refused_or_replace_nothing() {
    let whole = plan::sentencepiece::read(spm("spm-table.model").file("tokenizer.model").unwrap()).unwrap().charsmap;
    let read = normalizer::Charsmap::read;
    assert!(read(&whole).is_ok_and(|table| table.is_some()) && read(&[]).is_ok_and(|table| table.is_none()));
    for wrong in [&whole[..3], &whole[..40], &whole[..whole.len() - 1], &[1, 0, 0, 0, 0, 0], &[0, 0, 0, 0, 0]] {
        assert!(read(wrong).is_err_and(|e| e.to_string().contains("precompiled_charsmap")), "{} bytes", wrong.len());
    }
    for at in 0..whole.len() {
        for bit in [0, 3, 7] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            if let Ok(Some(table)) = read(&damaged) {
                for text in ["ab abc \u{fb01} e\u{301} \u{65e5}\u{672c}\u{3000}<t", "\u{10ffff}"] {
                    text.char_indices().for_each(|(i, _)| assert!(table.longest(&text[i..]).is_none_or(|(_, len)| len <= text.len() - i)));
                }
            }
        }
    }
}

/// What GGUF's keys say of a tokenizer.model gives the same ids, but where tokens that are always matched meet the space before a text.
#[test]
fn a_tokenizer_model_goes_to_gguf() {
    let mut file = Writer::new();
    for (key, value) in gguf_entries(&spm("spm-bytes.model"), 0).unwrap() {
        file.metadata(&key, value);
    }
    let header = ModelCard { files: vec![CardFile { name: GGUF_HEADER.to_owned(), bytes: file.to_bytes().unwrap() }] };
    let (before, after) = (Tokenizer::from_card(&spm("spm-bytes.model")).unwrap(), Tokenizer::from_card(&header).unwrap());
    let ids = |t: &Tokenizer, text: &str| t.encode_prompt(text, false).unwrap();
    let plain = (0..500).map(string).filter(|text| !text.contains(['\u{2581}', ' ']));
    let (mut same, mut all) = (0, 0);
    for text in plain {
        (same, all) = (same + usize::from(ids(&before, &text) == ids(&after, &text)), all + 1);
    }
    assert!(all > 50 && same == all, "{same} of {all}");
    assert_eq!((before.end_ids(), before.bos(), before.strips_space()), (after.end_ids(), after.bos(), after.strips_space()));
}

/// WordPiece from tokenizer.json, from vocab.txt and from GGUF's keys.
#[test]
fn word_pieces_have_the_ids_of_tokenizers() {
    let card = card("bert");
    let json: Value = serde_json::from_slice(card.file("tokenizer.json").unwrap()).unwrap();
    let vocabulary = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocabulary.len()];
    for (token, id) in vocabulary {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let lines = CardFile { name: "vocab.txt".to_owned(), bytes: (tokens.join("\n") + "\n").into_bytes() };
    let config = card.files.iter().find(|f| f.name == "tokenizer_config.json").unwrap().clone();
    // As converters write them: what begins a word has a mark, what continues one has none.
    let mut file = Writer::new();
    file.metadata("tokenizer.ggml.model", plan::gguf::Value::String("bert".to_owned()));
    let stored = tokens.iter().map(|token| match token.strip_prefix("##") {
        Some(more) => more.to_owned(),
        None if token.starts_with('[') && token.ends_with(']') => token.clone(),
        None => format!("\u{2581}{token}"),
    });
    file.array("tokenizer.ggml.tokens", plan::gguf::Kind::String, stored.map(plan::gguf::Value::String).collect());
    let header = CardFile { name: GGUF_HEADER.to_owned(), bytes: file.to_bytes().unwrap() };
    let made = Tokenizer::from_card(&card).unwrap();
    for files in [card.files.clone(), vec![config, lines.clone()], vec![lines], vec![header]] {
        let tokenizer = Tokenizer::from_card(&ModelCard { files }).unwrap();
        matches("random-bert.json", &tokenizer);
        let pair = tokenizer.encode_pair("the fox", "geese", true).unwrap();
        assert_eq!((&pair, tokenizer.vocab()), (&made.encode_pair("the fox", "geese", true).unwrap(), 512));
        assert_eq!(pair.0[..pair.1], tokenizer.encode_prompt("the fox", true).unwrap());
    }
}

/// What vocab.txt and its settings do not say right.
#[test]
fn word_pieces_without_their_marks_are_refused() {
    let refused = |vocabulary: &[u8], config: Value| {
        let file = |name: &str, bytes: &[u8]| CardFile { name: name.to_owned(), bytes: bytes.to_vec() };
        let files = vec![file("tokenizer_config.json", config.to_string().as_bytes()), file("vocab.txt", vocabulary)];
        Tokenizer::from_card(&ModelCard { files }).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let marks = "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n##b\n";
    assert_eq!(refused(marks.as_bytes(), json!({})), "");
    assert!(refused(b"[UNK]\n[CLS]\na\n", json!({})).contains("no token \"[SEP]\""));
    assert!(refused(marks.as_bytes(), json!({"unk_token": "<unk>"})).contains("no token \"<unk>\""));
    assert!(refused(marks.as_bytes(), json!({"tokenizer_class": "PhobertTokenizer"})).contains("PhobertTokenizer"));
    assert!(refused(marks.as_bytes(), json!({"do_lower_case": "yes"})).contains("tokenizer_config.json"));
    assert!(refused(b"[UNK]\n\xff\n", json!({})).contains("vocab.txt"));
}

#[test]
#[should_panic(expected = "random-deepseek-v3.json")]
fn the_comparison_sees_another_splitting() {
    matches("random-deepseek-v3.json", &Tokenizer::from_card(&deepseek(false)).unwrap());
}

#[test]
#[should_panic(expected = "random-qwen2.json")]
fn the_comparison_sees_another_vocabulary() {
    matches("random-qwen2.json", &Tokenizer::from_card(&card("llama")).unwrap());
}

#[test]
fn added_tokens_and_settings_of_tokenizer_config_count() {
    let mut card = spm("spm-bytes.model");
    let config = json!({"bos_token": "</s>", "add_bos_token": false, "add_eos_token": true,
        "added_tokens_decoder": {"601": {"content": "<|im_end|>", "special": true}, "602": {"content": "<x>", "special": false}}});
    card.files.push(CardFile { name: "tokenizer_config.json".to_owned(), bytes: config.to_string().into_bytes() });
    let tokenizer = Tokenizer::from_card(&card).unwrap();
    assert_eq!((tokenizer.vocab(), tokenizer.bos(), tokenizer.end_ids()), (603, Some(2), &[2, 601][..]));
    let ids = tokenizer.encode_prompt("a<|im_end|><x>", true).unwrap();
    assert_eq!(ids[ids.len() - 3..], [601, 602, 2][..]);
    assert!(!tokenizer.encode("a<|im_end|>", false).unwrap().contains(&601));
}
