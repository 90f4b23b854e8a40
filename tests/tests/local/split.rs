//! Stages and ranks as processes give the bits of one process, and each reads its own bytes only.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use e2e::{
    files,
    models::write_llama,
    process::Pid,
    program::{self, floats, id_list, ids, json},
    server::logged,
};
use plan::dtype::DType;

/// What `eval logits` computed, as bits.
#[derive(PartialEq, Eq)]
struct Bits {
    last_logits: Vec<u32>,
    losses: Vec<u32>,
    greedy: Vec<u32>,
}

/// Runs `eval logits` with `more` arguments.
fn bits(model: &Path, input: &[u32], more: &[&str]) -> Bits {
    let (model, input) = (model.to_string_lossy(), id_list(input));
    let mut args = vec!["eval", "logits", &model, "--input-ids", &input, "--greedy", "6", "--json"];
    args.extend(more);
    let got = json(&args);
    let raw = |field| floats(&got, field).iter().map(|x| x.to_bits()).collect();
    Bits { last_logits: raw("last_logits"), losses: raw("nll_per_token"), greedy: ids(&got, "greedy_ids") }
}

/// Asserts that `model` split in every one of `ways` gives the bits of one process, and that another input would be seen.
fn splits_exactly(model: &Path, input: &[u32], ways: &[&[&str]]) {
    let alone = bits(model, input, &[]);
    for way in ways {
        assert!(bits(model, input, way) == alone, "{} with {} differs from one process", model.display(), way.join(" "));
    }
    let mut other = input.to_vec();
    other.swap(1, 2);
    assert!(bits(model, &other, ways[0]) != alone);
}

const WAYS: [&[&str]; 5] = [&["--pp", "2"], &["--pp", "4"], &["--tp", "2"], &["--tp", "4"], &["--pp", "2", "--tp", "2"]];

#[test]
fn llama_splits_exactly() {
    let input = ids(&files::expected("llama"), "input_ids");
    splits_exactly(
        &files::fixture("llama"),
        &input,
        &[&WAYS[..], &[&["--tp", "3"], &["--tp", "2", "--collective", "tcp"], &["--tp", "2", "--collective", "unix"]]].concat(),
    );
}

#[test]
fn gemma3_splits_exactly() {
    let input = ids(&files::expected("gemma3"), "input_ids");
    splits_exactly(&files::fixture("gemma3"), &input, &[&WAYS[..], &SPREAD].concat());
}

/// Ways in which the first stage multiplies a part of the vocabulary too.
const SPREAD: [&[&str]; 3] = [
    &["--pp", "2", "--vocabulary", "spread"],
    &["--pp", "3", "--vocabulary", "spread"],
    &["--pp", "2", "--tp", "2", "--vocabulary", "spread"],
];

/// How many rows of the vocabulary the workers multiply, stage by stage.
fn products(model: &Path, way: &[&str]) -> Vec<Vec<u64>> {
    let model = model.to_string_lossy();
    let plan = json(&[&["plan", &model, "--json"][..], way].concat());
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let rows = |rank: &serde_json::Value| {
        let span: Vec<u64> = list(&rank["product"]).iter().filter_map(serde_json::Value::as_u64).collect();
        span[1] - span[0]
    };
    list(&plan["stages"]).iter().map(|stage| list(&stage["ranks"]).iter().map(rows).collect()).collect()
}

#[test]
fn a_vocabulary_spread_over_stages_splits_exactly() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for dtype in [DType::Q8_0, DType::Q4_K] {
        let model = folder.path().join(format!("{dtype:?}.gguf"));
        write_llama(&model, dtype, true).expect("a writable folder");
        for way in [SPREAD[0], SPREAD[2]] {
            let rows: Vec<u64> = products(&model, way).iter().map(|stage| stage.iter().sum()).collect();
            assert!(rows[0] > 0 && rows.iter().sum::<u64>() == 2500, "{rows:?} rows with {}", way.join(" "));
            // The larger layers of Q4_K leave the last of two stages none.
            assert!(rows[1] > 0 || dtype == DType::Q4_K, "{rows:?} rows with {}", way.join(" "));
        }
        splits_exactly(&model, &[1, 5, 9, 40, 41, 42, 7, 3, 99, 100], &SPREAD);
    }
    let refused = program::run(&["plan", &files::fixture("llama").to_string_lossy(), "--pp", "2", "--vocabulary", "spread"]);
    assert!(!refused.status.success() && refused.stderr.contains("whose embedding table is its vocabulary matrix"), "{}", refused.stderr);
}

#[test]
fn reference_model_splits_exactly() {
    let auto = WAYS.map(|way| [way, &["--vocabulary", "auto"]].concat());
    assert_eq!(products(&files::reference(), &auto[0]), [[131_072], [131_072]], "the plan gains by it");
    assert_eq!(products(&files::reference(), &auto[1]), [[131_072], [0], [0], [131_072]]);
    assert_eq!(products(&files::reference(), &auto[4]), [[65_536, 65_536], [65_536, 65_536]]);
    assert_eq!(products(&files::reference(), WAYS[0]), [[0], [262_144]], "the last stage alone, unless asked");
    let ways = [&WAYS[..], &[&auto[0], &auto[1], &auto[4]]].concat();
    splits_exactly(&files::reference(), &[2, 818, 5279, 529, 7001, 563, 506, 5279, 529], &ways);
}

/// A llama whose head and FFN borders at two ranks cut an activation block.
fn generated(dtype: DType) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("llama.gguf");
    write_llama(&path, dtype, false).expect("a writable folder");
    (folder, path)
}

#[test]
fn q8_0_llama_with_cut_blocks_splits_exactly() {
    let (_folder, model) = generated(DType::Q8_0);
    splits_exactly(&model, &[1, 5, 9, 40, 41, 42, 7, 3, 99, 100], &[&["--tp", "2"], &["--tp", "3"], &["--pp", "2", "--tp", "2"]]);
}

#[test]
fn q4_k_llama_with_cut_blocks_splits_exactly() {
    let (_folder, model) = generated(DType::Q4_K);
    splits_exactly(&model, &[1, 5, 9, 40, 41, 42, 7, 3, 99, 100], &[&["--tp", "2"], &["--tp", "3"], &["--pp", "2", "--tp", "2"]]);
}

/// The bytes that the workers read are the tensors plus what the plan says several of them hold.
#[test]
fn each_rank_reads_its_own_bytes_only() {
    let fixtures = [("llama", "2", "2"), ("gemma3", "1", "4"), ("gpt2", "2", "2"), ("qwen3-moe", "1", "2"), ("mixtral", "2", "2")];
    let fixtures = fixtures.map(|(name, pp, tp)| (files::fixture(name), pp, tp));
    for (model, pp, tp) in fixtures.into_iter().chain([(files::reference(), "2", "2")]) {
        let model = model.to_string_lossy();
        let place = ["--pp", pp, "--tp", tp];
        let plan = json(&[&["plan", &model, "--json"][..], &place].concat());
        let run = program::run(
            &[&["--log-format", "json", "-v", "eval", "logits", &model, "--input-ids", "2,3,4", "--json"][..], &place].concat(),
        );
        assert!(run.status.success(), "{}", run.stderr);
        let loaded = logged(&run.stderr, "shard loaded");
        let number = |v: &serde_json::Value, field: &str| v[field].as_u64().unwrap_or_else(|| panic!("no {field} in {v}"));
        let workers = pp.parse::<usize>().expect("a number") * tp.parse::<usize>().expect("a number");
        assert_eq!(loaded.len(), workers, "{}", run.stderr);
        let read: u64 = loaded.iter().map(|l| number(l, "read_bytes")).sum();
        let (tensors, shared) = (number(&plan, "tensor_bytes"), number(&plan, "shared_bytes"));
        assert_eq!(read, tensors + shared, "{model}: {tensors} bytes of tensors, {shared} of them held more than once");
        assert!(loaded.iter().all(|l| number(l, "read_bytes") < tensors), "one worker read the whole file: {loaded:?}");
    }
}

/// A rank that stops answering is noticed: the command ends, with an error that says so.
#[test]
fn a_stopped_rank_is_noticed_and_nothing_hangs() {
    let model = files::reference();
    // Long enough that the ranks are still at work when one of them is stopped.
    let args =
        ["eval", "logits", &model.to_string_lossy(), "--input-ids", "2,818,5279", "--greedy", "20000", "--tp", "2"].map(String::from);
    let child = program::start(Command::new(program::skein()).args(args).stdin(Stdio::null()));
    let skein = Pid(child.id());
    let workers = program::until("two workers", || Some(skein.children()).filter(|c| c.len() == 2));
    program::until("work", || workers.iter().all(|w| w.cpu_ticks() > 200).then_some(()));
    workers[1].signal("STOP");
    let done = program::finish(child, Duration::from_secs(60));
    assert!(!done.status.success());
    assert!(!done.stderr.is_empty());
    program::until("the end of the workers", || (!workers.iter().any(|w| w.lives())).then_some(()));
}
