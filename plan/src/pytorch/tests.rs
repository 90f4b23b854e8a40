//! State dicts written here opcode by opcode, and what is said of damaged and hostile ones.

use proptest::prelude::*;

use super::{Problem, PytorchError, Tensor, read};

/// An archive of entries that are stored as they are.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let (at, len) = ((file.len() as u32).to_le_bytes(), (data.len() as u32).to_le_bytes());
        let name_len = (name.len() as u16).to_le_bytes();
        file.extend([b"PK\x03\x04\0\0\0\0\0\0".as_slice(), &[0; 8], &len, &len, &name_len, &[0, 0], name.as_bytes(), data].concat());
        let head = [b"PK\x01\x02\0\0\0\0\0\0\0\0".as_slice(), &[0; 8], &len, &len, &name_len, &[0; 12], &at, name.as_bytes()];
        directory.extend(head.concat());
    }
    let (at, len, count) =
        ((file.len() as u32).to_le_bytes(), (directory.len() as u32).to_le_bytes(), (entries.len() as u16).to_le_bytes());
    [file, directory, [b"PK\x05\x06\0\0\0\0".as_slice(), &count, &count, &len, &at, &[0, 0]].concat()].concat()
}

fn text(s: &str) -> Vec<u8> {
    [b"X".as_slice(), &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat()
}

fn int(n: u32) -> Vec<u8> {
    [b"J".as_slice(), &n.to_le_bytes()].concat()
}

fn tuple(numbers: &[u32]) -> Vec<u8> {
    [b"(".to_vec(), numbers.iter().flat_map(|&n| int(n)).collect(), b"t".to_vec()].concat()
}

/// A view of a storage: key, class, elements of the storage, first element, shape, strides.
struct View<'a>(&'a str, &'a str, u32, u32, &'a [u32], &'a [u32]);

impl View<'_> {
    fn pickled(&self) -> Vec<u8> {
        let Self(key, class, elements, first, shape, strides) = self;
        let storage =
            [b"(".to_vec(), text("storage"), format!("ctorch\n{class}\n").into(), text(key), text("cpu"), int(*elements), b"tQ".to_vec()];
        let hooks = b"\x89ccollections\nOrderedDict\n)R".to_vec();
        let arguments = [b"(".to_vec(), storage.concat(), int(*first), tuple(shape), tuple(strides), hooks, b"t".to_vec()];
        [b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(), arguments.concat(), b"R".to_vec()].concat()
    }
}

/// `{name: value, …}` of pickled values, as a whole pickle.
fn pickle(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    [b"\x80\x02}(".to_vec(), entries.iter().flat_map(|(name, value)| [text(name), value.clone()].concat()).collect(), b"u.".to_vec()]
        .concat()
}

fn load(file: &[u8]) -> Result<Vec<Tensor>, PytorchError> {
    let mut largest = 0;
    let tensors = read(
        &mut |at, into: &mut [u8]| {
            largest = largest.max(into.len());
            let from = file.get(at as usize..at as usize + into.len()).ok_or(std::io::ErrorKind::UnexpectedEof)?;
            into.copy_from_slice(from);
            Ok(())
        },
        file.len() as u64,
    );
    assert!(largest <= file.len(), "{largest} bytes were asked for of a file of {}", file.len());
    tensors
}

fn file(pickle: &[u8]) -> Vec<u8> {
    archive(&[("m/data.pkl", pickle), ("m/byteorder", b"little"), ("m/data/0", &[1; 48]), ("m/data/1", &[2; 16])])
}

fn refusal(pickle: &[u8]) -> String {
    load(&file(pickle)).expect_err("a refusal").to_string()
}

#[test]
fn views_have_their_places() {
    let entries = [
        ("whole", View("0", "FloatStorage", 12, 0, &[3, 4], &[4, 1]).pickled()),
        ("shared", View("0", "FloatStorage", 12, 4, &[2, 4], &[4, 1]).pickled()),
        ("turned", View("0", "FloatStorage", 12, 0, &[4, 3], &[1, 4]).pickled()),
        ("half", View("1", "HalfStorage", 8, 1, &[1, 7], &[99, 1]).pickled()),
        ("epoch", int(3)),
    ];
    let file = file(&pickle(&entries));
    let tensors = load(&file).unwrap();
    assert_eq!(
        tensors.iter().map(|t| (t.name.as_str(), t.dtype)).collect::<Vec<_>>(),
        [("whole", "F32"), ("shared", "F32"), ("turned", "F32"), ("half", "F16")]
    );
    assert_eq!(tensors.iter().map(Tensor::is_contiguous).collect::<Vec<_>>(), [true, true, false, true]);
    assert_eq!(file[tensors[0].offset as usize..][..48], [1; 48]);
    assert_eq!(tensors[1].offset, tensors[0].offset + 16);
    assert_eq!(file[tensors[3].offset as usize - 2..][..16], [2; 16]);
    assert_eq!((tensors[2].span(), tensors[3].span()), (12, 7));
    // Nested, as trainers save it.
    let nested = pickle(&[("epoch", int(1)), ("state_dict", [b"}(".to_vec(), text("w"), entries[0].1.clone(), b"u".to_vec()].concat())]);
    assert_eq!(load(&self::file(&nested)).unwrap()[0].name, "w");
}

#[test]
fn nothing_but_a_state_dict_is_read() {
    let one = |value: Vec<u8>| pickle(&[("w", value)]);
    for (module, name) in
        [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch._utils", "_rebuild_tensor"), ("posix", "system")]
    {
        let said = refusal(&one(format!("c{module}\n{name}\n").into_bytes()));
        assert!(said.contains(&format!("{module}.{name}")) && said.contains("data.pkl at byte"), "{said}");
        let stacked = [text(module), text(name), b"\x93".to_vec()].concat();
        assert!(refusal(&one(stacked)).contains(&format!("{module}.{name}")));
    }
    // Opcodes that make or find objects: INST, OBJ, NEWOBJ, EXT1, GET, PERSID, POP, DUP, FLOAT, INT.
    for op in [b'i', b'o', 0x81, 0x82, b'g', b'P', b'0', b'2', b'F', b'I', 0x92, 0x97, 0x00] {
        assert!(refusal(&one(vec![op])).contains(&format!("opcode {op:#04x}")), "{op:#04x}");
    }
    let cases: [(Vec<u8>, &str); 12] = [
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.".to_vec(), "arguments"),
        (b"\x80\x02.".to_vec(), "a value on the stack"),
        (b"\x80\x02}".to_vec(), "cut off"),
        (b"\x80\x09}.".to_vec(), "protocol"),
        (b"\x80\x02X\xff\xff\xff\xff".to_vec(), "cut off"),
        (b"\x80\x02}h\x05.".to_vec(), "remembered"),
        (b"\x80\x02}r\xff\xff\xff\x7f.".to_vec(), "in order"),
        (b"\x80\x02\x8a\x09\0\0\0\0\0\0\0\0\0.".to_vec(), "at most 8 bytes"),
        (b"\x80\x02]K\x01K\x02s.".to_vec(), "a dict"),
        (b"\x80\x02}.".to_vec(), "a dict of tensors"),
        (one(b"}}b".to_vec()), "a dict of 1 other values"),
        (b"\x80\x02t.".to_vec(), "a mark"),
    ];
    for (bytes, said) in cases {
        let text = refusal(&bytes);
        assert!(text.contains(said), "{text:?} without {said:?}");
    }
}

#[test]
fn views_outside_of_their_storage_are_refused() {
    let said = |view: View<'_>| refusal(&pickle(&[("w", view.pickled())]));
    assert!(said(View("0", "FloatStorage", 12, 1, &[3, 4], &[4, 1])).contains("elements 1..13 of a storage of 12"));
    assert!(said(View("0", "FloatStorage", 99, 0, &[99], &[1])).contains("of a storage of 12"));
    assert!(said(View("9", "FloatStorage", 1, 0, &[1], &[1])).contains("m/data/9 is missing"));
    assert!(said(View("0", "FloatStorage", 12, 0, &[2, 2], &[1])).contains("a stride for each extent"));
    assert!(said(View("0", "FloatStorage", 12, 0, &[100, 12], &[0, 1])).contains("repeats no element"));
    assert!(said(View("0", "FloatStorage", 12, 0, &[1 << 30, 1 << 30, 1 << 30], &[0, 0, 0])).contains("overflows"));
    assert!(said(View("0", "FloatStorage", 12, 0, &[0x7fff, 0x7fff], &[0x7fff_ffff, 0x7fff_ffff])).contains("storage"));
    let view = || View("0", "FloatStorage", 12, 0, &[3], &[1]).pickled();
    assert!(refusal(&pickle(&[("w", view()), ("w", view())])).contains("tensor w"));
}

#[test]
fn other_archives_are_refused_by_name() {
    let good = pickle(&[("w", View("0", "FloatStorage", 12, 0, &[3], &[1]).pickled())]);
    let said = |file: &[u8]| load(file).expect_err("a refusal").to_string();
    assert!(said(&[super::LEGACY.as_slice(), &[0; 40]].concat()).contains("before PyTorch 1.6"));
    assert!(said(b"GGUF and more").contains("magic at byte 0"));
    assert!(said(&archive(&[("m/other", b"")])).contains("data.pkl is missing"));
    assert!(said(&archive(&[("m/data.pkl", &good), ("m/constants.pkl", b"")])).contains("TorchScript"));
    assert!(said(&archive(&[("m/data.pkl", &good), ("m/byteorder", b"big"), ("m/data/0", &[1; 48])])).contains("got big"));
    assert!(said(&archive(&[("m/data.pkl", &good), ("m/data.pkl", &good)])).contains("appears twice"));
    let whole = file(&good);
    assert!(load(&whole).is_ok());
    let directory = whole.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let damaged = |at: usize, byte: u8| {
        let mut other = whole.clone();
        other[at] = byte;
        load(&other).expect_err("a refusal").problem
    };
    assert_eq!(damaged(directory + 10, 8), Problem::Compressed { method: 8 });
    assert_eq!(damaged(directory + 8, 1), Problem::Encrypted);
    assert!(matches!(damaged(directory + 23, 0x7f), Problem::OutOfFile { .. }));
    // Two entries on the same bytes.
    let two = pickle(&[
        ("a", View("0", "FloatStorage", 12, 0, &[3], &[1]).pickled()),
        ("b", View("1", "FloatStorage", 4, 0, &[3], &[1]).pickled()),
    ]);
    let point = |file: &mut Vec<u8>, entry: usize, at: usize| {
        let place = file.windows(4).enumerate().filter(|(_, w)| *w == b"PK\x01\x02").nth(entry).unwrap().0 + 42;
        file[place..place + 4].copy_from_slice(&(at as u32).to_le_bytes());
    };
    // One whose header lies in the data of another.
    let inner = archive(&[("m/data/1", &[2; 16])]);
    let outer = &inner[..30 + 8 + 16];
    let mut overlapping = archive(&[("m/data.pkl", &two), ("m/data/0", outer), ("m/data/1", &[2; 16])]);
    assert!(load(&overlapping).is_ok());
    let place = overlapping.windows(outer.len()).position(|w| w == outer).unwrap();
    point(&mut overlapping, 2, place);
    assert!(said(&overlapping).contains("overlaps"));
    // Whose header is another's.
    point(&mut overlapping, 2, place - 38);
    assert!(said(&overlapping).contains("expected the entry's own header"));
    // What the header says otherwise than the directory.
    let header = |at: usize, byte: u8| {
        let mut other = whole.clone();
        other[at] = byte;
        load(&other).expect_err("a refusal").problem
    };
    assert_eq!(header(8, 8), Problem::Compressed { method: 8 });
    assert_eq!(header(6, 1), Problem::Encrypted);
    assert!(said(&archive(&[("m/data.pkl", &good), ("n/data.pkl", &good), ("m/data/0", &[1; 48])])).contains("one data.pkl"));
}

proptest! {
    /// Whatever is damaged: an answer, soon, and never more asked for than the file has (`load` checks that).
    #[test]
    fn damage_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut file = file(&pickle(&[("w", View("0", "FloatStorage", 12, 0, &[4, 3], &[1, 4]).pickled()), ("v", View("1", "HalfStorage", 8, 0, &[8], &[1]).pickled())]));
        let at = at.index(file.len());
        file[at] = byte;
        let _ = load(&file);
        file.truncate(cut.index(file.len()));
        let _ = load(&file);
    }

    #[test]
    fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = load(&noise);
        let _ = load(&file(&noise));
    }
}

#[test]
fn deep_and_long_pickles_end() {
    // A million nested tuples, each in the next: numbers, not pointers, so nothing is called a million deep.
    let deep = [b"\x80\x02)".to_vec(), vec![0x85; 1_000_000], b".".to_vec()].concat();
    assert!(load(&file(&deep)).is_err());
    // Every value remembered, none twice as large.
    let doubled = [b"\x80\x02)".to_vec(), b"q\x00h\x00\x86".repeat(100_000), b".".to_vec()].concat();
    assert!(load(&file(&doubled)).is_err());
}
