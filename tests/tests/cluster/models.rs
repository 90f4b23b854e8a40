//! Small models for tests that need many deployments, served by the cluster's mirror of a model hub.

use std::fs;

use e2e::{files, program};
use serde_json::{Value, json};

use crate::kubernetes::hub;

/// Source of the tiny llama, once [`llama`] has put it there.
pub(crate) const LLAMA: &str = "hf://e2e/llama@main";

/// Puts the tiny llama into the mirror.
pub(crate) fn llama() {
    put("llama");
}

/// Puts a fixture into the mirror; its source is `hf://e2e/NAME@main`.
pub(crate) fn put(fixture: &str) {
    let folder = hub(&format!("e2e/{fixture}"));
    for file in fs::read_dir(files::fixture(fixture)).expect("the fixture") {
        let file = file.expect("an entry");
        let place = folder.join(file.file_name());
        if fs::read(&place).is_ok_and(|there| there == fs::read(file.path()).expect("a file")) {
            continue;
        }
        // Under another name first: a test beside this one may be reading.
        let partial = folder.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
        fs::copy(file.path(), &partial).expect("a copy");
        fs::rename(&partial, place).expect("a place in the mirror");
    }
}

/// A request to the tiny llama deployed as `model`, as ids would be given to `skein eval`.
pub(crate) fn llama_body(model: &str) -> Value {
    json!({"model": model, "prompt": "abc", "max_tokens": 16, "temperature": 0})
}

/// What `skein run` answers to the same on this machine.
pub(crate) fn llama_here() -> String {
    let local = files::fixture("llama");
    let args = ["run", &local.to_string_lossy(), "abc", "--raw", "--quiet", "--json", "--max-tokens", "16", "--temperature", "0"];
    program::json(&args)["text"].as_str().expect("a text").to_owned()
}
