//! Models on a server: each rank fetches its own bytes only, and what was fetched once is not fetched again.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use e2e::{
    files,
    mirror::Mirror,
    program::{self, json},
    server::logged,
};
use plan::planner::{self, Capacity, Spec};
use serde_json::Value;
use source::{Keep, Source, SourceOptions};
use tempfile::TempDir;

/// `eval logits` of the model at `uri` with a cache of its own; its result, and what each worker said when it had loaded.
fn run(uri: &str, cache: &Path, place: &[&str]) -> (Value, Vec<Value>) {
    let cache = cache.to_string_lossy();
    let args = ["--cache", &cache, "--log-format", "json", "-v", "eval", "logits", uri, "--input-ids", "2,3,4", "--json"];
    let done = program::run(&[&args, place].concat());
    assert!(done.status.success(), "{}", done.stderr);
    (serde_json::from_str(&done.stdout).expect("JSON"), logged(&done.stderr, "shard loaded"))
}

fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no {field} in {value}"))
}

/// Bytes of weights that were sent; shorter ranges only ask whether there is a file, and what its first bytes are.
fn sent(mirror: &Mirror) -> u64 {
    mirror.sent().iter().map(|range| range.end - range.start).filter(|bytes| *bytes > 4).sum()
}

/// A model as it lies here, the folder that a server has, the file in it, and how it is split into stages and ranks.
type Served = (PathBuf, PathBuf, &'static str, (usize, usize));

/// Models, and what keeps their folder.
fn models() -> (TempDir, Vec<Served>) {
    let (reference, folder) = (files::reference(), tempfile::tempdir().expect("a temporary folder"));
    symlink(&reference, folder.path().join("gemma.gguf")).expect("a link");
    let fixture = |name: &str, place| (files::fixture(name), files::fixture(name), "", place);
    let served = folder.path().to_owned();
    let models =
        vec![fixture("llama", (2, 2)), fixture("qwen3-moe", (1, 2)), fixture("gpt2", (2, 2)), (reference, served, "gemma.gguf", (2, 2))];
    (folder, models)
}

/// Ranks with caches of their own, as on a cluster: what is sent is the tensors plus what the plan says several ranks hold.
#[test]
fn each_rank_fetches_its_own_bytes_only() {
    let (_folder, models) = models();
    // GPT-2 stores its matrices by columns: so many ranges are joined, and with them what lies between.
    let row_by_row = models.into_iter().filter(|(local, ..)| !local.ends_with("gpt2"));
    for (local, served, file, (pipeline, tensor)) in row_by_row {
        let mirror = Mirror::start(&served);
        let uri = format!("{}{file}", mirror.url);
        let header = Source::open(&local.to_string_lossy(), SourceOptions::default()).and_then(|s| s.header()).expect("a header");
        let spec = Spec { pipeline, tensor, ..Spec::default() };
        let plan = planner::plan(&spec, &header, &Capacity { memory_bytes: None }).expect("a plan");
        for shard in plan.stages.iter().flat_map(|stage| &stage.shards) {
            let cache = tempfile::tempdir().expect("a temporary folder");
            let before = sent(&mirror);
            let options = SourceOptions { keep: Keep::Parts, cache: Some(cache.path().to_owned()), ..SourceOptions::default() };
            let source = Source::open(&uri, options).expect("the model");
            source.fetch(shard.ranges(), &|_, _| true).expect("its bytes");
            let name = format!("{uri}, stage {} rank {}", shard.stage, shard.rank);
            assert_eq!(sent(&mirror) - before, shard.bytes_to_load(), "{name}");
            assert!(shard.bytes_to_load() < plan.tensor_bytes, "{name} has the whole");
        }
        let (tensors, shared) = (plan.tensor_bytes, plan.shared_bytes);
        assert_eq!(sent(&mirror), tensors + shared, "{uri}: {tensors} bytes of tensors, {shared} of them held more than once");
        println!("{}: {tensors} bytes of tensors, {shared} held by several of {} ranks", local.display(), pipeline * tensor);
    }
}

/// Worker processes that share a cache: each byte is sent once, the bits are those of local files, and another split finds everything.
#[test]
fn processes_with_one_cache_fetch_each_byte_once() {
    let (_folder, models) = models();
    for (local, served, file, (pipeline, tensor)) in models {
        let (mirror, cache) = (Mirror::start(&served), tempfile::tempdir().expect("a temporary folder"));
        let (uri, local) = (format!("{}{file}", mirror.url), local.to_string_lossy());
        let (pp, tp) = (pipeline.to_string(), tensor.to_string());
        let place = ["--pp", &pp, "--tp", &tp];
        let plan = json(&[&["plan", &local, "--json"][..], &place].concat());
        let (result, loaded) = run(&uri, cache.path(), &place);
        assert_eq!(sent(&mirror), number(&plan, "tensor_bytes"), "{local}");
        let fetched: u64 = loaded.iter().map(|l| number(l, "fetched_bytes")).sum();
        assert!((sent(&mirror)..=sent(&mirror) + 16).contains(&fetched), "{local}: {loaded:?}");
        assert_eq!(result, run(&local, cache.path(), &[]).0, "{local}: another source, other bits");
        let before = sent(&mirror);
        let (again, _) = run(&uri, cache.path(), &["--pp", "2"]);
        assert_eq!((sent(&mirror), again), (before, result));
    }
}

/// A file that became another one on its server is fetched anew, whatever is in the cache.
#[test]
fn another_version_of_a_file_is_not_mixed_with_the_one_before() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    files::copy_fixture("llama-pt", folder.path());
    let mirror = Mirror::start(folder.path());
    let cache = tempfile::tempdir().expect("a temporary folder");
    let uri = format!("{}model.pt", mirror.url);
    let (before, _) = run(&uri, cache.path(), &["--pp", "2"]);
    let path = folder.path().join("model.pt");
    let mut bytes = fs::read(&path).expect("a file");
    // Numbers change, and the length, by which this server tells versions apart: a comment at the archive's end.
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].iter_mut().for_each(|b| *b ^= 1);
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&3_u16.to_le_bytes());
    bytes.extend(b"new");
    fs::write(&path, bytes).expect("a writable file");
    let (after, loaded) = run(&uri, cache.path(), &["--pp", "2"]);
    assert_ne!(before, after);
    assert!(loaded.iter().all(|l| number(l, "fetched_bytes") > 1000), "{loaded:?}");
}

/// A runner and its workers read a bucket with the keys of the Secret that the manifest names, and with no others.
#[test]
fn workers_sign_with_the_keys_of_the_manifest() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::create_dir_all(folder.path().join("bucket/models/tiny")).expect("a writable folder");
    files::copy_fixture("llama", &folder.path().join("bucket/models/tiny"));
    let (mirror, cache) = (Mirror::start(folder.path()), folder.path().join("cache"));
    let manifest = folder.path().join("m.yaml");
    let text = format!(
        "apiVersion: skein.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: tiny}}\nspec:\n  model: {{uri: s3://bucket/models/tiny, \
         credentialsSecretRef: {{name: store}}}}\n  parallelism: {{pipeline: 2}}\n---\napiVersion: v1\nkind: Secret\nmetadata: {{name: store}}\n\
         stringData: {{AWS_ACCESS_KEY_ID: of-the-manifest, AWS_SECRET_ACCESS_KEY: hidden, AWS_ENDPOINT_URL: '{}'}}\n",
        mirror.url
    );
    fs::write(&manifest, text).expect("a writable folder");
    let answer = ["abc", "--raw", "--quiet", "--json", "--max-tokens", "8", "--temperature", "0"];
    let mut run = Command::new(program::skein());
    run.stdin(Stdio::null()).env("AWS_ACCESS_KEY_ID", "of-the-environment").env("AWS_SECRET_ACCESS_KEY", "another");
    run.args(["--cache", &cache.to_string_lossy(), "run", "--file", &manifest.to_string_lossy()]).args(answer);
    let done = program::finish(program::start(&mut run), program::LIMIT);
    assert!(done.status.success(), "{}", done.stderr);
    let text = |stdout: &str| serde_json::from_str::<Value>(stdout).expect("JSON")["text"].clone();
    let local = files::fixture("llama");
    let here = program::run(&[&["run", &local.to_string_lossy()], &answer[..]].concat());
    assert_eq!(text(&done.stdout), text(&here.stdout));
    let signers = mirror.signers();
    assert!(signers.len() > 8 && signers.iter().all(|s| s.as_deref() == Some("of-the-manifest")), "{signers:?}");
    assert!(!done.stderr.contains("hidden") && !done.stdout.contains("hidden"));
}
