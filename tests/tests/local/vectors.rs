//! Serving encoders: embeddings, scores, ranks and labels over HTTP, from one process and from several.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use e2e::{
    client, files,
    program::{self, floats},
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};

async fn post(server: &Server, path: &str, body: &Value) -> Value {
    let (status, answer) = client::post(&format!("{}/v1/{path}", server.http), body).await.expect("an answer");
    assert!(status.is_success(), "{path}: {status} {answer}");
    answer
}

/// The texts of a fixture with what is expected of them.
fn texts(name: &str) -> Vec<(String, Value)> {
    files::expected(name)["texts"].as_object().expect("texts").clone().into_iter().collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Embeddings of a fixture's texts and of many more, as bits; the first ones are compared with the reference.
async fn embeddings(server: &Server, name: &str) -> Vec<String> {
    let texts = texts(name);
    let fillers = (0..60).map(|i| format!("geese {i} {}", "fly on ".repeat(i % 9)));
    let inputs: Vec<String> = texts.iter().map(|(text, _)| text.clone()).chain(fillers).collect();
    let answer = post(server, "embeddings", &json!({"model": "encoder", "input": inputs})).await;
    for (index, (text, expected)) in texts.iter().enumerate() {
        let off = distance(&floats(&answer["data"][index], "embedding"), &floats(expected, "mean_pooled_l2"));
        assert!(off <= 1e-4, "{name}, {text:?}: off by {off}");
        let other = distance(&floats(&answer["data"][index + 1], "embedding"), &floats(expected, "mean_pooled_l2"));
        assert!(other > 1e-2, "another text went unseen");
        // The text's ids are the text.
        let ids = post(server, "embeddings", &json!({"model": "encoder", "input": expected["input_ids"]})).await;
        assert_eq!(ids["data"][0]["embedding"], answer["data"][index]["embedding"], "alone, from ids");
        assert_eq!(ids["usage"]["prompt_tokens"].as_u64(), expected["input_ids"].as_array().map(|ids| ids.len() as u64));
    }
    answer["data"].as_array().expect("a list").iter().map(|item| item["embedding"].to_string()).collect()
}

/// The reference's numbers, and the same bits from one process, from two stages, from two ranks.
#[tokio::test(flavor = "multi_thread")]
async fn embeddings_of_bert_are_the_references_on_any_split() {
    let mut all = Vec::new();
    for (pipeline, tensor) in [(1, 1), (2, 1), (1, 2)] {
        let server = Server::start(&manifest("encoder", &files::fixture("bert"), &parallelism(pipeline, tensor)));
        all.push(embeddings(&server, "bert").await);
    }
    assert!(all[0] == all[1] && all[0] == all[2], "a split changed bits");
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_of_distilbert_are_the_references_on_any_split() {
    let texts = texts("distilbert-sst2");
    let inputs: Vec<&String> = texts.iter().map(|(text, _)| text).collect();
    let mut all = Vec::new();
    for (pipeline, tensor) in [(1, 1), (2, 2)] {
        let server = Server::start(&manifest("encoder", &files::fixture("distilbert-sst2"), &parallelism(pipeline, tensor)));
        embeddings(&server, "distilbert-sst2").await;
        let answer = post(&server, "classify", &json!({"model": "encoder", "input": inputs})).await;
        for (item, (text, expected)) in answer["data"].as_array().expect("a list").iter().zip(&texts) {
            let logits = floats(expected, "logits");
            let share = |a: f32, b: f32| 1.0 / (1.0 + (b - a).exp());
            let expected = [share(logits[0], logits[1]), share(logits[1], logits[0])];
            let off = distance(&floats(item, "probs"), &expected);
            assert!(off <= 1e-4, "{text:?}: off by {off}");
            assert!(distance(&floats(item, "probs"), &[expected[1], expected[0]]) > 1e-2, "exchanged labels went unseen");
            assert_eq!(item["label"], if expected[0] > expected[1] { "NEGATIVE" } else { "POSITIVE" });
        }
        assert_eq!(answer["data"].as_array().map(Vec::len), Some(texts.len()));
        all.push(answer["data"].clone());
        // What its head does not do, and what it is not.
        for (path, body) in [
            ("score", json!({"model": "encoder", "text_1": "a", "text_2": "b"})),
            ("completions", json!({"model": "encoder", "prompt": "a"})),
        ] {
            let (status, error) = client::post(&format!("{}/v1/{path}", server.http), &body).await.expect("an answer");
            assert_eq!((status.as_u16(), &error["error"]["code"]), (400, &json!("unsupported_endpoint")), "{error}");
        }
    }
    assert!(all[0] == all[1], "a split changed bits");
}

/// Pairs by the cosine of their embeddings.
#[tokio::test(flavor = "multi_thread")]
async fn pairs_are_scored_and_ranked() {
    let server = Server::start(&manifest("encoder", &files::fixture("bert"), &parallelism(1, 1)));
    let texts = texts("bert");
    let (a, b) = (floats(&texts[0].1, "mean_pooled_l2"), floats(&texts[1].1, "mean_pooled_l2"));
    let cosine: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
    let (first, second) = (&texts[0].0, &texts[1].0);
    let answer = post(&server, "score", &json!({"model": "encoder", "text_1": first, "text_2": [second, first]})).await;
    let score = |i: usize| answer["data"][i]["score"].as_f64().expect("a number") as f32;
    assert!((score(0) - cosine).abs() <= 1e-4 && (score(1) - 1.0).abs() <= 1e-6 && cosine < 0.999, "{answer}");
    let ranked = post(&server, "rerank", &json!({"model": "encoder", "query": first, "documents": [second, first]})).await;
    let order: Vec<u64> = ranked["results"].as_array().expect("a list").iter().filter_map(|r| r["index"].as_u64()).collect();
    assert_eq!(order, [1, 0], "{ranked}");
}

/// A sentence model people use, as its files say: pooled and normalised by modules.json, from its folder, from vocab.txt alone, from a GGUF
/// file, and from the folder made of that.
#[tokio::test(flavor = "multi_thread")]
async fn the_sentence_model_embeds_as_its_reference() {
    let golden = files::golden("minilm.json");
    let cases = golden["cases"].as_array().expect("cases");
    let inputs: Vec<&Value> = cases.iter().map(|case| &case["text"]).collect();
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let folder = files::sentence_model();
    // A folder that was written anew has all that makes it a sentence model.
    let place = tempfile::tempdir().expect("a temporary folder");
    let copy = place.path().join("copy");
    program::json(&["convert", &folder.display().to_string(), &copy.display().to_string(), "--json"]);
    let lines = vocabulary_alone(&copy);
    let [gguf, back] = ["model.gguf", "back"].map(|name| place.path().join(name));
    for (from, to) in [(lines.path(), &gguf), (&gguf, &back)] {
        program::json(&["convert", &from.display().to_string(), &to.display().to_string(), "--json"]);
    }
    let mut all = Vec::new();
    for (model, split) in [(folder.as_path(), (1, 1)), (lines.path(), (2, 2)), (&gguf, (1, 1)), (&back, (1, 1))] {
        let server = Server::start(&manifest("encoder", model, &parallelism(split.0, split.1)));
        let answer = post(&server, "embeddings", &json!({"model": "encoder", "input": inputs})).await;
        for (index, case) in cases.iter().enumerate() {
            let (got, expected) = (floats(&answer["data"][index], "embedding"), floats(case, "embedding"));
            let (off, most) = (1.0 - cosine(&got, &expected), distance(&got, &expected));
            println!("{}: cosine 1 - {off:e}, off by at most {most:e}", case["text"]);
            assert!(off.abs() <= 1e-6 && most <= 1e-5, "{}: {off} {most}", case["text"]);
            let other = floats(&cases[(index + 1) % cases.len()], "embedding");
            assert!(1.0 - cosine(&got, &other) > 1e-2, "another text went unseen");
        }
        let tokens: usize = cases.iter().map(|case| case["ids"].as_array().expect("ids").len()).sum();
        assert_eq!(answer["usage"]["prompt_tokens"].as_u64(), Some(tokens as u64));
        all.push(answer["data"].clone());
    }
    assert!(all.iter().all(|data| *data == all[0]), "a split, or another file, changed bits");
}

/// The sentence model with a vocab.txt in place of its tokenizer.json.
fn vocabulary_alone(folder: &Path) -> tempfile::TempDir {
    let made = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(made.path().join("1_Pooling")).expect("a folder");
    for name in ["config.json", "model.safetensors", "modules.json", "tokenizer_config.json", "1_Pooling/config.json"] {
        std::fs::copy(folder.join(name), made.path().join(name)).expect("a copy");
    }
    let json = std::fs::read(folder.join("tokenizer.json")).expect("tokenizer.json");
    let json: Value = serde_json::from_slice(&json).expect("JSON");
    let vocabulary = json["model"]["vocab"].as_object().expect("a vocabulary");
    let mut lines = vec![""; vocabulary.len()];
    vocabulary.iter().for_each(|(token, id)| lines[id.as_u64().expect("an id") as usize] = token);
    std::fs::write(made.path().join("vocab.txt"), lines.join("\n") + "\n").expect("a writable folder");
    made
}

/// The official client, which asks for base64 by itself.
#[test]
fn the_openai_client_embeds() {
    let server = Server::start(&manifest("encoder", &files::fixture("bert"), &parallelism(1, 1)));
    let mut command = Command::new(files::python());
    command.arg(files::package().join("python/openai_embeddings.py")).arg(&server.http).arg("encoder");
    command.arg(files::fixture("bert").join("expected.json")).stdin(Stdio::null());
    let done = program::finish(program::start(&mut command), program::LIMIT);
    assert!(done.status.success(), "{}\n{}", done.status, done.stderr);
}
