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

#[test]
fn loading_in_fewer_bits_gives_the_same_bits_on_any_split() {
    let model = files::fixture("llama").display().to_string();
    let (_, exact) = logits(&model, &[]);
    for (bits, most) in [("8bit", 0.3), ("4bit", 3.0), ("q4_0", 3.0)] {
        let (alone, values) = logits(&model, &["--load-in", bits]);
        let off = values.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off > 0.0 && off < most, "{bits}: logits are off by {off}");
        for way in [["--pp", "2"], ["--tp", "2"]] {
            let (split, _) = logits(&model, &["--load-in", bits, way[0], way[1]]);
            assert!(split == alone, "{bits} with {}", way.join(" "));
        }
    }
}

fn number(value: &Value, field: &str) -> f64 {
    value[field].as_f64().unwrap_or_else(|| panic!("{field} is missing in {value}"))
}

#[test]
fn the_reference_model_in_8_bits_is_close_to_its_source() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (input, output) = (files::reference().display().to_string(), folder.path().join("q8.gguf"));
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "The geese take turns in front, and when one of them falls back another closes the gap. ".repeat(16))
        .expect("a file");
    let (output, text) = (output.display().to_string(), text.display().to_string());
    let more = ["--text", &text, "--context", "96", "--chunks", "2", "--json"];
    let quantize = |to: &str| json(&[&["quantize", &input, &output, "--to", to], &more[..]].concat());
    let eight = quantize("q8_0");
    assert!(number(&eight, "kl_divergence") <= 0.01 && number(&eight, "kl_divergence") >= 0.0, "{eight}");
    let four = quantize("q4_0");
    assert!(number(&four, "kl_divergence") > number(&eight, "kl_divergence"), "{four}");
    assert!(number(&four, "bytes_after") < 0.7 * number(&eight, "bytes_after"), "{four}");
    println!("q8_0: {eight}\nq4_0: {four}");
    // What is not GGUF is refused.
    let refused = run(&["quantize", &files::fixture("llama").display().to_string(), &output, "--to", "q8_0"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(refused.stderr.contains("is not GGUF"), "{}", refused.stderr);
}
