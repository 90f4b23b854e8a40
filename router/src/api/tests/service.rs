//! Models, health, readiness, load shedding, metrics, and the end.

use super::*;

#[tokio::test]
async fn models_are_listed_under_every_name() {
    let world = World::new().await;
    let listed = world.get("/v1/models").await.ok();
    let ids: Vec<&Value> = listed["data"].as_array().expect("a list").iter().map(|m| &m["id"]).collect();
    assert_eq!(ids, ["tiny", "org/small", "tiny:poet"]);
    assert_eq!((&listed["data"][2]["root"], &listed["data"][2]["parent"]), (&json!("tiny"), &json!("tiny")));
    for path in ["/v1/models/tiny", "/v1/models/org/small", "/v1/models/org%2Fsmall", "/v1/models/tiny:poet"] {
        let one = world.get(path).await.ok();
        assert_eq!((&one["object"], &one["max_model_len"]), (&json!("model"), &json!(CONTEXT)));
        assert!(ids.contains(&&one["id"]), "{one}");
    }
    let aliased = world.complete(json!({"model": "org/small"})).await;
    assert_eq!(aliased["choices"], world.complete(json!({})).await["choices"]);
    assert_eq!(aliased["model"], "org/small", "a client sees the name it used");
}

#[tokio::test]
async fn an_adapter_is_named_behind_a_colon() {
    let world = World::new().await;
    let (bare, adapted) = (world.complete(json!({})).await, world.complete(json!({"model": "tiny:poet"})).await);
    let tokens = MODEL.solo_with("numerics of poet", &world.ids(PROMPT), &Sampling::default(), 24, &[]);
    assert_eq!(adapted["choices"][0]["text"], world.text(&tokens));
    assert_ne!(adapted["choices"], bare["choices"]);
    assert_eq!(adapted["model"], "tiny:poet");
    assert_eq!(world.complete(json!({"model": "org/small:poet"})).await["choices"], adapted["choices"]);
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let body = json!({"model": "tiny:painter", "prompt": "a", "messages": [{"role": "user", "content": "a"}]});
        let mut body = body;
        body.as_object_mut().expect("an object").remove(if path.contains("chat") { "prompt" } else { "messages" });
        let error = world.post(path, &body).await.error(404);
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
        assert_eq!(error["message"], "model tiny has no adapter painter; served are tiny:poet");
    }
    world.get("/v1/models/tiny:painter").await.error(404);
}

#[tokio::test]
async fn readiness_waits_for_a_token_and_ends_with_the_replica() {
    let world = World::start(Setup { queue_requests: 2, queue_seconds: 1, ..Setup::default() }).await;
    world.replica().set_fault(Fault::Down);
    until("the session to end", || !world.edge.ready("tiny")).await;
    let refused = world.get("/ready").await;
    assert!(refused.error(503)["message"].as_str().is_some_and(|m| m.contains("tiny")));
    assert!(refused.header("retry-after").is_some());
    world.get("/live").await.ok();
    assert_eq!(world.get("/health").await.ok()["ready"]["tiny"], false);
    // Requests are held, as many as the queue takes, for as long as it may.
    let body = request(json!({}));
    let held = || world.post("/v1/completions", &body);
    let third = async {
        until("a full queue", || world.edge.load()[0].queued == 2).await;
        world.post("/v1/completions", &body).await
    };
    let (first, second, third) = tokio::join!(held(), held(), third);
    assert_eq!(third.error(429)["type"], "rate_limit_error");
    assert!(third.header("retry-after").is_some_and(|s| s.parse::<u64>().is_ok_and(|s| s > 0)));
    for late in [first, second] {
        assert_eq!(late.error(503)["code"], "queue_timeout");
        assert!(late.header("retry-after").is_some());
    }
    assert_eq!(world.edge.load()[0].queued, 0);
    world.replica().set_fault(Fault::None);
    assert!(world.edge.wait_ready("tiny").await);
    world.get("/ready").await.ok();
    assert_eq!(world.get("/health").await.ok()["ready"]["tiny"], true);
    world.complete(json!({})).await;
}

#[tokio::test]
async fn a_model_without_replicas_says_when_to_come_back() {
    let world = World::with(Setup { replicas: 0, ..Setup::default() }).await;
    let refused = world.post("/v1/completions", &request(json!({}))).await;
    assert_eq!(refused.error(503)["code"], "model_not_ready");
    assert!(refused.header("retry-after").is_some());
    world.get("/ready").await.error(503);
}

#[tokio::test]
async fn where_no_replica_is_wanted_nobody_is_told_to_come_back() {
    for (why, code, words) in
        [(Stopped::Suspended, "model_suspended", "is suspended"), (Stopped::ScaledToZero, "model_scaled_to_zero", "is scaled to zero")]
    {
        let world = World::with(Setup { replicas: 0, stopped: Some(why), ..Setup::default() }).await;
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let body = if path.contains("chat") { chat(json!({})) } else { request(json!({})) };
            let refused = world.post(path, &body).await;
            let error = refused.error(503);
            assert_eq!(error["code"], code, "{error}");
            assert!(error["message"].as_str().is_some_and(|m| m.contains(words)), "{error}");
            assert_eq!(refused.header("retry-after"), None);
        }
    }
}

#[tokio::test]
async fn request_ids_are_given_back_or_drawn() {
    let world = World::new().await;
    let with = |id: &str| format!("GET /version HTTP/1.1\r\nhost: skein\r\nconnection: close\r\nx-request-id: {id}\r\n\r\n");
    let reply = exchange(world.http, &with("abc-1"), b"").await;
    assert_eq!(reply.header("x-request-id"), Some("abc-1"));
    assert_eq!(reply.ok()["version"], env!("CARGO_PKG_VERSION"));
    let drawn = exchange(world.http, &with("two words"), b"").await;
    assert!(drawn.header("x-request-id").is_some_and(|id| id.len() == 32), "{drawn:?}");
    let failed = world.get("/v1/nothing").await;
    assert!(failed.header("x-request-id").is_some());
}

/// The value of a sample whose line starts with `name`.
pub(super) fn sample(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    let value = line.and_then(|l| l.rsplit(' ').next()?.parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {text}"))
}

#[tokio::test]
async fn metrics_have_the_names_and_types_that_dashboards_read_and_move() {
    let world = World::with(Setup { cost: SLOW, ..Setup::default() }).await;
    let read = async || world.get("/metrics").await;
    let before = read().await;
    assert!(before.header("content-type").is_some_and(|t| t.starts_with("application/openmetrics-text")));
    let generated = sample(before.text(), "vllm:generation_tokens_total");
    let steps = sample(before.text(), "vllm:iteration_tokens_total_count");
    let work = async {
        world.complete(json!({"n": 2, "max_tokens": 150, "ignore_eos": true})).await;
        world.complete(json!({"logit_bias": {"4": 100}, "prompt": (10..60).collect::<Vec<u32>>()})).await;
        world.complete(json!({"logit_bias": {"4": 100}, "prompt": (10..60).collect::<Vec<u32>>()})).await;
    };
    let look = async {
        until("both choices to run", || world.edge.load()[0].running == 2).await;
        read().await
    };
    let ((), during) = tokio::join!(work, look);
    assert_eq!(sample(during.text(), "vllm:num_requests_running"), 2.0);
    assert_eq!((sample(during.text(), "skein_replica_running"), sample(during.text(), "skein_replica_driven")), (2.0, 1.0));
    let used = sample(during.text(), "vllm:kv_cache_usage_perc");
    assert_eq!(sample(during.text(), "skein_replica_kv_used"), used, "there is one replica");
    assert!(used > 0.0 && used < 0.1, "{used}");
    let after = read().await;
    let text = after.text();
    for (name, kind) in [
        ("num_requests_running", "gauge"),
        ("num_requests_waiting", "gauge"),
        ("kv_cache_usage_perc", "gauge"),
        ("gpu_cache_usage_perc", "gauge"),
        ("cache_config_info", "gauge"),
        ("prompt_tokens", "counter"),
        ("generation_tokens", "counter"),
        ("request_success", "counter"),
        ("num_preemptions", "counter"),
        ("spec_decode_num_drafts", "counter"),
        ("spec_decode_num_draft_tokens", "counter"),
        ("spec_decode_num_accepted_tokens", "counter"),
        ("prefix_cache_queries", "counter"),
        ("prefix_cache_hits", "counter"),
        ("time_to_first_token_seconds", "histogram"),
        ("inter_token_latency_seconds", "histogram"),
        ("time_per_output_token_seconds", "histogram"),
        ("request_time_per_output_token_seconds", "histogram"),
        ("e2e_request_latency_seconds", "histogram"),
        ("request_queue_time_seconds", "histogram"),
        ("request_prefill_time_seconds", "histogram"),
        ("request_decode_time_seconds", "histogram"),
        ("request_inference_time_seconds", "histogram"),
        ("request_prompt_tokens", "histogram"),
        ("request_generation_tokens", "histogram"),
        ("request_max_num_generation_tokens", "histogram"),
        ("request_params_n", "histogram"),
        ("request_params_max_tokens", "histogram"),
        ("iteration_tokens_total", "histogram"),
    ] {
        assert!(text.contains(&format!("# TYPE vllm:{name} {kind}\n")), "{name} is no {kind} in {text}");
        let suffix = ["", "_total", "_count"][["gauge", "counter", "histogram"].iter().position(|k| *k == kind).expect("a kind")];
        sample(text, &format!("vllm:{name}{suffix}"));
        let line = text.lines().find(|l| l.starts_with(&format!("vllm:{name}"))).expect("a sample");
        assert!(line.contains("model_name=\"tiny\"") && line.contains("engine=\"0\""), "{line}");
    }
    assert_eq!(sample(text, "vllm:generation_tokens_total") - generated, 302.0);
    assert!(sample(text, "vllm:iteration_tokens_total_count") - steps >= 152.0);
    assert!(sample(text, "vllm:iteration_tokens_total_sum") >= 302.0);
    assert_eq!(sample(text, "vllm:num_requests_running"), 0.0);
    assert_eq!(sample(text, "vllm:prefix_cache_hits_total"), 48.0);
    assert_eq!(sample(text, "vllm:time_to_first_token_seconds_count"), 4.0);
    assert_eq!(sample(text, "vllm:request_max_num_generation_tokens_sum"), 152.0);
    assert!(sample(text, "vllm:request_decode_time_seconds_sum") >= 1.0, "twice 149 steps of 4 ms");
    assert_eq!(sample(text, "skein_replica_running"), 0.0);
    assert!(sample(text, "skein_replica_tokens_per_second") > 0.0 && sample(text, "skein_replica_ttft_p90_seconds") > 0.0);
    assert!(text.contains("skein_replica_ready{model_name=\"tiny\",replica=\"r0\"} 1"), "{text}");
    dashboards_read_what_there_is(text);
    for part in ["finished_reason=\"length\"} 2", "finished_reason=\"stop\"} 2"] {
        assert!(text.contains(part), "{part}");
    }
    assert!(text.contains("block_size=\"16\",num_gpu_blocks=\"900\"} 1\n"));
    for name in ["time_to_first_token", "e2e_request_latency"] {
        let bounds: Vec<&str> = text
            .lines()
            .filter(|l| l.starts_with(&format!("vllm:{name}_seconds_bucket")))
            .filter_map(|l| l.split("le=\"").nth(1)?.split('"').next())
            .collect();
        let (least, most) = if name == "time_to_first_token" { ("0.001", "2560.0") } else { ("0.3", "7680.0") };
        assert_eq!((bounds[0], bounds[bounds.len() - 2], bounds[bounds.len() - 1]), (least, most, "+Inf"));
    }
    assert!(text.lines().any(|l| l.starts_with("vllm:iteration_tokens_total_bucket") && l.contains("le=\"+Inf\"")));
    assert!(text.contains("skein_http_answers_total{route=\"/v1/completions\",status=\"200\"} 3\n"), "{text}");
    assert!(text.ends_with("# EOF\n"));
}

#[tokio::test]
async fn a_stop_lets_running_requests_end_and_takes_no_more() {
    let world = World::with(Setup { cost: SLOW, ..Setup::default() }).await;
    let body = request(json!({"max_tokens": 60, "ignore_eos": true}));
    let running = world.post("/v1/completions", &body);
    let stop = async {
        until("it to run", || world.edge.load()[0].running == 1).await;
        world.stop.cancel();
    };
    let (answer, ()) = tokio::join!(running, stop);
    assert_eq!(answer.ok()["usage"]["completion_tokens"], 60);
    world.server.await.expect("no panic").expect("a good end");
    assert!(TcpStream::connect(world.http).await.is_err(), "nobody listens any more");
}

/// A connection that has sent `bytes`.
async fn half_open(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("a server");
    stream.write_all(bytes).await.expect("it reads");
    stream
}

#[tokio::test]
async fn nothing_but_running_requests_holds_a_stop() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    // Longer than the test may take.
    let options = ApiOptions { drain: Duration::from_secs(60), ..ApiOptions::default() };
    let world = World::with(Setup { cost: SLOW, options, ..Setup::default() }).await;
    // An idle connection, one with half a head, one with half a preface.
    let mut idle = half_open(world.http, b"GET /live HTTP/1.1\r\nhost: skein\r\n\r\n").await;
    assert!(idle.read(&mut [0; 4096]).await.expect("it answers") > 0);
    let half_head = half_open(world.http, b"POST /v1/completions HTTP/1.1\r\nhost: sk").await;
    let half_preface = half_open(world.grpc, b"PRI * HT").await;
    // Half a body: it will not come to run any more.
    let mut half_body = half_open(world.http, format!("{}{{", head("/v1/completions", 100)).as_bytes()).await;
    // A client of HTTP/2 that reads no farewell, and one that watches for ever.
    let mute = half_open(world.grpc, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", world.grpc)).expect("an address");
    let mut health = HealthClient::new(channel.connect().await.expect("a server"));
    let mut watched = health.watch(HealthCheckRequest { service: String::new() }).await.expect("watched").into_inner();
    assert!(watched.message().await.expect("a state").is_some());
    let body = request(json!({"max_tokens": 100, "ignore_eos": true}));
    let running = world.post("/v1/completions", &body);
    let stop = async {
        until("it to run", || world.edge.load()[0].running == 1).await;
        world.stop.cancel();
    };
    let (answer, ()) = tokio::join!(running, stop);
    assert_eq!(answer.ok()["usage"]["completion_tokens"], 100, "what runs goes on to its end");
    let ended = tokio::time::timeout(Duration::from_secs(10), world.server).await;
    ended.expect("nothing holds the stop").expect("no panic").expect("a good end");
    let mut refused = Vec::new();
    half_body.read_to_end(&mut refused).await.expect("it answers");
    assert_eq!(Reply::parse(&refused).error(503)["code"], "stopping");
    drop((idle, half_head, half_preface, mute));
}

/// Every metric of a router in the chart's dashboards is in `text`; and one that does not exist would be missed.
fn dashboards_read_what_there_is(text: &str) {
    let dashboard = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/skein/dashboards/skein.json");
    let dashboard: Value = serde_json::from_slice(&std::fs::read(dashboard).expect("a dashboard")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let expressions =
        panels.iter().flat_map(|p| p["targets"].as_array().expect("targets")).map(|t| t["expr"].as_str().expect("an expression"));
    let mut names: Vec<&str> = expressions.flat_map(|e| e.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))).collect();
    names.retain(|name| (name.starts_with("vllm:") || name.starts_with("skein_")) && !name.starts_with("skein_operator_"));
    names.sort_unstable();
    names.dedup();
    let known = |name: &str| text.lines().any(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} ")));
    assert!(names.len() > 10 && !known("skein_no_such_metric"));
    for name in names {
        assert!(known(name), "the dashboard reads {name}, which is not among\n{text}");
    }
}
