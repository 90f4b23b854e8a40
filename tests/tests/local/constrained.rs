//! Constrained output: it matches what was asked for, and is the same on any split and beside anything.

use std::collections::HashSet;

use e2e::{
    client, files,
    server::{Server, manifest, parallelism},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::streams::mixed;

fn person() -> Value {
    json!({
        "type": "object", "required": ["name", "age", "skills"], "additionalProperties": false,
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 16},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "skills": {"type": "array", "maxItems": 3, "items": {"enum": ["cooking", "sailing", "Rust"]}},
        },
    })
}

fn is_person(text: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(text) else { return false };
    let skills = value["skills"].as_array();
    value.as_object().is_some_and(|map| map.len() == 3)
        && value["name"].as_str().is_some_and(|name| (1..=16).contains(&name.chars().count()))
        && value["age"].as_i64().is_some_and(|age| (0..=120).contains(&age))
        && skills
            .is_some_and(|list| list.len() <= 3 && list.iter().all(|s| ["cooking", "sailing", "Rust"].contains(&s.as_str().unwrap_or(""))))
}

fn is_numbers(text: &str) -> bool {
    serde_json::from_str::<Vec<u32>>(text).is_ok_and(|list| (2..=6).contains(&list.len()) && list.iter().all(|n| *n <= 500))
}

/// A request and what its answer must be.
type Case = (Value, fn(&str) -> bool);

fn cases(model: &str) -> Vec<Case> {
    let schema =
        |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}});
    let numbers = json!({"type": "array", "minItems": 2, "maxItems": 6, "items": {"type": "integer", "minimum": 0, "maximum": 500}});
    let kinds: [Case; 4] = [
        (schema(person()), is_person),
        (schema(numbers), is_numbers),
        (json!({"guided_regex": "(red|green|blue)(, (red|green|blue)){1,4}"}), |text| {
            let words: Vec<&str> = text.split(", ").collect();
            (2..=5).contains(&words.len()) && words.iter().all(|word| ["red", "green", "blue"].contains(word))
        }),
        (json!({"guided_choice": ["a small boat", "the sea", "nothing at all"]}), |text| {
            ["a small boat", "the sea", "nothing at all"].contains(&text)
        }),
    ];
    let settings = [
        json!({"temperature": 0}),
        json!({"temperature": 1.0}),
        json!({"temperature": 0.8, "top_k": 50, "logprobs": 3}),
        json!({"temperature": 0, "frequency_penalty": 0.5, "logprobs": 1}),
        json!({"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.1}),
    ];
    let case = |i: usize| {
        let (constraint, check) = &kinds[i % kinds.len()];
        let mut body = json!({"model": model, "prompt": format!("Question {i}: who is it, and what is there?\nAnswer: "), "max_tokens": 400, "seed": 70 + i});
        for part in [constraint, &settings[i % settings.len()]] {
            body.as_object_mut().expect("an object").extend(part.as_object().expect("an object").clone());
        }
        (body, *check)
    };
    (0..12).map(case).collect()
}

async fn choice(http: &str, request: &Value) -> Value {
    let (status, answer) = client::post(&format!("{http}/v1/completions"), request).await.expect("an answer");
    assert!(status.is_success(), "{answer}");
    answer["choices"][0].clone()
}

async fn matches_on_any_split(path: &std::path::Path) {
    let cases = cases("model");
    let alone = Server::start(&manifest("model", path, &parallelism(1, 1)));
    let mut expected = Vec::new();
    for (request, check) in &cases {
        let got = choice(&alone.http, request).await;
        let text = got["text"].as_str().expect("text");
        assert_eq!(got["finish_reason"], "stop", "{got}");
        assert!(check(text), "{text:?} for {request}");
        // Controls: without the constraint it does not match, and it does not match another one's.
        let mut free = request.clone();
        for name in ["response_format", "guided_regex", "guided_choice"] {
            free.as_object_mut().expect("an object").remove(name);
        }
        let free = choice(&alone.http, &free).await;
        assert!(!check(free["text"].as_str().expect("text")), "{free}");
        assert!(cases.iter().filter(|(_, other)| other(text)).count() == 3, "three ask for the same as {text:?}");
        expected.push(got);
    }
    let distinct: HashSet<String> = expected.iter().map(|choice| choice["text"].to_string()).collect();
    assert!(distinct.len() > 5, "{distinct:?}");
    drop(alone);
    let server = Server::start(&manifest("model", path, &parallelism(2, 2)));
    for ((request, _), expected) in cases.iter().zip(&expected) {
        assert_eq!(&choice(&server.http, request).await, expected, "alone, PP 2 × TP 2");
    }
    // All of them at once, beside streams that nothing constrains.
    let mates = mixed("model", 6).into_iter().map(|mut request| {
        request["prompt"] = json!("Once upon a time there was");
        (usize::MAX, request)
    });
    let mut running = JoinSet::new();
    for (i, request) in cases.iter().map(|(request, _)| request.clone()).enumerate().chain(mates) {
        let http = server.http.clone();
        running.spawn(async move { (i, choice(&http, &request).await) });
    }
    while let Some(done) = running.join_next().await {
        let (i, got) = done.expect("a task");
        if let Some(expected) = expected.get(i) {
            assert_eq!(&got, expected, "request {i} beside others, PP 2 × TP 2");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reference_model_writes_what_was_asked_for_on_any_split() {
    matches_on_any_split(&files::reference()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fixtures_write_what_was_asked_for_on_any_split() {
    for name in ["llama", "gemma3"] {
        matches_on_any_split(&files::fixture(name)).await;
    }
}
