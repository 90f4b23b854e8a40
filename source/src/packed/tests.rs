//! What is read of a packed matrix, and what is said of one whose numbers are not what its configuration says.

use std::{fs, path::Path};

use plan::{header::take_packed, model::ModelFile, safetensors};
use serde_json::json;

use super::Unpacked;
use crate::{Source, SourceError, SourceOptions, place::Place, ranges::Ranges};

/// A GPTQ matrix of 64 rows and 64 columns in groups of 32, its integers counting up.
struct Gptq {
    zeros: Vec<u32>,
    scales: Vec<u16>,
    order: Vec<u32>,
}

impl Default for Gptq {
    fn default() -> Self {
        Self { zeros: vec![0x7777_7777; 16], scales: vec![0x3400; 128], order: (0..64).map(|i| i / 32).collect() }
    }
}

const CONFIG: &str = r#"{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": true}}"#;

impl Gptq {
    fn write(&self, folder: &Path) {
        let words: Vec<u32> = (0..512_u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        let bytes = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let scales = self.scales.iter().flat_map(|w| w.to_le_bytes()).collect();
        let parts = [
            ("a.qweight", "I32", json!([8, 64]), bytes(&words)),
            ("a.qzeros", "I32", json!([2, 8]), bytes(&self.zeros)),
            ("a.scales", "F16", json!([2, 64]), scales),
            ("a.g_idx", "I32", json!([64]), bytes(&self.order)),
        ];
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, dtype, shape, bytes) in parts {
            let end = data.len() + bytes.len();
            header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]}));
            data.extend(bytes);
        }
        let header = serde_json::Value::Object(header).to_string();
        fs::write(folder.join("model.safetensors"), [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
        fs::write(folder.join("config.json"), CONFIG).unwrap();
    }

    fn read(&self) -> Result<Vec<u8>, SourceError> {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        let source = Source::open(&folder.path().to_string_lossy(), SourceOptions::default())?;
        let mut blocks = vec![0; 64 * 36];
        source.read(1, 0..64 * 36, &mut blocks)?;
        Ok(blocks)
    }

    fn refusal(&self) -> String {
        self.read().expect_err("a refusal").to_string()
    }
}

#[test]
fn a_row_is_blocks_of_its_integers() {
    let blocks = Gptq::default().read().unwrap();
    for row in [0, 1, 63] {
        for (i, block) in blocks[row * 36..][..36].chunks_exact(18).enumerate() {
            let integer = |at: usize| {
                let word = ((at / 8 * 64 + row) as u32).wrapping_mul(0x9e37_79b9);
                (word >> (4 * (at % 8)) & 15) as u8
            };
            assert_eq!(block[..2], [0, 0x34]);
            for j in 0..16 {
                assert_eq!(block[2 + j], integer(32 * i + j) | integer(32 * i + 16 + j) << 4, "row {row}, block {i}, byte {j}");
            }
        }
    }
}

#[test]
fn what_is_not_as_it_is_said_is_named_with_its_place() {
    let mut zeros = Gptq::default();
    zeros.zeros[9] = 0x7777_7727;
    let said = zeros.refusal();
    assert!(said.contains("a.qzeros at byte") && said.contains("row 9, group 1 is 3, expected 8"), "{said}");
    let mut scales = Gptq::default();
    scales.scales[64 + 5] = 0x7c00;
    assert!(scales.refusal().contains("a.scales at byte"), "{}", scales.refusal());
    assert!(scales.refusal().contains("row 5, group 1: the scale inf"), "{}", scales.refusal());
    let mut order = Gptq::default();
    order.order.swap(3, 40);
    let said = order.refusal();
    assert!(said.contains("a.g_idx at byte") && said.contains("value 3 is of group 1, expected 0"), "{said}");
}

#[test]
fn half_of_the_rows_take_half_of_the_bytes() {
    let folder = tempfile::tempdir().unwrap();
    Gptq::default().write(folder.path());
    let place = Place::local(&folder.path().join("model.safetensors")).unwrap();
    let file = ModelFile { name: "model.safetensors".into(), bytes: place.bytes() };
    let header = safetensors::read(&mut *place.stream().unwrap(), place.bytes()).unwrap();
    let mut parts = vec![(file, header)];
    let matrices = take_packed(CONFIG.as_bytes(), &mut parts).unwrap();
    let unpacked = Unpacked::new(parts[1].0.clone(), matrices);
    let taken = |rows: std::ops::Range<u64>| {
        let mut ranges = Ranges::default();
        for (file, range) in unpacked.covering(&(rows.start * 36..rows.end * 36)) {
            assert_eq!(file, 0);
            ranges.insert(range);
        }
        ranges.bytes()
    };
    let order = 256;
    assert_eq!(taken(0..64), 2048 + 64 + 256 + order);
    assert_eq!((taken(0..32), taken(32..64)), (1024 + 32 + 128 + order, 1024 + 32 + 128 + order));
    // A row shares its words of zero points with seven others.
    assert_eq!(taken(3..4), 32 + 8 + 4 + order);
}
