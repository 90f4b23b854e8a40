//! One model in every kind of file: the same values, the same texts, the same numbers.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use e2e::{
    files,
    program::{self, floats, id_list, ids, json},
    rewrite::{Folder, Tensor},
};
use plan::dtype::DType;
use serde_json::Value;

fn convert(from: &Path, to: &Path, more: &[&str]) -> Value {
    let (from, to) = (from.display().to_string(), to.display().to_string());
    json(&[&["convert", &from, &to, "--json"], more].concat())
}

/// The type that a fixture's weights have.
fn float_type(tensors: &BTreeMap<String, Tensor>) -> &'static str {
    match tensors.values().next().expect("a tensor").dtype {
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        _ => "f32",
    }
}

/// The bits of 1 + w.
fn one_more(tensor: &Tensor) -> Vec<u32> {
    let value = |bytes: &[u8]| match *bytes {
        [a, b] => f32::from_bits(u32::from(u16::from_le_bytes([a, b])) << 16),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => panic!("a float of {} bytes", bytes.len()),
    };
    let element = if tensor.dtype == DType::BF16 { 2 } else { 4 };
    tensor.data.chunks(element).map(|bytes| (1.0 + value(bytes)).to_bits()).collect()
}

fn equal(name: &str, a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>, gemma: bool) {
    assert!(a.keys().eq(b.keys()), "{name}: {:?}\n{:?}", a.keys(), b.keys());
    for (tensor, a) in a {
        let b = &b[tensor];
        let same = if gemma && a.shape.len() == 1 { one_more(a) == one_more(b) } else { a.data == b.data && a.dtype == b.dtype };
        assert!(same && a.shape == b.shape, "{name}: tensor {tensor} differs");
    }
}

/// Logits at a fixture's input, ids that follow, and the loss of a text by the model's own tokenizer.
fn says(model: &Path, input: &[u32]) -> (Vec<f32>, Vec<u32>, Value) {
    let shown = model.display().to_string();
    let got = json(&["eval", "logits", &shown, "--input-ids", &id_list(input), "--greedy", "12", "--kv", "f32", "--json"]);
    let text = files::package().join("fixtures/text/wikitext2-valid-300k.txt").display().to_string();
    let ppl = ["eval", "ppl", &shown, "--text", &text, "--context", "64", "--chunks", "2", "--kv", "f32", "--json"];
    let ppl = program::run(&ppl);
    let ppl = if ppl.status.success() { serde_json::from_str(&ppl.stdout).expect("JSON") } else { Value::String(ppl.stderr) };
    (floats(&got, "last_logits"), ids(&got, "greedy_ids"), ppl)
}

/// A fixture as folder of safetensors → GGUF → folder again, compared with the first.
fn round_trip(name: &str, original: &Path, place: &Path) -> [PathBuf; 3] {
    let [first, gguf, second] = ["first", "model.gguf", "second"].map(|part| place.join(format!("{name}-{part}")));
    convert(original, &first, &[]);
    convert(&first, &gguf, &["--dtype", "f32"]);
    let before = Folder::read(&first).expect("a folder");
    convert(&gguf, &second, &["--dtype", float_type(&before.tensors)]);
    let after = Folder::read(&second).expect("a folder");
    equal(name, &before.tensors, &after.tensors, name == "gemma3");
    [first, gguf, second]
}

fn whole(name: &str) {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (fixture, input) = (files::fixture(name), ids(&files::expected(name), "input_ids"));
    let [first, gguf, second] = round_trip(name, &fixture, place.path());
    if name != "llama-pt" {
        let (original, first) = (Folder::read(&fixture).expect("the fixture"), Folder::read(&first).expect("a folder"));
        equal(name, &original.tensors, &first.tensors, false);
    }
    let expected = says(&fixture, &input);
    assert!(says(&first, &input) == expected, "{name}: its folder says something else");
    let there = says(&gguf, &input);
    let off = there.0.iter().zip(&expected.0).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off <= 1e-5 && there.1 == expected.1, "{name}: logits of its GGUF file are off by {off}");
    match (expected.2["ppl"].as_f64(), there.2["ppl"].as_f64()) {
        (Some(a), Some(b)) => assert!((a - b).abs() <= 1e-5 * a, "{name}: perplexity {b}, not {a}"),
        // A tokenizer without a beginning token.
        _ => assert!(expected.2.to_string().contains("no beginning token") && there.2.to_string().contains("no beginning token"), "{name}"),
    }
    let back = says(&second, &input);
    assert!(back.1 == expected.1, "{name}: ids of the folder made of its GGUF file");
    // The control: what is turned or added on the way is seen.
    if name == "llama" {
        let mut tensors = Folder::read(&second).expect("a folder").tensors;
        let q = tensors.get_mut("model.layers.0.self_attn.q_proj.weight").expect("a tensor");
        q.data.rotate_left(q.shape[1] * 2);
        let seen = std::panic::catch_unwind(|| equal(name, &Folder::read(&first).expect("a folder").tensors, &tensors, false));
        assert!(seen.is_err());
    }
}

#[test]
fn llama_round_trip() {
    whole("llama");
    whole("llama31-rope");
}

#[test]
fn pytorch_round_trip() {
    whole("llama-pt");
}

#[test]
fn mistral_and_mixtral_round_trip() {
    whole("mistral");
    whole("mixtral");
}

#[test]
fn qwen_round_trip() {
    whole("qwen2");
    whole("qwen3");
    whole("qwen3-moe");
}

/// Of DeepSeek V2 a model that GGUF can tell; the fixture's own amplitude of YaRN it cannot.
#[test]
fn deepseek_round_trip() {
    whole("deepseek-v3");
    let place = tempfile::tempdir().expect("a temporary folder");
    let (like, original) = (files::fixture("deepseek-v2"), place.path().join("deepseek-v2"));
    fs::create_dir(&original).expect("a folder");
    let mut folder = Folder::read(&like).expect("the fixture");
    folder.config["rms_norm_eps"] = 1e-6.into();
    folder.config["rope_scaling"]["mscale"] = 0.707.into();
    folder.write(&original, &like).expect("a writable folder");
    let [_, gguf, back] = round_trip("deepseek-v2", &original, place.path());
    let input = ids(&files::expected("deepseek-v2"), "input_ids");
    let expected = says(&original, &input);
    assert!(says(&gguf, &input).1 == expected.1 && says(&back, &input).1 == expected.1);
    let out = place.path().join("other.gguf");
    let done = program::run(&["convert", &like.display().to_string(), &out.display().to_string()]);
    assert!(done.status.code() == Some(2) && done.stderr.contains("attn_factor") && !out.exists(), "{}", done.stderr);
}

#[test]
fn gemma3_round_trip() {
    whole("gemma3");
}

#[test]
fn gpt2_round_trip() {
    whole("gpt2");
}

#[test]
fn phi3_round_trip() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (like, original) = (files::fixture("llama"), place.path().join("phi3"));
    fs::create_dir(&original).expect("a folder");
    Folder::read(&like).expect("the fixture").into_phi3().write(&original, &like).expect("a writable folder");
    let [_, gguf, _] = round_trip("phi3", &original, place.path());
    let input = ids(&files::expected("llama"), "input_ids");
    assert_eq!(says(&gguf, &input).1, says(&like, &input).1);
}

/// Vectors and labels of every text of a fixture.
fn vectors(model: &Path, like: &str) -> Vec<Value> {
    let texts = files::expected(like)["texts"].clone();
    let model = model.display().to_string();
    let of = |text: &Value| json(&["eval", "logits", &model, "--input-ids", &id_list(&ids(text, "input_ids")), "--json"]);
    texts.as_object().expect("texts").values().map(of).collect()
}

/// How far vectors are from a fixture's reference outputs.
fn off(got: &[Value], like: &str) -> f32 {
    let expected = files::expected(like)["texts"].clone();
    let fields = ["cls_hidden", "mean_pooled_l2"];
    let texts = got.iter().zip(expected.as_object().expect("texts").values());
    let of = |(got, expected): (&Value, &Value)| {
        let pairs = fields.iter().flat_map(|field| floats(got, field).into_iter().zip(floats(expected, field)).collect::<Vec<_>>());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    texts.map(of).fold(0.0, f32::max)
}

/// A file of a folder, as JSON.
fn read(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder.join(name)).expect("a file")).expect("JSON")
}

/// Whether a field of two folders' `config.json` is the same.
fn same_fields(a: &Path, b: &Path, fields: &[&str]) {
    let (a, b) = (read(a, "config.json"), read(b, "config.json"));
    fields.iter().for_each(|field| assert_eq!(a[field], b[field], "{field}"));
}

#[test]
fn bert_round_trip() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let fixture = files::fixture("bert");
    let [first, gguf, second] = round_trip("bert", &fixture, place.path());
    let mut original = Folder::read(&fixture).expect("the fixture");
    // The pooler of a model that does not classify is no part of it.
    original.tensors.retain(|name, _| !name.starts_with("pooler."));
    equal("bert", &original.tensors, &Folder::read(&first).expect("a folder").tensors, false);
    let counts = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size"];
    same_fields(&fixture, &second, &counts);
    same_fields(&fixture, &second, &["architectures", "model_type", "type_vocab_size", "layer_norm_eps", "hidden_act"]);
    assert_eq!(read(&second, "tokenizer.json"), read(&fixture, "tokenizer.json"));
    assert!(!second.join("modules.json").exists(), "nobody said how it is pooled");
    let expected = vectors(&fixture, "bert");
    for model in [&first, &gguf, &second] {
        let got = vectors(model, "bert");
        assert!(got == expected && off(&got, "bert") <= 1e-5, "{}: off by {}", model.display(), off(&got, "bert"));
    }
    // The control: a value of its one table of token types shows.
    let mut other = Folder::read(&second).expect("a folder");
    other.tensors.get_mut("embeddings.token_type_embeddings.weight").expect("a tensor").data[3] ^= 1;
    let changed = place.path().join("changed");
    fs::create_dir(&changed).expect("a folder");
    other.write(&changed, &second).expect("a writable folder");
    assert!(off(&vectors(&changed, "bert"), "bert") > 1e-5);
}

/// DistilBERT without its head is BERT in GGUF; with it GGUF would say tanh where the model has relu.
#[test]
fn distilbert_round_trip() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let fixture = files::fixture("distilbert-sst2");
    let (whole, bare) = (place.path().join("whole"), place.path().join("bare"));
    convert(&fixture, &whole, &[]);
    let out = place.path().join("refused.gguf");
    let done = program::run(&["convert", &whole.display().to_string(), &out.display().to_string()]);
    assert!(done.status.code() == Some(2) && done.stderr.contains("head with relu") && !out.exists(), "{}", done.stderr);
    let mut folder = Folder::read(&whole).expect("a folder");
    folder.config["architectures"] = serde_json::json!(["DistilBertModel"]);
    folder.tensors = folder.tensors.into_iter().filter_map(|(name, t)| Some((name.strip_prefix("distilbert.")?.to_owned(), t))).collect();
    fs::create_dir(&bare).expect("a folder");
    folder.write(&bare, &whole).expect("a writable folder");
    let [first, gguf, second] = round_trip("distilbert", &bare, place.path());
    equal("distilbert", &folder.tensors, &Folder::read(&first).expect("a folder").tensors, false);
    same_fields(&bare, &second, &["architectures", "model_type", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings"]);
    for model in [&first, &gguf, &second] {
        let got = vectors(model, "distilbert-sst2");
        assert!(off(&got, "distilbert-sst2") <= 1e-5, "{}: off by {}", model.display(), off(&got, "distilbert-sst2"));
    }
}

/// A head that classifies, its labels, and how texts are pooled, where GGUF's keys or ours can say it.
#[test]
fn labels_and_pooling_round_trip() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (like, original) = (files::fixture("bert"), place.path().join("head"));
    let mut folder = Folder::read(&like).expect("the fixture");
    let base = |(name, tensor): (String, Tensor)| (format!("bert.{name}"), tensor);
    folder.tensors = folder.tensors.into_iter().map(base).collect();
    // Three rows of a table stand for a trained head.
    let rows = |n: usize, width: usize| -> Vec<u8> { (0..n * width).flat_map(|i| ((i % 31) as f32 / 31.0 - 0.5).to_le_bytes()).collect() };
    for (name, shape) in [("classifier.weight", vec![3, 128]), ("classifier.bias", vec![3])] {
        let data = rows(3, *shape.get(1).unwrap_or(&1));
        folder.tensors.insert(name.to_owned(), Tensor { shape, dtype: DType::F32, data });
    }
    folder.config["architectures"] = serde_json::json!(["BertForSequenceClassification"]);
    folder.config["id2label"] = serde_json::json!({"0": "ink", "1": "paper", "2": "thread"});
    folder.config["problem_type"] = "multi_label_classification".into();
    fs::create_dir_all(original.join("1_Pooling")).expect("a folder");
    folder.write(&original, &like).expect("a writable folder");
    let kind = |i: usize, path: &str, kind: &str| serde_json::json!({"idx": i, "path": path, "type": format!("sentence_transformers.models.{kind}")});
    let modules = Value::from(vec![kind(0, "", "Transformer"), kind(1, "1_Pooling", "Pooling")]);
    fs::write(original.join("modules.json"), modules.to_string()).expect("a file");
    fs::write(original.join("1_Pooling/config.json"), r#"{"pooling_mode_cls_token": true}"#).expect("a file");
    let prompts = r#"{"prompts": {"q": "query: "}, "default_prompt_name": "q"}"#;
    fs::write(original.join("config_sentence_transformers.json"), prompts).expect("a file");
    // What is written is compared by the program itself; a folder that cannot be said would not be there.
    let [_, gguf, second] = round_trip("head", &original, place.path());
    equal("head", &folder.tensors, &Folder::read(&second).expect("a folder").tensors, false);
    same_fields(&original, &second, &["architectures", "id2label", "problem_type"]);
    assert_eq!(read(&second, "1_Pooling/config.json")["pooling_mode_cls_token"], true);
    assert_eq!(read(&second, "modules.json").as_array().map(Vec::len), Some(2), "not made of length 1");
    assert_eq!(read(&second, "config_sentence_transformers.json")["prompts"]["default"], "query: ");
    let (expected, there) = (vectors(&original, "bert"), vectors(&gguf, "bert"));
    assert!(there == expected && vectors(&second, "bert") == expected && floats(&there[0], "logits").len() == 3);
    // What no reader here does is not written as if it did.
    fs::write(original.join("1_Pooling/config.json"), r#"{"pooling_mode_max_tokens": true}"#).expect("a file");
    let out = place.path().join("refused.gguf");
    let done = program::run(&["convert", &original.display().to_string(), &out.display().to_string()]);
    assert!(done.status.code() == Some(2) && done.stderr.contains("pooling_mode_max_tokens") && !out.exists(), "{}", done.stderr);
}

/// Parts are one model; nothing is written over; what cannot be said is refused.
#[test]
fn parts_and_refusals() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (llama, input) = (files::fixture("llama"), ids(&files::expected("llama"), "input_ids"));
    let expected = says(&llama, &input);
    let (folder, gguf) = (place.path().join("folder"), place.path().join("m.gguf"));
    let made = convert(&llama, &folder, &["--file-size", "300k"]);
    assert!(made["files"].as_array().expect("files").len() > 3 && folder.join("model.safetensors.index.json").exists(), "{made}");
    assert!(says(&folder, &input) == expected);
    let made = convert(&folder, &gguf, &["--file-size", "300k"]);
    let parts = made["files"].as_array().expect("files");
    assert!(parts.len() > 3, "{made}");
    let first = PathBuf::from(parts[0].as_str().expect("a name"));
    let split = says(&first, &input);
    assert_eq!(split.1, expected.1);
    // Parts become one file again, with the same values.
    let one = place.path().join("one.gguf");
    convert(&first, &one, &[]);
    assert!(says(&one, &input) == split);

    let before = fs::read(&one).expect("a file");
    for (out, said) in [(&one, "exists already"), (&place.path().join("x.bin"), "PyTorch reads too"), (&folder, "exists already")] {
        let done = program::run(&["convert", &llama.display().to_string(), &out.display().to_string()]);
        assert!(done.status.code() == Some(2) && done.stderr.contains(said), "{}", done.stderr);
    }
    assert!(fs::read(&one).expect("a file") == before);
    // A window in some layers alone is nothing that files of qwen2 tell in GGUF.
    let odd = place.path().join("odd");
    let mut qwen = Folder::read(&files::fixture("qwen2")).expect("the fixture");
    qwen.config["use_sliding_window"] = true.into();
    qwen.config["sliding_window"] = 8.into();
    qwen.config["max_window_layers"] = 2.into();
    qwen.config["layer_types"] = Value::Null;
    fs::create_dir(&odd).expect("a folder");
    qwen.write(&odd, &files::fixture("qwen2")).expect("a writable folder");
    let out = place.path().join("odd.gguf");
    let done = program::run(&["convert", &odd.display().to_string(), &out.display().to_string()]);
    assert!(done.status.code() == Some(2) && done.stderr.contains("sliding_window"), "{}", done.stderr);
    let left: Vec<_> = fs::read_dir(place.path()).expect("the folder").map(|e| e.expect("an entry").file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains(".part") && name != "odd.gguf"), "{left:?}");
}
