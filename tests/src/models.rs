//! Small quantized models with random weights, in shapes that no fixture has.

use std::{fs::File, io, path::Path};

use plan::{
    dtype::DType,
    gguf::{Kind, Value, Writer},
};

const VOCAB: usize = 2500;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const LAYERS: usize = 3;

/// Splitmix64 (Steele, Lea & Flood 2014): the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, n: usize) -> impl Iterator<Item = u8> {
        (0..n).map(|_| self.next() as u8)
    }

    /// A 16-bit float of the binade whose bits begin with `exponent`.
    fn half(&mut self, exponent: u16) -> [u8; 2] {
        (exponent | (self.next() as u16 & 0xff)).to_le_bytes()
    }
}

/// Blocks of `dtype` for `rows` rows of `k` values: random, with a mean near 0 and a size that keeps activations tame.
fn weights(random: &mut Random, dtype: DType, rows: usize, k: usize) -> Vec<u8> {
    let mut data = Vec::new();
    for _ in 0..rows * k / dtype.block_len() {
        match dtype {
            DType::Q8_0 => {
                data.extend(random.half(0x1000));
                data.extend(random.bytes(32));
            }
            DType::Q4_K => {
                data.extend(random.half(0x0c00));
                data.extend(random.half(0x1800));
                data.extend(random.bytes(12 + 128));
            }
            _ => data.extend(1.0f32.to_le_bytes()),
        }
    }
    data
}

/// Writes a llama with 4 heads and 2 KV heads, 3 layers and 2,500 tokens whose matrices are `dtype` (Q8_0 or Q4_K); `tied`: its embedding table is
/// its vocabulary matrix.
///
/// Between two ranks the middle head border and the middle of the FFN both cut an activation block: heads × head_dim is 96 (Q8_0, blocks of 32)
/// or 256 (Q4_K, blocks of 256), the FFN is three blocks wide. The same call writes the same bytes.
///
/// # Errors
/// If the file cannot be written.
///
/// # Panics
/// If `dtype` is another one.
pub fn write_llama(path: &Path, dtype: DType, tied: bool) -> io::Result<()> {
    let (hidden, head_dim) = match dtype {
        DType::Q8_0 => (96, 24),
        DType::Q4_K => (256, 64),
        other => panic!("blocks of {other:?} are not generated"),
    };
    let ffn = 3 * dtype.block_len();
    let mut random = Random(7);
    let mut file = Writer::new();
    let count = |n: usize| Value::U32(n as u32);
    file.metadata("general.architecture", Value::String("llama".into()))
        .metadata("llama.block_count", count(LAYERS))
        .metadata("llama.context_length", count(512))
        .metadata("llama.embedding_length", count(hidden))
        .metadata("llama.feed_forward_length", count(ffn))
        .metadata("llama.attention.head_count", count(HEADS))
        .metadata("llama.attention.head_count_kv", count(KV_HEADS))
        .metadata("llama.attention.key_length", count(head_dim))
        .metadata("llama.attention.value_length", count(head_dim))
        .metadata("llama.rope.dimension_count", count(head_dim))
        .metadata("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .metadata("llama.vocab_size", count(VOCAB))
        .metadata("tokenizer.ggml.model", Value::String("llama".into()))
        .array("tokenizer.ggml.tokens", Kind::String, (0..VOCAB).map(|id| Value::String(format!("t{id}"))).collect())
        .array("tokenizer.ggml.scores", Kind::F32, (0..VOCAB).map(|id| Value::F32(-(id as f32))).collect())
        .array("tokenizer.ggml.token_type", Kind::I32, vec![Value::I32(1); VOCAB])
        .metadata("tokenizer.ggml.bos_token_id", count(1))
        .metadata("tokenizer.ggml.eos_token_id", count(2));
    let mut matrix = |file: &mut Writer, name: &str, rows: usize, k: usize| {
        file.tensor(name, &[rows, k], dtype, weights(&mut random, dtype, rows, k));
    };
    let norm = |file: &mut Writer, name: &str| {
        file.tensor(name, &[hidden], DType::F32, weights(&mut Random(0), DType::F32, 1, hidden));
    };
    matrix(&mut file, "token_embd.weight", VOCAB, hidden);
    if !tied {
        matrix(&mut file, "output.weight", VOCAB, hidden);
    }
    norm(&mut file, "output_norm.weight");
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        norm(&mut file, &name("attn_norm"));
        norm(&mut file, &name("ffn_norm"));
        matrix(&mut file, &name("attn_q"), HEADS * head_dim, hidden);
        matrix(&mut file, &name("attn_k"), KV_HEADS * head_dim, hidden);
        matrix(&mut file, &name("attn_v"), KV_HEADS * head_dim, hidden);
        matrix(&mut file, &name("attn_output"), hidden, HEADS * head_dim);
        matrix(&mut file, &name("ffn_gate"), ffn, hidden);
        matrix(&mut file, &name("ffn_up"), ffn, hidden);
        matrix(&mut file, &name("ffn_down"), hidden, ffn);
    }
    file.write(&mut io::BufWriter::new(File::create(path)?))
}
