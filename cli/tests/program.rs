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
fn an_unknown_command_is_bad_input() {
    let done = skein(&["fly"]);
    assert_eq!(done.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&done.stderr).contains("fly"));
    assert!(done.stdout.is_empty());
}
