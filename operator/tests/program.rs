//! The program itself, as a pod or a shell starts it.
//!
//! A build of the tests of this package leaves the program where images are packed from, built with the features of the whole workspace.

use std::process::{Command, Output};

fn operator(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_skein-operator")).args(args).output().expect("the program starts")
}

#[test]
fn it_prints_the_definition() {
    let done = operator(&["--print-crd"]);
    assert!(done.status.success());
    assert!(
        String::from_utf8_lossy(&done.stdout) == include_str!("../../manifests/crd.yaml"),
        "manifests/crd.yaml is stale: run `cargo xtask codegen`"
    );
}

#[test]
fn a_missing_setting_is_bad_input() {
    let done = operator(&[]);
    assert_eq!(done.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&done.stderr).contains("--image"));
}
