//! Output that matches what was asked for, in every dialect; and what is refused.

use super::*;
use crate::grammar::tests::{constraint, mask_behind};
use crate::grammar::{GrammarSource, Grammars};
use proto::inference as wire;
use proto::inference::inference_client::InferenceClient;

fn schema() -> Value {
    json!({
        "type": "object", "required": ["city", "size"], "additionalProperties": false,
        "properties": {"city": {"enum": ["Paris", "Lyon"]}, "size": {"type": "integer", "minimum": 1, "maximum": 99}},
    })
}

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    assert_eq!(value.as_object().map(|map| map.len()), Some(2), "{text:?}");
    assert!(value["city"] == "Paris" || value["city"] == "Lyon", "{text:?}");
    assert!(value["size"].as_i64().is_some_and(|n| (1..=99).contains(&n)), "{text:?}");
}

fn format_of(schema: Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "city", "strict": true, "schema": schema}})
}

fn text(answer: &Value) -> (&str, &str) {
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().or(choice["message"]["content"].as_str()).expect("text");
    (text, choice["finish_reason"].as_str().expect("a reason"))
}

#[tokio::test]
async fn chats_and_completions_match_their_schema() {
    let world = World::new().await;
    let free = world.post("/v1/chat/completions", &chat(json!({"max_tokens": 200}))).await.ok();
    assert!(serde_json::from_str::<Value>(text(&free).0).is_err(), "without a schema it is no JSON: {free}");
    let mut seen = std::collections::HashSet::new();
    for seed in 0..6 {
        let more = json!({"max_tokens": 200, "temperature": 1, "seed": seed, "response_format": format_of(schema())});
        let answer = world.post("/v1/chat/completions", &chat(more.clone())).await.ok();
        check(text(&answer).0);
        assert_eq!(text(&answer).1, "stop");
        seen.insert(text(&answer).0.to_owned());
        let mut streamed = chat(more.clone());
        streamed["stream"] = true.into();
        let events = world.post("/v1/chat/completions", &streamed).await.events();
        let pieces: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(pieces, text(&answer).0);
        let completed = world.complete(more).await;
        check(text(&completed).0);
    }
    assert!(seen.len() > 2, "what is drawn depends on the seed: {seen:?}");
    world.wait_idle().await;
}

#[tokio::test]
async fn choices_log_probabilities_and_lengths_are_as_ever() {
    let world = World::new().await;
    let more = json!({"max_tokens": 200, "temperature": 1, "seed": 5, "n": 3, "logprobs": 2, "response_format": format_of(schema())});
    let answer = world.complete(more).await;
    let grammars = Grammars::new(Arc::new(Tokenizer::from_card(&card(|_, _| ())).expect("a tokenizer")));
    let of = constraint(&grammars, GrammarSource::JsonSchema(schema().to_string()));
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 3);
    for (index, choice) in (0..).zip(choices) {
        let text = choice["text"].as_str().expect("text");
        check(text);
        let sampling = Sampling { temperature: 1.0, seed: 5, choice: index, masked: true, ..Sampling::default() };
        let ids = MODEL.solo_under(&world.ids(PROMPT), &sampling, 200, &ENDS, |emitted| mask_behind(&of, emitted));
        assert_eq!(text, world.text(&ids), "choice {index}");
        assert!(!choice["logprobs"]["tokens"].as_array().expect("tokens").is_empty());
    }
    // Cut by a limit, it is the beginning of a match.
    let cut = world.complete(json!({"max_tokens": 3, "response_format": format_of(schema())})).await;
    assert_eq!(text(&cut).1, "length");
    assert!(serde_json::from_str::<Value>(text(&cut).0).is_err());
}

#[tokio::test]
async fn every_way_to_say_it() {
    let world = World::new().await;
    let one = |more: Value| {
        let world = &world;
        async move {
            let mut all = json!({"max_tokens": 300, "temperature": 1, "seed": 2});
            all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            let answer = world.complete(all).await;
            assert_eq!(text(&answer).1, "stop", "{more}: {answer}");
            text(&answer).0.to_owned()
        }
    };
    for more in [
        json!({"guided_json": schema()}),
        json!({"guided_json": schema().to_string()}),
        json!({"structured_outputs": {"json": schema()}}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema()}}}),
    ] {
        check(&one(more).await);
    }
    for more in [json!({"guided_regex": "[0-9]{3}-x(/|\\.)"}), json!({"structured_outputs": {"regex": "[0-9]{3}-x(/|\\.)"}})] {
        let text = one(more).await;
        assert!(text.len() == 6 && text[..3].bytes().all(|b| b.is_ascii_digit()) && ["-x/", "-x."].contains(&&text[3..]), "{text}");
    }
    for more in [json!({"guided_choice": ["a+b", "c|d", "(é"]}), json!({"structured_outputs": {"choice": ["a+b", "c|d", "(é"]}})] {
        let text = one(more).await;
        assert!(["a+b", "c|d", "(é"].contains(&text.as_str()), "{text}");
    }
    for more in [json!({"response_format": {"type": "text"}}), json!({"guided_json": null, "structured_outputs": {"json_object": false}})] {
        assert_eq!(text(&world.complete(more).await).0, text(&world.complete(json!({})).await).0);
    }
    // Any object: what is drawn at random seldom ends, and always goes on as one.
    let object = world.complete(json!({"max_tokens": 60, "temperature": 1, "response_format": {"type": "json_object"}})).await;
    assert!(text(&object).0.starts_with('{'), "{object}");
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name() {
    let world = World::new().await;
    let format = |value: Value| json!({"response_format": value});
    let cases = [
        (format(json!("json")), "response_format", "json_schema"),
        (format(json!({"type": "xml"})), "response_format.type", "xml"),
        (format(json!({"type": "json_object", "schema": {}})), "response_format.schema", "left out"),
        (format(json!({"type": "json_schema"})), "response_format.json_schema", "an object"),
        (format(json!({"type": "json_schema", "json_schema": {"name": "x"}})), "response_format.json_schema.schema", "an object"),
        (format(json!({"type": "json_schema", "json_schema": {"name": 1, "schema": {}}})), "response_format.json_schema.name", "a string"),
        (format(json!({"type": "json_schema", "json_schema": {"strict": 1, "schema": {}}})), "response_format.json_schema.strict", "true"),
        (format(json!({"type": "json_schema", "json_schema": {"more": 1, "schema": {}}})), "response_format.json_schema.more", "left out"),
        (format(format_of(json!({"type": "banana"}))), "response_format.json_schema.schema", "banana"),
        (format(format_of(json!({"$ref": "http://example.com"}))), "response_format.json_schema.schema", "example.com"),
        (json!({"guided_regex": "("}), "guided_regex", "regex"),
        (json!({"guided_regex": 1}), "guided_regex", "a string"),
        (json!({"guided_choice": []}), "guided_choice", "1 to"),
        (json!({"guided_choice": [1]}), "guided_choice", "strings"),
        (json!({"guided_json": 1}), "guided_json", "schema"),
        (json!({"guided_grammar": "start: \"a\""}), "guided_grammar", "not supported"),
        (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs.structural_tag", "not supported"),
        (json!({"structured_outputs": {"json_object": 1}}), "structured_outputs.json_object", "true or false"),
        (json!({"structured_outputs": 1}), "structured_outputs", "an object"),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice", "one of them"),
        (json!({"guided_regex": "a", "ignore_eos": true}), "ignore_eos", "guided_regex"),
        (json!({"guided_regex": "a", "min_tokens": 2}), "min_tokens", "guided_regex"),
    ];
    for (more, param, word) in cases {
        let error = world.post("/v1/completions", &request(more.clone())).await.error(400);
        assert_eq!(error["param"], param, "{more}: {error}");
        assert!(error["message"].as_str().is_some_and(|m| m.contains(word)), "{more}: {error}");
    }
    let endless = World::with(Setup {
        card: card(|name, value| {
            if name == "generation_config.json" {
                *value = json!({});
            } else if name == "tokenizer_config.json" {
                value.as_object_mut().expect("an object").remove("eos_token");
            }
        }),
        ..Setup::default()
    })
    .await;
    if endless.tokenizer.end_ids().is_empty() {
        let error = endless.post("/v1/completions", &request(json!({"guided_regex": "a"}))).await.error(400);
        assert!(error["message"].as_str().is_some_and(|m| m.contains("end token")), "{error}");
    }
}

#[tokio::test]
async fn grpc_constrains_too() {
    use wire::constraint::Kind;
    let world = World::new().await;
    let mut client = InferenceClient::connect(format!("http://{}", world.grpc)).await.expect("a server");
    let ask = |kind: Option<Kind>| wire::GenerateRequest {
        model: "tiny".to_owned(),
        prompt: Some(wire::generate_request::Prompt::Text(PROMPT.to_owned())),
        sampling: Some(wire::SamplingOptions { temperature: Some(1.0), seed: Some(4), ..Default::default() }),
        max_tokens: Some(200),
        constraint: Some(wire::Constraint { kind }),
        ..Default::default()
    };
    for kind in [
        Kind::JsonSchema(schema().to_string()),
        Kind::Regex("x{4}".to_owned()),
        Kind::Choices(wire::Choices { texts: vec!["left".to_owned(), "right".to_owned()] }),
    ] {
        let mut stream = client.generate(ask(Some(kind.clone()))).await.expect("it runs").into_inner();
        let (mut text, mut finish) = (String::new(), String::new());
        while let Some(message) = stream.message().await.expect("it ends well") {
            text.push_str(&message.text);
            finish = message.finish_reason;
        }
        assert_eq!(finish, "stop");
        match kind {
            Kind::JsonSchema(_) => check(&text),
            Kind::Regex(_) => assert_eq!(text, "xxxx"),
            _ => assert!(["left", "right"].contains(&text.as_str()), "{text}"),
        }
    }
    for (request, word) in [
        (ask(None), "constraint"),
        (ask(Some(Kind::JsonSchema("{".to_owned()))), "constraint.json_schema"),
        (ask(Some(Kind::Choices(wire::Choices::default()))), "constraint.choices"),
        (wire::GenerateRequest { ignore_eos: true, ..ask(Some(Kind::JsonObject(wire::JsonObject {}))) }, "ignore_eos"),
    ] {
        let status = client.generate(request).await.expect_err("refused");
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().contains(word), "{status}");
    }
}
