//! Importance matrices: which weights of a model matter for a text, and what is made with that.

use std::{fs, path::Path};

use e2e::{
    files,
    program::{json, run},
};
use plan::gguf::{self, Header, Keep, Kind, Value, Writer};
use serde_json::Value as Json;

/// Two texts that have nothing in common: one to learn from, one to compare on.
fn texts(folder: &Path, bytes: usize) -> (String, String) {
    let text = fs::read_to_string(files::text()).expect("the test text");
    let put = |name: &str, part: String| {
        let path = folder.join(name);
        fs::write(&path, part).expect("a file");
        path.display().to_string()
    };
    let chars: Vec<char> = text.chars().collect();
    (put("learnt.txt", chars[..bytes].iter().collect()), put("held-out.txt", chars[chars.len() - bytes..].iter().collect()))
}

/// A GGUF file's header, and what lies behind it.
fn parts(path: &str) -> (Header, Vec<u8>) {
    let bytes = fs::read(path).expect("a file");
    let header = gguf::read(&mut &*bytes, bytes.len() as u64, Keep::Short, true).expect("a GGUF file");
    let data = bytes[header.data_offset as usize..].to_vec();
    (header, data)
}

fn fixture(name: &str) -> String {
    files::fixture(name).display().to_string()
}

fn refused(args: &[&str], said: &[&str]) {
    let run = run(args);
    assert_eq!(run.status.code(), Some(2), "{args:?}: {}", run.stderr);
    assert!(said.iter().all(|said| run.stderr.contains(said)), "{args:?}: {}", run.stderr);
}

/// The same file whatever computes it, and the same again from the matrix that was kept.
#[test]
fn an_importance_matrix_has_the_same_bits_everywhere() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (learnt, _) = texts(folder.path(), 6000);
    for model in ["llama", "mixtral", "gpt2", "deepseek-v3"] {
        let input = fixture(model);
        let make = |name: &str, more: &[&str]| {
            let (out, kept) = (place(&format!("{model}-{name}.gguf")), place(&format!("{model}-{name}.imatrix")));
            let learn = ["--imatrix-text", &learnt, "--context", "96", "--save-imatrix", &kept];
            let said = json(&[&["quantize", &input, &out, "--to", "q4_1", "--json"], &learn[..], more].concat());
            (said, parts(&out).1, fs::read(kept).expect("a file"))
        };
        let (said, file, matrix) = make("one", &["--threads", "1", "--isa", "scalar"]);
        let (_, again, matrix_again) = make("two", &["--threads", "3", "--chunk", "7"]);
        assert!(matrix == matrix_again && file == again, "{model}: the bits depend on how they were computed");
        assert_eq!(said["imatrix"]["source"], "learnt.txt", "{said}");
        assert!(said["imatrix"]["chunks"].as_u64().is_some_and(|n| n > 5) && said["imatrix"]["unknown"] == 0, "{said}");

        // From the file that was kept: the same blocks, and other words about where it is from.
        let from_file = place(&format!("{model}-file.gguf"));
        json(&["quantize", &input, &from_file, "--to", "q4_1", "--json", "--imatrix", &place(&format!("{model}-one.imatrix"))]);
        let plain = place(&format!("{model}-plain.gguf"));
        json(&["quantize", &input, &plain, "--to", "q4_1", "--json"]);
        let (learnt, data) = parts(&place(&format!("{model}-one.gguf")));
        let (kept, same) = parts(&from_file);
        let (without, other) = parts(&plain);
        assert!(data == same && data != other && data.len() == other.len(), "{model}");
        let says = |header: &Header, key: &str| header.get(&format!("quantize.imatrix.{key}")).and_then(Value::as_str).map(str::to_owned);
        assert_eq!(says(&learnt, "dataset").as_deref(), Some("learnt.txt"));
        assert_eq!(says(&kept, "file"), Some(format!("{model}-one.imatrix")));
        assert!(!without.metadata.iter().any(|entry| entry.key.starts_with("quantize.")));
        // What was made with one does not say so of what is made of it.
        let next = place(&format!("{model}-next.gguf"));
        json(&["quantize", &place(&format!("{model}-one.gguf")), &next, "--to", "q8_0", "--json"]);
        assert!(!parts(&next).0.metadata.iter().any(|entry| entry.key.starts_with("quantize.")));
    }
}

fn number(value: &Json, field: &str) -> f64 {
    value[field].as_f64().unwrap_or_else(|| panic!("{field} is missing in {value}"))
}

/// A kept matrix with its columns in reverse order: as large, and wrong.
fn reversed(path: &str, into: &str) {
    let (header, data) = parts(path);
    let mut out = Writer::new();
    for entry in &header.metadata {
        out.metadata(&entry.key, entry.value.clone());
    }
    for tensor in &header.tensors {
        let at = (tensor.offset - header.data_offset) as usize;
        let mut values: Vec<[u8; 4]> = data[at..at + tensor.bytes as usize].as_chunks().0.to_vec();
        if tensor.name.ends_with(".in_sum2") {
            values.chunks_mut(tensor.dims[0] as usize).for_each(<[_]>::reverse);
        }
        let shape: Vec<usize> = tensor.dims.iter().rev().map(|&n| n as usize).collect();
        out.tensor(&tensor.name, &shape, tensor.kind.dtype().expect("floats"), values.concat());
    }
    fs::write(into, out.to_bytes().expect("a file")).expect("a file");
}

/// On text that it did not see, the model is closer to its source; with the importance of other columns it is not.
#[test]
fn importance_brings_the_reference_model_closer_to_its_source() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (learnt, held_out) = texts(folder.path(), 12_000);
    let input = files::reference().display().to_string();
    let kept = place("imatrix.gguf");
    let quantize = |name: &str, more: &[&str]| {
        let compare = ["--text", &held_out, "--context", "256", "--chunks", "2", "--json"];
        number(&json(&[&["quantize", &input, &place(name), "--to", "q3_k"], &compare[..], more].concat()), "kl_divergence")
    };
    let without = quantize("without.gguf", &[]);
    let with = quantize("with.gguf", &["--imatrix-text", &learnt, "--save-imatrix", &kept]);
    reversed(&kept, &place("reversed.gguf"));
    let wrong = quantize("wrong.gguf", &["--imatrix", &place("reversed.gguf")]);
    println!("KL divergence: {without} without, {with} with, {wrong} with that of other columns");
    assert!(with < 0.9 * without, "{with}, without {without}");
    assert!(wrong > with, "{wrong}, right {with}");
}

/// A tensor to be written: name, shape, values.
type Tensor<'a> = (&'a str, &'a [usize], Vec<f32>);

#[test]
fn what_cannot_be_weighed_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (learnt, _) = texts(folder.path(), 2000);
    let (llama, out) = (fixture("llama"), place("out.gguf"));
    let learn = |more: &[&str], said: &[&str]| refused(&[&["quantize", &llama, &out, "--imatrix-text", &learnt], more].concat(), said);
    learn(&["--to", "q8_0"], &["importance matrix changes nothing of Q8_0", "Q4_K"]);
    learn(&["--to", "q4_0", "--pp", "2"], &["--pp and --tp"]);
    learn(&["--to", "q4_0", "--imatrix", &learnt], &["--imatrix"]);
    learn(&["--to", "q4_0", "--context", "100000"], &["100000 tokens do not fit"]);
    learn(&["--to", "q4_0", "--save-imatrix", &learnt], &["learnt.txt exists already"]);
    refused(&["quantize", &llama, &out, "--to", "q4_0", "--save-imatrix", &place("new")], &["--imatrix-text"]);
    refused(&["quantize", &llama, &out, "--to", "q4_0", "--imatrix-text", "-", "--text", "-"], &["cannot both be standard input"]);
    refused(&["quantize", &fixture("bert"), &out, "--to", "q4_0", "--imatrix-text", &learnt], &["encoder"]);
    let short = place("short.txt");
    fs::write(&short, "geese").expect("a file");
    refused(&["quantize", &llama, &out, "--to", "q4_0", "--imatrix-text", &short], &["expected at least one chunk"]);

    let matrix = |name: &str, kind: &str, tensors: &[Tensor<'_>]| {
        let mut file = Writer::new();
        file.metadata("general.type", Value::String(kind.to_owned()));
        file.array("imatrix.datasets", Kind::String, vec![Value::String("x".to_owned())]);
        for (name, shape, values) in tensors {
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            file.tensor(name, shape, ::plan::dtype::DType::F32, bytes);
        }
        fs::write(place(name), file.to_bytes().expect("a file")).expect("a file");
        place(name)
    };
    let hidden = 128;
    let (sums, counts) = ("blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts");
    let cases: [(&str, &[Tensor<'_>], &[&str]); 7] = [
        ("model", &[], &["general.type is model, expected imatrix"]),
        ("imatrix", &[("blk.0.other.weight.in_sum2", &[1, 4], vec![1.0; 4])], &["it is of another model"]),
        ("imatrix", &[(sums, &[1, 48], vec![1.0; 48]), (counts, &[1, 1], vec![1.0])], &[sums, "[48, 1]", "rows of 128 values"]),
        ("imatrix", &[(sums, &[2, hidden], vec![1.0; 256]), (counts, &[2, 1], vec![1.0; 2])], &[sums, "2 matrices", "has 1"]),
        ("imatrix", &[(sums, &[1, hidden], vec![1.0; 128])], &[sums, "no counts"]),
        ("imatrix", &[(sums, &[1, hidden], vec![1.0; 128]), (counts, &[1, 3], vec![1.0; 3])], &[counts, "3 values of F32, expected 1"]),
        ("imatrix", &[(sums, &[1, hidden], vec![f32::NAN; 128]), (counts, &[1, 1], vec![2.0])], &[sums, "matrix 0", "no sum of 2 squares"]),
    ];
    for (number, (kind, tensors, said)) in cases.into_iter().enumerate() {
        let file = matrix(&format!("{number}.gguf"), kind, tensors);
        refused(&["quantize", &llama, &out, "--to", "q4_0", "--imatrix", &file], &[&[format!("{number}.gguf").as_str()], said].concat());
    }
    refused(&["quantize", &llama, &out, "--to", "q4_0", "--imatrix", &learnt], &["no importance matrix in GGUF"]);
    refused(&["quantize", &llama, &out, "--to", "q4_0", "--imatrix", &place("absent")], &["failed to open importance matrix"]);
    assert!(!Path::new(&out).exists());
    // Control: one that is right is taken, and says of how many matrices it knows nothing.
    let right = matrix("right.gguf", "imatrix", &[(sums, &[1, hidden], vec![1.0; 128]), (counts, &[1, 1], vec![2.0])]);
    let said = json(&["quantize", &llama, &out, "--to", "q4_0", "--imatrix", &right, "--json"]);
    assert_eq!(said["imatrix"]["matrices"], 1, "{said}");
    assert!(said["imatrix"]["unknown"].as_u64().is_some_and(|n| n > 10), "{said}");
}
