//! gRPC and the WebSocket: the same answers, refusals and cancellation as over plain HTTP.

use super::*;
use proto::inference as wire;
use proto::inference::inference_client::InferenceClient;
use tonic::Code;
use tonic::transport::Channel;

async fn client(world: &World) -> InferenceClient<Channel> {
    InferenceClient::connect(format!("http://{}", world.grpc)).await.expect("a server")
}

fn ask(max_tokens: u32) -> wire::GenerateRequest {
    wire::GenerateRequest {
        model: "tiny".to_owned(),
        prompt: Some(wire::generate_request::Prompt::Text(PROMPT.to_owned())),
        sampling: Some(wire::SamplingOptions { temperature: Some(0.0), ..Default::default() }),
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        ..Default::default()
    }
}

async fn collect(
    client: &mut InferenceClient<Channel>,
    request: wire::GenerateRequest,
) -> Result<Vec<wire::GenerateResponse>, tonic::Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

#[tokio::test]
async fn grpc_streams_text_ids_log_probabilities_and_usage() {
    let world = World::new().await;
    let mut client = client(&world).await;
    let all = collect(&mut client, wire::GenerateRequest { logprobs: Some(2), ..ask(24) }).await.expect("it runs");
    let ids = world.solo(&Sampling::default(), 24, &[]);
    assert_eq!(all.iter().flat_map(|m| &m.tokens).map(|t| t.id).collect::<Vec<_>>(), ids);
    assert!(all.iter().flat_map(|m| &m.tokens).all(|t| t.logprob.is_some() && t.top.len() == 2 && t.bytes == world.tokenizer.piece(t.id)));
    assert_eq!(all.iter().map(|m| m.text.as_str()).collect::<String>(), world.text(&ids));
    let last = all.last().expect("messages");
    assert_eq!(last.finish_reason, "length");
    let usage = last.usage.expect("usage");
    assert_eq!((usage.prompt_tokens as usize, usage.completion_tokens), (world.ids(PROMPT).len(), 24));
    assert!(all[..all.len() - 1].iter().all(|m| m.finish_reason.is_empty() && m.usage.is_none()));
    let text = world.text(&ids);
    let stop: String = text.chars().skip(4).take(2).collect();
    let stopped = collect(&mut client, wire::GenerateRequest { stop: vec![stop.clone()], ..ask(24) }).await.expect("it runs");
    assert_eq!(stopped.iter().map(|m| m.text.as_str()).collect::<String>(), text[..text.find(&stop).expect("in it")]);
    assert_eq!(stopped.last().expect("messages").finish_reason, "stop");
    let talk = wire::ChatMessages { messages: vec![wire::ChatMessage { role: "user".to_owned(), content: "Hello".to_owned() }] };
    let talk = wire::GenerateRequest { prompt: Some(wire::generate_request::Prompt::Chat(talk)), ..ask(6) };
    let over_http = world.post("/v1/chat/completions", &chat(json!({"max_tokens": 6, "ignore_eos": true}))).await.ok();
    let talk = collect(&mut client, talk).await.expect("it runs");
    assert_eq!(
        talk.iter().map(|m| m.text.as_str()).collect::<String>(),
        over_http["choices"][0]["message"]["content"].as_str().expect("text")
    );
}

#[tokio::test]
async fn grpc_tokenizes_describes_and_refuses() {
    let world = World::new().await;
    let mut client = client(&world).await;
    let tokenize = |special| wire::TokenizeRequest { model: "tiny".to_owned(), text: PROMPT.to_owned(), add_special_tokens: special };
    let ids = client.tokenize(tokenize(true)).await.expect("ids").into_inner().ids;
    assert_eq!(ids, world.ids(PROMPT));
    let bare = client.tokenize(tokenize(false)).await.expect("ids").into_inner().ids;
    assert_eq!(bare, world.tokenizer.encode(PROMPT, true).expect("encodes"));
    let info = client.model_info(wire::ModelInfoRequest { model: "org/small".to_owned() }).await.expect("info").into_inner();
    assert_eq!((info.model.as_str(), info.max_context as usize, info.vocab, info.replicas), ("tiny", CONTEXT, 512, 1));
    assert!(info.has_chat_template && info.end_ids == ENDS);
    let sampling = |s: wire::SamplingOptions| wire::GenerateRequest { sampling: Some(s), ..ask(4) };
    let cases = [
        (Code::NotFound, "absent", wire::GenerateRequest { model: "absent".to_owned(), ..ask(4) }),
        (Code::InvalidArgument, "temperature", sampling(wire::SamplingOptions { temperature: Some(-1.0), ..Default::default() })),
        (Code::InvalidArgument, "top_p", sampling(wire::SamplingOptions { top_p: Some(f32::NAN), ..Default::default() })),
        (Code::InvalidArgument, "max_tokens", ask(0)),
        (Code::InvalidArgument, "max_tokens", ask(600)),
        (Code::InvalidArgument, "prompt", wire::GenerateRequest { prompt: None, ..ask(4) }),
        (Code::InvalidArgument, "stop", wire::GenerateRequest { stop: vec![String::new()], ..ask(4) }),
    ];
    for (code, word, request) in cases {
        let status = collect(&mut client, request).await.expect_err("it is refused");
        assert!(status.code() == code && status.message().contains(word), "{status}");
    }
    assert_eq!(collect(&mut client, ask(4)).await.expect("the connection goes on").last().expect("messages").finish_reason, "length");
}

#[tokio::test]
async fn health_follows_readiness_and_reflection_names_the_services() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let world = World::new().await;
    let channel = Channel::from_shared(format!("http://{}", world.grpc)).expect("an address").connect().await.expect("a server");
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "skein.v1.Inference"] {
        let mut changes = health.watch(HealthCheckRequest { service: service.to_owned() }).await.expect("watched").into_inner();
        let mut next = async |wanted: ServingStatus| {
            while changes.message().await.expect("a change").expect("more").status != wanted as i32 {}
        };
        next(ServingStatus::Serving).await;
        world.replica().set_fault(Fault::Down);
        next(ServingStatus::NotServing).await;
        world.replica().set_fault(Fault::None);
        next(ServingStatus::Serving).await;
    }
    let missing = health.check(HealthCheckRequest { service: "absent".to_owned() }).await.expect_err("it is not known");
    assert_eq!(missing.code(), Code::NotFound);
    let ask = ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) };
    let answers = ServerReflectionClient::new(channel).server_reflection_info(futures_util::stream::iter([ask])).await;
    let answer = answers.expect("answers").into_inner().message().await.expect("an answer").expect("one");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("expected a list") };
    let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
    assert!(names.contains(&"skein.v1.Inference") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
}

#[tokio::test]
async fn a_grpc_stream_that_is_dropped_is_cancelled() {
    let world = World::with(Setup { cost: SLOW, ..Setup::default() }).await;
    let mut client = client(&world).await;
    let mut stream = client.generate(ask(480)).await.expect("it runs").into_inner();
    stream.message().await.expect("a message").expect("more to come");
    let before = world.replica().steps();
    drop(stream);
    world.wait_idle().await;
    assert!(world.replica().steps() - before < 40);
}

/// Sends a text frame, masked as clients must.
async fn send_frame(stream: &mut TcpStream, text: &str) {
    let mut frame = vec![0x81, 0x80 | 126];
    frame.extend_from_slice(&u16::try_from(text.len()).expect("a short text").to_be_bytes());
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(text.as_bytes());
    stream.write_all(&frame).await.expect("it reads");
}

/// The text of the next frame.
async fn read_frame(stream: &mut TcpStream) -> String {
    let mut head = [0; 2];
    stream.read_exact(&mut head).await.expect("a frame");
    assert_eq!(head[0], 0x81, "a whole text frame");
    let length = match head[1] {
        126 => usize::from(stream.read_u16().await.expect("a length")),
        short => usize::from(short),
    };
    let mut text = vec![0; length];
    stream.read_exact(&mut text).await.expect("a frame");
    String::from_utf8(text).expect("UTF-8")
}

#[tokio::test]
async fn a_websocket_takes_request_after_request() {
    let world = World::new().await;
    let mut stream = TcpStream::connect(world.http).await.expect("a server");
    let upgrade = "GET /v1/stream HTTP/1.1\r\nhost: skein\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(upgrade.as_bytes()).await.expect("it reads");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("an answer"));
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    let whole = world.complete(json!({"ignore_eos": true})).await;
    for _ in 0..2 {
        send_frame(&mut stream, &request(json!({"ignore_eos": true})).to_string()).await;
        let mut text = String::new();
        loop {
            match read_frame(&mut stream).await.as_str() {
                "[DONE]" => break,
                chunk => text.push_str(&joined(&[serde_json::from_str(chunk).expect("JSON")], 0)),
            }
        }
        assert_eq!(text, whole["choices"][0]["text"].as_str().expect("text"));
        send_frame(&mut stream, "{\"model\": \"tiny\"}").await;
        let error: Value = serde_json::from_str(&read_frame(&mut stream).await).expect("JSON");
        assert_eq!(error["error"]["param"], "prompt", "the connection stays open after a refusal");
    }
    world.get("/v1/stream").await.error(400);
    // A binary frame is refused by the code for it, and the connection closed.
    stream.write_all(&[0x82, 0x81, 0, 0, 0, 0, 7]).await.expect("it reads");
    let mut close = [0; 4];
    stream.read_exact(&mut close).await.expect("a frame");
    assert_eq!((close[0], u16::from_be_bytes([close[2], close[3]])), (0x88, 1003));
}
