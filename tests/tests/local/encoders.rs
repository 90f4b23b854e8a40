//! Encoders: their fixtures against the reference implementation's numbers, from every kind of file, whole and split.

use std::{collections::BTreeMap, path::Path};

use e2e::{
    files,
    program::{self, floats, id_list, ids, json},
    rewrite::Folder,
};
use serde_json::Value;

/// What `eval logits` prints of an encoder.
const FIELDS: [&str; 3] = ["cls_hidden", "mean_pooled_l2", "logits"];

fn vectors(model: &Path, input: &[u32], more: &[&str]) -> Value {
    let (model, input) = (model.to_string_lossy(), id_list(input));
    let mut args = vec!["eval", "logits", &model, "--input-ids", &input, "--json"];
    args.extend(more);
    json(&args)
}

/// The largest difference between what was computed and what is expected, where anything is.
fn distance(got: &Value, expected: &Value) -> f32 {
    let mut most = 0.0;
    for field in FIELDS.into_iter().filter(|field| expected.get(*field).is_some()) {
        let (got, expected) = (floats(got, field), floats(expected, field));
        assert_eq!(got.len(), expected.len(), "{field}");
        most = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(most, f32::max);
    }
    most
}

fn bits(got: &Value) -> Vec<Vec<u32>> {
    FIELDS.map(|field| floats(got, field).iter().map(|x| x.to_bits()).collect()).to_vec()
}

/// The texts of a fixture: what is expected of each.
fn texts(name: &str) -> BTreeMap<String, Value> {
    serde_json::from_value(files::expected(name)["texts"].clone()).expect("texts")
}

/// Asserts that a fixture gives its reference outputs, that all splits and instructions give the same bits, and that a wrong setting
/// would be seen.
fn matches_reference(name: &str, wrong: (&str, &str)) {
    let model = files::fixture(name);
    let folder = files::changed_fixture(name, wrong.0, wrong.1);
    for (text, expected) in texts(name) {
        let input = ids(&expected, "input_ids");
        let got = vectors(&model, &input, &[]);
        let off = distance(&got, &expected);
        assert!(off <= 1e-4, "{name}, {text:?}: off by {off}");
        println!("{name}, {text:?}: off by {off}");
        for way in [&["--pp", "2"][..], &["--tp", "2"], &["--pp", "2", "--tp", "2"], &["--isa", "scalar"], &["--isa", "avx2"]] {
            assert!(bits(&vectors(&model, &input, way)) == bits(&got), "{name} with {} differs", way.join(" "));
        }
        let off = distance(&vectors(folder.path(), &input, &[]), &expected);
        assert!(off > 1e-4, "{name}: {} in place of {} went unseen ({off})", wrong.1, wrong.0);
    }
}

#[test]
fn bert_matches_its_reference() {
    matches_reference("bert", ("\"layer_norm_eps\": 1e-12", "\"layer_norm_eps\": 1e-2"));
    // The form of GELU shows.
    let (_, expected) = texts("bert").pop_first().expect("a text");
    let input = ids(&expected, "input_ids");
    let folder = files::changed_fixture("bert", "\"hidden_act\": \"gelu\"", "\"hidden_act\": \"gelu_new\"");
    let (other, exact) = (vectors(folder.path(), &input, &[]), vectors(&files::fixture("bert"), &input, &[]));
    assert!(bits(&other) != bits(&exact) && distance(&other, &expected) > distance(&exact, &expected));
}

/// From a PyTorch file, with a classification head.
#[test]
fn distilbert_matches_its_reference() {
    matches_reference("distilbert-sst2", ("\"n_heads\": 4", "\"n_heads\": 2"));
}

/// Under GGUF's names, and under those of old checkpoints.
#[test]
fn bert_from_other_files() {
    let mut folder = Folder::read(&files::fixture("bert")).expect("the fixture");
    let (_, expected) = texts("bert").pop_first().expect("a text");
    let input = ids(&expected, "input_ids");
    let got = bits(&vectors(&files::fixture("bert"), &input, &[]));
    let place = tempfile::tempdir().expect("a temporary folder");
    let path = place.path().join("model.gguf");
    folder.write_gguf(&path, "bert").expect("a writable folder");
    assert!(bits(&vectors(&path, &input, &[])) == got, "GGUF");
    assert!(bits(&vectors(&path, &input, &["--pp", "2", "--tp", "2"])) == got, "GGUF, split");

    let old =
        |name: &str| format!("bert.{}", name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"));
    folder.tensors = folder.tensors.into_iter().map(|(name, tensor)| (old(&name), tensor)).collect();
    let place = tempfile::tempdir().expect("a temporary folder");
    folder.write(place.path(), &files::fixture("bert")).expect("a writable folder");
    assert!(bits(&vectors(place.path(), &input, &[])) == got, "old names");
    folder.tensors.get_mut("bert.encoder.layer.1.output.LayerNorm.gamma").expect("a norm").data[2] ^= 0x40;
    folder.write(place.path(), &files::fixture("bert")).expect("a writable folder");
    assert!(bits(&vectors(place.path(), &input, &[])) != got, "another value went unseen");
}

/// Within the format that a model has: another file of it, other types.
#[test]
fn encoders_are_written_in_their_own_format() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| place.path().join(name).display().to_string();
    for name in ["bert", "distilbert-sst2"] {
        let fixture = files::fixture(name);
        let (_, expected) = texts(name).pop_first().expect("a text");
        let input = ids(&expected, "input_ids");
        json(&["convert", &fixture.display().to_string(), &path(name), "--json"]);
        assert!(bits(&vectors(&place.path().join(name), &input, &[])) == bits(&vectors(&fixture, &input, &[])), "{name}");
        let refused = program::run(&["convert", &fixture.display().to_string(), &path("refused.gguf")]);
        assert!(refused.status.code() == Some(2) && refused.stderr.contains("cannot be written as GGUF yet"), "{}", refused.stderr);
    }
    let (_, expected) = texts("bert").pop_first().expect("a text");
    let input = ids(&expected, "input_ids");
    Folder::read(&files::fixture("bert")).expect("the fixture").write_gguf(Path::new(&path("bert.gguf")), "bert").expect("a file");
    json(&["quantize", &path("bert.gguf"), &path("q8.gguf"), "--to", "q8_0", "--json"]);
    let (exact, eight) = (path("bert.gguf"), path("q8.gguf"));
    let loaded = bits(&vectors(Path::new(&exact), &input, &["--load-in", "8bit"]));
    assert!(bits(&vectors(Path::new(&eight), &input, &[])) == loaded, "quantized before, or as it is loaded");
    assert!(loaded != bits(&vectors(Path::new(&exact), &input, &[])), "8 bits change nothing");
}

#[test]
fn what_encoders_cannot_do_is_refused() {
    let refused = |args: &[&str], words: &str| {
        let done = program::run(args);
        assert_eq!(done.status.code(), Some(2), "{args:?}: {}", done.stderr);
        assert!(done.stderr.contains(words), "{args:?}: {}", done.stderr);
    };
    let (model, text) = (files::fixture("bert"), files::text());
    let (model, text) = (model.to_str().expect("a path in UTF-8"), text.to_str().expect("a path in UTF-8"));
    refused(&["eval", "logits", model, "--input-ids", "1,2", "--greedy", "3"], "draws no tokens");
    refused(&["eval", "logits", model, "--input-ids", "1,2", "--kv", "f16"], "an encoder has no cache");
    refused(&["eval", "ppl", model, "--text", text], "perplexity needs a model that does");
    refused(&["bench", "engine", model, "--tests", "tg4"], "the benchmark needs a model that does");
    for (from, to, words) in [
        ("\"is_decoder\": false", "\"is_decoder\": true", "is_decoder"),
        ("\"use_cache\": true", "\"position_embedding_type\": \"relative_key\"", "position_embedding_type"),
        ("\"hidden_act\": \"gelu\"", "\"hidden_act\": \"relu\"", "hidden_act"),
        ("\"BertModel\"", "\"BertForQuestionAnswering\"", "BertForQuestionAnswering"),
        ("\"BertModel\"", "\"NomicBertModel\"", "NomicBertModel"),
        ("\"BertModel\"", "\"BertForSequenceClassification\"", "classifier.weight"),
    ] {
        let folder = files::changed_fixture("bert", from, to);
        refused(&["eval", "logits", folder.path().to_str().expect("a path in UTF-8"), "--input-ids", "1,2"], words);
    }
}
