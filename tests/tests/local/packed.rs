//! Packed checkpoints (GPTQ, AWQ, compressed-tensors): written by `tests/python/packed_checkpoints.py` together with the same numbers as floats.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use e2e::{
    files,
    mirror::Mirror,
    program::{floats, id_list, ids, json, run},
    rewrite::Folder,
};
use kernels::{Isa, Matrix, Pool, WeightType};
use plan::{
    dtype::DType,
    model::TensorId,
    planner::{self, Capacity, Spec},
};
use serde_json::Value;
use source::{Keep, Source, SourceOptions};

/// Each layout, and the block type that holds it.
const LAYOUTS: [(&str, DType); 9] = [
    ("gptq-4", DType::Q4_0),
    ("gptq-4-asymmetric", DType::Q5_0),
    ("gptq-4-v2", DType::Q5_0),
    ("gptq-8", DType::Q8_0),
    ("awq", DType::Q5_0),
    ("packed-4", DType::Q4_0),
    ("packed-4-asymmetric", DType::Q5_0),
    ("packed-8", DType::Q8_0),
    ("int8", DType::Q8_0),
];

/// The folder of all of them, written once.
fn written() -> PathBuf {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let script = files::package().join("python").join("packed_checkpoints.py");
        let done = Command::new(files::python()).arg(script).arg(files::fixture("llama")).arg(folder.path()).output().expect("Python runs");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        folder
    });
    folder.path().to_path_buf()
}

fn weight_type(dtype: DType) -> WeightType {
    match dtype {
        DType::Q4_0 => WeightType::Q4_0,
        DType::Q5_0 => WeightType::Q5_0,
        DType::Q8_0 => WeightType::Q8_0,
        other => panic!("{other:?} holds no packed matrix"),
    }
}

/// The matrices of a packed folder that were packed, as floats, and as bytes of their blocks.
fn matrices(folder: &Path, dtype: DType) -> Vec<(TensorId, String, Vec<f32>)> {
    let source = Source::open(&folder.to_string_lossy(), SourceOptions::default()).expect("a model");
    let header = source.header().expect("a supported model");
    let pool = Pool::new(1);
    let packed = header.tensors.iter().filter(|(_, t)| t.dtype.block_len() > 1);
    let matrices: Vec<_> = packed
        .map(|(id, tensor)| {
            assert_eq!(tensor.dtype, dtype, "{}", tensor.name);
            let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
            let mut blocks = vec![0; tensor.bytes as usize];
            source.read(tensor.file, tensor.offset..tensor.offset + tensor.bytes, &mut blocks).expect("its bytes");
            // Any part is that part of the whole.
            for part in [0..1, 7..1000, tensor.bytes / 3..tensor.bytes / 3 * 2 + 5, tensor.bytes - 1..tensor.bytes] {
                let mut some = vec![0; (part.end - part.start) as usize];
                source.read(tensor.file, tensor.offset + part.start..tensor.offset + part.end, &mut some).expect("its bytes");
                assert!(some == blocks[part.start as usize..part.end as usize], "{} at {part:?}", tensor.name);
            }
            let matrix = Matrix::pack(Isa::Scalar, weight_type(dtype), rows, columns, &blocks, &pool).expect("whole blocks");
            let mut values = vec![0.0; rows * columns];
            values.chunks_exact_mut(columns).enumerate().for_each(|(r, row)| matrix.row(r, row));
            (*id, tensor.name.clone(), values)
        })
        .collect();
    assert_eq!(matrices.len(), 28, "seven matrices of four layers");
    matrices
}

/// Whether all matrices have the values of a folder of floats, bit for bit.
fn equal(matrices: &[(TensorId, String, Vec<f32>)], folder: &Path) -> bool {
    let floats = Folder::read(folder).expect("the folder");
    matrices.iter().all(|(_, name, values)| {
        let stored = floats.tensors[name].data.as_chunks().0;
        // What is 0 has no sign here, and may have one there.
        stored.len() == values.len() && stored.iter().zip(values).all(|(stored, value)| f32::from_le_bytes(*stored) == *value)
    })
}

#[test]
fn every_layout_holds_its_numbers_exactly() {
    let folder = written();
    for (i, (layout, dtype)) in LAYOUTS.into_iter().enumerate() {
        let matrices = matrices(&folder.join(layout), dtype);
        assert!(equal(&matrices, &folder.join(format!("{layout}-f32"))), "{layout}");
        // The control: those of another layout are others.
        let other = LAYOUTS[(i + 1) % LAYOUTS.len()].0;
        assert!(!equal(&matrices, &folder.join(format!("{other}-f32"))), "{layout} and {other}");
    }
}

fn logits(model: &Path, input: &[u32], more: &[&str]) -> Value {
    let (model, input) = (model.to_string_lossy(), id_list(input));
    let mut args = vec!["eval", "logits", &model, "--input-ids", &input, "--greedy", "8", "--kv", "f32", "--json"];
    args.extend(more);
    json(&args)
}

fn bits(got: &Value) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let raw = |field| floats(got, field).iter().map(|x| x.to_bits()).collect();
    (raw("last_logits"), raw("nll_per_token"), ids(got, "greedy_ids"))
}

#[test]
fn every_layout_runs_on_any_split() {
    let folder = written();
    let input = ids(&files::expected("llama"), "input_ids");
    for (i, (layout, _)) in LAYOUTS.into_iter().enumerate() {
        let got = logits(&folder.join(layout), &input, &[]);
        let distance = |other: &str| {
            let other = floats(&logits(&folder.join(format!("{other}-f32")), &input, &[]), "last_logits");
            let pairs = other.iter().zip(floats(&got, "last_logits"));
            (pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / other.len() as f64).sqrt()
        };
        // Products with blocks have their inputs in 8 bits, those with floats do not: near, and nearer than another layout's numbers.
        let (own, other) = (distance(layout), distance(LAYOUTS[(i + 3) % LAYOUTS.len()].0));
        println!("{layout}: logits are {own:.4} from those of floats, {other:.4} from those of another layout");
        assert!(own < 0.05 && own * 2.0 < other, "{layout}: {own}, another layout {other}");
        for split in [&["--pp", "2"][..], &["--tp", "2"], &["--pp", "2", "--tp", "2"], &["--tp", "3"]] {
            assert!(bits(&logits(&folder.join(layout), &input, split)) == bits(&got), "{layout} with {} differs", split.join(" "));
        }
    }
}

#[test]
fn workers_fetch_what_holds_their_rows() {
    let input = ids(&files::expected("llama"), "input_ids");
    for layout in ["gptq-4", "packed-4"] {
        let local = written().join(layout);
        let mirror = Mirror::start(&local);
        let sent = || mirror.sent().iter().map(|range| range.end - range.start).sum::<u64>();
        let here = Source::open(&local.to_string_lossy(), SourceOptions::default()).expect("the model");
        let spec = Spec { pipeline: 2, tensor: 2, ..Spec::default() };
        let plan = planner::plan(&spec, &here.header().expect("a header"), &Capacity { memory_bytes: None }).expect("a plan");
        let whole = here.files()[0].bytes - (2 << 20);
        let mut all = 0;
        for shard in plan.stages.iter().flat_map(|stage| &stage.shards) {
            let cache = tempfile::tempdir().expect("a temporary folder");
            let options = SourceOptions { keep: Keep::Parts, cache: Some(cache.path().to_owned()), ..SourceOptions::default() };
            let source = Source::open(&mirror.url, options).expect("the model");
            let before = sent();
            source.fetch(shard.ranges(), &|_, _| true).expect("its bytes");
            let fetched = sent() - before;
            for (file, range) in shard.ranges() {
                let (mut a, mut b) = (vec![0; (range.end - range.start) as usize], vec![0; (range.end - range.start) as usize]);
                source.read(file, range.clone(), &mut a).expect("what was fetched");
                here.read(file, range, &mut b).expect("the same");
                assert!(a == b, "{layout}, stage {} rank {}", shard.stage, shard.rank);
            }
            println!("{layout}, stage {} rank {}: {fetched} of {whole} bytes", shard.stage, shard.rank);
            assert_eq!(sent() - before, fetched, "{layout}: nothing more is asked for when it is read");
            assert!(
                0 < fetched && fetched < whole * 3 / 4,
                "{layout}, stage {} rank {}: {fetched} of {whole} bytes",
                shard.stage,
                shard.rank
            );
            all += fetched;
        }
        // Rows that lie side by side are fetched with what is between a rank's where that is less than a request, as it is in some of these.
        let most = if layout == "gptq-4" { whole * 2 } else { whole * 21 / 20 };
        assert!(all < most, "{layout}: {all} bytes of {whole} for four workers");
        let cache = tempfile::tempdir().expect("a temporary folder");
        let served = logits(Path::new(&mirror.url), &input, &["--cache", &cache.path().to_string_lossy(), "--pp", "2", "--tp", "2"]);
        assert!(bits(&served) == bits(&logits(&local, &input, &[])), "{layout}");
    }
}

#[test]
fn what_was_packed_is_converted_like_any_other_model() {
    let folder = written();
    let place = tempfile::tempdir().expect("a temporary folder");
    let input = ids(&files::expected("llama"), "input_ids");
    for layout in ["gptq-8", "awq"] {
        let (packed, floats_folder) = (folder.join(layout), folder.join(format!("{layout}-f32")));
        let path = |name: &str| place.path().join(format!("{layout}{name}"));
        let convert = |to: &Path| json(&["convert", &packed.to_string_lossy(), &to.to_string_lossy(), "--json"]);
        // As floats it has the numbers that the layout defines, and says nothing of packing any more.
        convert(&path("-folder"));
        let (got, expected) = (Folder::read(&path("-folder")).expect("a folder"), Folder::read(&floats_folder).expect("a folder"));
        assert!(got.config.get("quantization_config").is_none() && got.tensors.keys().eq(expected.tensors.keys()));
        for (name, tensor) in &got.tensors {
            let values = |t: &e2e::rewrite::Tensor| t.data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>();
            let same = if name.ends_with("_proj.weight") {
                values(tensor) == values(&expected.tensors[name])
            } else {
                tensor.data == expected.tensors[name].data
            };
            assert!(same && tensor.shape == expected.tensors[name].shape, "{layout}: {name}");
        }
        // In GGUF it has the same blocks, llama's rows turned.
        convert(&path(".gguf"));
        let (before, after) = (logits(&packed, &input, &[]), logits(&path(".gguf"), &input, &[]));
        let off = floats(&before, "last_logits").iter().zip(floats(&after, "last_logits")).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= 1e-4, "{layout} in GGUF: last logits are off by {off}");
    }
}

#[test]
fn layouts_that_blocks_do_not_hold_are_refused_by_field() {
    let folder = written();
    let changed = |layout: &str, from: &str, to: &str| {
        let copy = tempfile::tempdir().expect("a temporary folder");
        for file in std::fs::read_dir(folder.join(layout)).expect("the folder") {
            let file = file.expect("an entry");
            std::fs::copy(file.path(), copy.path().join(file.file_name())).expect("a copy");
        }
        let config = copy.path().join("config.json");
        let text = std::fs::read_to_string(&config).expect("config.json");
        assert!(text.contains(from), "{from}");
        std::fs::write(&config, text.replace(from, to)).expect("a writable file");
        let done = run(&["eval", "logits", &copy.path().to_string_lossy(), "--input-ids", "1,2", "--json"]);
        assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
        done.stderr
    };
    let said = changed("gptq-4", "\"desc_act\": false", "\"desc_act\": true");
    assert!(said.contains("quantization_config.desc_act") && said.contains("order of activations"), "{said}");
    let said = changed("int8", "int-quantized", "float-quantized");
    assert!(said.contains("quantization_config.format"), "{said}");
    // What the weights say is looked at, not what is said of them.
    let said = changed("gptq-4-asymmetric", "\"sym\": false", "\"sym\": true");
    assert!(said.contains("zero point") && said.contains("qzeros"), "{said}");
}
