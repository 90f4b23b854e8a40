//! Adapters: folders and files of this machine and of servers, with and without a listing.

use super::*;

/// The header of an adapter for the tiny llama, and bytes of its first tensor.
fn read(uri: &str, options: SourceOptions) -> Result<(plan::adapter::AdapterHeader, Vec<u8>), SourceError> {
    let llama = Source::open(&fixture("llama").display().to_string(), SourceOptions::default())?.header()?;
    let source = Source::open_adapter(uri, options)?;
    let header = source.adapter_header(&llama.config)?;
    let first = &header.pairs[0].a;
    let mut bytes = vec![0; first.bytes as usize];
    source.read(first.file, first.offset..first.offset + first.bytes, &mut bytes)?;
    Ok((header, bytes))
}

fn file(name: &str, file: &str) -> Vec<u8> {
    fs::read(fixture(name).join(file)).unwrap()
}

#[test]
fn an_adapter_is_the_same_from_a_folder_a_server_and_in_the_form_of_pytorch() {
    let local = fixture("llama-lora-b").display().to_string();
    let (header, bytes) = read(&local, SourceOptions::default()).unwrap();
    assert_eq!(header.pairs.len(), 12);
    let one_file = format!("{local}/adapter_model.safetensors");
    assert!(read(&one_file, SourceOptions::default()).unwrap() == (header, bytes.clone()));
    let pytorch = fixture("llama-lora-b-pt").display().to_string();
    assert!(read(&pytorch, SourceOptions::default()).unwrap().1 == bytes);
    // A server lists nothing: the one form is asked for, then the other.
    let ranges = Behaviour { ranges: true, ..Behaviour::default() };
    for (name, weights) in [("llama-lora-b", "adapter_model.safetensors"), ("llama-lora-b-pt", "adapter_model.bin")] {
        let (config, weights_at) = ("/x/adapter_config.json", format!("/x/{weights}"));
        let files = vec![(config, file(name, "adapter_config.json")), (weights_at.as_str(), file(name, weights))];
        let server = Server::start(files, ranges.clone());
        assert!(read(&format!("{}/x/", server.url), SourceOptions::default()).unwrap().1 == bytes, "{weights}");
    }
}

#[test]
fn a_pinned_adapter_is_checked_and_then_found_in_the_cache() {
    for (name, weights_name) in [("llama-lora-b", "adapter_model.safetensors"), ("llama-lora-b-pt", "adapter_model.bin")] {
        let folder = tempfile::tempdir().unwrap();
        let (weights, at) = (file(name, weights_name), format!("/x/{weights_name}"));
        let pinned = SourceOptions { digest: Some(digest(&weights)), ..options(folder.path()) };
        let files = vec![("/x/adapter_config.json", file(name, "adapter_config.json")), (at.as_str(), weights)];
        let server = Server::start(files, Behaviour { ranges: true, ..Behaviour::default() });
        let uri = format!("{}/x/", server.url);
        let first = read(&uri, pinned.clone()).unwrap();
        let asked = server.requests();
        assert!(read(&uri, pinned.clone()).unwrap() == first, "{name}");
        assert_eq!(server.requests(), asked, "a source whose digest is in the cache is not asked");
        let wrong = SourceOptions { digest: Some(digest(b"other")), ..pinned };
        assert!(matches!(read(&uri, wrong), Err(SourceError::DigestMismatch { .. })));
    }
}

#[test]
fn what_is_no_adapter_is_named() {
    let refused = |uri: &str| {
        let error: &dyn std::error::Error = &read(uri, SourceOptions::default()).unwrap_err();
        format!("{error}{}", error.source().map(|s| format!(": {s}")).unwrap_or_default())
    };
    let text = refused(&fixture("llama").display().to_string());
    assert!(text.contains("expected an adapter, adapter_model.safetensors"), "{text}");
    assert!(refused("/nowhere/at/all").contains("/nowhere/at/all does not exist"));
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().display().to_string();
    fs::write(folder.path().join("adapter_model.safetensors"), file("llama-lora-b", "adapter_model.safetensors")).unwrap();
    assert!(refused(&at).contains("adapter_config.json does not exist"));
    fs::write(folder.path().join("adapter_config.json"), "[]").unwrap();
    assert!(refused(&at).contains("adapter_config.json is not JSON"));
    // Cut anywhere, the weights are refused.
    fs::write(folder.path().join("adapter_config.json"), file("llama-lora-b", "adapter_config.json")).unwrap();
    let whole = file("llama-lora-b", "adapter_model.safetensors");
    for len in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(folder.path().join("adapter_model.safetensors"), &whole[..len]).unwrap();
        assert!(read(&at, SourceOptions::default()).is_err(), "cut at {len}");
    }
}
