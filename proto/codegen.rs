//! Makes `src/generated/` from the `.proto` files. Shared, as a file, by `cargo xtask codegen` (which must not depend on the
//! crate it generates) and by the test that finds stale files.

use std::{collections::BTreeMap, error::Error, fs, path::Path};

use protox::prost::Message as _;

const FILES: [&str; 4] =
    ["skein/v1/inference.proto", "skein/worker/v1/worker.proto", "skein/fleet/v1/fleet.proto", "skein/pool/v1/pool.proto"];

/// Compiles the `.proto` files of the crate at `package`: file name in `src/generated/` → contents. `scratch` is an empty folder.
pub(crate) fn generate(package: &Path, scratch: &Path) -> Result<BTreeMap<String, Vec<u8>>, Box<dyn Error>> {
    let descriptors = protox::compile(FILES, [package.join("proto")])?;
    let mut files = BTreeMap::new();
    // Reflection is offered to clients of the inference service alone.
    let mut public = descriptors.clone();
    public.file.retain(|f| f.package() == "skein.v1");
    for file in &mut public.file {
        file.source_code_info = None;
    }
    files.insert("skein.v1.binpb".to_owned(), public.encode_to_vec());
    // Large payloads are slices of the received buffer, not copies.
    let mut builder = tonic_prost_build::configure();
    let links = ["HiddenFrame.data", "QuestionFrame.data", "PartFrame.data"];
    for field in links.into_iter().chain(["CardChunk.data", "CardChunk.hash", "Output.logits", "Output.pooled"]) {
        builder = builder.bytes(format!(".skein.worker.v1.{field}"));
    }
    builder.out_dir(scratch).compile_fds(descriptors)?;
    for entry in fs::read_dir(scratch)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).ok_or("a generated file without a name")?;
        files.insert(name.to_owned(), fs::read(&path)?);
    }
    Ok(files)
}
