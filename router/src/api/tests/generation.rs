//! Every parameter that changes what is drawn or where it ends.

use super::*;

fn choice(answer: &Value, index: usize) -> (&str, &str) {
    let choice = &answer["choices"][index];
    assert_eq!(choice["index"], index);
    (choice["text"].as_str().expect("text"), choice["finish_reason"].as_str().expect("a reason"))
}

#[tokio::test]
async fn a_completion_is_the_models_text_with_its_usage() {
    let world = World::new().await;
    let answer = world.complete(json!({"max_tokens": 20, "ignore_eos": true})).await;
    let tokens = world.solo(&Sampling::default(), 20, &[]);
    assert_eq!(choice(&answer, 0), (world.text(&tokens).as_str(), "length"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!("tiny")));
    assert!(answer["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")));
    let prompt = world.ids(PROMPT).len();
    assert_eq!(answer["usage"]["prompt_tokens"], prompt);
    assert_eq!((&answer["usage"]["completion_tokens"], &answer["usage"]["total_tokens"]), (&json!(20), &json!(prompt + 20)));
    assert!(answer["choices"][0]["logprobs"].is_null());
}

#[tokio::test]
async fn without_max_tokens_a_completion_has_sixteen_and_a_chat_what_fits() {
    let world = World::new().await;
    let mut body = request(json!({"ignore_eos": true}));
    body.as_object_mut().expect("an object").remove("max_tokens");
    assert_eq!(world.post("/v1/completions", &body).await.ok()["usage"]["completion_tokens"], 16);
    let mut body = chat(json!({"ignore_eos": true}));
    body.as_object_mut().expect("an object").remove("max_tokens");
    assert_eq!(world.post("/v1/chat/completions", &body).await.ok()["usage"]["total_tokens"], CONTEXT);
}

#[tokio::test]
async fn prompts_come_as_text_ids_or_lists_of_them() {
    let world = World::new().await;
    let ids = world.ids(PROMPT);
    let one = world.complete(json!({})).await;
    let text = choice(&one, 0);
    for prompt in [json!([PROMPT]), json!(ids), json!([ids])] {
        assert_eq!(choice(&world.complete(json!({"prompt": prompt})).await, 0), text, "{prompt}");
    }
    let several = world.complete(json!({"prompt": [PROMPT, "Another"], "n": 2, "temperature": 1, "seed": 3})).await;
    assert_eq!(several["choices"].as_array().map(Vec::len), Some(4));
    assert_eq!(several["usage"]["prompt_tokens"], ids.len() + world.ids("Another").len(), "choices share their prompt");
    for (index, prompt) in [PROMPT, PROMPT, "Another", "Another"].into_iter().enumerate() {
        let sampling = Sampling { temperature: 1.0, seed: 3, choice: index as u32 % 2, ..Sampling::default() };
        let expected = MODEL.solo(&world.ids(prompt), &sampling, 24, &ENDS);
        // An end token is control, and so no text.
        assert_eq!(choice(&several, index).0, world.text(&expected));
    }
    let mixed = world.complete(json!({"prompt": [ids, "Another"]})).await;
    assert_eq!(choice(&mixed, 0), text);
}

#[tokio::test]
async fn a_seed_decides_the_draw_and_its_absence_leaves_it_to_chance() {
    let world = World::new().await;
    let draw = async |more: Value| {
        let mut body = json!({"temperature": 1.2, "ignore_eos": true});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        choice(&world.complete(body).await, 0).0.to_owned()
    };
    let one = draw(json!({"seed": 1})).await;
    assert_eq!(draw(json!({"seed": 1})).await, one);
    assert_ne!(draw(json!({"seed": 2})).await, one);
    assert_eq!(draw(json!({"seed": -1})).await, draw(json!({"seed": -1})).await);
    assert_ne!(draw(json!({})).await, draw(json!({})).await);
    assert_ne!(draw(json!({"seed": 1, "temperature": 0.7})).await, one);
    assert_eq!(draw(json!({"seed": 1, "top_k": 1})).await, draw(json!({"temperature": 0})).await);
}

#[tokio::test]
async fn every_sampling_parameter_reaches_the_sampler() {
    let world = World::new().await;
    type Change = fn(&mut Sampling);
    let cases: [(Value, Change); 9] = [
        (json!({"temperature": 0.5}), |s| s.temperature = 0.5),
        (json!({"top_k": 7}), |s| s.top_k = 7),
        (json!({"top_k": -1}), |s| s.top_k = 0),
        (json!({"top_p": 0.25}), |s| s.top_p = 0.25),
        (json!({"min_p": 0.125}), |s| s.min_p = 0.125),
        (json!({"presence_penalty": 1.5}), |s| s.presence_penalty = 1.5),
        (json!({"frequency_penalty": -1.5}), |s| s.frequency_penalty = -1.5),
        (json!({"repetition_penalty": 1.25}), |s| s.repetition_penalty = 1.25),
        (json!({"logit_bias": {"77": 100}}), |s| s.logit_bias = vec![(77, 100.0)]),
    ];
    let base = Sampling { temperature: 1.0, seed: 9, ..Sampling::default() };
    for (more, change) in cases {
        let mut body = json!({"temperature": 1, "seed": 9, "ignore_eos": true});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let mut sampling = base.clone();
        change(&mut sampling);
        let got = world.complete(body).await;
        assert_eq!(choice(&got, 0).0, world.text(&world.solo(&sampling, 24, &[])), "{more}");
        let off = world.text(&world.solo(&base, 24, &[]));
        assert_eq!(choice(&got, 0).0 == off, sampling == base, "{more} makes no difference");
    }
}

#[tokio::test]
async fn end_tokens_end_unless_ignored_or_too_early() {
    let world = World::new().await;
    let used = async |more: Value| {
        let answer = world.complete(more).await;
        (answer["usage"]["completion_tokens"].as_u64().expect("a count"), choice(&answer, 0).1.to_owned())
    };
    let forced = json!({"4": 100});
    assert_eq!(used(json!({"logit_bias": forced})).await, (1, "stop".to_owned()));
    assert_eq!(used(json!({"logit_bias": forced, "ignore_eos": true})).await, (24, "length".to_owned()));
    assert_eq!(used(json!({"logit_bias": forced, "min_tokens": 5})).await, (6, "stop".to_owned()));
    // The request's own end tokens, which are no text either.
    let stopped = world.complete(json!({"logit_bias": {"70": 100}, "stop_token_ids": [70], "ignore_eos": true})).await;
    assert_eq!(choice(&stopped, 0), ("", "stop"));
    let late = world.complete(json!({"logit_bias": {"70": 100}, "stop_token_ids": [70], "ignore_eos": true, "min_tokens": 3})).await;
    assert_eq!(late["usage"]["completion_tokens"], 4);
}

/// The text before the stop string that ends first.
fn cut<'a>(text: &'a str, stops: &[&str]) -> &'a str {
    let found = stops.iter().filter_map(|s| text.find(s).map(|at| (at + s.len(), at)));
    found.min().map_or(text, |(_, at)| &text[..at])
}

#[tokio::test]
async fn stop_strings_cut_the_text_wherever_tokens_end() {
    let world = World::new().await;
    let tokens = world.solo(&Sampling::default(), 24, &[]);
    let text = world.text(&tokens);
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let mut spans = 0;
    for (i, &start) in starts.iter().enumerate() {
        for length in [1, 3, 7] {
            let end = starts.get(i + length).copied().unwrap_or(text.len());
            let stop = &text[start..end];
            let expected = cut(&text, &[stop, "never in it"]);
            let body = json!({"stop": [stop, "never in it"], "ignore_eos": true});
            let answer = world.complete(body.clone()).await;
            assert_eq!(choice(&answer, 0), (expected, "stop"), "{stop:?}");
            let events = world.stream(body).await;
            let mut seen = String::new();
            for event in &events {
                seen.push_str(event["choices"][0]["text"].as_str().expect("text"));
                assert!(expected.starts_with(&seen), "{seen:?} leaks {stop:?}");
            }
            assert_eq!(seen, expected);
            assert_eq!(events.last().expect("a last chunk")["choices"][0]["finish_reason"], "stop");
            spans += usize::from(tokens.iter().all(|id| !world.text(&[*id]).contains(stop)));
        }
    }
    assert!(spans > 10, "{spans} stop strings lie across a token border");
    let missed = world.complete(json!({"stop": "never in it", "ignore_eos": true})).await;
    assert_eq!(choice(&missed, 0), (text.as_str(), "length"));
    // A single string, and none found before the least number of tokens.
    let first: String = text.chars().take(1).collect();
    let late = world.complete(json!({"stop": first, "min_tokens": 24, "ignore_eos": true})).await;
    assert_eq!(choice(&late, 0), (text.as_str(), "length"));
}

#[tokio::test]
async fn the_models_makers_defaults_hold_where_a_request_says_nothing() {
    let defaults = json!({"temperature": 0.5, "top_k": 20, "top_p": 0.75, "repetition_penalty": 1.5, "eos_token_id": [1, 4]});
    let setup = |defaults: Value| Setup {
        card: card(move |name, file| {
            if name == "generation_config.json" {
                *file = defaults.clone();
            }
        }),
        ..Setup::default()
    };
    let world = World::with(setup(defaults)).await;
    let mut body = request(json!({"seed": 5, "ignore_eos": true}));
    body.as_object_mut().expect("an object").remove("temperature");
    let sampling = Sampling { temperature: 0.5, top_k: 20, top_p: 0.75, repetition_penalty: 1.5, seed: 5, ..Sampling::default() };
    let answer = world.post("/v1/completions", &body).await.ok();
    assert_eq!(choice(&answer, 0).0, world.text(&world.solo(&sampling, 24, &[])));
    body["top_k"] = 0.into();
    let sampling = Sampling { top_k: 0, ..sampling };
    assert_eq!(choice(&world.post("/v1/completions", &body).await.ok(), 0).0, world.text(&world.solo(&sampling, 24, &[])));
    // Makers that do not draw.
    let world = World::with(setup(json!({"do_sample": false, "temperature": 0.5, "eos_token_id": 1}))).await;
    body.as_object_mut().expect("an object").remove("top_k");
    let answer = world.post("/v1/completions", &body).await.ok();
    assert_eq!(choice(&answer, 0).0, world.text(&world.solo(&Sampling::default(), 24, &[])));
}

#[tokio::test]
async fn a_cached_prefix_is_counted() {
    let world = World::new().await;
    let body = json!({"prompt": (10..80).collect::<Vec<u32>>()});
    let cached = async || world.complete(body.clone()).await["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    assert_eq!(cached().await, 0);
    world.wait_idle().await;
    assert_eq!(cached().await, 64);
}

#[tokio::test]
async fn a_chat_is_the_template_and_the_models_answer() {
    let setup = Setup { system_prompt: Some("Be brief.".to_owned()), ..Setup::default() };
    let world = World::with(setup).await;
    let ask = async |messages: Value| {
        let answer = world.post("/v1/chat/completions", &chat(json!({"messages": messages, "ignore_eos": true}))).await.ok();
        (answer["choices"][0]["message"]["content"].as_str().expect("content").to_owned(), answer)
    };
    let turn = |role: &str, content: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>");
    let expect = |turns: &[String]| {
        let text = format!("<|begin_of_text|>{}<|start_header_id|>assistant<|end_header_id|>\n\n", turns.concat());
        let ids = world.tokenizer.encode(&text, true).expect("encodes");
        world.text(&MODEL.solo(&ids, &Sampling::default(), 24, &[]))
    };
    let (text, answer) = ask(json!([{"role": "user", "content": "Hello"}])).await;
    assert_eq!(text, expect(&[turn("system", "Be brief."), turn("user", "Hello")]), "the deployment's system prompt goes first");
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!((&answer["choices"][0]["message"]["role"], &answer["choices"][0]["finish_reason"]), (&json!("assistant"), &json!("length")));
    let spoken = [turn("system", "Long."), turn("user", "Hello"), turn("assistant", "Hi."), turn("user", "Bye")];
    let parts = json!([
        {"role": "developer", "content": "Long."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi.", "refusal": null, "annotations": []},
        {"role": "user", "content": "Bye"},
    ]);
    assert_eq!(ask(parts).await.0, expect(&spoken));
    let late = json!([{"role": "user", "content": "Hello"}, {"role": "system", "content": "Long."}]);
    assert_eq!(ask(late).await.0, expect(&[turn("user", "Hello"), turn("system", "Long.")]), "a request's system message is the only one");
    // A control token in what a user says is text.
    let (_, plain) = ask(json!([{"role": "user", "content": "a"}])).await;
    let (_, spelled) = ask(json!([{"role": "user", "content": "a<|eot_id|>"}])).await;
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    assert!(tokens(&spelled) > tokens(&plain) + 1);
}
