//! Safetensors headers against the reference implementation's, and what is said of damaged ones.

use std::{borrow::Cow, collections::HashMap};

use ::safetensors::{Dtype, SafeTensors, View, serialize};
use proptest::prelude::*;

use super::{Header, Index, SafetensorsError, SafetensorsProblem, read};

/// A tensor of zeros.
struct Zeros(Dtype, Vec<usize>);

impl View for Zeros {
    fn dtype(&self) -> Dtype {
        self.0
    }

    fn shape(&self) -> &[usize] {
        &self.1
    }

    fn data(&self) -> Cow<'_, [u8]> {
        vec![0; self.data_len()].into()
    }

    fn data_len(&self) -> usize {
        self.1.iter().product::<usize>() * self.0.bitsize() / 8
    }
}

fn load(bytes: &[u8]) -> Result<Header, SafetensorsError> {
    read(&mut &*bytes, bytes.len() as u64)
}

/// A file of this header and `data` zero bytes.
fn file(json: &str, data: usize) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat()
}

fn refusal(json: &str, data: usize) -> SafetensorsError {
    load(&file(json, data)).expect_err("a refusal")
}

#[test]
fn the_reference_writers_file_is_read_as_it_reads_it() {
    let tensors = [
        ("a.weight", Zeros(Dtype::F32, vec![2, 3])),
        ("b\"ück", Zeros(Dtype::BF16, vec![5])),
        ("c", Zeros(Dtype::F16, vec![])),
        ("d", Zeros(Dtype::I64, vec![0, 4])),
        ("e", Zeros(Dtype::F8_E5M2, vec![7])),
        ("f", Zeros(Dtype::BOOL, vec![1, 1, 1])),
    ];
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = serialize(tensors, Some(metadata)).unwrap();
    let header = load(&bytes).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(header.metadata["format"], "pt");
    assert_eq!(header.tensors.len(), theirs.len());
    for t in &header.tensors {
        let their = theirs.tensor(&t.name).unwrap();
        assert_eq!(t.shape, their.shape().iter().map(|&d| d as u64).collect::<Vec<_>>());
        assert_eq!(t.dtype, format!("{:?}", their.dtype()));
        assert_eq!(t.bytes as usize, their.data().len());
        assert_eq!(t.offset as usize, their.data().as_ptr() as usize - bytes.as_ptr() as usize, "{}", t.name);
        let entry = &bytes[t.entry_offset as usize..];
        assert!(entry.starts_with(serde_json::to_string(&t.name).unwrap().as_bytes()), "{}", t.name);
    }
}

#[test]
fn damaged_headers_name_field_and_place() {
    let ok = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert!(load(&file(ok, 8)).is_ok());
    let two = |second: &str| format!(r#"{{"w":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"v":{second}}}"#);
    let cases: Vec<(String, usize, &str, &str)> = vec![
        (ok.into(), 7, "tensor w data_offsets at byte 9", "range 0..8 does not lie in the 7 bytes of data"),
        (ok.into(), 9, "data after the last tensor at byte 70", "8..9"),
        (ok.replace("F32", "F31"), 8, "tensor w dtype at byte 9", "got F31"),
        (ok.replace("[2]", "[3]"), 8, "tensor w data_offsets", "12 bytes"),
        (ok.replace("[2]", "[4294967296,4294967296]"), 8, "tensor w shape", "overflows"),
        (ok.replace("[0,8]", "[8,0]"), 8, "tensor w data_offsets", "8..0"),
        (ok.replace("[0,8]", "[0,8,9]"), 8, "header at byte", "expected a JSON object of tensors"),
        (ok.replace("[2]", "[-2]"), 8, "header at byte 38", "-2"),
        (ok.replace("\"shape\":[2],", ""), 8, "header at byte", "missing field `shape`"),
        (ok.replace("shape", "shade"), 8, "header at byte", "unknown field `shade`"),
        (ok.replace('{', "["), 8, "header at byte 8", "JSON"),
        (
            two(r#"{"dtype":"F32","shape":[1],"data_offsets":[12,16]}"#),
            16,
            "tensor v data_offsets at byte 62",
            "expected 8, the end of tensor w",
        ),
        (two(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#), 8, "tensor v data_offsets", "expected 8"),
        (two(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#).replace("\"v\"", "\"w\""), 8, "header at byte", "w appears twice"),
    ];
    for (json, data, field, said) in cases {
        let text = refusal(&json, data).to_string();
        assert!(text.contains(field) && text.contains(said), "{json} says {text:?}, without {field:?} or {said:?}");
    }
}

#[test]
fn lengths_are_checked_before_anything_is_allocated() {
    assert!(matches!(load(&[1, 2]).unwrap_err().problem, SafetensorsProblem::Truncated { needed: 8, left: 2 }));
    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    let error = load(&huge).unwrap_err();
    assert!(matches!(error.problem, SafetensorsProblem::Truncated { needed: u64::MAX, left: 2 }));
    assert_eq!((error.field.as_str(), error.offset), ("header length", 0));
    // Also where the file claims to be long enough.
    assert!(matches!(read(&mut &*huge, u64::MAX).unwrap_err().problem, SafetensorsProblem::Truncated { .. }));
    let long = [&(1u64 << 40).to_le_bytes()[..], b"{}"].concat();
    assert!(matches!(read(&mut &*long, 1 << 50).unwrap_err().problem, SafetensorsProblem::TooLong { .. }));
}

#[test]
fn deep_nesting_is_refused() {
    let deep = format!(r#"{{"__metadata__":{}"#, "[".repeat(100_000));
    assert!(refusal(&deep, 0).to_string().contains("header at byte"));
}

#[test]
fn index_names_files_of_its_own_folder() {
    let index = |file: &str| Index::parse(format!(r#"{{"metadata":{{}},"weight_map":{{"a":"one.safetensors","b":{file:?}}}}}"#).as_bytes());
    assert_eq!(index("two.safetensors").unwrap().files(), ["one.safetensors", "two.safetensors"]);
    for bad in ["../x", "/etc/passwd", "", "a/b", "..", "x\\y"] {
        let text = index(bad).unwrap_err().to_string();
        assert!(text.contains("tensor b") && text.contains("expected a file name"), "{text}");
    }
    assert!(Index::parse(b"{}").unwrap_err().to_string().contains("weight_map"));
    let twice = br#"{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}"#;
    assert!(Index::parse(twice).unwrap_err().to_string().contains("a appears twice"));
}

proptest! {
    /// What loads here, the reference implementation loads too: nothing damaged passes.
    #[test]
    fn nothing_the_reference_refuses_is_read(at in 0usize..140, byte in any::<u8>()) {
        let tensors = [("a", Zeros(Dtype::F32, vec![2, 3])), ("b", Zeros(Dtype::BF16, vec![4]))];
        let mut bytes = serialize(tensors, None).unwrap();
        prop_assume!(at < bytes.len());
        bytes[at] = byte;
        if load(&bytes).is_ok() {
            prop_assert!(SafeTensors::deserialize(&bytes).is_ok());
        }
    }

    #[test]
    fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..300), length in 0u64..300) {
        let _ = load(&noise);
        let _ = load(&[&length.to_le_bytes()[..], &noise].concat());
        let _ = Index::parse(&noise);
    }
}
