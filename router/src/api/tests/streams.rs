//! Server-sent events: equal to the whole answer, cancelled when nobody listens, unbroken when a replica is lost.

use super::*;

#[tokio::test]
async fn a_stream_says_what_the_whole_answer_says() {
    let world = World::new().await;
    for seed in 0..12 {
        let body = json!({"temperature": 1.5, "seed": seed, "n": 2, "logprobs": 1, "max_tokens": 40, "stop": ["e", "\u{fffd}\u{fffd}"]});
        let whole = world.complete(body.clone()).await;
        let events = world.stream(body).await;
        for index in 0..2 {
            let choice = &whole["choices"][index];
            assert_eq!(joined(&events, index), choice["text"].as_str().expect("text"));
            let own: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index).collect();
            let reasons: Vec<&Value> = own.iter().map(|c| &c["finish_reason"]).filter(|r| !r.is_null()).collect();
            assert_eq!(reasons, [&choice["finish_reason"]], "one reason, and nothing after it");
            assert!(!own.last().expect("chunks")["finish_reason"].is_null());
            for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let parts = own.iter().flat_map(|c| c["logprobs"][name].as_array().expect("a list").clone());
                assert_eq!(Value::from_iter(parts), choice["logprobs"][name], "{name}");
            }
        }
        assert!(events.iter().all(|e| e["id"] == events[0]["id"] && e["object"] == "text_completion" && e.get("usage").is_none()));
    }
}

#[tokio::test]
async fn what_a_token_takes_to_the_socket_is_counted_as_often_as_it_is_written() {
    let world = World::with(Setup { cost: SLOW, ..Setup::default() }).await;
    let count = async || service::sample(world.get("/metrics").await.text(), "skein_token_delay_seconds_count");
    world.complete(json!({"ignore_eos": true})).await;
    assert_eq!(count().await, 0.0, "an answer in one piece is no stream");
    let events = world.stream(json!({"ignore_eos": true, "n": 3})).await;
    assert_eq!(count().await, events.len() as f64);
    let text = world.get("/metrics").await;
    let sum = service::sample(text.text(), "skein_token_delay_seconds_sum");
    assert!(sum > 0.0, "{sum}");
    assert!(text.text().contains("skein_token_delay_seconds_bucket{le=\"0.0001\"}"), "{}", text.text());
}

#[tokio::test]
async fn a_chat_stream_opens_with_the_role_and_closes_with_the_usage() {
    let world = World::new().await;
    let whole = world.post("/v1/chat/completions", &chat(json!({"ignore_eos": true}))).await.ok();
    let body = chat(json!({"ignore_eos": true, "stream": true, "stream_options": {"include_usage": true}}));
    let events = world.post("/v1/chat/completions", &body).await.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (last, chunks) = events.split_last().expect("chunks");
    let text: String = chunks.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().expect("content"));
    assert_eq!(last["choices"], json!([]));
    for name in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][name], whole["usage"][name]);
    }
    assert!(chunks.iter().all(|e| e.get("usage").is_some_and(Value::is_null) && e["object"] == "chat.completion.chunk"));
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
}

/// Sends a request and returns the connection once `bytes` of the answer have come.
async fn begin(world: &World, body: &Value, bytes: usize) -> TcpStream {
    let mut stream = TcpStream::connect(world.http).await.expect("a server");
    let text = body.to_string();
    stream.write_all((head("/v1/completions", text.len()) + &text).as_bytes()).await.expect("it reads");
    let mut buffer = vec![0; bytes];
    stream.read_exact(&mut buffer).await.expect("it answers");
    stream
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_place_within_a_step() {
    for (streaming, read) in [(true, 600), (false, 0)] {
        let world = World::with(Setup { cost: SLOW, ..Setup::default() }).await;
        let body = request(json!({"max_tokens": 480, "ignore_eos": true, "stream": streaming, "n": 2}));
        let connection = begin(&world, &body, read).await;
        until("both choices to run", || world.edge.load()[0].running == 2).await;
        let before = world.replica().steps();
        drop(connection);
        world.wait_idle().await;
        let after = world.replica().steps();
        assert!(after - before < 40, "{after} steps, {before} when the client went away");
        // Whatever was in flight is done; the next request has the replica to itself.
        world.complete(json!({"max_tokens": 10, "ignore_eos": true})).await;
        assert!(world.replica().steps() - after <= 10 + 4, "nobody goes on with what was dropped");
        assert!(world.get("/metrics").await.text().contains("skein_disconnected_requests_total 1\n"));
    }
}

#[tokio::test]
async fn a_lost_replica_changes_nothing_that_a_client_sees() {
    let body = json!({
        "temperature": 1, "seed": 4, "max_tokens": 60, "ignore_eos": true, "logprobs": 2, "echo": true, "n": 2, "min_tokens": 30,
        "presence_penalty": 1.0, "repetition_penalty": 1.5, "stop_token_ids": [70, 71, 72, 73, 74, 75, 76, 77, 78, 79], "stop": ["zz", "th"],
    });
    let whole = World::new().await.complete(body.clone()).await;
    let mut lost = 0;
    for at in (3..60).step_by(4) {
        let world = World::with(Setup { replicas: 2, ..Setup::default() }).await;
        until("both replicas", || world.edge.models()[0].ready_replicas == 2).await;
        for name in ["r0", "r1"] {
            world.connector.get(name).expect("a replica").set_fault(Fault::LoseAtStep(at));
        }
        let events = world.stream(body.clone()).await;
        for index in 0..2 {
            let choice = &whole["choices"][index];
            assert_eq!(joined(&events, index), choice["text"].as_str().expect("text"), "lost at step {at}");
            let own: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index).collect();
            for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let parts = own.iter().flat_map(|c| c["logprobs"][name].as_array().expect("a list").clone());
                assert_eq!(Value::from_iter(parts), choice["logprobs"][name], "{name}, lost at step {at}");
            }
        }
        lost += world.edge.load()[0].resumed_total;
    }
    assert!(lost > 10, "{lost} streams were resumed");
    // The model would tell: its draws change with the place where the prompt ends, once there is a penalty.
    let sampling = Sampling { presence_penalty: 1.0, ..Sampling::default() };
    let draws = |emitted: u32| (0..20).map(|p| MODEL.draw(7, &sampling, p + 10, emitted)).collect::<Vec<_>>();
    assert_ne!(draws(3), draws(4));
}

#[tokio::test]
async fn a_deadline_ends_requests_with_an_error() {
    let options = ApiOptions { deadline: Duration::from_secs(1), ..ApiOptions::default() };
    let world = World::with(Setup { cost: SLOW, options, ..Setup::default() }).await;
    let body = json!({"max_tokens": 480, "ignore_eos": true});
    let error = world.post("/v1/completions", &request(body.clone())).await.error(408);
    assert_eq!(error["code"], "deadline_exceeded");
    let events = world.stream(body).await;
    assert_eq!(events.last().expect("an error")["error"]["code"], "deadline_exceeded");
    assert!(events.len() > 2, "what came before it was sent");
    world.wait_idle().await;
    assert_eq!(world.complete(json!({"max_tokens": 1})).await["usage"]["completion_tokens"], 1);
}
