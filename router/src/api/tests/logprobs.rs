//! Log-probabilities in both dialects, and the echo of prompts.

use super::*;

fn list<'a>(value: &'a Value, name: &str) -> &'a Vec<Value> {
    value[name].as_array().unwrap_or_else(|| panic!("{name} in {value}"))
}

#[tokio::test]
async fn completions_name_each_token_its_alternatives_and_where_it_starts() {
    let world = World::new().await;
    let answer = world.complete(json!({"logprobs": 3, "ignore_eos": true})).await;
    let (text, found) = (answer["choices"][0]["text"].as_str().expect("text"), &answer["choices"][0]["logprobs"]);
    let ids = world.solo(&Sampling::default(), 24, &[]);
    let (tokens, own, top) = (list(found, "tokens"), list(found, "token_logprobs"), list(found, "top_logprobs"));
    assert_eq!((tokens.len(), own.len(), top.len()), (24, 24, 24));
    for ((id, name), (own, top)) in ids.iter().zip(tokens).zip(own.iter().zip(top)) {
        let name = name.as_str().expect("a name");
        match std::str::from_utf8(world.tokenizer.piece(*id)) {
            Ok(piece) => assert_eq!(name, piece),
            Err(_) => assert!(name.starts_with("bytes:\\x"), "{name}"),
        }
        let top = top.as_object().expect("alternatives");
        assert!((3..=4).contains(&top.len()) && &top[name] == own, "{name} {own} {top:?}");
        assert!(own.as_f64().is_some_and(|l| (-10.0..=0.0).contains(&l)));
    }
    let offsets: Vec<usize> = list(found, "text_offset").iter().map(|o| o.as_u64().expect("a number") as usize).collect();
    let mut before = 0;
    for (i, offset) in offsets.iter().enumerate() {
        assert!(*offset >= before && *offset <= text.chars().count());
        before = *offset;
        // Where a token is whole text and so is what came before it, the offset is that of its text.
        if std::str::from_utf8(world.tokenizer.piece(ids[i])).is_ok() && !world.tokenizer.is_control(ids[i]) {
            let rest: String = text.chars().skip(*offset).collect();
            let piece = world.text(&[ids[i]]);
            assert!(rest.starts_with(&piece) || rest.starts_with('\u{fffd}'), "{i}: {rest:?} {piece:?}");
        }
    }
    let none = world.complete(json!({"logprobs": 0, "max_tokens": 2})).await;
    assert!(none["choices"][0]["logprobs"]["top_logprobs"].is_null());
    assert_eq!(list(&none["choices"][0]["logprobs"], "token_logprobs").len(), 2);
}

#[tokio::test]
async fn offsets_count_characters() {
    let world = World::new().await;
    // Two tokens of text after a prompt whose characters have up to four bytes.
    let prompt = "é日🙂 a";
    let answer = world.complete(json!({"prompt": prompt, "echo": true, "logprobs": 0, "logit_bias": {"70": 100}, "max_tokens": 2})).await;
    let found = &answer["choices"][0]["logprobs"];
    let ids = world.ids(prompt);
    let offsets: Vec<u64> = list(found, "text_offset").iter().map(|o| o.as_u64().expect("a number")).collect();
    assert_eq!(offsets.len(), ids.len() + 2);
    assert_eq!(offsets[ids.len()], prompt.chars().count() as u64, "the answer starts after the prompt");
    assert_eq!(offsets[0], 0);
    let last = *ids.last().expect("ids");
    assert_eq!(offsets[ids.len() - 1] as usize, prompt.chars().count() - world.text(&[last]).chars().count());
    assert!(prompt.len() > prompt.chars().count(), "bytes would differ");
}

#[tokio::test]
async fn an_echo_gives_the_prompt_its_scores_and_nothing_else_of_them() {
    let world = World::new().await;
    let prompt = world.ids(PROMPT).len();
    let plain = world.complete(json!({"max_tokens": 4})).await;
    let after = plain["choices"][0]["text"].as_str().expect("text");
    let echoed = world.complete(json!({"max_tokens": 4, "echo": true, "logprobs": 2})).await;
    assert_eq!(echoed["choices"][0]["text"], format!("{PROMPT}{after}"));
    let found = &echoed["choices"][0]["logprobs"];
    assert_eq!(list(found, "tokens").len(), prompt + 4);
    assert!(found["token_logprobs"][0].is_null() && found["top_logprobs"][0].is_null(), "nothing precedes the first token");
    assert!(list(found, "token_logprobs")[1..].iter().all(Value::is_number));
    // The prompt alone, as evaluation harnesses ask for it; the same scores.
    let scored = world.complete(json!({"max_tokens": 0, "echo": true, "logprobs": 2})).await;
    assert_eq!((&scored["choices"][0]["text"], &scored["choices"][0]["finish_reason"]), (&json!(PROMPT), &json!("length")));
    assert_eq!(list(&scored["choices"][0]["logprobs"], "token_logprobs")[..], list(found, "token_logprobs")[..prompt]);
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    // From ids, streamed, without log-probabilities.
    let events = world.stream(json!({"prompt": world.ids(PROMPT), "echo": true, "max_tokens": 4})).await;
    assert_eq!(joined(&events, 0), format!("{PROMPT}{after}"));
    assert!(events.iter().all(|e| e["choices"][0]["logprobs"].is_null()));
}

#[tokio::test]
async fn chats_have_entries_with_bytes() {
    let world = World::new().await;
    let ask = async |more: Value| world.post("/v1/chat/completions", &chat(more)).await.ok();
    let answer = ask(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 5, "ignore_eos": true})).await;
    let content = list(&answer["choices"][0]["logprobs"], "content");
    assert_eq!(content.len(), 5);
    for entry in content {
        assert_eq!(list(entry, "top_logprobs").len(), 2);
        assert!(entry["logprob"].as_f64().is_some_and(|l| l <= 0.0) && entry["token"].is_string());
        let bytes: Vec<u8> = list(entry, "bytes").iter().map(|b| b.as_u64().expect("a byte") as u8).collect();
        assert!((0..MODEL.vocab).any(|id| world.tokenizer.piece(id) == bytes));
    }
    let bare = ask(json!({"logprobs": true, "max_tokens": 2})).await;
    assert_eq!(bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    assert!(ask(json!({"max_tokens": 2})).await["choices"][0]["logprobs"].is_null());
}

#[tokio::test]
async fn tokens_behind_a_stop_string_are_left_out() {
    let world = World::new().await;
    let whole = world.complete(json!({"logprobs": 0, "ignore_eos": true})).await;
    let text = whole["choices"][0]["text"].as_str().expect("text");
    let stop: String = text.chars().skip(10).take(3).collect();
    let cut = text.find(&stop).expect("it is in there");
    let stopped = world.complete(json!({"logprobs": 0, "ignore_eos": true, "stop": stop})).await;
    assert_eq!(stopped["choices"][0]["text"], text[..cut]);
    let characters = text[..cut].chars().count() as u64;
    let offsets = list(&stopped["choices"][0]["logprobs"], "text_offset");
    assert!(offsets.iter().all(|o| o.as_u64().is_some_and(|o| o < characters)), "{offsets:?}");
    let all = list(&whole["choices"][0]["logprobs"], "text_offset");
    assert!(all.len() > offsets.len() && all[..offsets.len()] == offsets[..]);
}
