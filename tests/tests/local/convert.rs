//! Weights in other types: converted as they are loaded, and written anew.

use e2e::{
    files,
    program::{floats, id_list, ids, json, run},
};
use serde_json::Value;

fn logits(model: &str, more: &[&str]) -> (Vec<u32>, Vec<f32>) {
    let input = id_list(&ids(&files::expected("llama"), "input_ids"));
    let mut args = vec!["eval", "logits", model, "--input-ids", &input, "--greedy", "4", "--json"];
    args.extend(more);
    let got = json(&args);
    (floats(&got, "last_logits").iter().map(|x| x.to_bits()).collect(), floats(&got, "last_logits"))
}

/// What is converted as it is loaded are the weights that are written anew, so the numbers are the same bits, on any split.
#[test]
fn loading_in_fewer_bits_is_running_what_was_quantized_before() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let model = place.path().join("model.gguf").display().to_string();
    // GGUF turns rows of llamas, which is seen in the last bits of a product: both models are of one kind.
    json(&["convert", &files::fixture("llama").display().to_string(), &model, "--json"]);
    let (exact, _) = logits(&model, &[]);
    let mut all = vec![exact];
    for bits in ["8bit", "4bit", "q4_0"] {
        let written = place.path().join(format!("{bits}.gguf")).display().to_string();
        json(&["quantize", &model, &written, "--to", bits, "--json"]);
        let (before, _) = logits(&written, &[]);
        for way in [&[][..], &["--pp", "2"], &["--tp", "2"]] {
            let (loaded, _) = logits(&model, &[&["--load-in", bits], way].concat());
            assert!(loaded == before, "{bits} {way:?}");
        }
        assert!(!all.contains(&before), "{bits} changes nothing");
        all.push(before);
    }
}

fn number(value: &Value, field: &str) -> f64 {
    value[field].as_f64().unwrap_or_else(|| panic!("{field} is missing in {value}"))
}

#[test]
fn the_reference_model_in_8_bits_is_close_to_its_source() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let input = files::reference().display().to_string();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "The geese take turns in front, and when one of them falls back another closes the gap. ".repeat(16))
        .expect("a file");
    let text = text.display().to_string();
    let more = ["--text", &text, "--context", "96", "--chunks", "2", "--json"];
    let output = |to: &str| folder.path().join(format!("{to}.gguf")).display().to_string();
    let quantize = |to: &str| json(&[&["quantize", &input, &output(to), "--to", to], &more[..]].concat());
    let eight = quantize("q8_0");
    assert!(number(&eight, "kl_divergence") <= 0.01 && number(&eight, "kl_divergence") >= 0.0, "{eight}");
    let four = quantize("q4_0");
    assert!(number(&four, "kl_divergence") > number(&eight, "kl_divergence"), "{four}");
    assert!(number(&four, "bytes_after") < 0.7 * number(&eight, "bytes_after"), "{four}");
    println!("q8_0: {eight}\nq4_0: {four}");
    // Nothing is written over, and nothing but GGUF holds blocks.
    for (out, said) in [(output("q8_0"), "exists already"), (folder.path().join("q8").display().to_string(), "does not end with .gguf")] {
        let refused = run(&["quantize", &input, &out, "--to", "q8_0"]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(refused.stderr.contains(said), "{}", refused.stderr);
    }
}
