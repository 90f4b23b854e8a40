//! Servers that lie or change, damaged parts, several processes, a machine without a network.

use std::io;

use super::*;

fn ranges() -> Behaviour {
    Behaviour { ranges: true, ..Behaviour::default() }
}

fn pinned(cache: &Path) -> SourceOptions {
    SourceOptions { digest: Some(digest(&gguf())), ..options(cache) }
}

/// Bytes of a partial download of the pinned file.
fn leave_partial(cache: &Path, bytes: &[u8]) {
    let digest: Digest = digest(&gguf()).parse().unwrap();
    fs::create_dir_all(cache.join("partial")).unwrap();
    fs::write(cache.join("partial").join(digest.hex()), bytes).unwrap();
}

#[test]
fn a_file_that_changes_while_it_is_read_is_refused() {
    let server = Server::start(vec![("/m.gguf", gguf())], Behaviour { changing: true, ..ranges() });
    let dir = tempfile::tempdir().unwrap();
    let open = |options| Source::open(&format!("{}/m.gguf", server.url), options).and_then(|s| s.header());
    for options in [options(dir.path()), pinned(dir.path())] {
        let error = open(options).unwrap_err();
        assert!(matches!(error, SourceError::Changed { .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("/m.gguf changed while it was read") && error.reason() == "DownloadFailed", "{said}");
    }
    assert!(!dir.path().join("blobs").exists());
}

#[test]
fn a_server_that_sends_too_much_is_refused_before_the_disk_is_full() {
    // Without ranges the length is the server's word; what follows it is not read.
    let honest = Server::start(vec![("/m.gguf", gguf())], Behaviour { surplus: 10, ..Behaviour::default() });
    let dir = tempfile::tempdir().unwrap();
    let error = Source::open(&format!("{}/m.gguf", honest.url), pinned(dir.path())).unwrap_err();
    assert!(matches!(error, SourceError::DigestMismatch { .. }), "{error}");
    // With ranges the length is known from the first answer, and a body without an end is cut off.
    let endless = Server::start(vec![("/m.gguf", gguf())], Behaviour { surplus: 64 << 20, unknown_length: true, ..ranges() });
    let error = Source::open(&format!("{}/m.gguf", endless.url), pinned(dir.path())).unwrap_err();
    let SourceError::Protocol { expected, got, .. } = &error else { panic!("{error}") };
    assert_eq!((expected.as_str(), got.as_str()), (&*format!("{} bytes", gguf().len()), &*format!("{} bytes", gguf().len() + 1)));
    assert_eq!(fs::read_dir(dir.path().join("partial")).unwrap().count(), 0, "nothing is left");
}

#[test]
fn a_range_that_begins_elsewhere_is_refused() {
    let server = Server::start(vec![("/m.gguf", gguf())], Behaviour { shifted: 1, ..ranges() });
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(&format!("{}/m.gguf", server.url), options(dir.path())).unwrap();
    let error = source.read(0, 10..20, &mut [0; 10]).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("status 206 for bytes 10-…") && said.contains("bytes 11-19"), "{said}");
    // A resumed download asks for a range too.
    leave_partial(dir.path(), &gguf()[..3000]);
    assert!(matches!(Source::open(&format!("{}/m.gguf", server.url), pinned(dir.path())), Err(SourceError::Protocol { .. })));
}

#[test]
fn a_damaged_partial_file_is_thrown_away_and_fetched_again() {
    let server = Server::start(vec![("/m.gguf", gguf())], ranges());
    let uri = format!("{}/m.gguf", server.url);
    for damaged in [vec![0; 3000], vec![0; gguf().len()], vec![0; gguf().len() + 7]] {
        let dir = tempfile::tempdir().unwrap();
        leave_partial(dir.path(), &damaged);
        assert_eq!(whole(&Source::open(&uri, pinned(dir.path())).unwrap()), gguf(), "{} bytes", damaged.len());
    }
    // The control: a file that is wrong itself stays refused, after one more attempt.
    let other = Server::start(vec![("/m.gguf", b"GGUF and something else".to_vec())], ranges());
    let dir = tempfile::tempdir().unwrap();
    leave_partial(dir.path(), b"GGUF");
    let error = Source::open(&format!("{}/m.gguf", other.url), pinned(dir.path())).unwrap_err();
    assert!(matches!(error, SourceError::DigestMismatch { .. }), "{error}");
}

#[test]
fn a_complete_partial_file_is_not_fetched_again() {
    let server = Server::start(vec![("/m.gguf", gguf())], ranges());
    let dir = tempfile::tempdir().unwrap();
    leave_partial(dir.path(), &gguf());
    assert_eq!(whole(&Source::open(&format!("{}/m.gguf", server.url), pinned(dir.path())).unwrap()), gguf());
    assert_eq!(server.ranges.lock().unwrap().as_slice(), ["bytes=0-0"], "the probe alone");
}

#[test]
fn several_processes_fetch_a_file_once() {
    let server = Server::start(vec![("/m.gguf", gguf())], ranges());
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("{}/m.gguf", server.url);
    // Locks belong to open files, so threads with caches of their own stand for processes.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(whole(&Source::open(&uri, pinned(dir.path())).unwrap()), gguf()));
        }
    });
    let bodies = server.ranges.lock().unwrap().iter().filter(|r| r.as_str() != "bytes=0-0").count();
    assert_eq!(bodies, 1);
    assert_eq!(fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(dir.path().join("partial")).unwrap().count(), 0);
}

#[test]
fn a_lock_of_a_process_that_died_does_not_hold_up_others() {
    let server = Server::start(vec![("/m.gguf", gguf())], ranges());
    let dir = tempfile::tempdir().unwrap();
    let digest: Digest = digest(&gguf()).parse().unwrap();
    fs::create_dir_all(dir.path().join("locks")).unwrap();
    fs::write(dir.path().join("locks").join(digest.hex()), "").unwrap();
    assert!(Source::open(&format!("{}/m.gguf", server.url), pinned(dir.path())).is_ok());
}

#[test]
fn a_full_disk_says_how_much_is_needed() {
    let full = |kind: io::ErrorKind| crate::cache::write_error(Path::new("/cache/partial/x"), 123, kind.into());
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
        let error = full(kind);
        assert_eq!(error.to_string(), "no space left for /cache/partial/x: 123 more bytes are needed");
        assert_eq!(error.reason(), "InsufficientDisk");
    }
    assert_eq!(full(io::ErrorKind::PermissionDenied).reason(), "DownloadFailed");
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let server = Server::start(vec![("/m.gguf", gguf())], ranges());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a file");
    fs::write(&file, "").unwrap();
    let error = Source::open(&format!("{}/m.gguf", server.url), pinned(&file)).unwrap_err();
    assert!(error.to_string().contains("a file"), "{error}");
}

/// One safetensors file of the tiny llama's first shard, under names of its own.
pub(super) fn safetensors() -> Vec<(&'static str, Vec<u8>)> {
    let read = |name: &str| fs::read(fixture("llama").join(name)).unwrap();
    vec![
        ("/model.safetensors", read("model-00001-of-00005.safetensors")),
        ("/config.json", read("config.json")),
        ("/tokenizer.json", read("tokenizer.json")),
        ("/1_Pooling/config.json", b"{}".to_vec()),
    ]
}

#[test]
fn a_pinned_safetensors_file_brings_its_small_files_along_and_is_never_asked_for_again() {
    let files = safetensors();
    let elsewhere = [("/other/model.safetensors", files[0].1.clone()), ("/other/config.json", b"{}".to_vec())];
    let server = Server::start(files.iter().cloned().chain(elsewhere).collect(), ranges());
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("{}/model.safetensors", server.url);
    let pinned = SourceOptions { digest: Some(digest(&files[0].1)), ..options(dir.path()) };
    let card = Source::open(&uri, pinned.clone()).unwrap().card().unwrap();
    let before = server.requests();
    let again = Source::open(&uri, pinned.clone()).unwrap();
    assert_eq!((again.card().unwrap(), server.requests()), (card.clone(), before));
    assert_eq!(card.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["1_Pooling/config.json", "config.json", "tokenizer.json"]);
    assert_eq!(whole(&again), files[0].1);
    // Another source of the same weights may have another configuration: it is asked.
    let other = Source::open(&format!("{}/other/model.safetensors", server.url), pinned).unwrap();
    assert_eq!(other.card().unwrap().file("config.json"), Some(&b"{}"[..]));
}

#[test]
fn listings_do_not_lead_elsewhere_and_are_never_cut_short_silently() {
    let listing = br#"[{"type":"file","path":"m.gguf","size":1}]"#.to_vec();
    let start = |next: &str| {
        let files = vec![("/api/models/o/r/tree/main", listing.clone()), ("/o/r/resolve/main/m.gguf", gguf())];
        Server::start(files, Behaviour { next: Some(next.to_owned()), ..ranges() })
    };
    let dir = tempfile::tempdir().unwrap();
    let evil = Server::start(vec![("/", Vec::new())], ranges());
    for next in [format!("{}/x", evil.url), "http://127.0.0.1.evil.example/".to_owned()] {
        let server = start(&next);
        let with = SourceOptions { hub: server.url.clone(), token: Some("secret".into()), ..options(dir.path()) };
        let error = Source::open("hf://o/r", with).unwrap_err();
        assert!(matches!(&error, SourceError::Protocol { got, .. } if *got == next), "{error}");
    }
    assert_eq!(evil.requests(), 0);
    // A host whose name only begins like the hub's is another host.
    let server = start("SERVER.evil.example/x");
    let with = SourceOptions { hub: server.url.clone(), ..options(dir.path()) };
    assert!(matches!(Source::open("hf://o/r", with), Err(SourceError::Protocol { got, .. }) if got.contains(".evil.example")));
    // A listing without an end is an error, not a short list.
    let server = start("SERVER/api/models/o/r/tree/main");
    let with = SourceOptions { hub: server.url.clone(), ..options(dir.path()) };
    let error = Source::open("hf://o/r", with).unwrap_err();
    assert!(matches!(&error, SourceError::Protocol { expected, .. } if expected.contains("50 pages")), "{error}");
}

#[test]
fn a_mirror_under_a_path_is_a_hub_too() {
    let listing = format!(r#"[{{"type":"file","path":"d/m.gguf","size":{}}}]"#, gguf().len());
    let files = vec![("/mirror/api/models/o/r/tree/v1/d", listing.into_bytes()), ("/mirror/o/r/resolve/v1/d/m.gguf", gguf())];
    let server = Server::start(files, ranges());
    let dir = tempfile::tempdir().unwrap();
    let with = SourceOptions { hub: format!("{}/mirror/", server.url), ..options(dir.path()) };
    assert_eq!(whole(&Source::open("hf://o/r@v1/d/m.gguf", with).unwrap()), gguf());
}
