//! Models for this crate's tests: GGUF files and headers of any shape.

use crate::{
    dtype::DType,
    gguf::{Array, Entry, GgmlType, Header, Kind, Tensor, Value, Writer},
    header::from_gguf,
    model::{ModelFile, ModelHeader},
};

/// A model by its numbers; the fields are those of the GGUF keys.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) arch: &'static str,
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) ffn: usize,
    pub(crate) vocab: usize,
    pub(crate) context: u32,
    pub(crate) matrix: DType,
    pub(crate) tied: bool,
}

impl Sample {
    /// A llama of 2 layers whose file has less than 16 KiB.
    pub(crate) fn llama() -> Self {
        Self {
            arch: "llama",
            layers: 2,
            hidden: 8,
            heads: 4,
            kv_heads: 2,
            head_dim: 2,
            ffn: 12,
            vocab: 6,
            context: 64,
            matrix: DType::F32,
            tied: false,
        }
    }

    /// A gemma3 of 7 layers, the sixth of them global.
    pub(crate) fn gemma3() -> Self {
        Self { arch: "gemma3", layers: 7, kv_heads: 1, tied: true, ..Self::llama() }
    }

    /// Metadata in file order.
    pub(crate) fn metadata(&self) -> Vec<(String, Value)> {
        let text = |s: &str| Value::String(s.to_owned());
        let arch = |key: &str, value| (format!("{}.{key}", self.arch), value);
        let count = |n: usize| Value::U32(n as u32);
        let list = |kind, values: Vec<Value>| Value::Array(Box::new(Array { kind, len: values.len() as u64, values: Some(values) }));
        let tokens: Vec<String> = (0..self.vocab).map(|i| format!("t{i}")).collect();
        let mut all = vec![
            ("general.architecture".to_owned(), text(self.arch)),
            arch("block_count", count(self.layers)),
            arch("context_length", Value::U32(self.context)),
            arch("embedding_length", count(self.hidden)),
            arch("feed_forward_length", count(self.ffn)),
            arch("attention.head_count", count(self.heads)),
            arch("attention.head_count_kv", count(self.kv_heads)),
            arch("attention.key_length", count(self.head_dim)),
            arch("attention.value_length", count(self.head_dim)),
            arch("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            arch("rope.freq_base", Value::F32(5e5)),
            ("tokenizer.ggml.model".to_owned(), text("llama")),
            ("tokenizer.ggml.tokens".to_owned(), list(Kind::String, tokens.iter().map(|t| text(t)).collect())),
            ("tokenizer.ggml.scores".to_owned(), list(Kind::F32, (0..self.vocab).map(|i| Value::F32(-(i as f32))).collect())),
            ("tokenizer.ggml.token_type".to_owned(), list(Kind::I32, vec![Value::I32(1); self.vocab])),
            ("tokenizer.ggml.bos_token_id".to_owned(), Value::U32(1)),
            ("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(true)),
        ];
        if self.arch == "gemma3" {
            all.push(arch("attention.sliding_window", Value::U32(8)));
        }
        all
    }

    /// Name, row-major shape and type of each tensor in file order.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>, DType)> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let matrix = |name: &str, rows, columns| (name.to_owned(), vec![rows, columns], self.matrix);
        let vector = |name: &str, len| (name.to_owned(), vec![len], DType::F32);
        let mut all = vec![matrix("token_embd.weight", self.vocab, self.hidden), vector("output_norm.weight", self.hidden)];
        if !self.tied {
            all.push(matrix("output.weight", self.vocab, self.hidden));
        }
        for layer in 0..self.layers {
            let mut own = vec![
                vector("attn_norm", self.hidden),
                matrix("attn_q", q, self.hidden),
                matrix("attn_k", kv, self.hidden),
                matrix("attn_v", kv, self.hidden),
                matrix("attn_output", self.hidden, q),
                vector("ffn_norm", self.hidden),
                matrix("ffn_gate", self.ffn, self.hidden),
                matrix("ffn_up", self.ffn, self.hidden),
                matrix("ffn_down", self.hidden, self.ffn),
            ];
            if self.arch == "gemma3" {
                own.extend([vector("attn_q_norm", self.head_dim), vector("attn_k_norm", self.head_dim)]);
                own.extend([vector("post_attention_norm", self.hidden), vector("post_ffw_norm", self.hidden)]);
            }
            all.extend(own.into_iter().map(|(name, shape, dtype)| (format!("blk.{layer}.{name}.weight"), shape, dtype)));
        }
        all
    }

    /// The file, its weights zeros.
    pub(crate) fn writer(&self) -> Writer {
        let mut writer = Writer::new();
        for (key, value) in self.metadata() {
            writer.metadata(&key, value);
        }
        for (name, shape, dtype) in self.tensors() {
            writer.tensor(&name, &shape, dtype, vec![0; bytes(&shape, dtype)]);
        }
        writer
    }

    /// The file's bytes.
    pub(crate) fn file(&self) -> Vec<u8> {
        self.writer().to_bytes().expect("a writable file")
    }

    /// The file's header, put together without its data, so that sizes may be those of large models.
    pub(crate) fn header(&self) -> Header {
        let metadata = self.metadata().into_iter().map(|(key, value)| Entry { key, value, offset: 24 }).collect();
        let mut header = Header { version: 3, alignment: 32, metadata, tensors: Vec::new(), data_offset: 4096 };
        let mut offset = header.data_offset;
        for (entry, (name, shape, dtype)) in self.tensors().into_iter().enumerate() {
            let kind = GgmlType::from_id(GgmlType::id_of(dtype)).expect("a known type");
            let dims = shape.iter().rev().map(|&d| d as u64).collect();
            let bytes = bytes(&shape, dtype) as u64;
            header.tensors.push(Tensor { name, dims, kind, offset, bytes, entry_offset: 1000 + entry as u64 });
            offset = (offset + bytes).next_multiple_of(32);
        }
        header
    }

    /// The model.
    pub(crate) fn model(&self) -> ModelHeader {
        let header = self.header();
        let end = header.tensors.iter().map(|t| t.offset + t.bytes).max().unwrap_or(0);
        from_gguf(ModelFile { name: "m.gguf".to_owned(), bytes: end }, &header).expect("a supported model")
    }
}

fn bytes(shape: &[usize], dtype: DType) -> usize {
    let rows: usize = shape.iter().rev().skip(1).product();
    let row = shape.last().copied().unwrap_or(0);
    rows * dtype.row_bytes(row).expect("whole blocks")
}
