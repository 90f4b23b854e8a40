//! Headers with a byte changed or the end cut off: refused with the place, or loaded into a model whose plan stays in the file.

use std::collections::HashMap;

use ::safetensors::serialize;

use super::{gguf_model, small};
use crate::{
    gguf::{self, Keep, Tokenizer},
    header::from_safetensors,
    model::{ModelFile, ModelHeader},
    planner::{Capacity, Spec, plan},
    safetensors,
    samples::Sample,
};

/// Several values in place of a byte.
fn mutations(byte: u8) -> Vec<u8> {
    let mut values = vec![0, 1, 0x7f, 0x80, 0xff, byte ^ 1, byte ^ 0x20, byte ^ 0x80, byte.wrapping_add(1), byte.wrapping_sub(1)];
    values.sort_unstable();
    values.dedup();
    values.retain(|&v| v != byte);
    values
}

/// How a damaged file was met.
#[derive(Default, Debug)]
struct Tally {
    loaded: usize,
    refused: usize,
}

impl Tally {
    /// A refusal that says where; a model that loads must have a plan whose slices lie in the file.
    fn count(&mut self, outcome: Result<ModelHeader, String>, file: usize) {
        match outcome {
            Ok(model) => {
                self.loaded += 1;
                let spec = Spec { tensor: 2.min(model.config.heads), ..Spec::default() };
                if let Ok(plan) = plan(&spec, &model, &Capacity { memory_bytes: Some(1 << 30) }) {
                    let slices = plan.stages.iter().flat_map(|s| &s.shards).flat_map(|s| &s.slices);
                    assert!({ slices }.all(|s| s.bytes.start <= s.bytes.end && s.bytes.end <= file as u64));
                }
            }
            Err(said) => {
                self.refused += 1;
                assert!(said.contains("byte "), "{said}");
            }
        }
    }
}

#[test]
fn every_damaged_byte_of_a_gguf_header_is_refused_with_its_place_or_loads() {
    for sample in [Sample::llama(), Sample::gemma3()] {
        let original = sample.file();
        let data = gguf::read(&mut &*original, original.len() as u64, Keep::Short, true).unwrap().data_offset as usize;
        let mut tally = Tally::default();
        let mut bytes = original.clone();
        for at in 0..data {
            for value in mutations(original[at]) {
                bytes[at] = value;
                let keep = Keep::Keys(&["tokenizer.ggml.tokens"]);
                let outcome = gguf::read(&mut &*bytes, bytes.len() as u64, keep, true).map_err(|e| e.to_string()).and_then(|header| {
                    if let Err(e) = Tokenizer::from_header(&header) {
                        assert!(e.to_string().contains("at byte "), "{e}");
                    }
                    gguf_model(&header).map_err(|e| e.to_string())
                });
                tally.count(outcome, bytes.len());
            }
            bytes[at] = original[at];
        }
        assert!(tally.loaded > 100 && tally.refused > 1000, "{tally:?}");
    }
}

#[test]
fn every_damaged_byte_of_a_safetensors_header_is_refused_with_its_place_or_loads() {
    let (config, tensors) = small();
    let config = config.to_string();
    let original = serialize(tensors, Some(HashMap::from([("format".to_owned(), "pt".to_owned())]))).unwrap();
    let load = |bytes: &[u8]| -> Result<ModelHeader, String> {
        let header = safetensors::read(&mut &*bytes, bytes.len() as u64).map_err(|e| e.to_string())?;
        let file = ModelFile { name: "one.safetensors".into(), bytes: bytes.len() as u64 };
        from_safetensors(config.as_bytes(), &[(file, header)]).map_err(|e| e.to_string())
    };
    let data = safetensors::read(&mut &*original, original.len() as u64).unwrap().data_offset as usize;
    let (mut tally, mut bytes) = (Tally::default(), original.clone());
    for at in 0..data {
        for value in mutations(original[at]) {
            bytes[at] = value;
            tally.count(load(&bytes), bytes.len());
        }
        bytes[at] = original[at];
    }
    assert!(tally.loaded > 10 && tally.refused > 1000, "{tally:?}");
    let mut cut = Tally::default();
    for end in 0..original.len() {
        cut.count(load(&original[..end]), end);
    }
    assert_eq!((cut.loaded, cut.refused), (0, original.len()), "no truncation loads");
}
