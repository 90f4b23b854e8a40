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
