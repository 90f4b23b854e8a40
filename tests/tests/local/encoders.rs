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

/// A file as llama.cpp's converter writes one of DistilBERT: BERT's, without token types, its head under the names of one with tanh.
#[test]
fn distilbert_from_gguf() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| place.path().join(name);
    json(&["convert", &files::fixture("distilbert-sst2").display().to_string(), &path("folder").display().to_string(), "--json"]);
    let mut folder = Folder::read(&path("folder")).expect("a folder");
    let names = [
        ("distilbert.", ""),
        ("transformer.layer", "encoder.layer"),
        ("attention.q_lin", "attention.self.query"),
        ("attention.k_lin", "attention.self.key"),
        ("attention.v_lin", "attention.self.value"),
        ("attention.out_lin", "attention.output.dense"),
        ("sa_layer_norm", "attention.output.LayerNorm"),
        ("ffn.lin1", "intermediate.dense"),
        ("ffn.lin2", "output.dense"),
        ("output_layer_norm", "output.LayerNorm"),
    ];
    let name = |name: String| names.iter().fold(name, |name, (from, to)| name.replace(from, to));
    folder.tensors = folder.tensors.into_iter().map(|(old, tensor)| (name(old), tensor)).collect();
    let counts = [("dim", "hidden_size"), ("n_layers", "num_hidden_layers"), ("n_heads", "num_attention_heads")];
    for (old, new) in counts.into_iter().chain([("hidden_dim", "intermediate_size")]) {
        folder.config[new] = folder.config[old].clone();
    }
    folder.config["layer_norm_eps"] = 1e-12.into();
    folder.write_gguf(&path("model.gguf"), "bert").expect("a file");
    json(&["convert", &path("model.gguf").display().to_string(), &path("other.gguf").display().to_string(), "--json"]);
    for (text, expected) in texts("distilbert-sst2") {
        let input = ids(&expected, "input_ids");
        let got = vectors(&path("model.gguf"), &input, &[]);
        let off = distance(&got, &expected);
        assert!(off <= 1e-5 && !floats(&got, "logits").is_empty(), "{text:?}: off by {off}");
        assert!(bits(&vectors(&path("other.gguf"), &input, &[])) == bits(&got), "{text:?}");
    }
}

/// From a quantized GGUF file, the bits of conversion as it is loaded.
#[test]
fn encoders_are_quantized() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| place.path().join(name).display().to_string();
    let (_, expected) = texts("bert").pop_first().expect("a text");
    let input = ids(&expected, "input_ids");
    let fixture = files::fixture("bert").display().to_string();
    json(&["quantize", &fixture, &path("q8.gguf"), "--to", "q8_0", "--json"]);
    let eight = bits(&vectors(Path::new(&path("q8.gguf")), &input, &[]));
    assert!(eight == bits(&vectors(Path::new(&fixture), &input, &["--load-in", "8bit"])), "quantized before, or as it is loaded");
    assert!(eight != bits(&vectors(Path::new(&fixture), &input, &[])), "8 bits change nothing");
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
