//! Tokenizers from one kind of file to the other: tokenizer.json to the keys of a GGUF header, and back.
//!
//! What the keys cannot say exactly goes along whole, as `tokenizer.huggingface.json`, which readers that know it prefer.

use std::collections::{HashMap, HashSet};

use plan::card::{CardFile, GGUF_HEADER, ModelCard};
use plan::gguf::{Array, Kind, TokenType, Tokenizer as Stored, Value as Gguf};
use plan::step::TokenId;
use serde_json::{Map, Value, json};

use super::card::TokenizerConfig;
use super::error::TokenizerError;
use super::pieces::named_byte;
use super::pipeline::{self, pre_tokenization};
use super::sentencepiece;
use super::spm::BOUNDARY;
use super::{Tokenizer, json as hf, wordpiece};

/// Key of the generation settings that go along.
const GENERATION: &str = plan::generation::GGUF_KEY;
const WHOLE: &str = plan::gguf::HUGGINGFACE_KEY;

/// The entries of a GGUF header that say what the tokenizer, templates and generation settings of `card` are; `vocab` rows have a token each.
///
/// # Errors
/// When the card has no tokenizer.json, or it cannot be read.
pub fn gguf_entries(card: &ModelCard, vocab: usize) -> Result<Vec<(String, Gguf)>, TokenizerError> {
    let wrong = |problem: String| TokenizerError::File { file: "tokenizer.json", problem };
    if let (None, Some(bytes)) = (card.file("tokenizer.json"), card.file(sentencepiece::FILE)) {
        return pieces(bytes, card, vocab);
    }
    let (tokenizer, config) = (Tokenizer::from_card(card)?, TokenizerConfig::read(card)?);
    let bytes = match (card.file("tokenizer.json"), card.file(wordpiece::FILE)) {
        (Some(bytes), _) => bytes.to_vec(),
        (None, Some(lines)) => wordpiece::of_lines(lines, card, &config)?,
        (None, None) => {
            let names: Vec<&str> = card.files.iter().map(|f| f.name.as_str()).collect();
            return Err(TokenizerError::Missing(if names.is_empty() { "no files".to_owned() } else { names.join(", ") }));
        }
    };
    let file: Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    let known = hf::Known::read(&bytes)?;
    let size = tokenizer.vocab().max(vocab);
    let (mut tokens, mut types) = (Vec::with_capacity(size), Vec::with_capacity(size));
    let score_merged = known.is_score_merged();
    let word_pieces = known.is_word_pieces();
    for id in 0..size as TokenId {
        let (text, kind) = match (known.added(id), known.text(id)) {
            (Some((text, true)), _) => (text.to_owned(), TokenType::Control),
            (Some((text, false)), _) => (text.to_owned(), TokenType::UserDefined),
            (None, Some(text)) if score_merged && named_byte(&text).is_some() => (text, TokenType::Byte),
            (None, Some(text)) if word_pieces => (wordpiece::to_gguf(&text), TokenType::Normal),
            (None, Some(text)) => (text, TokenType::Normal),
            (None, None) => (format!("[PAD{id}]"), TokenType::Unused),
        };
        tokens.push(text);
        types.push(kind);
    }
    let merges = merges(&file);
    let (model, exact) = if word_pieces {
        (wordpiece::MODEL, wordpiece::of_gguf(&tokens, &types).is_ok_and(|made| same(&made, &file)))
    } else if score_merged {
        ("llama", false)
    } else if let Some(rule) = byte_level_rule(&file) {
        let overlap = overlapping(known.added_texts());
        (if rule.0.is_some() { "gpt2" } else { "none" }, rule.1 && !overlap && known.plain_added())
    } else {
        ("none", false)
    };
    let mut entries = vec![("tokenizer.ggml.model".to_owned(), Gguf::String(model.to_owned()))];
    let mut put = |key: &str, value: Gguf| entries.push((format!("tokenizer.{key}"), value));
    if let Some((Some(pre), _)) = byte_level_rule(&file).filter(|_| model == "gpt2") {
        put("ggml.pre", Gguf::String(pre.to_owned()));
    }
    if score_merged {
        put("ggml.pre", Gguf::String("default".to_owned()));
        let scores = scores(&tokens, &merges).into_iter().map(Gguf::F32).collect();
        put("ggml.scores", list(Kind::F32, scores));
        put("ggml.add_space_prefix", Gguf::Bool(tokenizer.strips_space()));
    }
    put("ggml.tokens", list(Kind::String, tokens.into_iter().map(Gguf::String).collect()));
    put("ggml.token_type", list(Kind::I32, types.into_iter().map(|kind| Gguf::I32(number(kind))).collect()));
    if !score_merged && !merges.is_empty() {
        put("ggml.merges", list(Kind::String, merges.iter().map(|(a, b)| Gguf::String(format!("{a} {b}"))).collect()));
    }
    let (prefix, suffix) = (&tokenizer.vocabulary.prefix, &tokenizer.vocabulary.suffix);
    let unknown = file["model"]["unk_token"].as_str().and_then(|text| known.id(text));
    let padding = config.pad.as_deref().and_then(|text| known.id(text));
    // What begins a text is its first token, whether or not a file calls it so.
    let bos = tokenizer.bos().or(prefix.first().copied());
    let [cls, separator, mask] = match word_pieces {
        true => [bos, suffix.last().copied(), config.mask.as_deref().and_then(|text| known.id(text))],
        false => [None; 3],
    };
    let of_words = [("cls", cls), ("seperator", separator), ("mask", mask)];
    for (key, id) in [("bos", bos), ("eos", tokenizer.eos()), ("unknown", unknown), ("padding", padding)].into_iter().chain(of_words) {
        if let Some(id) = id {
            put(&format!("ggml.{key}_token_id"), Gguf::U32(id));
        }
    }
    let around = |ids: &[TokenId], id: Option<TokenId>| match ids {
        [] => Some(false),
        [one] if Some(*one) == id => Some(true),
        _ => None,
    };
    let (add_bos, add_eos) = (around(prefix, bos), around(suffix, tokenizer.eos()));
    for (key, flag) in [("ggml.add_bos_token", add_bos), ("ggml.add_eos_token", add_eos)] {
        // Those of words are around every text.
        if let Some(flag) = flag.filter(|_| !word_pieces) {
            put(key, Gguf::Bool(flag));
        }
    }
    entries.extend(templates(&config));
    if !exact || (!word_pieces && (add_bos.is_none() || add_eos.is_none())) {
        let text = String::from_utf8(bytes).map_err(|e| wrong(e.to_string()))?;
        entries.push((WHOLE.to_owned(), Gguf::String(text)));
    }
    if let Some(settings) = generation(card, &tokenizer) {
        entries.push((GENERATION.to_owned(), Gguf::String(settings)));
    }
    Ok(entries)
}

/// Whether two tokenizer.json say the same but for what cuts and fills texts.
fn same(a: &Value, b: &Value) -> bool {
    ["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"].iter().all(|part| a[*part] == b[*part])
}

fn templates(config: &TokenizerConfig) -> impl Iterator<Item = (String, Gguf)> {
    let named = [("tokenizer.chat_template", &config.template), ("tokenizer.chat_template.tool_use", &config.tool_template)];
    named.into_iter().filter_map(|(key, template)| Some((key.to_owned(), Gguf::String(template.clone()?))))
}

/// The entries of a tokenizer.model, whose pieces and scores are those of a GGUF header.
fn pieces(bytes: &[u8], card: &ModelCard, vocab: usize) -> Result<Vec<(String, Gguf)>, TokenizerError> {
    let config = TokenizerConfig::read(card)?;
    let mut stored = sentencepiece::stored(bytes, card, &config)?;
    for id in stored.tokens.len()..vocab {
        stored.tokens.push(format!("[PAD{id}]"));
        stored.scores.push(f32::MIN);
        stored.types.push(TokenType::Unused);
    }
    let text = |(token, kind): (&String, &TokenType)| match kind {
        TokenType::UserDefined if stored.model != sentencepiece::LIKELIEST => Gguf::String(token.replace(BOUNDARY, " ")),
        _ => Gguf::String(token.clone()),
    };
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let mut entries = vec![
        (key("model"), Gguf::String(stored.model.clone())),
        (key("pre"), Gguf::String("default".to_owned())),
        (key("tokens"), list(Kind::String, stored.tokens.iter().zip(&stored.types).map(text).collect())),
        (key("scores"), list(Kind::F32, stored.scores.iter().map(|&s| Gguf::F32(s)).collect())),
        (key("token_type"), list(Kind::I32, stored.types.iter().map(|&kind| Gguf::I32(number(kind))).collect())),
    ];
    let ids = [("bos", stored.bos), ("eos", stored.eos), ("unknown", stored.unknown), ("padding", stored.padding)];
    entries.extend(ids.into_iter().filter_map(|(name, id)| Some((key(&format!("{name}_token_id")), Gguf::U32(id?)))));
    let likeliest = stored.model == sentencepiece::LIKELIEST;
    if !likeliest && (!stored.charsmap.is_empty() || stored.remove_extra_whitespaces == Some(true)) {
        let problem = "a table of normalization, or spaces that are removed, have no key in GGUF beside pieces that are merged".to_owned();
        return Err(TokenizerError::File { file: sentencepiece::FILE, problem });
    }
    if !stored.charsmap.is_empty() {
        let table = stored.charsmap.iter().map(|&byte| Gguf::U8(byte)).collect();
        entries.push((plan::gguf::CHARSMAP.to_owned(), list(Kind::U8, table)));
    }
    let flags = [
        ("add_bos_token", stored.add_bos),
        ("add_eos_token", stored.add_eos),
        ("add_space_prefix", stored.add_space_prefix),
        ("remove_extra_whitespaces", stored.remove_extra_whitespaces.filter(|_| likeliest)),
    ];
    entries.extend(flags.into_iter().filter_map(|(name, flag)| Some((key(name), Gguf::Bool(flag?)))));
    entries.extend(templates(&config));
    let settings = generation(card, &Tokenizer::from_card(card)?);
    entries.extend(settings.map(|settings| (GENERATION.to_owned(), Gguf::String(settings))));
    Ok(entries)
}

/// The generation settings of a card, whichever file they stand in.
fn generation(card: &ModelCard, tokenizer: &Tokenizer) -> Option<String> {
    if let Some(bytes) = card.file("generation_config.json") {
        return Some(String::from_utf8_lossy(bytes).into_owned());
    }
    let eos = &tokenizer.defaults().eos;
    (!eos.is_empty()).then(|| json!({"bos_token_id": tokenizer.defaults().bos, "eos_token_id": eos}).to_string())
}

/// The files beside the weights that say what the GGUF header of `card` says: tokenizer.json, tokenizer_config.json and
/// generation_config.json.
///
/// # Errors
/// When the header has no tokenizer, or one of a kind that is not known.
pub fn files(card: &ModelCard) -> Result<Vec<CardFile>, TokenizerError> {
    let wrong = |problem: String| TokenizerError::File { file: GGUF_HEADER, problem };
    let bytes = card.file(GGUF_HEADER).ok_or_else(|| TokenizerError::Missing("no GGUF header".to_owned()))?;
    let stored = Stored::parse(bytes).map_err(|e| wrong(e.to_string()))?;
    let tokenizer = Tokenizer::from_card(card)?;
    let mut json: Value = match &stored.huggingface {
        Some(text) => serde_json::from_str(text).map_err(|e| wrong(format!("{WHOLE}: {e}")))?,
        None if stored.model == "llama" => score_merged(&stored)?,
        None if stored.model == sentencepiece::LIKELIEST => {
            let problem = "likeliest pieces as SentencePiece takes them, which a tokenizer.json does not say exactly".to_owned();
            return Err(wrong(problem));
        }
        None if stored.model == wordpiece::MODEL => wordpiece::of_gguf(&stored.tokens, &stored.types)?,
        None => byte_level(&stored)?,
    };
    if stored.huggingface.is_none() || stored.add_bos.is_some() || stored.add_eos.is_some() {
        let ids = (&tokenizer.vocabulary.prefix[..], &tokenizer.vocabulary.suffix[..]);
        if hf::around_text(&json, &tokenizer) != (ids.0.to_vec(), ids.1.to_vec()) {
            json["post_processor"] = template(&stored, ids);
        }
    }
    let text = |id: Option<TokenId>| id.and_then(|id| stored.tokens.get(id as usize)).map_or(Value::Null, |t| json!(t));
    let mut config = Map::new();
    let mut put = |key: &str, value: Value| drop((!value.is_null()).then(|| config.insert(key.to_owned(), value)));
    put("tokenizer_class", json!("PreTrainedTokenizerFast"));
    put("clean_up_tokenization_spaces", json!(false));
    put("bos_token", text(tokenizer.bos()));
    put("eos_token", text(tokenizer.eos()));
    put("unk_token", text(stored.unknown));
    put("pad_token", text(stored.padding));
    let word_pieces = stored.model == wordpiece::MODEL;
    if word_pieces {
        put("cls_token", text(stored.bos));
        put("sep_token", text(stored.separator));
        put("mask_token", text(stored.mask));
    }
    if stored.named_templates.is_empty() {
        put("chat_template", stored.chat_template.clone().map_or(Value::Null, Value::from));
    } else {
        let default = stored.chat_template.iter().map(|t| ("default", t));
        let named = stored.named_templates.iter().map(|(name, t)| (name.as_str(), t));
        put("chat_template", default.chain(named).map(|(name, template)| json!({"name": name, "template": template})).collect());
    }
    let ends: Vec<TokenId> = [stored.eos, stored.eot, stored.eom].into_iter().flatten().collect();
    let settings = json!({"bos_token_id": tokenizer.bos(), "eos_token_id": ends});
    let generation = stored.generation.clone().unwrap_or_else(|| settings.to_string());
    let file = |name: &str, text: String| CardFile { name: name.to_owned(), bytes: text.into_bytes() };
    let files = [file("tokenizer.json", json.to_string()), file("tokenizer_config.json", Value::Object(config).to_string())];
    // What cuts words generates nothing.
    Ok((!word_pieces).then(|| file("generation_config.json", generation)).into_iter().chain(files).collect())
}

fn number(kind: TokenType) -> i32 {
    match kind {
        TokenType::Normal => 1,
        TokenType::Unknown => 2,
        TokenType::Control => 3,
        TokenType::UserDefined => 4,
        TokenType::Unused => 5,
        TokenType::Byte => 6,
    }
}

fn list(kind: Kind, values: Vec<Gguf>) -> Gguf {
    Gguf::Array(Box::new(Array { kind, len: values.len() as u64, values: Some(values) }))
}

/// The merges of a tokenizer.json, in either of its forms.
fn merges(file: &Value) -> Vec<(String, String)> {
    let pair = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(a), Value::String(b)] => Some((a.clone(), b.clone())),
            _ => None,
        },
        _ => None,
    };
    file["model"]["merges"].as_array().into_iter().flatten().filter_map(pair).collect()
}

/// The name of the splitting rule of a byte-level tokenizer.json, if it has one, and whether it says all there is; `None` for other kinds.
fn byte_level_rule(file: &Value) -> Option<(Option<&'static str>, bool)> {
    let model = &file["model"];
    let steps: Vec<&Value> = match file["pre_tokenizer"]["type"].as_str()? {
        "Sequence" => file["pre_tokenizer"]["pretokenizers"].as_array()?.iter().collect(),
        _ => vec![&file["pre_tokenizer"]],
    };
    let (last, splits) = steps.split_last()?;
    if model["type"] != "BPE" || last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    let mut patterns = Vec::new();
    for split in splits {
        match (split["type"].as_str(), split["pattern"]["Regex"].as_str(), split["behavior"].as_str()) {
            (Some("Split"), Some(pattern), Some("Isolated")) if split["invert"] != true => patterns.push(pattern),
            (Some("Digits"), _, _) if split["individual_digits"] == true => patterns.push(pipeline::DIGIT),
            _ => return Some((None, false)),
        }
    }
    if last["use_regex"] != false {
        patterns.push(pipeline::WORDS);
    }
    let name = pipeline::name_of(&patterns);
    let whole_words = name.and_then(|name| pre_tokenization(name).ok()).map(|rule| rule.whole_words);
    let plain = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"].iter().all(|key| model[*key].is_null() || model[*key] == "");
    let exact = plain
        && file["normalizer"].is_null()
        && whole_words == Some(model["ignore_merges"] == true)
        && model["byte_fallback"] != true
        && model["unk_token"].is_null();
    Some((name, exact))
}

/// Whether tokens that are matched whole could be found in a text in more than one way.
fn overlapping<'a>(texts: impl Iterator<Item = &'a str>) -> bool {
    let texts: Vec<&str> = texts.collect();
    let bounds = |text: &'a str| (1..text.len()).filter(|&at| text.is_char_boundary(at));
    let starts: HashSet<&str> = texts.iter().flat_map(|text| bounds(text).map(|at| &text[..at]).chain([*text])).collect();
    // Runs of one character are cut alike from the left and by length.
    let run = |text: &str| text.chars().all(|c| text.starts_with(c));
    texts.iter().filter(|text| !run(text)).any(|text| bounds(text).any(|at| starts.contains(&text[at..])))
}

/// Scores under which merging by score goes in the order of `merges`.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let last = merges.len();
    tokens.iter().map(|t| -(ranks.get(t).copied().unwrap_or(last) as f32)).collect()
}

/// Tokens that are matched whole, as tokenizer.json lists them.
fn added_tokens(stored: &Stored) -> Vec<Value> {
    let kind = |id: usize| stored.types.get(id).copied().unwrap_or(TokenType::Normal);
    let whole =
        |id: &usize| matches!(kind(*id), TokenType::Control | TokenType::Unknown | TokenType::UserDefined) || is_end(&stored.tokens[*id]);
    (0..stored.tokens.len())
        .filter(whole)
        .map(|id| {
            let special = kind(id) != TokenType::UserDefined || is_end(&stored.tokens[id]);
            json!({"id": id, "content": stored.tokens[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": special})
        })
        .collect()
}

fn is_end(token: &str) -> bool {
    super::vocabulary::END_TEXTS.contains(&token)
}

/// Ids by text.
fn vocabulary(stored: &Stored) -> Result<Map<String, Value>, TokenizerError> {
    let mut vocab = Map::with_capacity(stored.tokens.len());
    for (id, token) in stored.tokens.iter().enumerate() {
        if let Some(first) = vocab.insert(token.clone(), json!(id)) {
            let problem = format!("tokens {first} and {id} are both {token:?}, which tokenizer.json cannot say");
            return Err(TokenizerError::Vocabulary(problem));
        }
    }
    Ok(vocab)
}

/// What goes before and after a text, as a post-processor.
fn template(stored: &Stored, (before, after): (&[TokenId], &[TokenId])) -> Value {
    let text = |id: &TokenId| stored.tokens.get(*id as usize).cloned().unwrap_or_default();
    let special = |id: &TokenId| json!({"SpecialToken": {"id": text(id), "type_id": 0}});
    let sequence = |name: &str, kind: u8| json!({"Sequence": {"id": name, "type_id": kind}});
    let around =
        |name: &str, kind| before.iter().map(special).chain([sequence(name, kind)]).chain(after.iter().map(special)).collect::<Vec<_>>();
    let named: Map<String, Value> =
        before.iter().chain(after).map(|id| (text(id), json!({"id": text(id), "ids": [id], "tokens": [text(id)]}))).collect();
    if named.is_empty() {
        return Value::Null;
    }
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": named})
}

fn whole(stored: &Stored, parts: [(&str, Value); 4]) -> Value {
    let mut file =
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added_tokens(stored), "post_processor": null});
    for (key, value) in parts {
        file[key] = value;
    }
    file
}

/// The tokenizer.json of a byte-level vocabulary.
fn byte_level(stored: &Stored) -> Result<Value, TokenizerError> {
    let rule = pre_tokenization(stored.pre.as_deref().unwrap_or("(absent)"))?;
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let splits = rule
        .patterns
        .iter()
        .map(|pattern| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}));
    let steps: Vec<Value> = splits.chain([bytes(false)]).collect();
    let pre = if rule.patterns == [pipeline::WORDS] { bytes(true) } else { json!({"type": "Sequence", "pretokenizers": steps}) };
    let merges: Vec<Value> = super::gguf::merges(stored)?.into_iter().map(|(left, right)| json!([left, right])).collect();
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": rule.whole_words, "vocab": vocabulary(stored)?, "merges": merges});
    Ok(whole(stored, [("normalizer", Value::Null), ("pre_tokenizer", pre), ("decoder", bytes(true)), ("model", model)]))
}

/// The tokenizer.json of a vocabulary merged by score: every way to make a token of two others is a merge, ranked by the token's score.
fn score_merged(stored: &Stored) -> Result<Value, TokenizerError> {
    let mergeable = |id: usize| {
        !matches!(stored.types.get(id), Some(TokenType::Control | TokenType::Unknown | TokenType::Byte)) && !stored.tokens[id].contains(' ')
    };
    let ids: HashMap<&str, usize> =
        stored.tokens.iter().enumerate().filter(|&(id, _)| mergeable(id)).map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (&token, &id) in &ids {
        for at in token.char_indices().skip(1).map(|(at, _)| at) {
            if let (Some(&left), Some(&right)) = (ids.get(&token[..at]), ids.get(&token[at..])) {
                merges.push((stored.scores.get(id).copied().unwrap_or(0.0), id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    let merges: Vec<Value> = merges.iter().map(|&(_, _, l, r)| json!([stored.tokens[l], stored.tokens[r]])).collect();
    let unknown = stored.unknown.and_then(|id| stored.tokens.get(id as usize));
    let prefix = stored.add_space_prefix.unwrap_or(true);
    let boundary = BOUNDARY.to_string();
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": boundary});
    let normalizer = match prefix {
        true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": boundary}, replace]}),
        false => replace,
    };
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": boundary}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let model = json!({"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocabulary(stored)?, "merges": merges});
    let decoder = json!({"type": "Sequence", "decoders": steps});
    Ok(whole(stored, [("normalizer", normalizer), ("pre_tokenizer", Value::Null), ("decoder", decoder), ("model", model)]))
}
