//! Every family: its fixture against the reference implementation's numbers, from either kind of file, whole and split.

use std::path::Path;

use e2e::{
    files,
    program::{floats, id_list, ids, json},
    rewrite::Folder,
};
use serde_json::Value;

/// `eval logits` of `model` at `input`, with `greedy` further ids.
fn logits(model: &Path, input: &[u32], greedy: usize, more: &[&str]) -> Value {
    let (model, input, greedy) = (model.to_string_lossy(), id_list(input), greedy.to_string());
    let mut args = vec!["eval", "logits", &model, "--input-ids", &input, "--greedy", &greedy, "--kv", "f32", "--json"];
    args.extend(more);
    json(&args)
}

/// The largest difference between two lists.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// What was computed, as bits.
fn bits(got: &Value) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let raw = |field| floats(got, field).iter().map(|x| x.to_bits()).collect();
    (raw("last_logits"), raw("nll_per_token"), ids(got, "greedy_ids"))
}

/// Asserts that `model` gives the numbers of `expected`, and the same bits in two stages, two ranks, and both.
fn matches(model: &Path, expected: &Value, name: &str) -> Value {
    let input = ids(expected, "input_ids");
    let got = logits(model, &input, 24, &[]);
    for field in ["last_logits", "nll_per_token"] {
        let off = distance(&floats(&got, field), &floats(expected, field));
        assert!(off <= 1e-4, "{name}: {field} are off by {off}");
    }
    assert_eq!(ids(&got, "greedy_ids"), ids(expected, "greedy_ids"), "{name}");
    for way in [&["--pp", "2"][..], &["--tp", "2"], &["--pp", "2", "--tp", "2"]] {
        assert!(bits(&logits(model, &input, 24, way)) == bits(&got), "{name} with {} differs from one process", way.join(" "));
    }
    got
}

/// Asserts that a fixture gives its reference outputs, whole and split, and that the comparison would see a wrong setting.
fn matches_reference(name: &str, wrong: (&str, &str)) -> Value {
    let expected = files::expected(name);
    let got = matches(&files::fixture(name), &expected, name);

    let folder = files::changed_fixture(name, wrong.0, wrong.1);
    let other = logits(folder.path(), &ids(&expected, "input_ids"), 0, &[]);
    let off = distance(&floats(&other, "last_logits"), &floats(&expected, "last_logits"));
    assert!(off > 1e-4, "{name}: {} in place of {} went unseen ({off})", wrong.1, wrong.0);
    got
}

/// Asserts that the weights of a folder, in a GGUF file of architecture `arch`, give `got` again within rounding.
fn same_in_gguf(folder: &Folder, arch: &str, got: &Value, input: &[u32]) {
    let place = tempfile::tempdir().expect("a temporary folder");
    let path = place.path().join("model.gguf");
    folder.write_gguf(&path, arch).expect("a writable folder");
    let other = logits(&path, input, 24, &[]);
    let off = distance(&floats(&other, "last_logits"), &floats(got, "last_logits"));
    assert!(off <= 1e-5, "{arch} in GGUF: last logits are off by {off}");
    assert_eq!(ids(&other, "greedy_ids"), ids(got, "greedy_ids"), "{arch} in GGUF");
    let split = logits(&path, input, 24, &["--tp", "2"]);
    assert!(bits(&split) == bits(&other), "{arch} in GGUF: two ranks differ from one process");
}

/// A fixture from either kind of file.
fn both_files(name: &str, wrong: (&str, &str), arch: &str) {
    let got = matches_reference(name, wrong);
    let folder = Folder::read(&files::fixture(name)).expect("the fixture");
    same_in_gguf(&folder, arch, &got, &ids(&files::expected(name), "input_ids"));
}

#[test]
fn mistral() {
    both_files("mistral", ("\"sliding_window\": 8", "\"sliding_window\": 7"), "llama");
}

#[test]
fn qwen2() {
    both_files("qwen2", ("\"rope_theta\": 1000000.0", "\"rope_theta\": 990000.0"), "qwen2");
}

#[test]
fn qwen3() {
    both_files("qwen3", ("\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-03"), "qwen3");
}

#[test]
fn gpt2() {
    both_files("gpt2", ("\"layer_norm_epsilon\": 1e-05", "\"layer_norm_epsilon\": 1e-03"), "gpt2");
}

#[test]
fn mixtral() {
    both_files("mixtral", ("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 3"), "llama");
}

#[test]
fn qwen3_moe() {
    both_files("qwen3-moe", ("\"norm_topk_prob\": true", "\"norm_topk_prob\": false"), "qwen3moe");
}

#[test]
fn deepseek_v3() {
    both_files("deepseek-v3", ("\"topk_group\": 1", "\"topk_group\": 2"), "deepseek2");
}

/// Newer GGUF files have keys and values of heads in tensors of their own: the same numbers, and the same bits in two ranks and stages.
#[test]
fn deepseek_with_keys_and_values_apart() {
    let expected = files::expected("deepseek-v3");
    let folder = Folder::read(&files::fixture("deepseek-v3")).expect("the fixture");
    let place = tempfile::tempdir().expect("a temporary folder");
    let (path, wrong) = (place.path().join("apart.gguf"), place.path().join("wrong.gguf"));
    folder.write_gguf_apart(&path).expect("a writable folder");
    let got = matches(&path, &expected, "keys and values apart");
    let mut other = folder;
    let kv = other.tensors.get_mut("model.layers.1.self_attn.kv_b_proj.weight").expect("a tensor");
    kv.data.rotate_left(kv.shape[1] * 2);
    other.write_gguf_apart(&wrong).expect("a writable folder");
    let seen = logits(&wrong, &ids(&expected, "input_ids"), 0, &[]);
    assert!(distance(&floats(&seen, "last_logits"), &floats(&got, "last_logits")) > 1e-3, "rows of another place went unseen");
}

/// GGUF has one epsilon for all norms, and no other amplitude of YaRN than 1: its twin is of a folder that says the same.
#[test]
fn deepseek_v2() {
    matches_reference("deepseek-v2", ("\"mscale_all_dim\": 0.707", "\"mscale_all_dim\": 0.75"));
    let like = files::fixture("deepseek-v2");
    let mut folder = Folder::read(&like).expect("the fixture");
    folder.config["rms_norm_eps"] = 1e-6.into();
    folder.config["rope_scaling"]["mscale"] = 0.707.into();
    let place = tempfile::tempdir().expect("a temporary folder");
    folder.write(place.path(), &like).expect("a writable folder");
    let input = ids(&files::expected("deepseek-v2"), "input_ids");
    same_in_gguf(&folder, "deepseek2", &logits(place.path(), &input, 24, &[]), &input);
}

/// Each setting that the fixtures have changes the numbers, so that the reference would tell a wrong reading of any of them.
#[test]
fn settings_of_latent_models_show() {
    for (name, settings) in [
        (
            "deepseek-v3",
            &[
                ("norm_topk_prob", Value::Bool(false)),
                ("routed_scaling_factor", 2.0.into()),
                ("n_group", 1.into()),
                ("rope_interleave", Value::Bool(false)),
                ("rms_norm_eps", 1e-3.into()),
            ][..],
        ),
        (
            "deepseek-v2",
            &[
                ("topk_method", "greedy".into()),
                ("topk_group", 3.into()),
                ("routed_scaling_factor", 3.0.into()),
                ("rope_theta", 9000.into()),
            ],
        ),
    ] {
        let (like, input) = (files::fixture(name), ids(&files::expected(name), "input_ids"));
        let expected = floats(&files::expected(name), "last_logits");
        for (field, value) in settings {
            let mut folder = Folder::read(&like).expect("the fixture");
            assert!(!folder.config[*field].is_null(), "{field}");
            folder.config[*field] = value.clone();
            let place = tempfile::tempdir().expect("a temporary folder");
            folder.write(place.path(), &like).expect("a writable folder");
            let off = distance(&floats(&logits(place.path(), &input, 0, &[]), "last_logits"), &expected);
            assert!(off > 1e-3, "{name}: {field} = {value} went unseen ({off})");
        }
    }
}

/// More ranks than some experts' worth, and experts that do not divide: the bits of one process.
#[test]
fn experts_split_unevenly() {
    for (name, way) in [
        ("mixtral", ["--tp", "3"]),
        ("qwen3-moe", ["--tp", "3"]),
        ("qwen3-moe", ["--tp", "4"]),
        ("mixtral", ["--chunk", "3"]),
        ("deepseek-v3", ["--tp", "3"]),
        ("deepseek-v2", ["--tp", "4"]),
        ("deepseek-v3", ["--chunk", "3"]),
    ] {
        let (expected, model) = (files::expected(name), files::fixture(name));
        let input = ids(&expected, "input_ids");
        let alone = bits(&logits(&model, &input, 8, &[]));
        assert!(bits(&logits(&model, &input, 8, &way)) == alone, "{name} with {} differs", way.join(" "));
        assert!(bits(&logits(&model, &input[1..], 8, &way)) != alone, "{name}: an id fewer went unseen");
    }
}

/// The layers from `max_window_layers` on have a window, as if `layer_types` named them.
#[test]
fn late_windows_of_qwen2() {
    let (expected, like) = (files::expected("qwen2"), files::fixture("qwen2"));
    let input = ids(&expected, "input_ids");
    let run = |changes: &[(&str, Value)]| {
        let mut folder = Folder::read(&like).expect("the fixture");
        for (field, value) in changes {
            folder.config[*field] = value.clone();
        }
        let place = tempfile::tempdir().expect("a temporary folder");
        folder.write(place.path(), &like).expect("a writable folder");
        bits(&logits(place.path(), &input, 4, &["--pp", "2", "--tp", "2"]))
    };
    let window = [("use_sliding_window", Value::Bool(true)), ("sliding_window", 8.into()), ("layer_types", Value::Null)];
    let late = run(&[&window[..], &[("max_window_layers", 2.into())]].concat());
    let kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"];
    let named = run(&[&window[..], &[("layer_types", Value::from(kinds.to_vec()))]].concat());
    assert!(late == named);
    assert!(late != run(&[&window[..], &[("max_window_layers", 3.into())]].concat()), "a window fewer went unseen");
}

/// Fused products are slices of the tensors they are stored in: a llama rewritten so keeps its numbers.
#[test]
fn phi3() {
    let (expected, like) = (files::expected("llama"), files::fixture("llama"));
    let folder = Folder::read(&like).expect("the fixture").into_phi3();
    let place = tempfile::tempdir().expect("a temporary folder");
    folder.write(place.path(), &like).expect("a writable folder");
    let got = matches(place.path(), &expected, "phi3");
    same_in_gguf(&folder, "phi3", &got, &ids(&expected, "input_ids"));
}

#[test]
fn llama_with_llama3_rope_scaling() {
    matches_reference("llama31-rope", ("\"high_freq_factor\": 4.0", "\"high_freq_factor\": 3.0"));
}

#[test]
fn llama_from_either_file() {
    both_files("llama", ("\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e-03"), "llama");
}
