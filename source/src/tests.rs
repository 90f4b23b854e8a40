//! Sources against a loopback server that can be told to misbehave, and against local files.

mod adapters;
mod hostile;
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]
mod parts;
mod stores;

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::{AccessKeys, Cache, Digest, Keep, Source, SourceError, SourceOptions};
use plan::{
    dtype::DType,
    gguf::{Kind, Value, Writer},
};

/// How the server answers.
#[derive(Clone, Default)]
struct Behaviour {
    ranges: bool,
    /// Close after this many body bytes, on the first so many answers.
    cut: Option<(usize, usize)>,
    /// Answer 503 this many times first.
    busy: usize,
    /// Required bearer token.
    token: Option<String>,
    /// Required value of the header `Authorization`.
    authorization: Option<String>,
    /// Redirect every path that does not begin with it to this prefix.
    redirect: Option<String>,
    /// Another ETag in every answer.
    changing: bool,
    /// Bytes sent beyond the file's end.
    surplus: usize,
    /// Partial answers begin this many bytes later than they say.
    shifted: usize,
    /// A `Link` header with this as the next page; `SERVER` stands for the server's URL.
    next: Option<String>,
    /// No length in answers.
    unknown_length: bool,
    /// No ETag in answers.
    unmarked: bool,
    /// The ETag, in place of a number.
    tag: String,
    /// Answer only to URLs signed with these keys for this region.
    signed: Option<(AccessKeys, &'static str)>,
    /// Answer 401 with this challenge to requests without the header `authorization`; `SERVER` stands for the server's URL.
    challenge: Option<(&'static str, &'static str)>,
}

struct Server {
    url: String,
    requests: Arc<AtomicUsize>,
    ranges: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(files: Vec<(&str, Vec<u8>)>, behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let files: HashMap<String, Vec<u8>> = files.into_iter().map(|(p, b)| (p.to_owned(), b)).collect();
        let server = Self { url, requests: Arc::default(), ranges: Arc::default() };
        let (requests, ranges) = (server.requests.clone(), server.ranges.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let n = requests.fetch_add(1, Ordering::SeqCst);
                // A client that goes away early is part of what is tested.
                let _ = answer(&stream, &files, &behaviour, n, &ranges);
            }
        });
        server
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn answer(
    mut stream: &TcpStream,
    files: &HashMap<String, Vec<u8>>,
    b: &Behaviour,
    n: usize,
    seen: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or("").to_owned();
    let (mut range, mut token) = (None, None);
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ").unwrap_or((&line, ""));
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => token = Some(value.to_owned()),
            _ => {}
        }
    }
    let refuse = |mut s: &TcpStream, status: &str| write!(s, "HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    if n < b.busy {
        return refuse(stream, "503 Busy");
    }
    if b.token.as_ref().is_some_and(|t| token != Some(format!("Bearer {t}"))) {
        return refuse(stream, "401 Unauthorized");
    }
    if let Some((challenge, _)) = b.challenge.filter(|(_, open)| !path.starts_with(open) && b.authorization != token) {
        let server = format!("http://{}", stream.local_addr()?);
        let challenge = challenge.replace("SERVER", &server);
        return write!(stream, "HTTP/1.1 401 No\r\nwww-authenticate: {challenge}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    let path = match &b.signed {
        None => path,
        Some((keys, region)) => match stores::unsigned(&format!("http://{}{path}", stream.local_addr()?), keys, region) {
            Some(path) => path,
            None => return refuse(stream, "403 Forbidden"),
        },
    };
    if b.challenge.is_none() && b.authorization.is_some() && b.authorization != token {
        return refuse(stream, "403 Forbidden");
    }
    if let Some(prefix) = b.redirect.as_ref().filter(|p| !path.starts_with(p.as_str())) {
        return write!(stream, "HTTP/1.1 302 Found\r\nlocation: {prefix}{path}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    let key = b.redirect.as_ref().and_then(|p| path.strip_prefix(p.as_str())).unwrap_or(&path);
    let Some(bytes) = files.get(key) else { return refuse(stream, "404 Not Found") };
    let range = range.filter(|_| b.ranges);
    seen.lock().unwrap().push(range.clone().unwrap_or_default());
    let (status, body, extra) = match range.as_deref().and_then(|r| r.strip_prefix("bytes=")).and_then(|r| r.split_once('-')) {
        Some((first, last)) => {
            let first: usize = first.parse().unwrap();
            if first >= bytes.len() {
                return refuse(stream, "416 Range Not Satisfiable");
            }
            let last = last.parse::<usize>().map_or(bytes.len() - 1, |l| l.min(bytes.len() - 1));
            let first = first + if first > 0 { b.shifted } else { 0 };
            ("206 Partial", &bytes[first..=last], format!("content-range: bytes {first}-{last}/{}\r\n", bytes.len()))
        }
        None => ("200 OK", bytes.as_slice(), String::new()),
    };
    let etag = match (b.changing, b.tag.as_str()) {
        (true, _) => n.to_string(),
        (false, "") => "1".to_owned(),
        (false, tag) => tag.to_owned(),
    };
    let etag = if b.unmarked { String::new() } else { format!("etag: \"{etag}\"\r\n") };
    let length = if b.unknown_length { String::new() } else { format!("content-length: {}\r\n", body.len() + b.surplus) };
    let own = format!("http://{}", stream.local_addr()?);
    let next = b.next.as_ref().map(|next| next.replace("SERVER", &own));
    let link = next.map(|next| format!("link: <{next}>; rel=\"next\"\r\n")).unwrap_or_default();
    write!(stream, "HTTP/1.1 {status}\r\n{extra}{length}{link}{etag}connection: close\r\n\r\n")?;
    let end = match b.cut {
        Some((at, times)) if n < times => at.min(body.len()),
        _ => body.len(),
    };
    stream.write_all(&body[..end])?;
    stream.write_all(&vec![0; b.surplus])
}

/// A small llama in GGUF.
fn gguf() -> Vec<u8> {
    let mut w = Writer::new();
    w.metadata("general.architecture", Value::String("llama".into()));
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ] {
        w.metadata(&format!("llama.{key}"), Value::U32(value));
    }
    w.metadata("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    w.metadata("tokenizer.ggml.model", Value::String("llama".into()));
    let tokens = (0..40).map(|i| Value::String(format!("t{i}"))).collect();
    w.array("tokenizer.ggml.tokens", Kind::String, tokens);
    let mut tensor = |name: &str, shape: &[usize]| {
        let n: usize = shape.iter().product();
        let data = (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect();
        w.tensor(name, shape, DType::F32, data);
    };
    tensor("token_embd.weight", &[40, 32]);
    tensor("output_norm.weight", &[32]);
    for (name, shape) in [
        ("attn_norm", vec![32]),
        ("attn_q", vec![32, 32]),
        ("attn_k", vec![16, 32]),
        ("attn_v", vec![16, 32]),
        ("attn_output", vec![32, 32]),
        ("ffn_norm", vec![32]),
        ("ffn_gate", vec![32, 32]),
        ("ffn_up", vec![32, 32]),
        ("ffn_down", vec![32, 32]),
    ] {
        tensor(&format!("blk.0.{name}.weight"), &shape);
    }
    w.to_bytes().unwrap()
}

fn digest(bytes: &[u8]) -> String {
    Digest::of_bytes(bytes).to_string()
}

fn options(cache: &Path) -> SourceOptions {
    SourceOptions { cache: Some(cache.to_owned()), backoff: Duration::ZERO, timeout: Duration::from_secs(5), ..SourceOptions::default() }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models").join(name)
}

/// The whole of weight file 0.
fn whole(source: &Source) -> Vec<u8> {
    let mut bytes = vec![0; source.files()[0].bytes as usize];
    source.read(0, 0..bytes.len() as u64, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_pipe_is_no_model_and_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("model.gguf");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let error = crate::place::Place::local(&pipe).unwrap_err();
    assert!(std::error::Error::source(&error).is_some_and(|s| s.to_string() == "it is not a file"), "{error}");
}

#[test]
fn local_gguf_file_and_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    fs::write(&path, gguf()).unwrap();
    for uri in [path.display().to_string(), format!("file://{}", path.display()), dir.path().display().to_string()] {
        let source = Source::open(&uri, SourceOptions::default()).unwrap();
        let header = source.header().unwrap();
        assert_eq!((header.config.vocab, header.tensors.len()), (40, 11), "{uri}");
        assert_eq!(source.bytes_read(), 0);
        assert_eq!(whole(&source), gguf());
        assert_eq!(source.bytes_read(), gguf().len() as u64);
        let card = source.card().unwrap();
        let tokenizer = plan::gguf::Tokenizer::parse(card.file(plan::card::GGUF_HEADER).unwrap()).unwrap();
        assert_eq!(tokenizer.tokens.len(), 40);
        assert!(matches!(source.read(0, 0..u64::MAX, &mut []), Err(SourceError::Range { .. })));
        assert!(matches!(source.read(1, 0..0, &mut []), Err(SourceError::FileIndex { .. })));
    }
}

#[test]
fn local_sharded_safetensors() {
    for (name, files) in [("llama", 5), ("gemma3", 4)] {
        let source = Source::open(&fixture(name).display().to_string(), SourceOptions::default()).unwrap();
        let header = source.header().unwrap();
        assert_eq!((header.files.len(), header.files.clone()), (files, source.files()));
        assert_eq!(header.config.layers.len(), 4);
        let card = source.card().unwrap();
        assert!(card.file("tokenizer.json").is_some() && card.file("config.json").is_some());
        assert!(card.files.is_sorted_by_key(|f| f.name.clone()));
    }
}

#[test]
fn pytorch_files_are_read_as_their_safetensors_twin() {
    let folder = fixture("llama-pt");
    let source = Source::open(&folder.display().to_string(), SourceOptions::default()).unwrap();
    let header = source.header().unwrap();
    assert_eq!((header.files.clone(), header.files[0].name.as_str()), (source.files(), "model.pt"));
    let bytes_of = |source: &Source, t: &plan::model::TensorInfo| {
        let mut bytes = vec![0; t.bytes as usize];
        source.read(t.file, t.offset..t.offset + t.bytes, &mut bytes).unwrap();
        bytes
    };
    // The same tensors, written by the other format's own library.
    let data: Vec<_> = header.tensors.values().map(|t| (t.name.clone(), t.shape.clone(), bytes_of(&source, t))).collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        (name.as_str(), safetensors::tensor::TensorView::new(safetensors::Dtype::F16, shape.clone(), bytes).unwrap())
    });
    let twin = tempfile::tempdir().unwrap();
    fs::write(twin.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::copy(folder.join("config.json"), twin.path().join("config.json")).unwrap();
    let other = Source::open(&twin.path().display().to_string(), SourceOptions::default()).unwrap();
    let twin = other.header().unwrap();
    assert_eq!((&twin.config, twin.tensors.len()), (&header.config, header.tensors.len()));
    for (id, tensor) in &header.tensors {
        let other_tensor = &twin.tensors[id];
        assert_eq!((&tensor.shape, tensor.dtype), (&other_tensor.shape, other_tensor.dtype));
        assert!(bytes_of(&source, tensor) == bytes_of(&other, other_tensor), "{}", tensor.name);
    }
}

#[test]
fn pytorch_ranges_are_read_from_a_server() {
    let file = |name: &str| fs::read(fixture("llama-pt").join(name)).unwrap();
    let server = Server::start(
        vec![("/model.pt", file("model.pt")), ("/config.json", file("config.json"))],
        Behaviour { ranges: true, ..Behaviour::default() },
    );
    let source = Source::open(&format!("{}/model.pt", server.url), SourceOptions::default()).unwrap();
    let header = source.header().unwrap();
    let tensor = header.tensors.values().nth(3).unwrap();
    let mut bytes = vec![0; 64];
    source.read(0, tensor.offset..tensor.offset + 64, &mut bytes).unwrap();
    let local = file("model.pt");
    assert_eq!(bytes, local[tensor.offset as usize..][..64]);
    assert_eq!(source.bytes_read(), 64);
}

#[test]
fn all_parts_of_a_split_file_are_one_model() {
    let whole_file = gguf();
    let header = plan::gguf::read(&mut &*whole_file, whole_file.len() as u64, plan::gguf::Keep::Keys(&[]), true).unwrap();
    let data = |t: &plan::gguf::Tensor| whole_file[t.offset as usize..(t.offset + t.bytes) as usize].to_vec();
    let folder = tempfile::tempdir().unwrap();
    let write = |count: u16, listed: u64| {
        for part in 0..3_u16 {
            let mut writer = Writer::new();
            if part == 0 {
                for e in &header.metadata {
                    writer.metadata(&e.key, e.value.clone());
                }
            }
            writer.metadata("split.no", Value::U16(part));
            writer.metadata("split.count", Value::U16(count));
            writer.metadata("split.tensors.count", Value::U64(listed));
            for t in header.tensors.iter().skip(part.into()).step_by(3) {
                let shape: Vec<usize> = t.dims.iter().rev().map(|&d| d as usize).collect();
                writer.tensor(&t.name, &shape, t.kind.dtype().unwrap(), data(t));
            }
            fs::write(folder.path().join(format!("m-{:05}-of-00003.gguf", part + 1)), writer.to_bytes().unwrap()).unwrap();
        }
    };
    write(3, header.tensors.len() as u64);
    let one = tempfile::tempdir().unwrap();
    fs::write(one.path().join("m.gguf"), &whole_file).unwrap();
    let one = Source::open(&one.path().display().to_string(), SourceOptions::default()).unwrap().header().unwrap();
    for uri in [folder.path().to_owned(), folder.path().join("m-00001-of-00003.gguf"), folder.path().join("m-00002-of-00003.gguf")] {
        let source = Source::open(&uri.display().to_string(), SourceOptions::default()).unwrap();
        let split = source.header().unwrap();
        assert_eq!((split.files.len(), &split.config), (3, &one.config));
        for (id, t) in &split.tensors {
            let mut bytes = vec![0; t.bytes as usize];
            source.read(t.file, t.offset..t.offset + t.bytes, &mut bytes).unwrap();
            let other = &one.tensors[id];
            assert_eq!(bytes, whole_file[other.offset as usize..][..other.bytes as usize], "{}", t.name);
        }
        assert!(source.card().unwrap().file(plan::card::GGUF_HEADER).is_some());
    }
    let refused = || {
        Source::open(&folder.path().display().to_string(), SourceOptions::default()).and_then(|s| s.header()).map_err(|e| format!("{e:?}"))
    };
    write(4, header.tensors.len() as u64);
    assert!(refused().is_err_and(|e| e.contains("split.count") && e.contains("00001-of-00003")));
    write(3, 99);
    assert!(refused().is_err_and(|e| e.contains("split.tensors.count")));
    fs::remove_file(folder.path().join("m-00002-of-00003.gguf")).unwrap();
    assert!(refused().is_err_and(|e| e.contains("m-00002-of-00003.gguf")));
}

#[test]
fn ranges_are_read_without_a_download() {
    let server = Server::start(vec![("/m.gguf", gguf())], Behaviour { ranges: true, ..Behaviour::default() });
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(&format!("{}/m.gguf", server.url), options(dir.path())).unwrap();
    let header = source.header().unwrap();
    let tensor = header.tensors.values().nth(2).unwrap();
    let range = tensor.offset..tensor.offset + 100;
    let mut bytes = vec![0; 100];
    source.read(0, range.clone(), &mut bytes).unwrap();
    assert_eq!(bytes, gguf()[range.start as usize..range.end as usize]);
    assert!(server.ranges.lock().unwrap().contains(&format!("bytes={}-{}", range.start, range.end - 1)));
    assert!(!dir.path().join("blobs").exists());
    assert!(source.card().unwrap().file(plan::card::GGUF_HEADER).is_some());
}

#[test]
fn server_without_ranges_is_downloaded_once() {
    let server = Server::start(vec![("/m.gguf", gguf())], Behaviour::default());
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("{}/m.gguf", server.url);
    assert_eq!(whole(&Source::open(&uri, options(dir.path())).unwrap()), gguf());
    let before = server.requests();
    assert_eq!(whole(&Source::open(&uri, options(dir.path())).unwrap()), gguf());
    assert_eq!(server.requests(), before + 1, "one probe, no second download");
    let error = Source::open(&uri, SourceOptions { cache: None, ..options(dir.path()) }).unwrap_err();
    assert!(matches!(error, SourceError::NoCache { .. }), "{error}");
}

#[test]
fn pinned_file_is_checked_and_then_never_asked_for_again() {
    let server = Server::start(vec![("/m.gguf", gguf())], Behaviour { ranges: true, ..Behaviour::default() });
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("{}/m.gguf", server.url);
    let pinned = SourceOptions { digest: Some(digest(&gguf())), ..options(dir.path()) };
    assert_eq!(whole(&Source::open(&uri, pinned.clone()).unwrap()), gguf());
    let before = server.requests();
    let source = Source::open(&uri, pinned.clone()).unwrap();
    assert!(source.local_path(0).is_some());
    assert_eq!(source.files()[0].name, "m.gguf");
    assert_eq!(server.requests(), before);
    // A hub that does not exist is not contacted either.
    let hub = SourceOptions { hub: "http://127.0.0.1:1".into(), ..pinned };
    assert!(Source::open("hf://o/r@main/m.gguf", hub).is_ok());
}

#[test]
fn wrong_digest_names_both_and_leaves_nothing() {
    let server = Server::start(vec![("/m.gguf", gguf())], Behaviour { ranges: true, ..Behaviour::default() });
    let dir = tempfile::tempdir().unwrap();
    let wrong = digest(b"something else");
    let pinned = SourceOptions { digest: Some(wrong.clone()), ..options(dir.path()) };
    let error = Source::open(&format!("{}/m.gguf", server.url), pinned.clone()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&wrong) && text.contains(&digest(&gguf())), "{text}");
    assert_eq!(error.reason(), "DigestMismatch");
    assert_eq!(fs::read_dir(dir.path().join("partial")).unwrap().count(), 0);
    assert!(!dir.path().join("blobs").exists());
    let local = dir.path().join("m.gguf");
    fs::write(&local, gguf()).unwrap();
    for options in [pinned.clone(), SourceOptions { cache: None, ..pinned.clone() }] {
        assert!(matches!(Source::open(local.to_str().unwrap(), options), Err(SourceError::DigestMismatch { .. })));
    }
    let right = SourceOptions { digest: Some(digest(&gguf())), ..pinned };
    assert!(Source::open(local.to_str().unwrap(), right.clone()).is_ok());
    assert!(Source::open(local.to_str().unwrap(), right).is_ok(), "the second time without hashing");
}

#[test]
fn lost_connections_are_resumed() {
    let behaviour = Behaviour { ranges: true, cut: Some((1000, 6)), ..Behaviour::default() };
    let server = Server::start(vec![("/m.gguf", gguf())], behaviour);
    let dir = tempfile::tempdir().unwrap();
    let pinned = SourceOptions { digest: Some(digest(&gguf())), ..options(dir.path()) };
    assert_eq!(whole(&Source::open(&format!("{}/m.gguf", server.url), pinned).unwrap()), gguf());
    let ranges = server.ranges.lock().unwrap();
    assert!(ranges.contains(&"bytes=1000-".to_owned()) && ranges.contains(&"bytes=2000-".to_owned()), "{ranges:?}");
}

#[test]
fn partial_file_of_an_earlier_run_is_resumed() {
    let server = Server::start(vec![("/m.gguf", gguf())], Behaviour { ranges: true, ..Behaviour::default() });
    let dir = tempfile::tempdir().unwrap();
    let expected: Digest = digest(&gguf()).parse().unwrap();
    fs::create_dir_all(dir.path().join("partial")).unwrap();
    fs::write(dir.path().join("partial").join(expected.hex()), &gguf()[..3000]).unwrap();
    let pinned = SourceOptions { digest: Some(expected.to_string()), ..options(dir.path()) };
    assert_eq!(whole(&Source::open(&format!("{}/m.gguf", server.url), pinned).unwrap()), gguf());
    assert!(server.ranges.lock().unwrap().contains(&"bytes=3000-".to_owned()));
    assert_eq!(Cache::new(dir.path()).blob(&expected), Some(dir.path().join("blobs/sha256").join(expected.hex())));
}

#[test]
fn server_that_never_finishes_is_given_up() {
    let behaviour = Behaviour { ranges: true, cut: Some((0, usize::MAX)), ..Behaviour::default() };
    let server = Server::start(vec![("/m.gguf", gguf())], behaviour);
    let dir = tempfile::tempdir().unwrap();
    let pinned = SourceOptions { digest: Some(digest(&gguf())), retries: 2, ..options(dir.path()) };
    let error = Source::open(&format!("{}/m.gguf", server.url), pinned).unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { attempts: 3, .. }), "{error:?}");
}

#[test]
fn busy_server_is_asked_again_and_missing_file_is_not() {
    let behaviour = Behaviour { ranges: true, busy: 3, ..Behaviour::default() };
    let server = Server::start(vec![("/m.gguf", gguf())], behaviour);
    let dir = tempfile::tempdir().unwrap();
    assert!(Source::open(&format!("{}/m.gguf", server.url), options(dir.path())).is_ok());
    let before = server.requests();
    let error = Source::open(&format!("{}/other.gguf", server.url), options(dir.path())).unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }) && error.to_string().contains("other.gguf"), "{error}");
    assert_eq!(server.requests(), before + 1);
    let gone = SourceOptions { retries: 1, ..options(dir.path()) };
    let error = Source::open("http://127.0.0.1:1/m.gguf", gone).unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { attempts: 2, .. }), "{error:?}");
}

#[test]
fn hub_repository_by_file_and_by_folder() {
    let oid = digest(&gguf()).trim_start_matches("sha256:").to_owned();
    let listing = format!(
        r#"[{{"type":"file","path":"README.md","size":1}},{{"type":"directory","path":"d","size":0}},
           {{"type":"file","path":"m.gguf","size":{},"lfs":{{"oid":"{oid}","size":{}}}}}]"#,
        gguf().len(),
        gguf().len()
    );
    let files = vec![("/api/models/o/r/tree/main", listing.into_bytes()), ("/o/r/resolve/main/m.gguf", gguf())];
    let behaviour = Behaviour { ranges: true, token: Some("secret".into()), redirect: Some("/cdn".into()), ..Behaviour::default() };
    let server = Server::start(files, behaviour);
    let dir = tempfile::tempdir().unwrap();
    let with = |token: Option<&str>| SourceOptions { hub: server.url.clone(), token: token.map(str::to_owned), ..options(dir.path()) };
    let error = Source::open("hf://o/r", with(None)).unwrap_err();
    assert_eq!(error.reason(), "Unauthorized");
    let ranges_only = SourceOptions { keep: Keep::Nothing, ..with(Some("secret")) };
    assert!(Source::open("hf://o/r", ranges_only).unwrap().local_path(0).is_none());
    for uri in ["hf://o/r", "hf://o/r@main/m.gguf"] {
        let source = Source::open(uri, with(Some("secret"))).unwrap();
        assert_eq!(whole(&source), gguf());
        assert_eq!(source.local_path(0).and_then(Path::file_name).and_then(|n| n.to_str()), Some(oid.as_str()));
    }
    let wrong = SourceOptions { digest: Some(digest(b"x")), ..with(Some("secret")) };
    assert!(matches!(Source::open("hf://o/r@main/m.gguf", wrong), Err(SourceError::DigestMismatch { .. })));
}

#[test]
fn damaged_and_absent_models_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    fs::write(&path, &gguf()[..200]).unwrap();
    let error = Source::open(path.to_str().unwrap(), SourceOptions::default()).unwrap().header().unwrap_err();
    assert!(error.to_string().contains("m.gguf"), "{error}");
    let missing = dir.path().join("none.gguf");
    let error = Source::open(missing.to_str().unwrap(), SourceOptions::default()).unwrap_err();
    assert!(error.to_string().contains("none.gguf") && error.reason() == "NotFound", "{error}");
    fs::create_dir(dir.path().join("empty")).unwrap();
    let error = Source::open(dir.path().join("empty").to_str().unwrap(), SourceOptions::default()).unwrap_err();
    assert!(matches!(error, SourceError::NoModel { .. }), "{error}");
    let bad = SourceOptions { digest: Some("sha256:xyz".into()), ..SourceOptions::default() };
    assert!(matches!(Source::open("m", bad), Err(SourceError::Digest { .. })));
}
