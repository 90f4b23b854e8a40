//! Reference clients in Python: the official `openai` package, and a generic gRPC client that learns the service by reflection.

use std::process::{Command, Stdio};

use e2e::{
    files, program,
    server::{Server, manifest, parallelism},
};

/// A server of the reference model with a second name and Gemma's chat template.
fn server() -> Server {
    let spec = format!("    aliases: [gemma]\n  chat:\n    template:\n      builtin: Gemma\n{}", parallelism(2, 2));
    Server::start(&manifest("gemma3-270m", &files::reference(), &spec))
}

/// Runs a script of `python/` with `args`; it prints what it checked and fails by an exception.
fn script(name: &str, args: &[&str]) {
    let mut command = Command::new(files::python());
    command.arg(files::package().join("python").join(name)).args(args).stdin(Stdio::null());
    let done = program::finish(program::start(&mut command), program::LIMIT);
    println!("{}", done.stdout);
    assert!(done.status.success(), "{name}: {}\n{}", done.status, done.stderr);
}

#[test]
fn the_openai_client_works_with_every_parameter() {
    script("openai_client.py", &[&server().http, "gemma3-270m"]);
}

#[test]
fn a_generic_grpc_client_works_through_reflection() {
    script("grpc_client.py", &[&server().grpc, "gemma3-270m"]);
}

/// A model without a chat template refuses chat, with an error that says why.
#[test]
fn chat_without_a_template_is_refused() {
    let server = Server::start(&manifest("base", &files::reference(), &parallelism(1, 1)));
    script("openai_client.py", &[&server.http, "base", "--without-template"]);
}
