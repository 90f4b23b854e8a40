//! Refusals: the status, the parameter they name, and what does not refuse.

use super::*;

#[tokio::test]
async fn bad_parameters_are_named() {
    let world = World::new().await;
    let completions = [
        ("model", json!({"model": 3}), "invalid_value"),
        ("model", json!({"model": null}), "missing_parameter"),
        ("prompt", json!({"prompt": null}), "missing_parameter"),
        ("prompt", json!({"prompt": []}), "invalid_value"),
        ("prompt", json!({"prompt": [1, "a"]}), "invalid_value"),
        ("prompt", json!({"prompt": [[]]}), "invalid_value"),
        ("prompt", json!({"prompt": {"text": "a"}}), "invalid_value"),
        ("prompt", json!({"prompt": [512]}), "invalid_value"),
        ("prompt", json!({"prompt": [-1]}), "invalid_value"),
        ("prompt", json!({"prompt": vec![5; 600]}), "context_length_exceeded"),
        ("max_tokens", json!({"max_tokens": 511}), "context_length_exceeded"),
        ("max_tokens", json!({"max_tokens": 0}), "invalid_value"),
        ("max_tokens", json!({"max_tokens": -2}), "invalid_value"),
        ("max_tokens", json!({"max_tokens": 1.5}), "invalid_value"),
        ("min_tokens", json!({"min_tokens": 30}), "invalid_value"),
        ("temperature", json!({"temperature": -0.1}), "invalid_value"),
        ("temperature", json!({"temperature": "hot"}), "invalid_value"),
        ("top_p", json!({"top_p": 0}), "invalid_value"),
        ("top_p", json!({"top_p": 1.1}), "invalid_value"),
        ("top_k", json!({"top_k": -2}), "invalid_value"),
        ("min_p", json!({"min_p": 7}), "invalid_value"),
        ("n", json!({"n": 0}), "invalid_value"),
        ("n", json!({"n": 129}), "invalid_value"),
        ("n", json!({"n": 65}), "invalid_value"),
        ("presence_penalty", json!({"presence_penalty": 3}), "invalid_value"),
        ("frequency_penalty", json!({"frequency_penalty": -3}), "invalid_value"),
        ("repetition_penalty", json!({"repetition_penalty": 0}), "invalid_value"),
        ("seed", json!({"seed": 0.5}), "invalid_value"),
        ("stop", json!({"stop": ""}), "invalid_value"),
        ("stop", json!({"stop": ["a", 1]}), "invalid_value"),
        ("stop_token_ids", json!({"stop_token_ids": [512]}), "invalid_value"),
        ("stop_token_ids", json!({"stop_token_ids": "4"}), "invalid_value"),
        ("logit_bias", json!({"logit_bias": {"506": 101}}), "invalid_value"),
        ("logit_bias", json!({"logit_bias": {"a": 1}}), "invalid_value"),
        ("logit_bias", json!({"logit_bias": {"512": 1}}), "invalid_value"),
        ("logprobs", json!({"logprobs": 21}), "invalid_value"),
        ("logprobs", json!({"logprobs": true}), "invalid_value"),
        ("echo", json!({"echo": 1}), "invalid_value"),
        ("stream", json!({"stream": "yes"}), "invalid_value"),
        ("stream_options", json!({"stream_options": {"include_usage": true}}), "invalid_value"),
        ("stream_options.pace", json!({"stream": true, "stream_options": {"pace": true}}), "invalid_value"),
        ("best_of", json!({"best_of": 2}), "unsupported_parameter"),
        ("suffix", json!({"suffix": "}"}), "unsupported_parameter"),
        ("skip_special_tokens", json!({"skip_special_tokens": false}), "unsupported_parameter"),
        ("user", json!({"user": 1}), "invalid_value"),
        ("guided_json", json!({"guided_json": []}), "invalid_value"),
        ("guided_decoding_backend", json!({"guided_decoding_backend": "x"}), "unknown_parameter"),
    ];
    for (param, more, code) in completions {
        let error = world.post("/v1/completions", &request(more.clone())).await.error(400);
        assert_eq!(
            (&error["param"], &error["code"], &error["type"]),
            (&json!(param), &json!(code), &json!("invalid_request_error")),
            "{more}: {error}"
        );
        let last = param.rsplit('.').next().unwrap_or(param);
        assert!(error["message"].as_str().is_some_and(|m| m.contains(last)), "{more}: {error}");
    }
    let one = json!([{"role": "user", "content": "Hello"}]);
    let chats = [
        ("messages", json!({"messages": []}), "invalid_value"),
        ("messages", json!({"messages": "Hello"}), "invalid_value"),
        ("messages[0]", json!({"messages": ["Hello"]}), "invalid_value"),
        ("messages[0].role", json!({"messages": [{"role": "pirate", "content": "x"}]}), "invalid_value"),
        ("messages[0].content", json!({"messages": [{"role": "user"}]}), "invalid_value"),
        (
            "messages[1].content[0]",
            json!({"messages": [one[0], {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}),
            "invalid_value",
        ),
        ("messages[0].audio", json!({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}), "invalid_value"),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": 50}), "invalid_value"),
        ("top_logprobs", json!({"top_logprobs": 2}), "invalid_value"),
        ("max_completion_tokens", json!({"max_completion_tokens": 3, "max_tokens": 4}), "invalid_value"),
        ("tools", json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), "unsupported_parameter"),
        ("tool_choice", json!({"tool_choice": "required"}), "unsupported_parameter"),
        ("response_format.type", json!({"response_format": {"type": "structural_tag"}}), "unsupported_parameter"),
        ("response_format", json!({"response_format": {"type": 1}}), "invalid_value"),
        ("modalities", json!({"modalities": ["text", "audio"]}), "unsupported_parameter"),
        ("audio", json!({"audio": {"voice": "x"}}), "unsupported_parameter"),
        ("reasoning_effort", json!({"reasoning_effort": "high"}), "unsupported_parameter"),
        ("verbosity", json!({"verbosity": "low"}), "unsupported_parameter"),
        ("echo", json!({"echo": true}), "unknown_parameter"),
        ("chat_template_kwargs", json!({"chat_template_kwargs": {"messages": []}}), "invalid_value"),
    ];
    for (param, more, code) in chats {
        let error = world.post("/v1/chat/completions", &chat(more.clone())).await.error(400);
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{more}: {error}");
    }
}

#[tokio::test]
async fn what_changes_no_token_is_taken() {
    let world = World::new().await;
    let plain = world.complete(json!({})).await;
    let harmless = json!({
        "user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "flex", "safety_identifier": "s", "prompt_cache_key": "k",
        "prompt_cache_retention": "24h", "stop": null, "n": 1, "best_of": 1, "suffix": "", "logit_bias": {}, "seed": null, "top_k": 0,
        "skip_special_tokens": true, "no_such_thing": null, "temperature": 0.0, "max_tokens": 24.0,
    });
    let same = world.complete(harmless).await;
    assert_eq!(same["choices"], plain["choices"]);
    let talk = world.post("/v1/chat/completions", &chat(json!({}))).await.ok();
    let harmless = json!({
        "store": false, "metadata": {}, "service_tier": "auto", "tools": [], "tool_choice": "none", "parallel_tool_calls": true,
        "response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium",
        "prediction": {"type": "content", "content": "x"}, "max_completion_tokens": 24, "logprobs": false, "add_generation_prompt": true,
    });
    let same = world.post("/v1/chat/completions", &chat(harmless)).await.ok();
    assert_eq!(same["choices"], talk["choices"]);
}

#[tokio::test]
async fn what_is_no_request_is_refused_with_an_error_object() {
    let world = World::new().await;
    let error = world.get("/v1/nothing").await.error(404);
    assert!(error["message"].as_str().is_some_and(|m| m.contains("/v1/nothing")), "{error}");
    world.get("/v1/completions").await.error(405);
    world.post("/health", &json!({})).await.error(405);
    let error = world.post("/v1/completions", &request(json!({"model": "absent"}))).await.error(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    assert!(error["message"].as_str().is_some_and(|m| m.contains("absent")));
    world.get("/v1/models/absent").await.error(404);
    let send = async |head: String, body: &str| exchange(world.http, &head, body.as_bytes()).await;
    for (body, place) in [("{\"model\": \"tiny\",\n  \"n\": }", "line 2 column 8"), ("", "line 1 column 0"), ("[1]", "array")] {
        let error = send(head("/v1/completions", body.len()), body).await.error(400);
        assert!(error["message"].as_str().is_some_and(|m| m.contains(place)), "{error}");
        assert_eq!(error["code"], "invalid_json");
    }
    let deep = "[".repeat(100_000);
    send(head("/v1/completions", deep.len()), &deep).await.error(400);
    let typed = |kind: &str| head("/v1/completions", 2).replace("application/json", kind);
    let error = send(typed("text/plain"), "{}").await.error(415);
    assert!(error["message"].as_str().is_some_and(|m| m.contains("text/plain")));
    send(typed("application/json; charset=utf-8"), "{}").await.error(400);
    let coded = |coding: &str| head("/v1/completions", 2).replace("host: skein", &format!("host: skein\r\ncontent-encoding: {coding}"));
    let error = send(coded("gzip"), "{}").await.error(415);
    assert_eq!(error["code"], "unsupported_content_encoding");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("gzip")));
    send(coded("identity"), "{}").await.error(400);
}

#[tokio::test]
async fn bodies_up_to_the_limit_are_taken_and_larger_ones_refused() {
    let limit = 64 << 10;
    let world = World::with(Setup { options: ApiOptions { body_bytes: limit, ..ApiOptions::default() }, ..Setup::default() }).await;
    let padded = |length: usize| {
        let text = request(json!({"max_tokens": 1})).to_string();
        let spaces = " ".repeat(length - text.len());
        text + &spaces
    };
    let send = async |head: String, body: String| exchange(world.http, &head, body.as_bytes()).await;
    send(head("/v1/completions", limit), padded(limit)).await.ok();
    for length in [limit + 1, 3 << 20] {
        let error = send(head("/v1/completions", length), padded(length)).await.error(413);
        assert_eq!(error["code"], "body_too_large");
        assert!(error["message"].as_str().is_some_and(|m| m.contains("65536")), "{error}");
    }
    // One whose length is not announced, and one that asks before it is sent.
    let chunked = head("/v1/completions", 0).replace("content-length: 0", "transfer-encoding: chunked");
    send(chunked, format!("{:x}\r\n{}\r\n0\r\n\r\n", limit + 1, padded(limit + 1))).await.error(413);
    let asking = head("/v1/completions", 3 << 20).replace("host: skein", "host: skein\r\nexpect: 100-continue");
    send(asking, String::new()).await.error(413);
}

#[tokio::test]
async fn clients_that_stop_sending_are_let_go() {
    let options = ApiOptions { patience: Duration::from_millis(300), ..ApiOptions::default() };
    let world = World::with(Setup { options, cost: SLOW, ..Setup::default() }).await;
    let silent = async |sent: &str| {
        let mut stream = TcpStream::connect(world.http).await.expect("a server");
        stream.write_all(sent.as_bytes()).await.expect("it reads");
        let mut bytes = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes)).await;
        // A reset says that bytes were left unread.
        let _ = closed.expect("the server closes the connection");
        bytes
    };
    for head in ["", "PRI * HT", "POST /v1/compl"] {
        assert!(!silent(head).await.starts_with(b"HTTP/1.1 2"), "after {head:?}");
    }
    let started = head("/v1/completions", 100) + "{";
    let error = Reply::parse(&silent(&started).await).error(408);
    assert_eq!(error["code"], "body_stalled");
    // Control: an answer may take longer than that.
    let begun = tokio::time::Instant::now();
    world.complete(json!({"max_tokens": 60, "ignore_eos": true})).await;
    assert!(begun.elapsed() > Duration::from_millis(300), "the answer took {:?}", begun.elapsed());
}

#[tokio::test]
async fn chat_without_a_template_is_refused() {
    let bare = |name: &str, file: &mut Value| {
        if name == "tokenizer_config.json" {
            file.as_object_mut().expect("an object").remove("chat_template");
        }
    };
    let world = World::with(Setup { card: card(bare), ..Setup::default() }).await;
    let error = world.post("/v1/chat/completions", &chat(json!({}))).await.error(400);
    assert_eq!(error["code"], "no_chat_template");
    assert!(error["message"].as_str().is_some_and(|m| m.contains("template")), "{error}");
    world.complete(json!({})).await;
}
