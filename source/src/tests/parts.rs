//! Files kept in part: what is fetched, how often, and what is left when a process ends.

use std::sync::atomic::{AtomicBool, AtomicU64};

use super::*;
use crate::{Credentials, Keep};

fn ranges() -> Behaviour {
    Behaviour { ranges: true, ..Behaviour::default() }
}

fn parts(cache: &Path) -> SourceOptions {
    SourceOptions { keep: Keep::Parts, ..options(cache) }
}

fn start(behaviour: Behaviour) -> (Server, String, tempfile::TempDir) {
    let server = Server::start(vec![("/m.gguf", gguf())], behaviour);
    let uri = format!("{}/m.gguf", server.url);
    (server, uri, tempfile::tempdir().unwrap())
}

/// Requests for bytes of the file since `from`, but for probes.
fn bodies(server: &Server, from: usize) -> Vec<String> {
    server.ranges.lock().unwrap()[from..].iter().filter(|r| r.as_str() != "bytes=0-0").cloned().collect()
}

fn fetch(source: &Source, ranges: &[Range<u64>]) -> Result<(), SourceError> {
    source.fetch(ranges.iter().map(|r| (0, r.clone())), &|_, _| true)
}

/// Asserts that `source` has these bytes of the file.
fn has(source: &Source, range: Range<u64>) {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    source.read(0, range.clone(), &mut bytes).unwrap();
    assert_eq!(bytes, gguf()[range.start as usize..range.end as usize], "{range:?}");
}

use std::ops::Range;

#[test]
fn only_what_is_asked_for_is_fetched_and_kept() {
    let (server, uri, dir) = start(ranges());
    let source = Source::open(&uri, parts(dir.path())).unwrap();
    let (before, told) = (server.ranges.lock().unwrap().len(), Mutex::new(Vec::new()));
    // The last two are a gap of 100 bytes apart, which is less than a request is worth.
    let wanted = [2000..2100, 2100..3000, 5000..5100, 5200..5300];
    source
        .fetch(wanted.iter().map(|r| (0, r.clone())), &|done, total| {
            told.lock().unwrap().push((done, total));
            true
        })
        .unwrap();
    let mut asked = bodies(&server, before);
    asked.sort();
    assert_eq!(asked, ["bytes=2000-2999", "bytes=5000-5299"]);
    assert_eq!(source.bytes_fetched(), 4 + 1000 + 300, "the first four bytes tell the format");
    let told = told.into_inner().unwrap();
    assert_eq!((told.first(), told.iter().max()), (Some(&(0, 1300)), Some(&(1300, 1300))));
    wanted.into_iter().for_each(|range| has(&source, range));
    // What was not asked for is fetched when it is read.
    has(&source, 2990..3010);
    assert_eq!(bodies(&server, before)[2..], ["bytes=3000-3009"]);
    // Another process finds all of it.
    let before = server.ranges.lock().unwrap().len();
    let again = Source::open(&uri, parts(dir.path())).unwrap();
    fetch(&again, &[2000..3010, 5000..5300]).unwrap();
    has(&again, 2000..3010);
    assert_eq!((bodies(&server, before), again.bytes_fetched()), (vec![], 0));
    assert!(again.local_path(0).is_none() && !dir.path().join("blobs").exists());
}

#[test]
fn very_many_ranges_become_few_requests() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(vec![("/m.gguf", [gguf(), vec![7; 4 << 20]].concat())], ranges());
    let source = Source::open(&format!("{}/m.gguf", server.url), parts(dir.path())).unwrap();
    let before = server.ranges.lock().unwrap().len();
    let columns = |count: u64| (0..count).map(|i| 20_000 + i * 2000..20_000 + i * 2000 + 100).collect::<Vec<_>>();
    fetch(&source, &columns(20)).unwrap();
    assert_eq!(bodies(&server, before).len(), 20);
    let before = server.ranges.lock().unwrap().len();
    fetch(&source, &columns(1500)).unwrap();
    let asked = bodies(&server, before);
    assert!(asked.len() <= 21, "{} requests", asked.len());
}

#[test]
fn the_model_is_that_of_the_whole_file() {
    let (server, uri, dir) = start(ranges());
    let source = Source::open(&uri, parts(dir.path())).unwrap();
    let header = source.header().unwrap();
    let local = dir.path().join("m.gguf");
    fs::write(&local, gguf()).unwrap();
    let other = Source::open(local.to_str().unwrap(), SourceOptions::default()).unwrap();
    assert_eq!((header, source.card().unwrap()), (other.header().unwrap(), other.card().unwrap()));
    assert_eq!(whole(&source), gguf());
    assert_eq!(source.bytes_fetched(), gguf().len() as u64, "each byte once");
    drop(server);
}

#[test]
fn a_fetch_that_is_stopped_goes_on_from_there() {
    let (server, uri, dir) = start(ranges());
    let source = Source::open(&uri, parts(dir.path())).unwrap();
    let stop = AtomicBool::new(false);
    let error = source.fetch([(0, 1000..2000), (0, 5000..9000)], &|done, _| {
        // After the first of two requests.
        !stop.swap(done >= 1000, Ordering::Relaxed)
    });
    assert!(matches!(error, Err(SourceError::Stopped { .. })), "{error:?}");
    drop(source);
    let before = server.ranges.lock().unwrap().len();
    let again = Source::open(&uri, parts(dir.path())).unwrap();
    fetch(&again, &[1000..2000, 5000..9000]).unwrap();
    has(&again, 1000..2000);
    has(&again, 5000..9000);
    assert!(bodies(&server, before).len() <= 2);
}

#[test]
fn lines_of_the_journal_that_were_cut_off_count_for_less() {
    let (server, uri, dir) = start(ranges());
    let source = Source::open(&uri, parts(dir.path())).unwrap();
    fetch(&source, &[1000..2000, 5000..6000]).unwrap();
    drop(source);
    let folder = dir.path().join("parts");
    let journal = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).find(|p| p.extension().is_some()).unwrap();
    let text = fs::read_to_string(&journal).unwrap();
    let noted: Vec<&str> = text.lines().filter(|l| !l.is_empty()).collect();
    assert!(noted.contains(&"1000 2000") && noted.contains(&"5000 6000"), "{noted:?}");
    // The process ended while it wrote its last line, and the disk has what it has: the file beside it is as it was.
    let junk = "\n0 4\n\n1000 2000\nnonsense\n9 3\n0 99999999\n5000 60";
    fs::write(&journal, junk).unwrap();
    let before = server.ranges.lock().unwrap().len();
    let again = Source::open(&uri, parts(dir.path())).unwrap();
    fetch(&again, &[1000..2000, 5000..6000]).unwrap();
    assert_eq!(bodies(&server, before), ["bytes=5000-5999"]);
    // A file that went away takes its journal along.
    let data = journal.with_extension("");
    fs::remove_file(&data).unwrap();
    let before = server.ranges.lock().unwrap().len();
    let again = Source::open(&uri, parts(dir.path())).unwrap();
    has(&again, 1000..2000);
    assert_eq!(bodies(&server, before), ["bytes=0-3", "bytes=1000-1999"]);
    // One of another length is not taken for it.
    fs::write(&data, b"short").unwrap();
    let error = Source::open(&uri, parts(dir.path())).unwrap_err();
    assert!(matches!(&error, SourceError::Protocol { expected, .. } if expected.contains("the 5 bytes that")), "{error}");
}

#[test]
fn several_processes_bring_each_byte_once() {
    let (server, uri, dir) = start(ranges());
    let before = {
        fetch(&Source::open(&uri, parts(dir.path())).unwrap(), &[]).unwrap();
        server.ranges.lock().unwrap().len()
    };
    std::thread::scope(|scope| {
        for first in [1000, 1500, 2000, 1000] {
            let (uri, dir) = (&uri, &dir);
            scope.spawn(move || {
                let source = Source::open(uri, parts(dir.path())).unwrap();
                fetch(&source, &[first..first + 2000]).unwrap();
                has(&source, first..first + 2000);
            });
        }
    });
    let bytes = |r: &String| {
        let (from, to) = r.strip_prefix("bytes=").and_then(|r| r.split_once('-')).unwrap();
        to.parse::<u64>().unwrap() + 1 - from.parse::<u64>().unwrap()
    };
    assert_eq!(bodies(&server, before).iter().map(bytes).sum::<u64>(), 3000);
}

#[test]
fn a_lost_connection_is_taken_up_where_it_broke() {
    let (server, uri, dir) = start(Behaviour { cut: Some((1000, 8)), ..ranges() });
    let source = Source::open(&uri, parts(dir.path())).unwrap();
    fetch(&source, &[2000..4500]).unwrap();
    has(&source, 2000..4500);
    let asked = bodies(&server, 0);
    assert!(asked.contains(&"bytes=3000-4499".to_owned()) && asked.contains(&"bytes=4000-4499".to_owned()), "{asked:?}");
    let (_server, uri, dir) = start(Behaviour { cut: Some((0, usize::MAX)), ..ranges() });
    let error = Source::open(&uri, SourceOptions { retries: 2, ..parts(dir.path()) }).unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { attempts: 3, .. }), "{error:?}");
}

#[test]
fn a_file_that_changes_is_refused_and_its_parts_are_not_mixed() {
    let (_server, uri, dir) = start(Behaviour { changing: true, ..ranges() });
    let error = Source::open(&uri, parts(dir.path())).unwrap_err();
    assert!(matches!(error, SourceError::Changed { .. }), "{error}");
    // Without a mark nothing is found again: it may be another file by then.
    let (server, uri, dir) = start(Behaviour { unmarked: true, ..ranges() });
    for _ in 0..2 {
        let before = server.ranges.lock().unwrap().len();
        let source = Source::open(&uri, parts(dir.path())).unwrap();
        fetch(&source, &[1000..2000]).unwrap();
        has(&source, 1000..2000);
        assert_eq!(bodies(&server, before), ["bytes=0-3", "bytes=1000-1999"]);
    }
    assert_eq!(fs::read_dir(dir.path().join("parts")).unwrap().count(), 0, "nothing is left");
}

#[test]
fn a_pinned_file_is_kept_in_part_only_where_its_source_says_the_digest() {
    let right = digest(&gguf());
    let pinned = |cache: &Path, digest: &str| SourceOptions { digest: Some(digest.to_owned()), ..parts(cache) };
    // The server's tag is something else: the file is fetched whole, and hashed.
    let (server, uri, dir) = start(ranges());
    let source = Source::open(&uri, pinned(dir.path(), &right)).unwrap();
    assert!(source.local_path(0).is_some() && server.ranges.lock().unwrap().contains(&String::new()), "the whole");
    let wrong = digest(b"another file");
    let dir = tempfile::tempdir().unwrap();
    let error = Source::open(&uri, pinned(dir.path(), &wrong)).unwrap_err();
    assert!(matches!(error, SourceError::DigestMismatch { .. }), "{error}");
    // Its tag is the digest, as hubs have it.
    let (server, uri, dir) = start(Behaviour { tag: right.trim_start_matches("sha256:").to_owned(), ..ranges() });
    let source = Source::open(&uri, pinned(dir.path(), &right)).unwrap();
    assert!(source.local_path(0).is_none());
    fetch(&source, &[1000..2000]).unwrap();
    // From then on the server is asked for what is missing alone.
    let requests = server.requests();
    let again = Source::open(&uri, pinned(dir.path(), &right)).unwrap();
    fetch(&again, &[1000..2000]).unwrap();
    has(&again, 1000..2000);
    assert_eq!(server.requests(), requests);
    fetch(&again, &[1000..2100]).unwrap();
    has(&again, 1000..2100);
    assert_eq!(server.requests(), requests + 2, "a probe and a range");
    let error = Source::open(&uri, pinned(dir.path(), &wrong)).unwrap_err();
    assert!(matches!(error, SourceError::DigestMismatch { .. }), "{error}");
}

#[test]
fn the_hub_says_which_digest_a_file_has() {
    let oid = digest(&gguf()).trim_start_matches("sha256:").to_owned();
    let listing = format!(r#"[{{"type":"file","path":"m.gguf","size":1,"lfs":{{"oid":"{oid}","size":1}}}}]"#);
    let files = vec![("/api/models/o/r/tree/main", listing.into_bytes()), ("/o/r/resolve/main/m.gguf", gguf())];
    let server = Server::start(files, ranges());
    let dir = tempfile::tempdir().unwrap();
    let with = |digest: Option<String>| SourceOptions { hub: server.url.clone(), digest, ..parts(dir.path()) };
    let error = Source::open("hf://o/r/m.gguf", with(Some(digest(b"x")))).unwrap_err();
    assert!(matches!(error, SourceError::DigestMismatch { .. }), "{error}");
    let source = Source::open("hf://o/r/m.gguf", with(Some(digest(&gguf())))).unwrap();
    fetch(&source, &[1000..2000]).unwrap();
    assert_eq!(fs::read_dir(dir.path().join("parts")).unwrap().count(), 2);
    // It is the same file under any name, and pinned or not.
    let before = server.ranges.lock().unwrap().len();
    has(&Source::open("hf://o/r", with(None)).unwrap(), 1000..2000);
    assert_eq!(bodies(&server, before), vec![String::new()], "the listing");
}

#[test]
fn a_server_without_ranges_sends_the_whole() {
    let (_server, uri, dir) = start(Behaviour::default());
    let source = Source::open(&uri, parts(dir.path())).unwrap();
    assert!(source.local_path(0).is_some());
    let told = AtomicU64::new(0);
    source.fetch([(0, 0..100)], &|_, _| told.fetch_add(1, Ordering::Relaxed) == 0).unwrap();
    assert_eq!(told.into_inner(), 0, "there is nothing to fetch");
}

#[test]
fn a_disk_that_is_full_is_said_with_what_is_needed() {
    let (_server, uri, dir) = start(ranges());
    drop(Source::open(&uri, parts(dir.path())).unwrap());
    let folder = dir.path().join("parts");
    let data = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).find(|p| p.extension().is_none()).unwrap();
    // A file system with no room at all: every write to this device fails so.
    let place = crate::parts::Parts::on_full_disk(&data, gguf().len() as u64, &uri);
    let error = place.read(&(1000..2000), &mut [0; 1000]).unwrap_err();
    assert_eq!(error.reason(), "InsufficientDisk");
    assert!(error.to_string().contains("1000 more bytes"), "{error}");
}

#[test]
fn small_files_are_fetched_when_they_are_asked_for() {
    let server = Server::start(hostile::safetensors(), ranges());
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("{}/model.safetensors", server.url);
    let source = Source::open(&uri, parts(dir.path())).unwrap();
    let before = server.requests();
    fetch(&source, &[4000..5000]).unwrap();
    assert_eq!(server.requests(), before + 1, "a range of weights, and nothing else");
    let card = source.card().unwrap();
    assert_eq!(card.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["1_Pooling/config.json", "config.json", "tokenizer.json"]);
    // Whoever needs the header alone leaves the tokenizer where it is.
    let before = server.requests();
    let source = Source::open(&uri, SourceOptions { keep: Keep::Nothing, ..options(dir.path()) }).unwrap();
    source.raw_header().unwrap();
    assert_eq!(server.requests(), before + 4, "a probe, the first bytes, the configuration, the header");
}

#[test]
fn turned_tensors_of_a_pytorch_file_are_fetched_by_what_they_cover() {
    let file = |name: &str| fs::read(fixture("llama-pt").join(name)).unwrap();
    let server = Server::start(vec![("/model.pt", file("model.pt")), ("/config.json", file("config.json"))], ranges());
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(&format!("{}/model.pt", server.url), parts(dir.path())).unwrap();
    let header = source.header().unwrap();
    let all = header.tensors.values().map(|t| (t.file, t.offset..t.offset + t.bytes));
    source.fetch(all, &|_, _| true).unwrap();
    let before = server.requests();
    let other = Source::open(&fixture("llama-pt").display().to_string(), SourceOptions::default()).unwrap();
    for t in header.tensors.values() {
        let mut bytes = [vec![0; t.bytes as usize], vec![0; t.bytes as usize]];
        source.read(t.file, t.offset..t.offset + t.bytes, &mut bytes[0]).unwrap();
        other.read(t.file, t.offset..t.offset + t.bytes, &mut bytes[1]).unwrap();
        assert!(bytes[0] == bytes[1], "{}", t.name);
    }
    assert_eq!(server.requests(), before, "everything was here");
}

#[test]
fn credentials_are_shown_to_the_server_that_is_named_and_no_other() {
    let shown = Credentials::authorization("Basic c2VjcmV0").unwrap();
    let (server, uri, dir) = start(Behaviour { authorization: Some("Basic c2VjcmV0".into()), ..ranges() });
    let with = |credentials: Option<Credentials>| SourceOptions { credentials, token: Some("of the hub".into()), ..parts(dir.path()) };
    for wrong in [None, Some(Credentials::bearer("other").unwrap())] {
        let error = Source::open(&uri, with(wrong)).unwrap_err();
        assert!(matches!(error, SourceError::Unauthorized { status: 403, .. }) && error.reason() == "Unauthorized", "{error}");
        assert!(error.to_string().contains("credentials may be missing"), "{error}");
    }
    let source = Source::open(&uri, with(Some(shown.clone()))).unwrap();
    fetch(&source, &[1000..2000]).unwrap();
    has(&source, 1000..2000);
    // A server that sends its clients elsewhere does not take the credentials along.
    let other = Server::start(vec![("/m.gguf", gguf())], Behaviour { authorization: Some("Basic c2VjcmV0".into()), ..ranges() });
    let away = Server::start(vec![], Behaviour { redirect: Some(other.url.replace("127.0.0.1", "localhost")), ..ranges() });
    let error = Source::open(&format!("{}/m.gguf", away.url), with(Some(shown))).unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { status: 403, .. }), "{error}");
    assert!(server.requests() > 3);
}
