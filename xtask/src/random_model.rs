//! A Llama of 1.1 billion parameters with random weights, for benchmarks: a common shape in common types, that no download is needed for.
//!
//! 16 layers, hidden size 2048, 32 heads on 8 KV heads, FFN 8192, vocabulary 32,000. Q4_K; Q6_K for the output matrix and in every second
//! layer for values and down, as quantizers mix them. GGUF: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context, Result};

use crate::{paths, process::say};

const LAYERS: u64 = 16;
const HIDDEN: u64 = 2048;
const FFN: u64 = 8192;
const KV: u64 = 512;
const VOCAB: u64 = 32_000;
/// Tensors begin at multiples of this many bytes.
const ALIGNMENT: u64 = 32;

/// Types by their numbers in GGUF.
#[derive(Clone, Copy)]
enum Type {
    F32 = 0,
    Q4K = 12,
    Q6K = 14,
}

struct Tensor {
    name: String,
    dtype: Type,
    rows: u64,
    k: u64,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        let (values, bytes) = match self.dtype {
            Type::F32 => (1, 4),
            Type::Q4K => (256, 144),
            Type::Q6K => (256, 210),
        };
        self.rows * self.k / values * bytes
    }
}

/// The model's file in Skein's cache, written when it is missing (676 MB).
///
/// # Errors
/// If it cannot be written.
pub(crate) fn ensure() -> Result<PathBuf> {
    let path = paths::cache()?.join("bench").join("llama-1.1b-q4_k.gguf");
    if path.exists() {
        return Ok(path);
    }
    say("writing a model of 1.1 billion random parameters (676 MB)");
    let folder = path.parent().context("the cache has no folder")?;
    fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let scratch = folder.join(format!("write-{}", process::id()));
    let written = write(&scratch).and_then(|()| fs::rename(&scratch, &path).map_err(Into::into));
    if written.is_err() {
        // What is left of a failed attempt is of no use; the first error is the one to tell.
        let _ = fs::remove_file(&scratch);
    }
    written.with_context(|| format!("failed to write {}", path.display()))?;
    Ok(path)
}

fn write(path: &Path) -> Result<()> {
    let tensors = tensors();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let header = header(&tensors);
    file.write_all(&header)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut at = header.len() as u64;
    for tensor in &tensors {
        file.write_all(&vec![0; (at.next_multiple_of(ALIGNMENT) - at) as usize])?;
        at = at.next_multiple_of(ALIGNMENT) + tensor.bytes();
        let mut row = Vec::new();
        for _ in 0..tensor.rows {
            row.clear();
            random.row(tensor, &mut row);
            file.write_all(&row)?;
        }
    }
    file.flush()?;
    Ok(())
}

fn tensors() -> Vec<Tensor> {
    let mut tensors = Vec::new();
    let mut add = |name: String, dtype, rows, k| tensors.push(Tensor { name, dtype, rows, k });
    add("token_embd.weight".into(), Type::Q4K, VOCAB, HIDDEN);
    add("output_norm.weight".into(), Type::F32, 1, HIDDEN);
    add("output.weight".into(), Type::Q6K, VOCAB, HIDDEN);
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let mixed = if layer % 2 == 0 { Type::Q6K } else { Type::Q4K };
        add(name("attn_norm"), Type::F32, 1, HIDDEN);
        add(name("attn_q"), Type::Q4K, HIDDEN, HIDDEN);
        add(name("attn_k"), Type::Q4K, KV, HIDDEN);
        add(name("attn_v"), mixed, KV, HIDDEN);
        add(name("attn_output"), Type::Q4K, HIDDEN, HIDDEN);
        add(name("ffn_norm"), Type::F32, 1, HIDDEN);
        add(name("ffn_gate"), Type::Q4K, FFN, HIDDEN);
        add(name("ffn_up"), Type::Q4K, FFN, HIDDEN);
        add(name("ffn_down"), mixed, HIDDEN, FFN);
    }
    tensors
}

/// Everything before the first tensor's padding.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut keys = Keys::default();
    keys.text("general.architecture", "llama");
    keys.text("general.name", "Random Llama 1.1B");
    for (name, value) in [
        ("block_count", LAYERS),
        ("context_length", 4096),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", FFN),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 8),
        ("rope.dimension_count", 64),
        ("vocab_size", VOCAB),
    ] {
        keys.number(&format!("llama.{name}"), value as u32);
    }
    keys.float("llama.attention.layer_norm_rms_epsilon", 1e-5);
    keys.float("llama.rope.freq_base", 10_000.0);
    keys.vocabulary();
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(keys.count.to_le_bytes());
    out.extend(keys.bytes);
    let mut offset = 0_u64;
    for tensor in tensors {
        string(&mut out, &tensor.name);
        let dims: &[u64] = if tensor.rows == 1 { &[tensor.k] } else { &[tensor.k, tensor.rows] };
        out.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
        out.extend((tensor.dtype as u32).to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = (offset + tensor.bytes()).next_multiple_of(ALIGNMENT);
    }
    out
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Key-value pairs of a header.
#[derive(Default)]
struct Keys {
    count: u64,
    bytes: Vec<u8>,
}

impl Keys {
    /// Numbers of the types of values.
    const U32: u32 = 4;
    const I32: u32 = 5;
    const F32: u32 = 6;
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;

    fn key(&mut self, name: &str, dtype: u32) {
        self.count += 1;
        string(&mut self.bytes, name);
        self.bytes.extend(dtype.to_le_bytes());
    }

    fn text(&mut self, name: &str, value: &str) {
        self.key(name, Self::TEXT);
        string(&mut self.bytes, value);
    }

    fn number(&mut self, name: &str, value: u32) {
        self.key(name, Self::U32);
        self.bytes.extend(value.to_le_bytes());
    }

    fn float(&mut self, name: &str, value: f32) {
        self.key(name, Self::F32);
        self.bytes.extend(value.to_le_bytes());
    }

    fn array(&mut self, name: &str, dtype: u32) {
        self.key(name, Self::ARRAY);
        self.bytes.extend(dtype.to_le_bytes());
        self.bytes.extend(VOCAB.to_le_bytes());
    }

    /// A vocabulary of three special pieces, all bytes, and made-up pieces.
    fn vocabulary(&mut self) {
        self.text("tokenizer.ggml.model", "llama");
        self.array("tokenizer.ggml.tokens", Self::TEXT);
        for id in 0..VOCAB {
            let piece = match id {
                0 => "<unk>".to_owned(),
                1 => "<s>".to_owned(),
                2 => "</s>".to_owned(),
                3..259 => format!("<0x{:02X}>", id - 3),
                _ => format!("piece{id}"),
            };
            string(&mut self.bytes, &piece);
        }
        self.array("tokenizer.ggml.scores", Self::F32);
        (0..VOCAB).for_each(|id| self.bytes.extend((-(id as f32)).to_le_bytes()));
        self.array("tokenizer.ggml.token_type", Self::I32);
        for id in 0..VOCAB {
            // Unknown, control, byte, normal.
            let kind: i32 = match id {
                0 => 2,
                1 | 2 => 3,
                3..259 => 6,
                _ => 1,
            };
            self.bytes.extend(kind.to_le_bytes());
        }
        self.number("tokenizer.ggml.bos_token_id", 1);
        self.number("tokenizer.ggml.eos_token_id", 2);
    }
}

/// A xorshift generator: the same file each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Appends a row: ones for a norm, else blocks of random bytes whose scales make weights of a few hundredths.
    fn row(&mut self, tensor: &Tensor, out: &mut Vec<u8>) {
        let (block, scales): (usize, &[(usize, u16)]) = match tensor.dtype {
            Type::F32 => {
                (0..tensor.k).for_each(|_| out.extend(1.0_f32.to_le_bytes()));
                return;
            }
            // 2^-14 and 2^-11, as f16: values of 0 to 15 times 0 to 63 scales, less 0 to 63 minima.
            Type::Q4K => (144, &[(0, 0x0400), (2, 0x1000)]),
            // 2^-16, subnormal: values of -32 to 31 times scales of -128 to 127.
            Type::Q6K => (210, &[(208, 0x0100)]),
        };
        for _ in 0..tensor.k / 256 {
            let start = out.len();
            while out.len() < start + block {
                out.extend(self.next().to_le_bytes());
            }
            out.truncate(start + block);
            for &(at, scale) in scales {
                out[start + at..][..2].copy_from_slice(&scale.to_le_bytes());
            }
        }
    }
}
