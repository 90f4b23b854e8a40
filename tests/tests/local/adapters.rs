//! Low-rank adapters: the reference's numbers, the same bits on any split, and several of them at one endpoint.

use std::{fs, path::Path};

use e2e::{
    client, files,
    program::{floats, id_list, ids, json},
    rewrite::Folder,
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const NAMES: [&str; 2] = ["llama-lora-a", "llama-lora-b"];

/// `eval logits` of `model` with an adapter, at the ids of `expected`.
fn logits(model: &Path, adapter: &Path, expected: &Value, more: &[&str]) -> Value {
    let (model, adapter, input) = (model.to_string_lossy(), adapter.to_string_lossy(), id_list(&ids(expected, "input_ids")));
    let mut args = vec!["eval", "logits", &model, "--adapter", &adapter, "--input-ids", &input, "--greedy", "24", "--kv", "f32", "--json"];
    args.extend(more);
    json(&args)
}

/// The largest difference between what was computed and what was expected.
fn distance(got: &Value, expected: &Value) -> f32 {
    let far = |field| floats(got, field).iter().zip(floats(expected, field)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    far("last_logits").max(far("nll_per_token"))
}

fn bits(got: &Value) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let raw = |field| floats(got, field).iter().map(|x| x.to_bits()).collect();
    (raw("last_logits"), raw("nll_per_token"), ids(got, "greedy_ids"))
}

#[test]
fn adapters_match_their_references_on_any_split() {
    let llama = files::fixture("llama");
    for (name, other) in [(NAMES[0], NAMES[1]), (NAMES[1], NAMES[0])] {
        let (adapter, expected) = (files::fixture(name), files::expected(name));
        let got = logits(&llama, &adapter, &expected, &[]);
        let off = distance(&got, &expected);
        assert!(off <= 1e-4, "{name} is off by {off}");
        assert_eq!(ids(&got, "greedy_ids"), ids(&expected, "greedy_ids"), "{name}");
        for way in
            [&["--pp", "2"][..], &["--tp", "2"], &["--tp", "3"], &["--pp", "2", "--tp", "2"], &["--chunk", "3"], &["--isa", "scalar"]]
        {
            assert!(bits(&logits(&llama, &adapter, &expected, way)) == bits(&got), "{name} with {} differs", way.join(" "));
        }
        // Controls: a factor 10 % off, the other adapter, none.
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::copy(adapter.join("adapter_model.safetensors"), folder.path().join("adapter_model.safetensors")).expect("a copy");
        let config = fs::read_to_string(adapter.join("adapter_config.json")).expect("the settings");
        assert!(config.contains("\"lora_alpha\": 16,"));
        let config = config.replace("\"lora_alpha\": 16,", "\"lora_alpha\": 14.4,");
        fs::write(folder.path().join("adapter_config.json"), config).expect("a writable folder");
        for wrong in [folder.path(), &files::fixture(other)] {
            let off = distance(&logits(&llama, wrong, &expected, &[]), &expected);
            assert!(off > 1e-3, "{name}: {} went unseen ({off})", wrong.display());
        }
        let bare = files::expected("llama");
        assert!(ids(&bare, "input_ids") != ids(&expected, "input_ids") || distance(&bare, &expected) > 1e-3, "{name} changes nothing");
    }
}

/// Model and adapter from either kind of file: GGUF has the rows of llama's heads in another order.
#[test]
fn any_file_of_an_adapter_goes_with_any_file_of_its_model() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let gguf = place.path().join("llama.gguf");
    let (llama, peft) = (files::fixture("llama"), files::fixture(NAMES[1]));
    Folder::read(&llama).expect("the fixture").write_gguf(&gguf, "llama").expect("a writable folder");
    let adapter = place.path().join("adapter.gguf");
    Folder::write_gguf_adapter(&peft, &adapter, (8, 4)).expect("a writable folder");
    let expected = files::expected(NAMES[1]);
    let got = logits(&llama, &peft, &expected, &[]);
    assert!(bits(&logits(&llama, &adapter, &expected, &[])) == bits(&got), "a GGUF adapter on safetensors");
    let pytorch = files::fixture("llama-lora-b-pt");
    assert!(bits(&logits(&llama, &pytorch, &expected, &[])) == bits(&got), "an adapter of PyTorch on safetensors");
    let in_gguf = logits(&gguf, &adapter, &expected, &[]);
    assert!(distance(&in_gguf, &expected) <= 1e-4 && ids(&in_gguf, "greedy_ids") == ids(&expected, "greedy_ids"), "both in GGUF");
    for (adapter, way) in [(&peft, &[][..]), (&peft, &["--tp", "2"]), (&adapter, &["--pp", "2", "--tp", "2"])] {
        assert!(bits(&logits(&gguf, adapter, &expected, way)) == bits(&in_gguf), "{} with {}", adapter.display(), way.join(" "));
    }
}

/// The text that `ids` are, by the server's own tokenizer.
async fn text(http: &str, ids: &[u32]) -> String {
    let body = json!({"model": "llama", "prompt": ids, "max_tokens": 0, "echo": true});
    client::complete(http, &body).await.expect("an answer")
}

/// What a request for a model is to give: the prompt and the reference's greedy ids.
async fn reference(http: &str, fixture: &str) -> (Value, String) {
    let expected = files::expected(fixture);
    let (input, greedy) = (ids(&expected, "input_ids"), ids(&expected, "greedy_ids"));
    let model = match fixture {
        "llama" => "llama".to_owned(),
        name => format!("llama:{}", &name[name.len() - 1..]),
    };
    let body = json!({"model": model, "prompt": input, "max_tokens": 24, "temperature": 0, "ignore_eos": true, "echo": true});
    (body, text(http, &[input, greedy].concat()).await)
}

fn with_adapters(spec: &str) -> String {
    let adapter = |name: &str| format!("  - name: {}\n    uri: file://{}\n", &name[name.len() - 1..], files::fixture(name).display());
    format!("{spec}  adapters:\n{}{}", adapter(NAMES[0]), adapter(NAMES[1]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_adapters_and_the_bare_model_share_an_endpoint() {
    for (pipeline, tensor) in [(1, 1), (2, 2)] {
        let server = Server::start(&manifest("llama", &files::fixture("llama"), &with_adapters(&parallelism(pipeline, tensor))));
        let mut cases = Vec::new();
        for fixture in ["llama", NAMES[0], NAMES[1]] {
            cases.push(reference(&server.http, fixture).await);
        }
        assert!(cases[0].1 != cases[1].1 && cases[1].1 != cases[2].1 && cases[0].1 != cases[2].1, "the adapters hardly differ");
        // Twice, so that the second finds the prompts in the cache, each its own.
        for round in 0..2 {
            let mut running = JoinSet::new();
            for (i, (body, _)) in cases.iter().enumerate().cycle().take(9) {
                let (http, body) = (server.http.clone(), body.clone());
                running.spawn(async move { (i, client::complete(&http, &body).await) });
            }
            while let Some(done) = running.join_next().await {
                let (i, got) = done.expect("a task");
                assert_eq!(got.expect("an answer"), cases[i].1, "case {i} in round {round} of {pipeline} × {tensor}");
            }
        }
        let listed: Value = serde_json::from_str(&client::get(&format!("{}/v1/models", server.http)).await.expect("models")).expect("JSON");
        let names: Vec<&str> = listed["data"].as_array().expect("a list").iter().filter_map(|m| m["id"].as_str()).collect();
        assert_eq!(names, ["llama", "llama:a", "llama:b"]);
        let mut unknown = cases[0].0.clone();
        unknown["model"] = "llama:c".into();
        let (status, answer) = client::post(&format!("{}/v1/completions", server.http), &unknown).await.expect("an answer");
        assert_eq!(status.as_u16(), 404);
        assert_eq!(answer["error"]["message"], "model llama has no adapter c; served are llama:a, llama:b");
        // A worker that is started again has its adapters again.
        if let Some(victim) = server.workers().last() {
            victim.signal("KILL");
            for (i, (body, expected)) in cases.iter().enumerate() {
                assert_eq!(client::complete(&server.http, body).await.expect("an answer"), *expected, "case {i} after a loss");
            }
        }
    }
}

/// `--adapter` of `run` and `serve`: what a manifest's adapters are.
#[tokio::test]
async fn adapters_are_put_on_a_model_without_a_manifest() {
    let llama = files::fixture("llama").display().to_string();
    let flag = |name: &str| format!("{}={}", &name[name.len() - 1..], files::fixture(name).display());
    let (a, b) = (flag(NAMES[0]), flag(NAMES[1]));
    let prompt = "the geese take";
    let mut texts = Vec::new();
    for split in [&[][..], &["--pp", "2", "--tp", "2"]] {
        let server = Server::of(&[&[&*llama, "--adapter", &a, "--adapter", &b], split].concat());
        for fixture in ["llama", NAMES[0], NAMES[1]] {
            let (mut body, expected) = reference(&server.http, fixture).await;
            assert_eq!(client::complete(&server.http, &body).await.expect("an answer"), expected, "{fixture} with {}", split.join(" "));
            (body["prompt"], body["echo"]) = (prompt.into(), false.into());
            texts.push(client::complete(&server.http, &body).await.expect("an answer"));
        }
    }
    assert!(texts[..3] == texts[3..] && texts[0] != texts[1] && texts[1] != texts[2], "{texts:?}");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("m.yaml").display().to_string();
    fs::write(&path, manifest("llama", &files::fixture("llama"), &with_adapters(""))).expect("a writable folder");
    let ask = |more: &[&str]| {
        let drawn = ["--temperature", "0", "--max-tokens", "24", "--ignore-eos", "--raw", "--json", prompt];
        json(&[&["run"], more, &drawn[..]].concat())
    };
    for (more, model, text) in [
        (&[&*llama][..], "llama", &texts[0]),
        (&[&*llama, "--adapter", &a], "llama:a", &texts[1]),
        (&[&*llama, "--adapter", &b, "--tp", "2"], "llama:b", &texts[2]),
        (&["-f", &path, "--adapter", "a"], "llama:a", &texts[1]),
    ] {
        let answer = ask(more);
        assert_eq!((answer["text"].as_str(), answer["model"].as_str()), (Some(&**text), Some(model)), "{more:?}");
    }
    let refused = |args: &[&str], said: &str| {
        let run = e2e::program::run(args);
        assert_eq!(run.status.code(), Some(2), "{args:?}");
        assert!(run.stderr.contains(said), "{args:?}: {}", run.stderr);
    };
    refused(&["run", &llama, "--adapter", "a", prompt], "expected NAME=SOURCE");
    refused(&["run", &llama, "--adapter", "A=x", prompt], "lower-case letters");
    refused(&["run", &llama, "--adapter", "a=/absent", prompt], "/absent");
    refused(&["run", "-f", &path, "--adapter", "c", prompt], "no adapter c, expected one of a, b");
    refused(&["run", "-f", &path, "--adapter", &a, prompt], "the name of one of the manifest's adapters alone");
    refused(&["serve", "--port", "0", "--grpc-port", "0", &llama, "--adapter", &a, "--adapter", &a], "a again");
    refused(&["serve", "--port", "0", "--grpc-port", "0", "-f", &path, "--adapter", &a], "--adapter");
    refused(
        &["serve", "--port", "0", "--grpc-port", "0", &llama, "--adapter", &format!("llama={}", files::fixture(NAMES[0]).display())],
        "another name than the model's",
    );
}

#[test]
fn adapters_of_another_model_are_refused_before_anything_starts() {
    let (model, adapter) = (files::fixture("gpt2"), files::fixture(NAMES[0]));
    let manifest = with_adapters("").replace("  adapters", "  replicas: 1\n  adapters");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("m.yaml");
    fs::write(&path, e2e::server::manifest("gpt2", &model, &manifest)).expect("a writable folder");
    for args in [
        vec!["plan".to_owned(), "-f".to_owned(), path.display().to_string()],
        vec![
            "eval".to_owned(),
            "logits".to_owned(),
            model.display().to_string(),
            "--adapter".to_owned(),
            adapter.display().to_string(),
            "--input-ids".to_owned(),
            "1,2".to_owned(),
        ],
    ] {
        let refused = e2e::program::run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(refused.status.code(), Some(2));
        let said = &refused.stderr;
        assert!(said.contains("lora_A") && said.contains("adapter_model.safetensors"), "{said}");
    }
}
