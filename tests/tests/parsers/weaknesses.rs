//! Published weaknesses of parsers like these: each is a file of the corpus, is met as the table says, and stands in `docs/security.md`.

use e2e::parsers::{PARSERS, Parser};

use crate::{
    corpus,
    held::{alone, meet},
};

/// Folder, file, and what the refusal says; nothing where the file loads, and does no harm.
#[rustfmt::skip]
const TABLE: [(&str, &str, &str); 147] = [
    ("gguf", "alignment-3.gguf", "a power of two"),
    ("gguf", "cve-2024-21802.gguf", "at most 4 extents, got 9"),
    ("gguf", "cve-2024-21825.gguf", "length of metadata a at byte 41: count"),
    ("gguf", "cve-2024-21836.gguf", "tensor count at byte 8: count"),
    ("gguf", "cve-2024-23496.gguf", "key of metadata entry 0 at byte 24: count"),
    ("gguf", "cve-2024-23605.gguf", "metadata count at byte 16: count"),
    ("gguf", "cve-2024-25667.gguf", "length of metadata a at byte 41: count"),
    ("gguf", "cve-2024-25668.gguf", "metadata a at byte 49: count"),
    ("gguf", "cve-2024-39720.gguf", "version at byte 4: needs 4 bytes"),
    ("gguf", "cve-2024-8063.gguf", "llama.block_count at byte"),
    ("gguf", "cve-2025-0317.gguf", "a power of two"),
    ("gguf", "cve-2025-49847.gguf", "metadata tokenizer.ggml.tokens at byte 114: count"),
    ("gguf", "cve-2025-53630.gguf", "tensor a offset at byte 69: data lies at"),
    ("gguf", "cve-2026-27940.gguf", "tensor count at byte 8: count"),
    ("gguf", "cve-2026-33298.gguf", "overflow 64 bits"),
    ("gguf", "cve-2026-7482.gguf", "of a file of 192 bytes"),
    ("gguf", "ghsa-3p75-pq92-q28f.gguf", "extents of at least 1"),
    ("gguf", "half-blocks.gguf", "not whole blocks"),
    ("gguf", "keys-twice.gguf", "appears twice, first at byte 24"),
    ("gguf", "layers.gguf", "llama.block_count at byte"),
    ("gguf", "llama-cpp-25378.gguf", "at most 4 extents"),
    ("gguf", "llama-cpp-26318.gguf", "general.alignment at byte 53: expected"),
    ("gguf", "llama-cpp-27203.gguf", "overflow 64 bits"),
    ("gguf", "misaligned.gguf", "not a multiple of the alignment"),
    ("gguf", "nested-arrays.gguf", "an array of arrays"),
    ("gguf", "no-heads.gguf", "expected at least 1"),
    ("gguf", "overlap.gguf", "overlaps that of tensor a"),
    ("gguf", "tensor-type.gguf", "tensor type id 4294967295 is unknown"),
    ("gguf", "tensors-twice.gguf", "appears twice, first at byte 69"),
    ("gguf", "value-type.gguf", "a value type from 0 to 12"),
    ("safetensors", "header-length.safetensors", "header length at byte 0: needs 18446744073709551615 bytes"),
    ("safetensors", "header-past-end.safetensors", "header length at byte 0: needs 3 bytes"),
    ("safetensors", "hole.safetensors", "range begins at 32, expected 16"),
    ("safetensors", "keys-twice.safetensors", "a appears twice"),
    ("safetensors", "length.safetensors", "has another length than shape"),
    ("safetensors", "negative-shape.safetensors", "integer `-4`"),
    ("safetensors", "nested.safetensors", "header at byte 23"),
    ("safetensors", "overlap.safetensors", "range begins at 8, expected 16"),
    ("safetensors", "past-end.safetensors", "does not lie in the 16 bytes"),
    ("safetensors", "polyglot.safetensors", "data after the last tensor at byte 86"),
    ("safetensors", "reversed.safetensors", "range 16..0"),
    ("safetensors", "shape-overflow.safetensors", "overflows 64 bits"),
    ("safetensors", "type.safetensors", "got PICKLE"),
    ("packed", "groups.safetensors", "whole blocks of 32"),
    ("packed", "rows.safetensors", "a multiple of 8 rows"),
    ("packed", "scale-type.safetensors", "expected F16 or BF16"),
    ("packed", "scales.safetensors", "up_proj.scales is missing"),
    ("packed", "zero-extent.safetensors", "has shape [0, 2305843009213693952]"),
    ("index", "absolute.json", "expected a file name"),
    ("index", "backslash.json", "expected a file name"),
    ("index", "nul.json", "expected a file name"),
    ("index", "parent.json", "expected a file name"),
    ("index", "twice.json", "a appears twice"),
    ("pytorch", "bomb.pt", "compression method 8"),
    ("pytorch", "cve-2025-1716.pt", "names pip.main"),
    ("pytorch", "cve-2025-1889.pt", "one data.pkl, got m/data.pkl and n/data.pkl"),
    ("pytorch", "cve-2025-1944.pt", "the entry's own header"),
    ("pytorch", "cve-2025-1945.pt", "the entry is encrypted"),
    ("pytorch", "cve-2025-32434.pt", "names torch._utils._rebuild_wrapper_subclass"),
    ("pytorch", "deep.pt", "6026 containers"),
    ("pytorch", "directory.pt", "archive directory at byte 490: lies at"),
    ("pytorch", "early.pt", "names posix.system"),
    ("pytorch", "entries.pt", "65520 entries in 167 bytes"),
    ("pytorch", "eval.pt", "names builtins.eval"),
    ("pytorch", "hub.pt", "names torch.hub.load"),
    ("pytorch", "inst.pt", "pickle opcode 0x69"),
    ("pytorch", "laughs.pt", "a dict of tensors"),
    ("pytorch", "legacy.pt", "before PyTorch 1.6"),
    ("pytorch", "long.pt", "cut off"),
    ("pytorch", "marks.pt", "a stack of"),
    ("pytorch", "memo.pt", "a remembered value that is in order"),
    ("pytorch", "method.pt", "compression method 8"),
    ("pytorch", "numpy.pt", "names numpy.core.multiarray._reconstruct"),
    ("pytorch", "object.pt", "names os.system"),
    ("pytorch", "overlap.pt", "the entry's own header"),
    ("pytorch", "reduce.pt", "names posix.system"),
    ("pytorch", "repeated.pt", "repeats no element"),
    ("pytorch", "resolve-name.pt", "names pkgutil.resolve_name"),
    ("pytorch", "script.pt", "TorchScript"),
    ("pytorch", "state.pt", "attributes of a dict"),
    ("pytorch", "storage-bounds.pt", "of a storage of 12"),
    ("pytorch", "storage-size.pt", "of a storage of 12"),
    ("pytorch", "zip64.pt", "past the end of the file"),
    ("tokenizer_json", "charsmap-length.json", "precompiled_charsmap"),
    ("tokenizer_json", "charsmap-short.json", "precompiled_charsmap"),
    ("tokenizer_json", "charsmap-trie.json", ""),
    ("tokenizer_json", "charsmap-values.json", ""),
    ("tokenizer_json", "cve-2025-2099.json", ""),
    ("tokenizer_json", "nested-steps.json", ""),
    ("tokenizer_json", "nested.json", "cannot read tokenizer.json"),
    ("tokenizer_json", "size.json", ""),
    ("tokenizer_json", "unknown-id.json", "cannot read tokenizer.json"),
    ("tokenizer_json", "unknown-merge.json", "`x` out of vocabulary"),
    ("tokenizer_json", "wild-id.json", "past the limit of 4194304"),
    ("sentencepiece", "charsmap.model", "precompiled_charsmap"),
    ("sentencepiece", "group.model", "wire type 3"),
    ("sentencepiece", "id.model", "past the 6 pieces"),
    ("sentencepiece", "length.model", "needs 18446744073709551615 bytes"),
    ("sentencepiece", "piece.model", "needs 127 bytes, 3 are left"),
    ("sentencepiece", "utf8.model", "UTF-8"),
    ("sentencepiece", "varint.model", "more than 64 bits"),
    ("vocab_txt", "utf8.txt", "utf-8"),
    ("chat_template", "attr.jinja", "undefined"),
    ("chat_template", "blocks.jinja", "recursion limits"),
    ("chat_template", "cve-2024-34359.jinja", "undefined"),
    ("chat_template", "cve-2025-61620.jinja", "limit of steps"),
    ("chat_template", "cve-2026-5760.jinja", "undefined"),
    ("chat_template", "doubled.jinja", "limit of steps"),
    ("chat_template", "elif.jinja", ""),
    ("chat_template", "fields.jinja", "undefined"),
    ("chat_template", "filters.jinja", ""),
    ("chat_template", "include.jinja", "non-existing template"),
    ("chat_template", "lipsum.jinja", "undefined"),
    ("chat_template", "minus.jinja", ""),
    ("chat_template", "multiplied.jinja", "limit of steps"),
    ("chat_template", "nested-compared.jinja", ""),
    ("chat_template", "nested-json.jinja", ""),
    ("chat_template", "nested-most.jinja", "limit of steps"),
    ("chat_template", "nested-once.jinja", ""),
    ("chat_template", "nested-shown.jinja", ""),
    ("chat_template", "nested-text.jinja", ""),
    ("chat_template", "nested-values.jinja", ""),
    ("chat_template", "nots.jinja", ""),
    ("chat_template", "output.jinja", "limit of output bytes"),
    ("chat_template", "parentheses.jinja", "recursion limits"),
    ("chat_template", "recursion.jinja", "recursion limit"),
    ("chat_template", "size.jinja", "expected at most 65536"),
    ("chat_template", "sum.jinja", ""),
    ("chat_template", "ternary.jinja", ""),
    ("config_json", "code.json", "not supported"),
    ("config_json", "factor.json", "a positive number"),
    ("config_json", "group-size.json", "quantization_config.group_size"),
    ("config_json", "heads.json", "a divisor of the hidden size 8"),
    ("config_json", "hidden.json", "from 1 to 16777216"),
    ("config_json", "layers.json", "from 1 to 16777216"),
    ("config_json", "negative.json", "from 1 to 16777216"),
    ("config_json", "nested.json", "recursion limit"),
    ("config_json", "no-heads.json", "from 1 to 16777216"),
    ("adapter_json", "alpha.json", "a positive number"),
    ("adapter_json", "no-rank.json", "from 1 to 16777216"),
    ("adapter_json", "pattern.json", "regular expressions without"),
    ("adapter_json", "rank.json", "from 1 to 16777216"),
    ("manifest", "cve-2019-11253.yaml", "alias replay limit"),
    ("manifest", "keys-twice.yaml", "duplicate mapping key"),
    ("manifest", "number.yaml", "a whole number"),
    ("manifest", "rustsec-2018-0006.yaml", "recursion limit"),
    ("manifest", "tag.yaml", "metadata.name: expected text"),
];

/// What `parser` says of `file`.
fn refusal(parser: &Parser, file: &[u8]) -> String {
    (parser.read)(file).err().unwrap_or_default()
}

#[test]
fn good_files_load() {
    let _alone = alone();
    for parser in PARSERS {
        let good: Vec<_> = corpus(&parser).into_iter().filter(|seed| seed.name.starts_with("good-")).collect();
        assert!(!good.is_empty(), "{} has no good file", parser.name);
        for seed in good {
            assert!(meet(&parser, &seed.bytes), "{}/{}: {}", parser.name, seed.name, refusal(&parser, &seed.bytes));
        }
    }
}

#[test]
fn weaknesses_are_met_as_the_table_says() {
    let _alone = alone();
    let mut wrong = Vec::new();
    for parser in PARSERS {
        for seed in corpus(&parser).into_iter().filter(|seed| !seed.name.starts_with("good-")) {
            let place = format!("{}/{}", parser.name, seed.name);
            let row = TABLE.iter().find(|(folder, file, _)| (*folder, *file) == (parser.name, &*seed.name));
            let (_, _, words) = row.unwrap_or_else(|| panic!("{place} is not in the table"));
            let loads = meet(&parser, &seed.bytes);
            let said = refusal(&parser, &seed.bytes);
            if loads != words.is_empty() || !said.contains(words) {
                wrong.push(format!("{place} says {said:?}, expected {words:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_corpus_has_every_file_of_the_table_and_the_docs_list_it() {
    let docs = include_str!("../../../docs/security.md");
    for (folder, file, _) in TABLE {
        assert!(corpus(&Parser::named(folder)).iter().any(|seed| seed.name == file), "{folder}/{file} is not there");
        assert!(docs.contains(&format!("`{folder}/{file}`")), "{folder}/{file} is not in docs/security.md");
    }
}
