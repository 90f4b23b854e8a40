//! One process: fixtures against reference outputs, the reference model against known ids and perplexity.

use std::{fs, path::Path};

use e2e::{
    files,
    program::{floats, id_list, ids, json},
};
use serde_json::Value;

/// `eval logits` of `model` at `input`, with `greedy` further ids.
fn logits(model: &Path, input: &[u32], greedy: usize, more: &[&str]) -> Value {
    let (model, input, greedy) = (model.to_string_lossy(), id_list(input), greedy.to_string());
    let mut args = vec!["eval", "logits", &model, "--input-ids", &input, "--greedy", &greedy, "--json"];
    args.extend(more);
    json(&args)
}

/// The largest difference between two lists.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Asserts that a fixture gives its reference outputs, and that the comparison would see a wrong setting.
fn matches_reference(name: &str, wrong: (&str, &str)) {
    let expected = files::expected(name);
    let input = ids(&expected, "input_ids");
    let got = logits(&files::fixture(name), &input, 24, &["--kv", "f32"]);
    let off = distance(&floats(&got, "last_logits"), &floats(&expected, "last_logits"));
    assert!(off <= 1e-4, "{name}: last logits are off by {off}");
    let off = distance(&floats(&got, "nll_per_token"), &floats(&expected, "nll_per_token"));
    assert!(off <= 1e-4, "{name}: losses are off by {off}");
    assert_eq!(ids(&got, "greedy_ids"), ids(&expected, "greedy_ids"), "{name}");

    let folder = files::changed_fixture(name, wrong.0, wrong.1);
    let other = logits(folder.path(), &input, 0, &["--kv", "f32"]);
    let off = distance(&floats(&other, "last_logits"), &floats(&expected, "last_logits"));
    assert!(off > 1e-4, "{name}: {} in place of {} went unseen ({off})", wrong.1, wrong.0);
}

#[test]
fn llama_matches_its_reference() {
    matches_reference("llama", ("\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e-03"));
}

/// A PyTorch file.
#[test]
fn llama_pt_matches_its_reference() {
    matches_reference("llama-pt", ("\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-03"));
}

#[test]
fn gemma3_matches_its_reference() {
    matches_reference("gemma3", ("\"sliding_window\": 8", "\"sliding_window\": 7"));
}

/// A cache of 8 bits is near the reference, and has the same bits on any split and instructions, and in any chunks.
#[test]
fn a_cache_of_8_bits_is_near_and_the_same_on_any_split() {
    for name in ["llama", "gemma3"] {
        let (model, expected) = (files::fixture(name), files::expected(name));
        let input = ids(&expected, "input_ids");
        let of = |more: &[&str]| {
            let got = logits(&model, &input, 8, more);
            (floats(&got, "last_logits"), floats(&got, "nll_per_token"), ids(&got, "greedy_ids"))
        };
        let got = of(&["--kv", "q8"]);
        for (got, field) in [(&got.0, "last_logits"), (&got.1, "nll_per_token")] {
            let off = distance(got, &floats(&expected, field));
            // Control: it is another cache than those that hold what was computed, or 11 bits of it.
            assert!((1e-4..0.05).contains(&off), "{name}: {field} is off by {off}");
        }
        for way in [&["--pp", "2"][..], &["--tp", "2"], &["--pp", "2", "--tp", "2"], &["--chunk", "3"], &["--isa", "scalar"]] {
            assert!(of(&[&["--kv", "q8"], way].concat()) == got, "{name} {way:?}");
        }
        assert!(of(&["--kv", "f16"]).0 != got.0, "{name}: 16 bits give the numbers of 8");
    }
}

/// A prompt, and the ids that follow greedily when weights are dequantized and activations are not quantized.
struct Prompt {
    ids: &'static [u32],
    greedy: &'static [u32],
    /// Steps whose two best ids are closer than 0.15: 8-bit activations may turn them.
    narrow: &'static [usize],
    /// The best first ids and their logits.
    top: &'static [(usize, f32)],
}

const PROMPTS: [Prompt; 3] = [
    // The capital of France is
    Prompt {
        ids: &[2, 818, 5279, 529, 7001, 563],
        greedy: &[506, 5279, 529, 506, 2891, 529, 7001, 236761],
        narrow: &[],
        top: &[(506, 19.0915), (496, 18.5476), (9079, 18.2686)],
    },
    // def fibonacci(n): and a newline
    Prompt {
        ids: &[2, 2063, 10779, 78113, 236769, 236749, 1473, 107],
        greedy: &[140, 584, 538, 1251, 236743, 236771, 236787, 107, 144, 2060, 236743, 236771],
        narrow: &[],
        top: &[(140, 17.7929), (138, 14.7104)],
    },
    // Kubernetes is an open source
    Prompt {
        ids: &[2, 114107, 43604, 563, 614, 1932, 3738],
        greedy: &[9714, 183288, 5058, 600, 5862, 611, 531, 2016],
        narrow: &[0, 4],
        top: &[(9714, 16.6237), (5368, 16.5159), (5058, 16.3466)],
    },
];

/// The model continues each known prefix with the known id, outside narrow margins, and has the known logits within `near`.
///
/// A greedy run whose ids are all known ones is the same as a run for each known prefix; narrow steps are skipped by starting again behind them.
fn continues_known_prefixes(model: &Path, near: f32, more: &[&str]) {
    for prompt in PROMPTS {
        let mut known = prompt.ids.to_vec();
        let mut next = 0;
        while next < prompt.greedy.len() {
            if prompt.narrow.contains(&next) {
                known.push(prompt.greedy[next]);
                next += 1;
                continue;
            }
            let end = prompt.narrow.iter().copied().find(|&n| n > next).unwrap_or(prompt.greedy.len());
            let got = logits(model, &known, end - next, more);
            assert_eq!(ids(&got, "greedy_ids"), prompt.greedy[next..end], "after {known:?}");
            known.extend(&prompt.greedy[next..end]);
            next = end;
        }
        let first = floats(&logits(model, prompt.ids, 0, more), "last_logits");
        for &(id, logit) in prompt.top {
            assert!((first[id] - logit).abs() < near, "logit of {id} after {:?}: {}, expected about {logit}", prompt.ids, first[id]);
        }
        // Another prompt gives other logits, by more than that.
        let other = floats(&logits(model, &prompt.ids[..prompt.ids.len() - 1], 0, &[]), "last_logits");
        assert!(prompt.top.iter().any(|&(id, logit)| (other[id] - logit).abs() >= near));
    }
}

#[test]
fn reference_model_continues_known_prefixes() {
    continues_known_prefixes(&files::reference(), 0.5, &[]);
}

/// Its vocabulary screened, in one process and on ranks of stages; the plan says what that takes.
#[test]
fn the_reference_model_screened_continues_known_prefixes() {
    let model = files::reference();
    continues_known_prefixes(&model, 0.5, &["--screening"]);
    let spread = ["--screening", "--pp", "2", "--tp", "2"];
    let [plain, screened] = [&[][..], &spread].map(|more| logits(&model, PROMPTS[2].ids, 24, more));
    assert_eq!(screened["greedy_ids"], plain["greedy_ids"]);
    // What asks for all logits has them as they are.
    assert_eq!(screened["last_logits"], plain["last_logits"]);
    let bytes = |more: &[&str]| {
        let plan = json(&[&["plan", &*model.to_string_lossy(), "--json"], more].concat());
        plan["stages"][0]["ranks"][0]["weight_bytes"].as_u64().expect("a number")
    };
    assert_eq!(bytes(&["--screening"]) - bytes(&[]), 262_144 * 640 / 32 * 18);
}

/// With its weights written as floats, in parts of a folder, the reference model has the known logits closely, and a GGUF file of them the
/// folder's.
#[test]
fn reference_model_as_floats_continues_known_prefixes() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (folder, gguf) = (place.path().join("parts"), place.path().join("floats.gguf"));
    let convert = |from: &Path, to: &Path, more: &[&str]| {
        let (from, to) = (from.to_string_lossy(), to.to_string_lossy());
        json(&[&["convert", &from, &to, "--json"], more].concat())
    };
    convert(&files::reference(), &folder, &["--file-size", "300M"]);
    let parts = fs::read_dir(&folder).expect("a folder").filter(|f| {
        let name = f.as_ref().expect("a file").file_name();
        name.to_string_lossy().ends_with(".safetensors")
    });
    assert!(parts.count() > 2, "the model must be in parts");
    continues_known_prefixes(&folder, 0.01, &[]);
    convert(&folder, &gguf, &[]);
    let input = PROMPTS[1].ids;
    let [parts, one, packed] = [&folder, &gguf, &files::reference()].map(|model| floats(&logits(model, input, 0, &[]), "last_logits"));
    let off = distance(&parts, &one);
    assert!(off <= 1e-4, "the GGUF file's logits are off by {off}");
    assert!(distance(&parts, &packed) > 1e-4, "activations of 8 bits must show");
}

/// The first chunks of the text, within 1 % of llama.cpp on the same chunks.
#[test]
fn perplexity_is_that_of_llama_cpp() {
    let golden = files::golden("ppl-gemma3-270m.json");
    let (model, text, chunks) = (files::reference(), files::text(), golden["chunks"].to_string());
    let got = json(&[
        "eval",
        "ppl",
        &model.to_string_lossy(),
        "--text",
        &text.to_string_lossy(),
        "--context",
        "512",
        "--chunks",
        &chunks,
        "--json",
    ]);
    assert_eq!(got["tokens"], golden["tokens"]);
    let ratio = got["ppl"].as_f64().expect("a number") / golden["ppl"].as_f64().expect("a number");
    assert!((ratio - 1.0).abs() < 0.01, "perplexity {}, llama.cpp has {}", got["ppl"], golden["ppl"]);
}

/// What was computed, as bits.
fn bits(got: &Value) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let raw = |field| floats(got, field).iter().map(|x| x.to_bits()).collect();
    (raw("last_logits"), raw("nll_per_token"), ids(got, "greedy_ids"))
}

/// However a prompt is cut into steps, and whatever the number of threads: the same bits.
#[test]
fn chunks_and_threads_change_no_bit() {
    // Longer than a tile of attention, than the fixture's window, and no multiple of any chunk.
    let long: Vec<u32> = std::iter::once(2).chain((0..149).map(|i| 5 + (i * 37) % 500)).collect();
    for model in [files::fixture("llama"), files::fixture("gemma3"), files::reference()] {
        let whole = bits(&logits(&model, &long, 4, &["--threads", "2"]));
        for more in [["--chunk", "1"], ["--chunk", "7"], ["--chunk", "64"], ["--threads", "1"], ["--threads", "3"]] {
            assert!(bits(&logits(&model, &long, 4, &more)) == whole, "{} with {}", model.display(), more.join(" "));
        }
        assert!(bits(&logits(&model, &long[..149], 4, &["--chunk", "7"])) != whole, "one id fewer went unseen");
    }
}
