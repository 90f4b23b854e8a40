//! Lists of packed tensors become lists of blocks, and what cannot is named.

use serde_json::{Value, json};

use super::{Packing, take_packed};
use crate::{
    dtype::DType,
    header::HfConfig,
    model::ModelFile,
    safetensors::{Header, Tensor},
};

/// Name, type, shape.
type Listed<'a> = (&'a str, &'a str, &'a [u64]);

/// A file of tensors.
fn files(tensors: &[Listed<'_>]) -> Vec<(ModelFile, Header)> {
    let (mut header, mut at) = (Header { data_offset: 100, ..Header::default() }, 100);
    for (name, dtype, shape) in tensors {
        let element = if dtype.ends_with("32") {
            4
        } else if dtype.ends_with("16") {
            2
        } else {
            1
        };
        let bytes = shape.iter().product::<u64>() * element;
        let (name, dtype) = ((*name).to_owned(), (*dtype).to_owned());
        header.tensors.push(Tensor {
            name,
            dtype,
            shape: shape.to_vec(),
            offset: at,
            bytes,
            entry_offset: 8 + header.tensors.len() as u64,
        });
        at += bytes;
    }
    vec![(ModelFile { name: "model.safetensors".into(), bytes: at }, header)]
}

fn config(quantization: &Value) -> Vec<u8> {
    let mut map = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "vocab_size": 8});
    map["quantization_config"] = quantization.clone();
    map.to_string().into_bytes()
}

fn gptq(more: &Value) -> Value {
    let mut all = json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": false, "sym": true});
    more.as_object().into_iter().flatten().for_each(|(key, value)| all[key] = value.clone());
    all
}

fn compressed(format: &str, weights: &Value) -> Value {
    let mut all = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32, "actorder": null});
    weights.as_object().into_iter().flatten().for_each(|(key, value)| all[key] = value.clone());
    json!({"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"targets": ["Linear"], "weights": all}}})
}

const GPTQ: [Listed<'_>; 5] = [
    ("a.qweight", "I32", &[8, 48]),
    ("a.qzeros", "I32", &[2, 6]),
    ("a.scales", "F16", &[2, 48]),
    ("a.g_idx", "I32", &[64]),
    ("n.weight", "F16", &[64]),
];

#[test]
fn parts_lie_where_their_layout_says() {
    let mut parts = files(&GPTQ);
    let packed = take_packed(&config(&gptq(&json!({}))), &mut parts).unwrap();
    let [a] = &packed[..] else { panic!("{packed:?}") };
    assert_eq!((a.name.as_str(), a.rows, a.columns, a.group, a.dtype), ("a.weight", 48, 64, 32, DType::Q4_0));
    assert_eq!(a.packing, Packing::Gptq { zero_offset: 1 });
    let left: Vec<&str> = parts.iter().flat_map(|(_, h)| &h.tensors).map(|t| t.name.as_str()).collect();
    assert_eq!(left, ["n.weight", "a.weight"]);
    assert_eq!((parts[1].0.bytes, &parts[1].1.tensors[0].dtype), (48 * 36, &"Q4_0".to_owned()));
    // Rows 9 to 17: a column of words each, of zero points the second and third words.
    let (weights, scales, zeros) = a.parts(&(9..17));
    let ranges = |part: super::Part<'_>| part.0.ranges(part.1.clone(), part.2.clone());
    assert_eq!(ranges(weights.clone()).len(), 8);
    assert_eq!(ranges(weights)[1], 100 + (48 + 9) * 4..100 + (48 + 17) * 4);
    assert_eq!(ranges(scales)[1], 100 + 1536 + 48 + (48 + 9) * 2..100 + 1536 + 48 + (48 + 17) * 2);
    assert_eq!(ranges(zeros.unwrap()), [100 + 1536 + 4..100 + 1536 + 12, 100 + 1536 + 28..100 + 1536 + 36]);
    // All rows are one range.
    let all = ranges(a.parts(&(0..48)).0);
    assert_eq!((all.len(), all[0].clone()), (1, 100..100 + 1536));
}

#[test]
fn other_layouts_have_the_types_that_hold_them() {
    let one = |quantization: &Value, tensors: &[Listed<'_>]| {
        let packed = take_packed(&config(quantization), &mut files(tensors)).unwrap();
        (packed[0].dtype, packed[0].rows, packed[0].columns, packed[0].group)
    };
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": true, "version": "gemm"});
    assert_eq!(
        one(&awq, &[("a.qweight", "I32", &[128, 2]), ("a.qzeros", "I32", &[2, 2]), ("a.scales", "F16", &[2, 16])]),
        (DType::Q5_0, 16, 128, 64)
    );
    assert_eq!(one(&gptq(&json!({"sym": false})), &GPTQ), (DType::Q5_0, 48, 64, 32));
    let bytes = [("a.qweight", "I32", &[16_u64, 8][..]), ("a.qzeros", "I32", &[1, 2]), ("a.scales", "F16", &[1, 8])];
    assert_eq!(one(&gptq(&json!({"bits": 8, "group_size": -1})), &bytes), (DType::Q8_0, 8, 64, 64));
    let rows = [("a.weight_packed", "I32", &[16_u64, 8][..]), ("a.weight_scale", "BF16", &[16, 2]), ("a.weight_shape", "I64", &[2])];
    assert_eq!(one(&compressed("pack-quantized", &json!({})), &rows), (DType::Q4_0, 16, 64, 32));
    let zeros = [rows[0], rows[1], rows[2], ("a.weight_zero_point", "I32", &[2, 2])];
    assert_eq!(one(&compressed("pack-quantized", &json!({"symmetric": false})), &zeros), (DType::Q5_0, 16, 64, 32));
    let channel = json!({"num_bits": 8, "strategy": "channel", "group_size": null});
    let signed = [("a.weight", "I8", &[16_u64, 64][..]), ("a.weight_scale", "BF16", &[16, 1]), ("n.weight", "BF16", &[64])];
    assert_eq!(one(&compressed("int-quantized", &channel), &signed), (DType::Q8_0, 16, 64, 64));
}

#[test]
fn what_blocks_do_not_hold_is_named() {
    let said = |quantization: &Value| HfConfig::parse(&config(quantization)).unwrap_err().to_string();
    let cases = [
        (gptq(&json!({"desc_act": true})), "quantization_config.desc_act"),
        (gptq(&json!({"bits": 3})), "quantization_config.bits"),
        (gptq(&json!({"bits": 8, "sym": false})), "quantization_config.sym"),
        (gptq(&json!({"dynamic": {"x": {}}})), "quantization_config.dynamic"),
        (gptq(&json!({"checkpoint_format": "marlin"})), "quantization_config.checkpoint_format"),
        (gptq(&json!({"group_size": "x"})), "quantization_config.group_size"),
        (gptq(&json!({"quant_method": "bitsandbytes"})), "quantization_config.quant_method"),
        (json!({"bits": 4}), "quantization_config.quant_method"),
        (json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}), "quantization_config.version"),
        (json!({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": false}), "quantization_config.zero_point"),
        (json!({"quant_method": "awq", "bits": 8, "group_size": 64}), "quantization_config.bits"),
        (compressed("float-quantized", &json!({})), "quantization_config.format"),
        (compressed("pack-quantized", &json!({"actorder": "group"})), "group_0.weights.actorder"),
        (compressed("pack-quantized", &json!({"strategy": "block"})), "group_0.weights.strategy"),
        (compressed("pack-quantized", &json!({"type": "float"})), "group_0.weights.type"),
        (compressed("int-quantized", &json!({"num_bits": 8, "symmetric": false})), "group_0.weights.symmetric"),
        (compressed("int-quantized", &json!({"num_bits": 4})), "group_0.weights.num_bits"),
    ];
    for (quantization, field) in cases {
        let text = said(&quantization);
        assert!(text.contains(field), "{text} without {field}");
    }
    let mut two = compressed("pack-quantized", &json!({}));
    two["config_groups"]["group_1"] = two["config_groups"]["group_0"].clone();
    assert!(said(&two).contains("quantization_config.config_groups"));
    two = compressed("int-quantized", &json!({"num_bits": 8}));
    two["config_groups"]["group_0"]["input_activations"] = json!({"dynamic": false});
    assert!(said(&two).contains("group_0.input_activations.dynamic"));
}

#[test]
fn parts_of_other_types_and_shapes_are_named() {
    let said = |change: &dyn Fn(&mut Vec<Listed<'static>>)| {
        let mut tensors = GPTQ.to_vec();
        change(&mut tensors);
        take_packed(&config(&gptq(&json!({}))), &mut files(&tensors)).unwrap_err().to_string()
    };
    assert!(
        said(&|t| {
            t.remove(2);
        })
        .contains("a.scales is missing")
    );
    assert!(
        said(&|t| {
            t.remove(1);
        })
        .contains("a.qzeros is missing")
    );
    assert!(said(&|t| t[2].1 = "F32").contains("tensor a.scales at byte 10 of model.safetensors has type F32, expected F16 or BF16"));
    assert!(said(&|t| t[0].1 = "F32").contains("a.qweight"));
    assert!(said(&|t| t[2].2 = &[2, 40]).contains("tensor a.scales at byte 10 of model.safetensors has shape [2, 40], expected [2, 48]"));
    assert!(said(&|t| t[0].2 = &[5, 48]).contains("whole blocks of 32"));
    assert!(said(&|t| t[0].2 = &[384]).contains("tensor a.qweight"));
    assert!(said(&|t| t[0].2 = &[0, 1 << 62]).contains("tensor a.qweight"));
    assert!(said(&|t| t[0].2 = &[8, 47]).contains("a multiple of 8 rows"));
    assert!(said(&|t| t.push(GPTQ[0])).contains("appears again"));
}
