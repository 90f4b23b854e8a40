//! GGUF headers that load, and what is said of those that do not.

use std::io::Read;

use proptest::prelude::*;

use super::{GgmlType, GgufError, GgufProblem, Header, Keep, Kind, TokenType, Tokenizer, Value, Writer, read};
use crate::{dtype::DType, samples::Sample};

fn load(bytes: &[u8]) -> Result<Header, GgufError> {
    read(&mut &*bytes, bytes.len() as u64, Keep::Short, true)
}

/// The problem of a header that is refused.
fn problem(bytes: &[u8]) -> GgufProblem {
    load(bytes).expect_err("a refusal").problem
}

/// A header by hand: magic, version, counts, then `rest`.
fn raw(tensors: u64, entries: u64, rest: &[u8]) -> Vec<u8> {
    [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &entries.to_le_bytes(), rest].concat()
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

/// An entry of the tensor table.
fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let dims_bytes: Vec<u8> = dims.iter().flat_map(|d| d.to_le_bytes()).collect();
    [&text(name)[..], &(dims.len() as u32).to_le_bytes(), &dims_bytes, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

/// A header of tensors alone, padded, with `data` bytes after it.
fn table(tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
    let mut bytes = raw(tensors.len() as u64, 0, &tensors.concat());
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

fn every_kind() -> Vec<(&'static str, Value)> {
    vec![
        ("a", Value::U8(1)),
        ("b", Value::I8(-1)),
        ("c", Value::U16(2)),
        ("d", Value::I16(-2)),
        ("e", Value::U32(3)),
        ("f", Value::I32(-3)),
        ("g", Value::F32(0.5)),
        ("h", Value::Bool(true)),
        ("i", Value::String("naïve".to_owned())),
        ("j", Value::U64(4)),
        ("k", Value::I64(-4)),
        ("l", Value::F64(-0.25)),
    ]
}

#[test]
fn what_is_written_is_read() {
    let mut writer = Writer::new();
    for (key, value) in every_kind() {
        writer.metadata(key, value.clone());
        writer.array(&format!("{key}.list"), value.kind(), vec![value.clone(), value]);
    }
    writer.array("empty", Kind::I32, Vec::new());
    for dtype in DType::ALL {
        let row = dtype.row_bytes(256).unwrap();
        writer.tensor(&format!("{dtype:?}"), &[3, 256], dtype, (0..3 * row).map(|i| i as u8).collect());
    }
    let bytes = writer.to_bytes().unwrap();
    let header = load(&bytes).unwrap();
    assert_eq!((header.version, header.alignment, header.data_offset % 32), (3, 32, 0));
    for (key, value) in every_kind() {
        assert_eq!(header.get(key), Some(&value));
        let list = header.get(&format!("{key}.list")).and_then(Value::as_array).unwrap();
        assert_eq!((list.kind, list.values.as_deref()), (value.kind(), Some(&[value.clone(), value][..])));
    }
    assert_eq!(header.get("empty").and_then(Value::as_array).map(|a| a.len), Some(0));
    for t in &header.tensors {
        assert_eq!((t.dims.as_slice(), t.offset % 32), (&[256, 3][..], 0));
        let dtype = t.kind.dtype().unwrap();
        assert_eq!((t.kind.name, t.bytes), (t.name.as_str(), 3 * dtype.row_bytes(256).unwrap() as u64));
        let data = &bytes[t.offset as usize..][..t.bytes as usize];
        assert!(data.iter().enumerate().all(|(i, &b)| b == i as u8), "{}", t.name);
    }
    // The value of an entry stands where its offset says.
    let at = header.entry("e").unwrap().offset as usize;
    assert_eq!(bytes[at..at + 4], [3, 0, 0, 0]);
}

#[test]
fn version_2_is_the_same_layout_and_others_are_refused() {
    let mut bytes = Sample::llama().file();
    bytes[4] = 2;
    assert_eq!(load(&bytes).unwrap().version, 2);
    for (version, expected) in [
        (1u32, GgufProblem::Version { got: 1 }),
        (4, GgufProblem::Version { got: 4 }),
        (0, GgufProblem::Version { got: 0 }),
        (3u32.swap_bytes(), GgufProblem::ByteOrder { got: 0x0300_0000 }),
    ] {
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        let error = load(&bytes).unwrap_err();
        assert_eq!((error.problem, error.offset), (expected, 4));
    }
    assert_eq!(problem(b"GGML\x03\0\0\0"), GgufProblem::Magic { got: *b"GGML" });
}

#[test]
fn long_arrays_are_skipped_unless_asked_for() {
    let mut writer = Writer::new();
    writer.array("words", Kind::String, (0..5000).map(|i| Value::String(i.to_string())).collect());
    writer.array("numbers", Kind::U16, (0..5000).map(Value::U16).collect());
    writer.metadata("after", Value::U8(7));
    let bytes = writer.to_bytes().unwrap();
    let kept = |keep| {
        let header = read(&mut &*bytes, bytes.len() as u64, keep, true).unwrap();
        assert_eq!(header.get("after"), Some(&Value::U8(7)));
        ["words", "numbers"].map(|key| {
            let array = header.get(key).and_then(Value::as_array).unwrap();
            assert_eq!(array.len, 5000);
            array.values.as_ref().map(Vec::len)
        })
    };
    assert_eq!(kept(Keep::Short), [None, None]);
    assert_eq!(kept(Keep::Keys(&["words"])), [Some(5000), None]);
}

#[test]
fn duplicates_are_refused_with_both_places() {
    let twice = raw(0, 2, &[entry("k", 0, &[1]), entry("k", 0, &[2])].concat());
    let error = load(&twice).unwrap_err();
    assert_eq!((error.problem, error.offset), (GgufProblem::Duplicate { first: 24 }, 24 + 14));
    let one = tensor("w", &[2], 0, 0);
    let two = tensor("w", &[2], 0, 32);
    let error = load(&table(&[one.clone(), two], 64)).unwrap_err();
    assert_eq!((error.problem, error.offset), (GgufProblem::Duplicate { first: 24 }, 24 + one.len() as u64));
    assert!(load(&table(&[one, tensor("v", &[2], 0, 32)], 64)).is_ok(), "other names load");
}

#[test]
fn alignment_is_the_files_own() {
    let file = |alignment: &[u8], kind: u32, offset: u64| {
        let mut bytes =
            raw(2, 1, &[entry("general.alignment", kind, alignment), tensor("a", &[1], 0, 0), tensor("b", &[1], 0, offset)].concat());
        bytes.resize(bytes.len().next_multiple_of(64) + 128, 0);
        bytes
    };
    let header = load(&file(&64u32.to_le_bytes(), 4, 64)).unwrap();
    assert_eq!((header.alignment, header.data_offset % 64, header.tensors[1].offset), (64, 0, header.data_offset + 64));
    assert_eq!(load(&file(&8u32.to_le_bytes(), 4, 8)).unwrap().alignment, 8);
    assert_eq!(problem(&file(&64u32.to_le_bytes(), 4, 32)), GgufProblem::Misaligned { got: 32, alignment: 64 });
    for bad in [0u32, 24, 1 << 21] {
        assert!(matches!(problem(&file(&bad.to_le_bytes(), 4, 64)), GgufProblem::Invalid { .. }), "{bad}");
    }
    assert!(matches!(problem(&file(&64u64.to_le_bytes(), 10, 64)), GgufProblem::Invalid { .. }), "of another type");
}

#[test]
fn tensors_must_lie_in_the_file_apart_from_each_other() {
    let a = tensor("a", &[16], 0, 0);
    assert!(load(&table(std::slice::from_ref(&a), 64)).is_ok());
    assert_eq!(problem(&table(std::slice::from_ref(&a), 63)), GgufProblem::OutOfFile { begin: 64, end: 128, file: 127 });
    let b = tensor("b", &[16], 0, 32);
    assert!(matches!(problem(&table(&[a.clone(), b], 128)), GgufProblem::Overlap { begin: 128, other, .. } if other == "a"));
    assert_eq!(problem(&table(&[tensor("a", &[2], 0, 1)], 64)), GgufProblem::Misaligned { got: 1, alignment: 32 });
    let far = tensor("a", &[2], 0, u64::MAX - 31);
    assert!(matches!(problem(&table(&[far], 64)), GgufProblem::Overflow { .. }));
    // A header alone says where data would be.
    let header = table(std::slice::from_ref(&a), 0);
    assert!(read(&mut &*header, header.len() as u64, Keep::Short, false).is_ok());
}

#[test]
fn extents_and_types_are_checked() {
    let one = |dims: &[u64], kind| problem(&table(&[tensor("t", dims, kind, 0)], 256));
    assert!(matches!(one(&[0], 0), GgufProblem::Invalid { .. }));
    assert!(matches!(one(&[1, 1, 1, 1, 1], 0), GgufProblem::Invalid { .. }));
    assert_eq!(one(&[33], 8), GgufProblem::Block { row: 33, block: 32, kind: "Q8_0" });
    assert_eq!(one(&[32], 4), GgufProblem::UnknownTensorType { got: 4 });
    assert_eq!(one(&[32], 1000), GgufProblem::UnknownTensorType { got: 1000 });
    assert!(matches!(one(&[1 << 32, 1 << 32], 0), GgufProblem::Overflow { .. }));
    assert!(matches!(one(&[1 << 62], 0), GgufProblem::Overflow { .. }));
    assert!(matches!(problem(&raw(1, 0, &tensor("", &[1], 0, 0))), GgufProblem::Empty));
    assert!(matches!(problem(&raw(1, 0, &tensor(&"n".repeat(256), &[1], 0, 0))), GgufProblem::TooLong { limit: 255, got: 256 }));
}

#[test]
fn values_are_checked() {
    assert_eq!(problem(&raw(0, 1, &entry("k", 13, &[0; 8]))), GgufProblem::UnknownKind { got: 13 });
    assert_eq!(problem(&raw(0, 1, &entry("k", 7, &[2]))), GgufProblem::Bool { got: 2 });
    assert_eq!(problem(&raw(0, 1, &entry("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]))), GgufProblem::Utf8);
    assert_eq!(problem(&raw(0, 1, &entry("", 0, &[0; 8]))), GgufProblem::Empty);
    let nested = [&9u32.to_le_bytes()[..], &[0; 8]].concat();
    assert_eq!(problem(&raw(0, 1, &entry("k", 9, &nested))), GgufProblem::Nested);
}

/// A stream of a file that claims to be larger than it is.
struct Liar<'a>(&'a [u8]);

impl Read for Liar<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(into)
    }
}

#[test]
fn counts_and_lengths_are_checked_against_the_file_before_anything_is_allocated() {
    let huge = u64::MAX.to_le_bytes();
    for (what, bytes) in [
        ("tensors", raw(u64::MAX, 0, &[0; 64])),
        ("entries", raw(0, u64::MAX, &[0; 64])),
        ("a key", raw(0, 1, &huge)),
        ("a text", raw(0, 1, &entry("k", 8, &huge))),
        ("an array", raw(0, 1, &entry("k", 9, &[&4u32.to_le_bytes()[..], &huge].concat()))),
        ("an array of text", raw(0, 1, &entry("k", 9, &[&8u32.to_le_bytes()[..], &huge].concat()))),
        ("a name", raw(1, 0, &[&huge[..], &[0; 32]].concat())),
    ] {
        assert!(matches!(problem(&bytes), GgufProblem::Count { .. }), "{what}: {:?}", problem(&bytes));
        // Even where the file claims to be large enough, memory grows only with what really arrives.
        for claimed in [1 << 62, u64::MAX] {
            let error = read(&mut Liar(&bytes), claimed, Keep::Short, true).unwrap_err();
            assert!(!error.field.is_empty(), "{what}");
        }
    }
    let mut short = raw(0, 1, &entry("k", 8, &(1u64 << 50).to_le_bytes()));
    short.extend([b'x'; 100]);
    let error = read(&mut Liar(&short), 1 << 60, Keep::Short, true).unwrap_err();
    assert_eq!((error.problem, error.field.as_str()), (GgufProblem::Unreadable, "metadata k"));
}

#[test]
fn every_truncation_is_refused_with_field_and_offset() {
    for sample in [Sample::llama(), Sample::gemma3()] {
        let bytes = sample.file();
        assert!(load(&bytes).is_ok());
        let data = load(&bytes).unwrap().data_offset as usize;
        let ends = (0..data).chain((data..bytes.len()).step_by(61));
        for end in ends {
            let error = load(&bytes[..end]).expect_err("a file without its end");
            assert!(!error.field.is_empty() && error.offset <= bytes.len() as u64, "{end}: {error}");
            assert!(error.to_string().contains(&format!("at byte {}", error.offset)), "{error}");
        }
    }
}

#[test]
fn types_ids_and_names_agree() {
    for id in 0..64 {
        if let Some(kind) = GgmlType::from_id(id) {
            assert_eq!(kind.id, id);
            if let Some(dtype) = kind.dtype() {
                assert_eq!(GgmlType::id_of(dtype), id);
                assert_eq!((kind.block_len, kind.block_bytes), (dtype.block_len() as u64, dtype.block_bytes() as u64));
                assert_eq!(kind.name, format!("{dtype:?}"));
            }
        }
    }
    for retired in [4, 5, 31, 32, 33, 36, 37, 38] {
        assert_eq!(GgmlType::from_id(retired), None);
    }
    for id in 0..=12 {
        assert_eq!(Kind::from_id(id).map(|k| k as u32), Some(id));
    }
    assert_eq!(Kind::from_id(13), None);
}

#[test]
fn writer_refuses_data_of_another_length() {
    let mut writer = Writer::new();
    writer.tensor("t", &[2, 32], DType::Q8_0, vec![0; 67]);
    let text = writer.to_bytes().unwrap_err().to_string();
    assert!(text.contains("tensor t") && text.contains("67") && text.contains("68"), "{text}");
    let mut writer = Writer::new();
    writer.tensor("t", &[2, 31], DType::Q8_0, vec![0; 66]);
    assert!(writer.to_bytes().is_err());
    let mut writer = Writer::new();
    writer.array("a", Kind::U8, vec![Value::U16(1)]);
    assert!(writer.to_bytes().is_err());
}

#[test]
fn tokenizer_is_read_as_stored() {
    let mut writer = Writer::new();
    let text = |s: &str| Value::String(s.to_owned());
    writer.metadata("tokenizer.ggml.model", text("llama"));
    writer.array("tokenizer.ggml.tokens", Kind::String, ["<unk>", "<s>", "</s>", "a", "<0x41>"].map(text).to_vec());
    writer.array("tokenizer.ggml.scores", Kind::F32, (0..5).map(|i| Value::F32(-(i as f32))).collect());
    writer.array("tokenizer.ggml.token_type", Kind::I32, [2, 3, 3, 4, 6].map(Value::I32).to_vec());
    writer.metadata("tokenizer.ggml.bos_token_id", Value::U32(1));
    writer.metadata("tokenizer.ggml.eos_token_id", Value::U32(2));
    writer.metadata("tokenizer.ggml.padding_token_id", Value::I32(-1));
    writer.metadata("tokenizer.ggml.add_bos_token", Value::Bool(false));
    writer.metadata("tokenizer.chat_template", text("x"));
    writer.metadata("tokenizer.chat_template.tool_use", text("y"));
    let t = Tokenizer::parse(&writer.to_bytes().unwrap()).unwrap();
    assert_eq!((t.model.as_str(), t.tokens.len(), t.scores[4]), ("llama", 5, -4.0));
    assert_eq!(t.types, [TokenType::Unknown, TokenType::Control, TokenType::Control, TokenType::UserDefined, TokenType::Byte]);
    assert_eq!((t.bos, t.eos, t.padding, t.unknown), (Some(1), Some(2), None, None));
    assert_eq!((t.add_bos, t.add_space_prefix), (Some(false), None));
    assert_eq!((t.chat_template.as_deref(), t.named_templates["tool_use"].as_str()), (Some("x"), "y"));
}

#[test]
fn tokenizer_fields_of_wrong_type_or_range_are_refused() {
    let cases: &[(&str, Value, &str)] = &[
        ("tokenizer.ggml.bos_token_id", Value::U32(6), "the id of a token"),
        ("tokenizer.ggml.bos_token_id", Value::String("1".into()), "the id of a token"),
        ("tokenizer.ggml.add_bos_token", Value::U8(1), "a bool"),
        ("tokenizer.ggml.model", Value::U8(1), "text"),
        ("tokenizer.ggml.tokens", Value::U8(1), "an array"),
        ("tokenizer.chat_template", Value::U8(1), "text"),
    ];
    for (key, value, expected) in cases {
        let mut header = load(&Sample::llama().file()).unwrap();
        assert!(Tokenizer::from_header(&header).is_ok());
        header.metadata.retain(|e| e.key != *key);
        header.metadata.push(super::Entry { key: (*key).to_owned(), value: value.clone(), offset: 99 });
        let error = Tokenizer::from_header(&header).unwrap_err();
        let text = error.to_string();
        assert!(error.offset == 99 && text.contains(key) && text.contains(expected), "{text}");
    }
    for key in ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"] {
        let mut header = load(&Sample::llama().file()).unwrap();
        for entry in header.metadata.iter_mut().filter(|e| e.key == key) {
            let Value::Array(array) = &mut entry.value else { panic!("an array") };
            array.values.as_mut().expect("values").pop();
        }
        let text = Tokenizer::from_header(&header).unwrap_err().to_string();
        assert!(text.contains("one value per token") && text.contains("5 for 6"), "{text}");
    }
}

proptest! {
    /// Any bytes at all: refused or read, never a panic.
    #[test]
    fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..400), claimed in any::<u64>()) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(noise);
        let _ = load(&bytes);
        let _ = read(&mut &*bytes, claimed, Keep::Keys(&[]), false);
        let _ = Tokenizer::parse(&bytes);
    }
}
