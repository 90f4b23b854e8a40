//! Masks against the vocabulary of the llama fixture.

use std::path::Path;

use plan::{
    card::{CardFile, ModelCard},
    step::{Mask, TokenId},
};
use serde_json::{Value, json};

use super::*;
use crate::encode::Tokenizer;

/// The tokenizer of the llama fixture, as a card.
pub(crate) fn card() -> ModelCard {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama");
    let file = |name: &str| CardFile { name: name.to_owned(), bytes: std::fs::read(folder.join(name)).expect("a file of the fixture") };
    ModelCard { files: ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"].map(file).to_vec() }
}

/// A tokenizer, and grammars for it.
pub(crate) fn fixture() -> (Arc<Tokenizer>, Grammars) {
    let tokenizer = Arc::new(Tokenizer::from_card(&card()).expect("a tokenizer"));
    (tokenizer.clone(), Grammars::new(tokenizer))
}

/// A constraint for the fixture's tokens.
pub(crate) fn constraint(grammars: &Grammars, source: GrammarSource) -> Constraint {
    let source = Arc::new(source);
    let grammar = grammars.compile(&source).expect("a good grammar");
    Constraint { source, grammar: Some(grammar) }
}

/// The mask behind what was emitted, made anew.
pub(crate) fn mask_behind(constraint: &Constraint, emitted: &[TokenId]) -> Mask {
    let grammar = constraint.grammar.as_ref().expect("compiled");
    grammar.matcher(emitted).expect("it matches").mask().expect("a mask")
}

pub(crate) fn schema(value: Value) -> GrammarSource {
    GrammarSource::JsonSchema(value.to_string())
}

fn ids_of(mask: &Mask) -> Vec<TokenId> {
    match mask {
        Mask::Ids(ids) => ids.clone(),
        Mask::Bits(bits) => (0..bits.len() as u32 * 8).filter(|id| bits[*id as usize / 8] >> (id % 8) & 1 == 1).collect(),
        Mask::Unchanged => panic!("a mask says which"),
    }
}

#[test]
fn every_token_of_a_mask_goes_on_to_a_match_and_no_other_does() {
    let (tokenizer, grammars) = fixture();
    // One pattern whose prefixes are easy to tell.
    let pattern = "(ab|a{3}|xyz)+0";
    let fits = |text: &str| {
        // The automaton by hand: what can still become a match.
        fn go(text: &[u8], begun: bool) -> bool {
            let words: [&[u8]; 3] = [b"ab", b"aaa", b"xyz"];
            text.is_empty()
                || (begun && text == b"0")
                || words.iter().any(|word| word.starts_with(text) || (text.starts_with(word) && go(&text[word.len()..], true)))
        }
        go(text.as_bytes(), false)
    };
    let constraint = constraint(&grammars, GrammarSource::Regex(pattern.to_owned()));
    for emitted in ["", "a", "ab", "aa", "abxy", "xyzaaa", "xyzab"] {
        let ids = tokenizer.encode(emitted, false).expect("encoded");
        let allowed = ids_of(&mask_behind(&constraint, &ids));
        assert!(!allowed.is_empty());
        for id in 0..tokenizer.vocab() as TokenId {
            let piece = tokenizer.piece(id);
            let text = std::str::from_utf8(piece).ok().filter(|piece| !piece.is_empty() && !tokenizer.is_control(id));
            let expected = text.is_some_and(|piece| fits(&format!("{emitted}{piece}")));
            // Where there is one way on, it is taken as the tokenizer cuts it: one token.
            assert!(!allowed.contains(&id) || expected, "{emitted:?} goes on with {text:?}");
            assert!(allowed.len() == 1 || !expected || allowed.contains(&id), "{emitted:?} does not go on with {text:?}");
        }
    }
    // At the end there are end tokens alone.
    let ids = tokenizer.encode("ab0", false).expect("encoded");
    assert_eq!(ids_of(&mask_behind(&constraint, &ids)), tokenizer.end_ids());
    // And what does not match is refused.
    let ids = tokenizer.encode("b", false).expect("encoded");
    assert!(constraint.grammar.as_ref().expect("compiled").matcher(&ids).is_err());
}

#[test]
fn masks_made_on_the_way_are_those_made_anew() {
    let (tokenizer, grammars) = fixture();
    let source = schema(json!({
        "type": "object", "additionalProperties": false, "required": ["name", "size", "tags"],
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "size": {"enum": ["small", "large", null]},
            "tags": {"type": "array", "items": {"type": "integer", "minimum": -20, "maximum": 999}, "maxItems": 4},
        },
    }));
    let constraint = constraint(&grammars, source);
    let mut lists = 0;
    for seed in 0..12_u64 {
        let mut matcher = constraint.grammar.as_ref().expect("compiled").matcher(&[]).expect("a matcher");
        let mut emitted: Vec<TokenId> = Vec::new();
        loop {
            let mask = matcher.mask().expect("a mask");
            assert_eq!(mask, mask_behind(&constraint, &emitted), "behind {emitted:?}");
            lists += usize::from(matches!(mask, Mask::Ids(_)));
            let allowed = ids_of(&mask);
            let pick = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(emitted.len() as u32 * 7) >> 16;
            let id = allowed[(pick % allowed.len() as u64) as usize];
            if tokenizer.end_ids().contains(&id) {
                break;
            }
            emitted.push(id);
            matcher.advance(&[id]).expect("it is allowed");
        }
        let text = crate::decode::text(&tokenizer, &emitted, false);
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let keys: Vec<&String> = value.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["name", "size", "tags"], "{text}");
        assert!(value["name"].as_str().is_some_and(|name| name.chars().count() <= 12), "{text}");
        assert!(value["size"].is_null() || ["small", "large"].contains(&value["size"].as_str().expect("a string")), "{text}");
        let tags = value["tags"].as_array().expect("an array");
        assert!(tags.len() <= 4 && tags.iter().all(|tag| tag.as_i64().is_some_and(|n| (-20..=999).contains(&n))), "{text}");
    }
    assert!(lists > 20, "few tokens are a list");
}

#[test]
fn bad_grammars_say_what_is_wrong() {
    let (_, grammars) = fixture();
    let refused = |source: GrammarSource| grammars.compile(&Arc::new(source)).expect_err("refused").to_string();
    let chain: serde_json::Map<String, Value> =
        (0..3000).map(|i| (format!("a{i}"), json!({"$ref": format!("#/$defs/a{}", (i + 1) % 3000)}))).collect();
    let cases = [
        (schema(json!({"type": "banana"})), "banana"),
        (schema(json!({"type": "object", "unevaluatedProperties": false})), "unevaluatedProperties"),
        (schema(json!({"$ref": "https://example.com/schema"})), "https://example.com/schema"),
        (schema(json!({"$ref": "#/$defs/gone"})), "gone"),
        (schema(json!({"not": {"type": "string"}})), "not"),
        (schema(json!({"type": "integer", "minimum": 5, "maximum": 4})), "minimum"),
        (schema(json!({"enum": []})), ""),
        (schema(json!({"x-guidance": {}})), "x-guidance"),
        (schema(json!({"type": "string", "pattern": "(((("})), "regex"),
        (schema(json!({"$defs": chain, "$ref": "#/$defs/a0"})), "levels"),
        (schema(json!({"type": "string", "description": "x".repeat(300_000)})), "262144"),
        (GrammarSource::JsonSchema("{".to_owned()), "not JSON"),
        (GrammarSource::JsonSchema("[]".to_owned()), "object"),
        (GrammarSource::Regex("(".to_owned()), "regex"),
        (GrammarSource::Regex("(".repeat(10_000)), ""),
        (GrammarSource::Regex("a".repeat(20_000)), "16384"),
    ];
    for (source, expected) in cases {
        let message = refused(source.clone());
        assert!(message.contains(expected) && !message.contains('\n') && message.len() < 600, "{message:?}");
        assert!(!message.contains("panic") && !message.is_empty(), "{message:?}");
    }
}

#[test]
fn what_nests_deeply_takes_no_more_stack_than_there_is() {
    let (_, grammars) = fixture();
    let nested =
        (0..30).fold(json!({"type": "string"}), |inner, _| json!({"anyOf": [{"type": "array", "items": inner}, {"type": "null"}]}));
    grammars.compile(&Arc::new(schema(nested))).expect("30 levels");
    let all =
        (0..30).fold(json!({"type": "object"}), |inner, i| json!({"allOf": [inner, {"properties": {format!("p{i}"): {"type": "null"}}}]}));
    grammars.compile(&Arc::new(schema(all))).expect("30 levels");
    let chain: serde_json::Map<String, Value> = (0..900)
        .map(|i| (format!("a{i}"), if i == 899 { json!({"type": "null"}) } else { json!({"$ref": format!("#/$defs/a{}", i + 1)}) }))
        .collect();
    let deep = grammars.compile(&Arc::new(schema(json!({"$defs": chain, "$ref": "#/$defs/a0"}))));
    assert!(deep.as_ref().err().is_none_or(|error| !error.to_string().contains("cannot be processed")), "{deep:?}");
    let patterns = ["(".repeat(200) + "a" + &"b)?".repeat(200), "(a|b)?".repeat(2_000), "ab?c*".repeat(3_000), "x".repeat(16_000)];
    for pattern in patterns {
        // Whether it is taken or too complex, nothing ends the process, and masks are made on a stack as small as it is here.
        let source = Arc::new(GrammarSource::Regex(pattern));
        if let Ok(grammar) = grammars.compile(&source) {
            let mut matcher = grammar.matcher(&[]).expect("the beginning");
            for _ in 0..20 {
                let Ok(mask) = matcher.mask() else { break };
                if matcher.advance(&ids_of(&mask)[..1]).is_err() {
                    break;
                }
            }
        }
    }
}

#[test]
fn compiled_grammars_are_kept_up_to_a_number() {
    let (_, grammars) = fixture();
    let source = |i: usize| Arc::new(GrammarSource::Regex(format!("a{{{}}}", i + 1)));
    let first = grammars.compile(&source(0)).expect("good");
    for i in 1..64 {
        grammars.compile(&source(i)).expect("good");
        assert!(Arc::ptr_eq(&first, &grammars.compile(&source(0)).expect("good")), "it was used after {i}");
    }
    for i in 64..128 {
        grammars.compile(&source(i)).expect("good");
    }
    assert!(!Arc::ptr_eq(&first, &grammars.compile(&source(0)).expect("good")));
}
