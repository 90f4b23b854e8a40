//! Values of every block type against those of the `gguf` package (`golden/make.py`).

use std::collections::BTreeMap;

use kernels::{Isa, Matrix, Pool, WeightType, convert_rows};

/// What the golden file has of a type.
struct Known {
    stored: Vec<u8>,
    values: Vec<u32>,
    /// Floats, and what they become.
    quantized: Option<(Vec<u8>, Vec<u8>)>,
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn known() -> BTreeMap<String, Known> {
    let file: serde_json::Value = serde_json::from_str(include_str!("golden/blocks.json")).unwrap();
    let of = |(name, of): (&String, &serde_json::Value)| {
        let numbers = |key: &str| of[key].as_array().map(|list| list.iter().map(|v| v.as_u64().unwrap() as u32).collect::<Vec<_>>());
        let hex = |key: &str| of[key].as_str().map(bytes);
        let input = numbers("input").map(|list| list.into_iter().flat_map(u32::to_le_bytes).collect());
        (name.clone(), Known { stored: hex("stored").unwrap(), values: numbers("values").unwrap(), quantized: input.zip(hex("quantized")) })
    };
    file.as_object().unwrap().iter().map(of).collect()
}

#[test]
fn every_block_type_has_the_values_of_the_gguf_package() {
    let (known, pool) = (known(), Pool::new(1));
    for dtype in WeightType::ALL.into_iter().filter(|dtype| dtype.activation_block().is_some()) {
        let Known { stored, values, .. } = &known[&dtype.to_string()];
        for isa in Isa::available() {
            let row = |stored: &[u8]| {
                let matrix = Matrix::pack(isa, dtype, 1, values.len(), stored, &pool).unwrap();
                let mut row = vec![0.0; values.len()];
                matrix.row(0, &mut row);
                row.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            // −0 and 0 are one value, and NaN never occurs.
            let same = |a: &[u32], b: &[u32]| a.iter().zip(b).all(|(&a, &b)| f32::from_bits(a) == f32::from_bits(b));
            assert!(same(&row(stored), values), "{dtype} on {isa}");
            // Control: one changed bit shows.
            let mut other = stored.clone();
            other[dtype.block_bytes() / 2] ^= 4;
            assert!(!same(&row(&other), values), "{dtype} on {isa}");
        }
    }
}

#[test]
fn simple_types_are_quantized_as_the_gguf_package_does() {
    let (known, pool) = (known(), Pool::new(1));
    let mut compared = 0;
    for dtype in WeightType::ALL.into_iter().filter(|dtype| dtype.activation_block().is_some()) {
        let Some((input, expected)) = &known[&dtype.to_string()].quantized else { continue };
        let got = convert_rows(&pool, (WeightType::F32, dtype), 512, input, None).unwrap();
        assert_eq!(&got, expected, "{dtype}");
        compared += 1;
    }
    assert_eq!(compared, 5);
}
