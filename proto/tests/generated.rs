//! The committed code and descriptors are what the `.proto` files give.

use std::{fs, path::Path};

#[path = "../codegen.rs"]
mod codegen;

#[test]
fn committed_code_is_what_the_proto_files_give() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = package.join("src/generated");
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let expected = codegen::generate(package, scratch.path()).expect("the .proto files compile");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        for (name, contents) in &expected {
            fs::write(folder.join(name), contents).expect("a writable folder");
        }
    }
    let mut committed: Vec<_> = fs::read_dir(&folder)
        .expect("src/generated")
        .map(|e| e.expect("an entry").file_name().into_string().expect("an ASCII name"))
        .collect();
    committed.sort();
    assert!(committed.iter().eq(expected.keys()), "the files are {committed:?}: run `cargo xtask codegen`");
    for (name, contents) in &expected {
        assert!(fs::read(folder.join(name)).expect("a readable file") == *contents, "{name} is stale: run `cargo xtask codegen`");
    }
}
