//! The program itself, as a shell starts it.
//!
//! A build of the tests of this package leaves the program where the end-to-end tests look for it, built with the features of the whole workspace.

use std::process::{Command, Output};

fn skein(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_skein")).args(args).output().expect("the program starts")
}

#[test]
fn it_says_its_version() {
    let done = skein(&["--version"]);
    assert!(done.status.success());
    assert_eq!(String::from_utf8_lossy(&done.stdout), format!("skein {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_router_is_measured_in_front_of_simulated_replicas() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/models/llama");
    let few = ["--streams", "6", "--batch", "4", "--requests", "12", "--max-tokens", "5", "--step-time", "2000", "--token-time", "10"];
    let done = skein(&[&["bench", "router", model, "--json", "--quiet"], few.as_slice()].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said: serde_json::Value = serde_json::from_slice(&done.stdout).expect("one JSON object");
    let number = |path: &str| said.pointer(path).and_then(serde_json::Value::as_f64).unwrap_or_else(|| panic!("no {path} in {said}"));
    for (path, value) in [("/replicas", 2.0), ("/requests", 12.0), ("/errors", 0.0), ("/completion_tokens", 60.0)] {
        assert_eq!(number(path), value, "{path} of {said}");
    }
    assert!(number("/itl_ms/p50") >= 2.0, "a step is not shorter than it is said to be: {said}");
    assert!(number("/token_delay_us/p50") > 0.0 && number("/token_delay_us/p50") <= number("/token_delay_us/max"), "{said}");
    if cfg!(target_os = "linux") {
        assert!(number("/router/seconds") > 0.0 && number("/router/token_us") > 0.0, "{said}");
    }
}

#[test]
fn a_router_is_not_measured_with_what_says_nothing() {
    let fixture = |name: &str| format!("{}/../tests/fixtures/models/{name}", env!("CARGO_MANIFEST_DIR"));
    for (model, more, words) in [
        (fixture("llama"), ["--streams", "4", "--requests", "7"].as_slice(), "expected at least two for each"),
        (fixture("llama"), &["--max-tokens", "0"], "0"),
        (fixture("bert"), &[], "an encoder"),
        (fixture("none"), &[], "none"),
    ] {
        let done = skein(&[&["bench", "router", &model], more].concat());
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(2), "{model} {more:?}: {said}");
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn an_unknown_command_is_bad_input() {
    let done = skein(&["fly"]);
    assert_eq!(done.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&done.stderr).contains("fly"));
    assert!(done.stdout.is_empty());
}
