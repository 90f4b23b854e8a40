//! Dequantized weights of the reference model, against values computed from the format's definition elsewhere.

use std::io::Cursor;

use e2e::files;
use kernels::{FileMap, Isa, Matrix, Pool, WeightType};
use plan::gguf::{self, Keep};

/// First six values of row 0 and the sum of all values.
struct Known {
    tensor: &'static str,
    dtype: WeightType,
    first: [f32; 6],
    sum: f64,
}

const KNOWN: [Known; 4] = [
    Known {
        tensor: "token_embd.weight",
        dtype: WeightType::Q8_0,
        first: [-0.0072441, 0.042861, -0.0344095, -0.0211287, -0.0120735, 0.0289764],
        sum: -27668.3686,
    },
    Known {
        tensor: "blk.0.attn_q.weight",
        dtype: WeightType::Q5_0,
        first: [-0.0037842, 0.0075684, -0.0151367, -0.0056763, 0.0113525, 0.0094604],
        sum: -51.69337,
    },
    Known {
        tensor: "blk.0.attn_output.weight",
        dtype: WeightType::Q4_K,
        first: [-0.0157051, 0.0496693, -0.0374966, 0.060565, -0.0048094, 0.0387735],
        sum: -1.83308,
    },
    Known {
        tensor: "blk.0.ffn_down.weight",
        dtype: WeightType::Q6_K,
        first: [0.0052117, 0.0217155, -0.0251899, 0.0138979, 0.0269272, -0.0156351],
        sum: 6.48019,
    },
];

#[test]
fn reference_weights_dequantize_to_known_values() {
    let map = FileMap::open(files::reference()).expect("a readable file");
    let bytes = map.bytes();
    let header = gguf::read(&mut Cursor::new(bytes), bytes.len() as u64, Keep::Short, true).expect("a GGUF header");
    let pool = Pool::new(1);
    for known in KNOWN {
        let tensor = header.tensors.iter().find(|t| t.name == known.tensor).expect("the tensor");
        let (k, rows) = (tensor.dims[0] as usize, tensor.dims[1] as usize);
        let data = &bytes[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
        for isa in Isa::available() {
            let matrix = Matrix::pack(isa, known.dtype, rows, k, data, &pool).expect("a matrix");
            let mut row = vec![0.0; k];
            matrix.row(0, &mut row);
            for (got, want) in row.iter().zip(known.first) {
                assert!((got - want).abs() <= 1e-6, "{} on {}: row 0 begins {:?}", known.tensor, isa.name(), &row[..6]);
            }
            let mut sum = 0.0;
            for r in 0..rows {
                matrix.row(r, &mut row);
                sum += row.iter().map(|&x| f64::from(x)).sum::<f64>();
            }
            assert!((sum - known.sum).abs() <= 1e-4, "{} on {}: sum {sum}, expected {}", known.tensor, isa.name(), known.sum);
            // A row apart is seen: the sum without row 0 differs.
            matrix.row(0, &mut row);
            assert!((sum - row.iter().map(|&x| f64::from(x)).sum::<f64>() - known.sum).abs() > 1e-4);
        }
    }
}
