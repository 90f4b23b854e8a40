//! Bad input: one message that names the thing, the value and what was expected; exit code 2; nothing else stops working.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::Path,
};

use e2e::{
    client, files,
    program::{Finished, run},
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};

/// Asserts that a run was refused with exit code 2 and a short message that holds all of `words`.
fn refused(what: &str, done: &Finished, words: &[&str]) {
    assert_eq!(done.status.code(), Some(2), "{what}: {}\n{}", done.status, done.stderr);
    for word in words {
        assert!(done.stderr.contains(word), "{what}: {word:?} is missing in:\n{}", done.stderr);
    }
    assert!(!done.stderr.contains("panicked"), "{what}:\n{}", done.stderr);
    assert!(done.stderr.lines().count() <= 12, "{what}: not one message:\n{}", done.stderr);
}

/// `eval logits` of a model.
fn eval(model: &Path) -> Finished {
    run(&["eval", "logits", &model.to_string_lossy(), "--input-ids", "1,2", "--json"])
}

/// A copy of the tiny llama in which `file` was changed.
fn changed(file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    files::copy_fixture("llama", folder.path());
    let path = folder.path().join(file);
    let bytes = fs::read(&path).expect("the file");
    fs::write(path, change(bytes)).expect("a writable file");
    folder
}

#[test]
fn damaged_model_files_are_refused() {
    const SHARD: &str = "model-00002-of-00005.safetensors";
    let short = changed(SHARD, |mut bytes| {
        bytes.truncate(bytes.len() - 100);
        bytes
    });
    refused("a truncated file", &eval(short.path()), &[SHARD]);
    let header = changed(SHARD, |mut bytes| {
        bytes[20] = b'\0';
        bytes
    });
    refused("a damaged header", &eval(header.path()), &[SHARD]);
    let unknown = changed("config.json", |bytes| {
        String::from_utf8(bytes).expect("text").replace("\"llama\"", "\"mamba\"").replace("LlamaForCausalLM", "MambaForCausalLM").into()
    });
    refused("an unknown architecture", &eval(unknown.path()), &["amba"]);
    let dtype = changed(SHARD, |bytes| {
        let text: Vec<u8> = bytes
            .windows(6)
            .position(|w| w == b"\"BF16\"")
            .map(|at| [&bytes[..at], b"\"BF17\"", &bytes[at + 6..]].concat())
            .expect("a type");
        text
    });
    refused("an unknown tensor type", &eval(dtype.path()), &["BF17"]);
    refused(
        "a folder without a model",
        &eval(tempfile::tempdir().expect("a temporary folder").path()),
        &["holds no model", "model.safetensors"],
    );
    refused("a missing file", &eval(Path::new("/does/not/exist.gguf")), &["/does/not/exist.gguf"]);
}

#[test]
fn what_the_interface_names_but_does_not_have_yet_is_refused_as_such() {
    let model = files::fixture("llama").to_string_lossy().into_owned();
    let eval = |more: &[&str]| run(&[&["eval", "logits", &model, "--input-ids", "1,2", "--json"], more].concat());
    refused("no adapter", &eval(&["--adapter", "/some/lora"]), &["/some/lora", "does not exist"]);
    // What does not exist at all is told apart from that.
    let unknown = eval(&["--kv", "q3"]);
    refused("an unknown type", &unknown, &["q3", "f32", "f16", "q8"]);
    assert!(!unknown.stderr.contains("not supported yet"), "{}", unknown.stderr);
    assert!(eval(&["--kv", "f16"]).status.success());
}

#[test]
fn autoscaling_needs_a_cluster() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plan = |mode: &str| {
        let file = folder.path().join("m.yaml");
        let model = files::fixture("llama");
        let text = format!(
            "apiVersion: skein.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: a}}\nspec:\n  model: {{uri: 'file:{}'}}\n  autoscaling: \
             {{mode: {mode}}}\n",
            model.display()
        );
        fs::write(&file, text).expect("a manifest");
        run(&["plan", "-f", &file.to_string_lossy()])
    };
    refused("a mode of clusters", &plan("External"), &["m.yaml", "spec.autoscaling.mode: External needs a cluster", "expected Disabled"]);
    assert!(plan("Disabled").status.success());
}

#[test]
fn a_truncated_gguf_file_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    let whole = File::open(files::reference()).expect("the model");
    let mut part = File::create(&path).expect("a writable folder");
    std::io::copy(&mut std::io::Read::take(whole, 20_000_000), &mut part).expect("a copy");
    refused("a truncated GGUF file", &eval(&path), &["model.gguf"]);
}

#[test]
fn bad_arguments_are_refused() {
    let llama = files::fixture("llama");
    let llama = llama.to_string_lossy();
    let logits = |more: &[&str]| run(&[&["eval", "logits", &llama, "--input-ids", "1,2"][..], more].concat());
    refused("an id outside the vocabulary", &run(&["eval", "logits", &llama, "--input-ids", "1,512"]), &["512"]);
    refused("a prompt longer than the context", &logits(&["--greedy", "600"]), &["512", "602"]);
    refused("more stages than layers", &logits(&["--pp", "5"]), &["5", "4"]);
    refused("more ranks than heads", &logits(&["--tp", "9"]), &["9", "8"]);
    refused("an unknown flag", &logits(&["--colour"]), &["--colour"]);
    refused("an unknown instruction set", &logits(&["--isa", "mmx"]), &["mmx"]);
    refused("a bad temperature", &run(&["run", &llama, "x", "--temperature", "-1"]), &["temperature", "-1"]);
    refused("a missing text", &run(&["eval", "ppl", &llama, "--text", "/does/not/exist.txt"]), &["/does/not/exist.txt"]);
}

#[test]
fn bad_manifests_are_refused_with_line_and_column() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.yaml");
    let plan = |text: &str| {
        fs::write(&path, text).expect("a writable file");
        run(&["plan", "-f", &path.to_string_lossy()])
    };
    let good = manifest("tiny", &files::fixture("llama"), &parallelism(2, 2));
    assert!(plan(&good).status.success(), "{}", plan(&good).stderr);
    // Line 8 is `parallelism:`, line 9 `pipeline: 2`.
    refused("an unknown field", &plan(&good.replace("pipeline", "pipelines")), &["pipelines", "9:5"]);
    refused("a wrong type", &plan(&good.replace("pipeline: 2", "pipeline: two")), &["two", "9:15"]);
    refused("a value out of range", &plan(&good.replace("pipeline: 2", "pipeline: 0")), &["pipeline", "9:15"]);
    refused("no YAML", &plan("a: [b"), &["model.yaml"]);
    refused("another kind", &plan(&good.replace("ModelDeployment", "Deployment")), &["Deployment"]);
    refused("an unknown scheme", &plan(&good.replace("file://", "ftp://")), &["ftp"]);
    refused("a claim of a cluster", &plan(&good.replace("file://", "pvc://claim")), &["pvc://claim/", "a claim is a volume of a cluster"]);
    refused("a plan that cannot be", &plan(&good.replace("pipeline: 2", "pipeline: 5")), &["5", "4"]);
    refused(
        "a plan that does not fit",
        &plan(&format!("{good}  workers:\n    resources:\n      limits:\n        memory: 100Ki\n")),
        &["memory"],
    );
    refused("no file", &run(&["plan", "-f", "/does/not/exist.yaml"]), &["/does/not/exist.yaml"]);
}

#[test]
fn a_port_in_use_is_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let llama = files::fixture("llama");
    refused("a port in use", &run(&["serve", &llama.to_string_lossy(), "--port", &port, "--grpc-port", "0"]), &[&port, "in use"]);
}

/// Requests with something wrong, the status, and what the message names.
fn bad_requests() -> Vec<(&'static str, Value, u16, &'static str)> {
    let with = |key: &str, value: Value| {
        let mut body = json!({"model": "tiny", "prompt": "The quick", "max_tokens": 4});
        body[key] = value;
        body
    };
    vec![
        ("a model that is not there", with("model", json!("other")), 404, "other"),
        ("no prompt", json!({"model": "tiny"}), 400, "prompt"),
        ("an empty prompt list", with("prompt", json!([])), 400, "prompt"),
        ("a prompt of the wrong type", with("prompt", json!(7)), 400, "prompt"),
        ("an id outside the vocabulary", with("prompt", json!([1, 512])), 400, "512"),
        ("a prompt longer than the context", with("prompt", json!(vec![7; 600])), 400, "512"),
        ("a negative temperature", with("temperature", json!(-0.5)), 400, "temperature"),
        ("a temperature of the wrong type", with("temperature", json!("hot")), 400, "temperature"),
        ("top_p above 1", with("top_p", json!(1.5)), 400, "top_p"),
        ("max_tokens 0 and n 0", with("n", json!(0)), 400, "n"),
        ("negative max_tokens", with("max_tokens", json!(-1)), 400, "max_tokens"),
        ("too many log-probabilities", with("logprobs", json!(1000)), 400, "logprobs"),
        ("a bias for no id", with("logit_bias", json!({"x": 1})), 400, "logit_bias"),
        ("a penalty out of range", with("presence_penalty", json!(9)), 400, "presence_penalty"),
        ("a stop of the wrong type", with("stop", json!(5)), 400, "stop"),
    ]
}

#[tokio::test]
async fn bad_requests_get_the_error_object_and_nothing_else_stops() {
    let server = Server::start(&manifest("tiny", &files::fixture("llama"), &parallelism(1, 1)));
    let url = format!("{}/v1/completions", server.http);
    let mut wrong = Vec::new();
    for (what, body, status, word) in bad_requests() {
        let (got, answer) = client::post(&url, &body).await.expect("an answer");
        let error = &answer["error"];
        let message = error["message"].as_str().unwrap_or_default();
        if got.as_u16() != status || !message.contains(word) || !error["type"].is_string() {
            wrong.push(format!("{what}: expected {status} with {word:?}, got {got} {answer}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let good = json!({"model": "tiny", "prompt": "The quick", "max_tokens": 4});
    client::complete(&server.http, &good).await.expect("an answer after bad requests");
}
