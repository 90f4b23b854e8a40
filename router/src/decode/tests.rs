//! Streams of text: whole characters, stop strings over any borders.

use std::{path::Path, sync::Arc};

use plan::card::{CardFile, ModelCard};
use proptest::prelude::*;

use super::Decoder;
use crate::encode::Tokenizer;

fn tokenizer() -> Arc<Tokenizer> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama");
    let file = |name: &str| CardFile { name: name.to_owned(), bytes: std::fs::read(folder.join(name)).unwrap() };
    Arc::new(Tokenizer::from_card(&ModelCard { files: vec![file("tokenizer.json"), file("tokenizer_config.json")] }).unwrap())
}

/// One token per byte of `text`.
fn bytes(tokenizer: &Tokenizer, text: &[u8]) -> Vec<u32> {
    let id = |b: &u8| (0..tokenizer.vocab() as u32).find(|&id| tokenizer.piece(id) == [*b] && !tokenizer.is_control(id));
    text.iter().map(|b| id(b).expect("a token for every byte")).collect()
}

/// What each push releases, what the end does, and the stop string that ended the text.
fn stream(tokenizer: &Arc<Tokenizer>, stops: &[&str], ids: &[u32]) -> (Vec<String>, Option<String>) {
    let stops: Arc<[String]> = stops.iter().map(|s| (*s).to_owned()).collect();
    let mut decoder = Decoder::new(Arc::clone(tokenizer), stops, None);
    let mut pieces = Vec::new();
    let mut ended = false;
    for &id in ids {
        let mut out = String::new();
        ended = decoder.push(id, true, &mut out);
        pieces.push(out);
        if ended {
            break;
        }
    }
    let mut out = String::new();
    assert!(decoder.finish(true, &mut out) || !ended);
    pieces.push(out);
    (pieces, decoder.stop().map(str::to_owned))
}

/// The text up to the stop string that ends first, of those the one that starts first.
fn cut<'a>(text: &'a str, stops: &[&str]) -> &'a str {
    let found = stops.iter().filter_map(|s| text.find(s).map(|at| (at + s.len(), at))).min();
    found.map_or(text, |(_, at)| &text[..at])
}

#[test]
fn characters_are_held_back_until_whole() {
    let t = tokenizer();
    let (pieces, _) = stream(&t, &[], &bytes(&t, "é€🎉".as_bytes()));
    assert_eq!(pieces, ["", "é", "", "", "€", "", "", "", "🎉", ""]);
    // Bytes that can never become a character are replaced at once, those that could still at the end.
    let (pieces, _) = stream(&t, &[], &bytes(&t, b"a\xffb\xe2\x82"));
    assert_eq!(pieces, ["a", "\u{fffd}", "b", "", "", "\u{fffd}"]);
    let (pieces, _) = stream(&t, &[], &bytes(&t, b"\xe2\x82x"));
    assert_eq!(pieces, ["", "", "\u{fffd}x", ""]);
}

#[test]
fn stop_strings_are_found_over_token_borders() {
    let t = tokenizer();
    let of = |stops: &[&str], text: &str| stream(&t, stops, &bytes(&t, text.as_bytes()));
    let (pieces, stop) = of(&["END"], "aENbENDc");
    assert_eq!((pieces.concat(), stop.as_deref()), ("aENb".to_owned(), Some("END")));
    assert_eq!(pieces[..4], ["a", "", "", "ENb"], "what could become a stop string is held, and released when it cannot");
    assert_eq!(of(&["END"], "aEN"), (vec!["a".into(), String::new(), String::new(), "EN".into()], None), "the end releases it");
    // The one that ends first; of those that end together the one that starts first.
    assert_eq!(of(&["bcd", "c"], "abcd").1.as_deref(), Some("c"));
    assert_eq!(of(&["c", "bc"], "abc"), (vec!["a".into(), String::new(), String::new(), String::new()], Some("bc".into())));
    assert_eq!(of(&["aab"], "aaab").0.concat(), "a", "a beginning may start inside another");
    assert_eq!(of(&["é"], "xé").1.as_deref(), Some("é"), "over the bytes of a character");
    // A token that holds more than the stop string.
    let id = t.encode(" the", false).unwrap();
    assert_eq!(id.len(), 1);
    let (pieces, stop) = stream(&t, &["th"], &id);
    assert_eq!((pieces.concat(), stop.as_deref()), (" ".to_owned(), Some("th")));
}

#[test]
fn what_is_not_scanned_does_not_stop() {
    let t = tokenizer();
    let mut decoder = Decoder::new(Arc::clone(&t), Arc::from(["ab".to_owned()]), None);
    let (mut out, ids) = (String::new(), bytes(&t, b"abab"));
    assert!(!decoder.push(ids[0], true, &mut out));
    // As long as min_tokens are not reached: the text found later starts after this token.
    assert!(!decoder.push(ids[1], false, &mut out));
    assert_eq!((out.as_str(), decoder.decoded()), ("ab", 2));
    assert!(!decoder.push(ids[2], true, &mut out));
    assert!(decoder.push(ids[3], true, &mut out));
    assert_eq!((out.as_str(), decoder.decoded(), decoder.stop()), ("ab", 4, Some("ab")));
}

#[test]
fn control_tokens_are_no_text() {
    let t = tokenizer();
    let a = bytes(&t, b"ab");
    assert_eq!(stream(&t, &[], &[0, a[0], 4, a[1], u32::MAX]).0.concat(), "ab");
}

proptest! {
    /// The text released is the same for any split into tokens, and never takes back a byte.
    #[test]
    fn any_split_releases_the_same_text(
        text in "[abc é🎉]{0,20}", stops in proptest::collection::vec("[abcé]{1,4}", 0..3), greedy in any::<bool>()
    ) {
        let t = tokenizer();
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let ids = if greedy { t.encode(&text, false).unwrap() } else { bytes(&t, text.as_bytes()) };
        let (pieces, stop) = stream(&t, &stops, &ids);
        let expected = cut(&text, &stops);
        prop_assert_eq!(pieces.concat(), expected);
        prop_assert_eq!(stop.is_some(), expected.len() < text.len());
    }
}
