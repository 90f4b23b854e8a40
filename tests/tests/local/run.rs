//! `skein run`: answers in a terminal, from one process and from many, and what its pipes and exit codes say.

use e2e::{
    files,
    program::{self, json, run, run_with_input},
};

const PROMPT: &str = "The capital of France is";

/// `run` of the sample manifest with `more` arguments.
fn sample<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/samples/gemma3-270m.yaml");
    [&["run", "-f", manifest, "--temperature", "0", "--max-tokens", "16"][..], more].concat()
}

#[test]
fn four_workers_answer_as_one_process_does() {
    let four = run(&sample(&[PROMPT]));
    assert!(four.status.success(), "{}", four.stderr);
    assert!(four.stdout.starts_with(" the capital of the country of France") && four.stdout.ends_with('\n'), "{:?}", four.stdout);
    assert!(four.stderr.contains("4 workers") && four.stderr.contains("tok/s"), "{}", four.stderr);
    let one = run(&sample(&["--pp", "1", "--tp", "1", "--quiet", PROMPT]));
    assert_eq!((one.stdout.as_str(), one.stderr.as_str()), (four.stdout.as_str(), ""));
    assert_ne!(run(&sample(&["--pp", "1", "--tp", "1", "The capital of Spain is"])).stdout, one.stdout);
}

#[test]
fn a_prompt_may_come_through_a_pipe_and_the_answer_as_json() {
    let args = sample(&["--pp", "1", "--tp", "1", "--quiet", "--json"]);
    let piped = run_with_input(&args, &format!("{PROMPT}\n"));
    assert!(piped.status.success(), "{}", piped.stderr);
    let answer: serde_json::Value = serde_json::from_str(&piped.stdout).expect("one JSON object");
    assert_eq!(answer["text"], json(&[&args[..], &[PROMPT]].concat())["text"]);
    assert_eq!((answer["prompt_tokens"].as_u64(), answer["completion_tokens"].as_u64()), (Some(6), Some(16)));
    assert_eq!(answer["finish_reason"], "length");
}

/// The manifest's template makes a chat of a prompt only when a chat is asked for.
#[test]
fn a_chat_is_another_prompt_than_a_text() {
    let ask = |more: &[&str]| json(&[&sample(&["--pp", "1", "--tp", "1", "--json"])[..], more, &[PROMPT]].concat());
    let (text, chat) = (ask(&[]), ask(&["--chat"]));
    assert_eq!(text["prompt_tokens"], 6);
    assert!(chat["prompt_tokens"].as_u64() > Some(10), "{chat}");
    assert_eq!(ask(&["--raw"])["text"], text["text"]);
    assert!(ask(&["--chat", "--system", "Answer in French."])["prompt_tokens"].as_u64() > chat["prompt_tokens"].as_u64());
}

#[test]
fn a_chat_without_a_template_is_refused() {
    let done = run(&["run", &files::reference().to_string_lossy(), "--chat", PROMPT]);
    assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
    assert!(done.stderr.contains("template"), "{}", done.stderr);
}

/// A worker that is killed ends an evaluation, which says which one, and leaves no other behind.
#[test]
fn a_killed_worker_ends_an_evaluation() {
    let model = files::reference();
    let args = ["eval", "logits", &model.to_string_lossy(), "--input-ids", "2,818", "--greedy", "20000", "--pp", "2"].map(String::from);
    let child = program::start(std::process::Command::new(program::skein()).args(args).stdin(std::process::Stdio::null()));
    let skein = e2e::process::Pid(child.id());
    let workers = program::until("two workers", || Some(skein.children()).filter(|c| c.len() == 2));
    program::until("work", || workers.iter().all(|w| w.cpu_ticks() > 100).then_some(()));
    workers[1].signal("KILL");
    let done = program::finish(child, std::time::Duration::from_secs(60));
    assert_eq!(done.status.code(), Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("stage 1 rank 0") && done.stderr.contains("killed"), "{}", done.stderr);
    program::until("the end of the workers", || (!workers.iter().any(|w| w.lives())).then_some(()));
}
