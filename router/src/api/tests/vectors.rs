//! Encoders: embeddings, scores, ranks, labels, and what encoders and decoders refuse.

use base64::{Engine, engine::general_purpose::STANDARD};
use plan::step::{Pooled, Pooling, WantKind};

use super::*;

/// Longest text: an encoder reads it in one step.
const LONGEST: usize = 128;

/// A world with an encoder made of a fixture; `change` sees its `config.json`.
fn setup(fixture: &str, labels: u32, change: impl Fn(&mut Value)) -> Setup {
    let files = ["config.json", "tokenizer.json", "tokenizer_config.json"];
    let change = |name: &str, value: &mut Value| {
        if name == "config.json" {
            change(value)
        }
    };
    Setup { card: card_of(fixture, &files, change), groups: Vec::new(), model: SimulatedModel { labels, ..MODEL }, ..Setup::default() }
}

async fn bert() -> World {
    World::with(setup("bert", 0, |_| ())).await
}

/// A model of one label, which tells the second text of a pair from the first.
async fn cross_encoder() -> World {
    let change = |config: &mut Value| {
        config["architectures"] = json!(["BertForSequenceClassification"]);
        config["id2label"] = json!({"0": "LABEL_0"});
    };
    World::with(setup("bert", 1, change)).await
}

async fn classifier() -> World {
    World::with(setup("distilbert-sst2", 2, |_| ())).await
}

fn pooled(dimensions: u32) -> WantKind {
    WantKind::Pooled(Pooled { over: Pooling::Mean, dimensions, normalize: true })
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number") as f32).collect()
}

fn embeddings(answer: &Value) -> Vec<Vec<f32>> {
    let data = answer["data"].as_array().expect("a list");
    assert!(data.iter().enumerate().all(|(i, item)| item["index"] == i && item["object"] == "embedding"), "{answer}");
    data.iter().map(|item| floats(&item["embedding"])).collect()
}

#[tokio::test]
async fn embeddings_of_texts_and_ids() {
    let world = bert().await;
    let embed = async |more: Value| {
        let mut body = json!({"model": "tiny"});
        more.as_object().expect("an object").iter().for_each(|(name, value)| body[name] = value.clone());
        world.post("/v1/embeddings", &body).await.ok()
    };
    let texts = ["the quick brown fox", "a model", "geese"];
    let ids = texts.map(|text| world.ids(text));
    let expected = ids.clone().map(|ids| world.model.vector(&ids, 0, &pooled(0)));
    assert!(ids[0][0] == 2 && ids[0].ends_with(&[3]), "between [CLS] and [SEP]");

    let one = embed(json!({"input": texts[0]})).await;
    assert_eq!((embeddings(&one), &one["object"], &one["model"]), (vec![expected[0].clone()], &json!("list"), &json!("tiny")));
    assert_eq!(one["usage"], json!({"prompt_tokens": ids[0].len(), "total_tokens": ids[0].len()}));
    assert_eq!(embeddings(&embed(json!({"input": texts})).await), expected);
    assert_eq!(embeddings(&embed(json!({"input": ids[1]})).await), [expected[1].clone()]);
    assert_eq!(
        embeddings(&embed(json!({"input": [ids[0], texts[2]], "user": "u", "encoding_format": "float"})).await),
        [&expected[0], &expected[2]].map(Clone::clone)
    );
    assert_eq!(embed(json!({"input": "a", "model": "org/small"})).await["model"], "org/small");

    let cut = embed(json!({"input": texts[0], "dimensions": 5})).await;
    assert_eq!(embeddings(&cut), [world.model.vector(&ids[0], 0, &pooled(5))]);
    let packed = embed(json!({"input": texts, "encoding_format": "base64"})).await;
    for (item, expected) in packed["data"].as_array().expect("a list").iter().zip(&expected) {
        let bytes = STANDARD.decode(item["embedding"].as_str().expect("a string")).expect("base64");
        let values: Vec<f32> = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect();
        assert_eq!(&values, expected);
    }
    // More texts than may wait, in their order, many in a step.
    let before = world.edge.load()[0].replicas[0].steps_total;
    let many: Vec<String> = (0..300).map(|i| format!("text {i}")).collect();
    let answer = embed(json!({"input": many})).await;
    let expected: Vec<Vec<f32>> = many.iter().map(|text| world.model.vector(&world.ids(text), 0, &pooled(0))).collect();
    assert_eq!(embeddings(&answer), expected);
    let steps = world.edge.load()[0].replicas[0].steps_total - before;
    let tokens = answer["usage"]["total_tokens"].as_u64().expect("a number");
    assert!(steps < 150 && steps >= tokens / LONGEST as u64, "{steps} steps for {tokens} tokens");
    world.wait_idle().await;
}

#[tokio::test]
async fn a_lost_replica_loses_no_vector() {
    let world = bert().await;
    let many: Vec<String> = (0..40).map(|i| format!("text {i}")).collect();
    let steps = world.edge.load()[0].replicas[0].steps_total;
    world.replica().set_fault(Fault::LoseAtStep(steps + 3));
    let answer = world.post("/v1/embeddings", &json!({"model": "tiny", "input": many})).await.ok();
    let expected: Vec<Vec<f32>> = many.iter().map(|text| world.model.vector(&world.ids(text), 0, &pooled(0))).collect();
    assert_eq!(embeddings(&answer), expected);
    assert!(world.edge.load()[0].replicas[0].failures_total > 0, "it was not lost");
}

#[tokio::test]
async fn labels_have_the_names_of_the_config() {
    let world = classifier().await;
    let texts = ["the quick brown fox", "a model"];
    let answer = world.post("/v1/classify", &json!({"model": "tiny", "input": texts})).await.ok();
    for (item, text) in answer["data"].as_array().expect("a list").iter().zip(texts) {
        let values = world.model.vector(&world.ids(text), 0, &WantKind::Classes);
        let shares: Vec<f64> = values.iter().map(|&x| f64::from(x).exp()).collect();
        let best = usize::from(values[1] > values[0]);
        for (probability, share) in floats(&item["probs"]).iter().zip(&shares) {
            assert!((f64::from(*probability) - share / (shares[0] + shares[1])).abs() < 1e-6, "{item}");
        }
        assert_eq!((&item["label"], &item["num_classes"]), (&json!(["NEGATIVE", "POSITIVE"][best]), &json!(2)));
    }
    assert_eq!(answer["data"].as_array().map(Vec::len), Some(2));
    let one = world.post("/v1/classify", &json!({"model": "tiny", "input": texts[1]})).await.ok();
    assert_eq!((&one["data"][0]["probs"], &one["data"][0]["index"]), (&answer["data"][1]["probs"], &json!(0)));
}

#[tokio::test]
async fn pairs_are_scored_by_a_head_of_one_label() {
    let world = cross_encoder().await;
    let score = |a: &str, b: &str| {
        let (ids, second) = world.tokenizer.encode_pair(a, b, true).expect("encodes");
        // [CLS] a [SEP] b [SEP]
        assert_eq!((ids[0], ids[second - 1], ids[ids.len() - 1]), (2, 3, 3));
        let value = f64::from(world.model.vector(&ids, second as u32, &WantKind::Classes)[0]);
        (1.0 / (1.0 + (-value).exp())) as f32
    };
    let texts = ["a model", "the fox", "geese fly", "a"];
    let answer = world.post("/v1/score", &json!({"model": "tiny", "text_1": "geese", "text_2": texts})).await.ok();
    let scores: Vec<f32> =
        answer["data"].as_array().expect("a list").iter().map(|i| i["score"].as_f64().expect("a number") as f32).collect();
    let expected = texts.map(|text| score("geese", text));
    assert_eq!((scores, answer["data"][2]["index"].as_u64()), (expected.to_vec(), Some(2)));
    // Pair by pair.
    let answer = world.post("/v1/score", &json!({"model": "tiny", "text_1": texts, "text_2": ["a", "b", "c", "d"]})).await.ok();
    assert_eq!(answer["data"][3]["score"].as_f64().map(|x| x as f32), Some(score("a", "d")));

    let documents = json!([texts[0], texts[1], {"text": texts[2]}, texts[3]]);
    let ranked = world.post("/v1/rerank", &json!({"model": "tiny", "query": "geese", "documents": documents, "top_n": 3})).await.ok();
    let mut order: Vec<usize> = (0..4).collect();
    order.sort_by(|&a, &b| expected[b].total_cmp(&expected[a]));
    let results = ranked["results"].as_array().expect("a list");
    assert_eq!(results.len(), 3);
    for (result, index) in results.iter().zip(order) {
        assert_eq!((&result["index"], &result["document"]["text"]), (&json!(index), &json!(texts[index])));
        assert_eq!(result["relevance_score"].as_f64().map(|x| x as f32), Some(expected[index]));
    }
    let bare = json!({"model": "tiny", "query": "geese", "documents": documents, "return_documents": false});
    assert!(world.post("/v1/rerank", &bare).await.ok()["results"][0].get("document").is_none());
}

#[tokio::test]
async fn pairs_are_scored_by_the_cosine_of_embeddings() {
    let world = bert().await;
    let vector = |text: &str| world.model.vector(&world.ids(text), 0, &pooled(0));
    let answer = world.post("/v1/score", &json!({"model": "tiny", "text_1": "geese", "text_2": ["a model", "geese"]})).await.ok();
    let cosine: f32 = vector("geese").iter().zip(vector("a model")).map(|(a, b)| a * b).sum();
    let got = |i: usize| answer["data"][i]["score"].as_f64().expect("a number") as f32;
    assert!((got(0) - cosine).abs() < 1e-6 && (got(1) - 1.0).abs() < 1e-6, "{answer}");
    // The text that comes three times is read once.
    assert_eq!(answer["usage"]["total_tokens"], world.ids("geese").len() + world.ids("a model").len());
    let ranked = world.post("/v1/rerank", &json!({"model": "tiny", "query": "geese", "documents": ["a model", "geese"]})).await.ok();
    assert_eq!(ranked["results"][0]["index"], 1);
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_said() {
    let (bert, classifier) = (bert().await, classifier().await);
    let long = "fox ".repeat(LONGEST);
    let too_many: Vec<&str> = vec!["a"; 2049];
    for (path, more, code, param, words) in [
        ("embeddings", json!({}), "missing_parameter", "input", "missing"),
        ("embeddings", json!({"input": []}), "invalid_value", "input", "a string, a list of token ids"),
        ("embeddings", json!({"input": [1, "a"]}), "invalid_value", "input", "a string, a list of token ids"),
        ("embeddings", json!({"input": too_many}), "invalid_value", "input", "at most 2048"),
        ("embeddings", json!({"input": [5, 512]}), "invalid_value", "input", "token 512, expected ids below 512"),
        ("embeddings", json!({"input": ["a", long]}), "context_length_exceeded", "input", "reads at most 128"),
        ("rerank", json!({"query": "a", "documents": [long]}), "context_length_exceeded", "documents", "reads at most 128"),
        ("embeddings", json!({"input": "a", "dimensions": 129}), "invalid_value", "dimensions", "have 128"),
        ("embeddings", json!({"input": "a", "dimensions": 0}), "invalid_value", "dimensions", "from 1"),
        ("embeddings", json!({"input": "a", "encoding_format": "int8"}), "invalid_value", "encoding_format", "base64"),
        ("embeddings", json!({"input": "a", "colour": 1}), "unknown_parameter", "colour", "not known"),
        ("rerank", json!({"query": "a"}), "missing_parameter", "documents", "missing"),
        ("rerank", json!({"query": "a", "documents": []}), "invalid_value", "documents", "1 to 2048"),
        ("rerank", json!({"query": 1, "documents": ["a"]}), "invalid_value", "query", "a string"),
        ("rerank", json!({"query": "a", "documents": [{"title": "b"}]}), "invalid_value", "documents", "a string"),
        ("score", json!({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}), "invalid_value", "text_1", "2 texts and text_2 3"),
        ("classify", json!({"input": "a"}), "unsupported_endpoint", "model", "no classification head"),
    ] {
        let mut body = json!({"model": "tiny"});
        more.as_object().expect("an object").iter().for_each(|(name, value)| body[name] = value.clone());
        let error = bert.post(&format!("/v1/{path}"), &body).await.error(400);
        assert_eq!((&error["code"], &error["param"]), (&json!(code), &json!(param)), "{error}");
        assert!(error["message"].as_str().is_some_and(|m| m.contains(words)), "{path}: {error}");
    }
    bert.post("/v1/embeddings", &json!({"model": "other", "input": "a"})).await.error(404);
    // A head of two labels does not score.
    let error = classifier.post("/v1/score", &json!({"model": "tiny", "text_1": "a", "text_2": "b"})).await.error(400);
    assert!(error["message"].as_str().is_some_and(|m| m.contains("2 labels")), "{error}");
}

#[tokio::test]
async fn each_kind_of_model_is_refused_where_it_does_not_belong() {
    let (decoder, encoder) = (World::new().await, bert().await);
    for (path, body) in [
        ("embeddings", json!({"model": "tiny", "input": "a"})),
        ("classify", json!({"model": "tiny", "input": "a"})),
        ("score", json!({"model": "tiny", "text_1": "a", "text_2": "b"})),
        ("rerank", json!({"model": "tiny", "query": "a", "documents": ["b"]})),
    ] {
        let error = decoder.post(&format!("/v1/{path}"), &body).await.error(400);
        assert_eq!((&error["code"], &error["param"]), (&json!("unsupported_endpoint"), &json!("model")));
        assert!(error["message"].as_str().is_some_and(|m| m.contains("needs an encoder")), "{error}");
    }
    for (path, body) in [("completions", request(json!({}))), ("chat/completions", chat(json!({})))] {
        let error = encoder.post(&format!("/v1/{path}"), &body).await.error(400);
        assert_eq!(error["code"], "unsupported_endpoint");
        assert!(error["message"].as_str().is_some_and(|m| m.contains("use /v1/embeddings")), "{error}");
    }
}

#[tokio::test]
async fn encoders_are_listed_and_counted() {
    let world = bert().await;
    let listed = world.get("/v1/models").await.ok();
    assert_eq!((&listed["data"][0]["id"], &listed["data"][0]["max_model_len"]), (&json!("tiny"), &json!(CONTEXT)));
    world.post("/v1/embeddings", &json!({"model": "tiny", "input": ["the quick brown fox", "a"]})).await.ok();
    world.post("/v1/embeddings", &json!({"model": "tiny"})).await.error(400);
    let tokens = world.ids("the quick brown fox").len() + world.ids("a").len();
    let metrics = world.get("/metrics").await;
    for line in [
        "skein_http_answers_total{route=\"/v1/embeddings\",status=\"200\"} 1".to_owned(),
        "skein_http_answers_total{route=\"/v1/embeddings\",status=\"400\"} 1".to_owned(),
        "vllm:request_success_total{model_name=\"tiny\",engine=\"0\",finished_reason=\"stop\"} 1".to_owned(),
        format!("vllm:request_prompt_tokens_sum{{model_name=\"tiny\",engine=\"0\"}} {tokens}"),
        "vllm:e2e_request_latency_seconds_count{model_name=\"tiny\",engine=\"0\"} 1".to_owned(),
    ] {
        assert!(metrics.text().contains(&line), "no {line} in\n{}", metrics.text());
    }
}
