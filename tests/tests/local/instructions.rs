//! Every instruction set gives the same bits.

use std::path::Path;

use e2e::{
    files,
    program::{floats, id_list, ids, json},
};
use kernels::Isa;

/// `last_logits`, `greedy_ids`, `nll_per_token` as bits.
fn bits(model: &Path, input: &[u32], isa: Isa) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let (model, input) = (model.to_string_lossy(), id_list(input));
    let got = json(&["eval", "logits", &model, "--input-ids", &input, "--greedy", "8", "--isa", isa.name(), "--json"]);
    let raw = |field| floats(&got, field).iter().map(|x| x.to_bits()).collect();
    (raw("last_logits"), ids(&got, "greedy_ids"), raw("nll_per_token"))
}

fn same_everywhere(model: &Path, input: &[u32]) {
    let have = Isa::available();
    for name in ["avx2", "avxvnni", "avx512", "amx"] {
        if have.iter().all(|isa| isa.name() != name) {
            println!("this CPU lacks {name}: not compared");
        }
    }
    let scalar = bits(model, input, have[0]);
    for &isa in &have[1..] {
        assert!(bits(model, input, isa) == scalar, "{} on {} differs from scalar", model.display(), isa.name());
    }
    // The comparison sees another input.
    assert!(bits(model, &input[..input.len() - 1], have[0]) != scalar);
}

#[test]
fn fixtures_have_the_same_bits_on_every_instruction_set() {
    for name in ["llama", "gemma3", "gpt2", "mixtral", "qwen3-moe"] {
        same_everywhere(&files::fixture(name), &ids(&files::expected(name), "input_ids"));
    }
}

#[test]
fn reference_model_has_the_same_bits_on_every_instruction_set() {
    same_everywhere(&files::reference(), &[2, 818, 5279, 529, 7001, 563, 506, 5279, 529]);
}
