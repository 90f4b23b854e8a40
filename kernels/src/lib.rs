//! Arithmetic on slices: packed weight matrices, quantized activations, matrix products, the thread pool, file mapping and shared memory.
//!
//! `scalar/` is the specification: it is written from the file formats and the definitions of the bits, and every vector kernel equals
//! it bit for bit, whatever the number of tokens, rows or threads. This is the only crate of the workspace with `unsafe`; each file that
//! needs it says why.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "what only vector kernels use waits for those of other processors"))]

mod attention;
pub mod bytes;
mod convert;
pub mod elementwise;
pub mod file_map;
mod isa;
mod kv;
mod layout;
pub mod math;
mod matmul;
mod matrix;
mod memory;
pub mod norm;
pub mod pool;
pub mod pooling;
pub mod probe;
mod quantized;
pub mod rope;
pub mod routing;
mod scalar;
#[cfg(unix)]
pub mod shm;
mod simd;
#[cfg(test)]
mod testing;
pub mod vocab;
mod weight;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use attention::Attention;
pub use convert::{ConvertError, convert_matrix, convert_rows, dequantize_rows};
pub use file_map::FileMap;
pub use isa::{Amx, Avx2, Avx512, AvxVnni, Isa, IsaError};
pub use kv::{ABSENT, KV_BLOCK, KV_SCALED, KvCache, KvError, KvSpan, KvType};
pub use matmul::{Input, Product, matmul, matmul_group};
pub use matrix::{Matrix, MatrixBuilder, MatrixError};
pub use memory::Buffer;
pub use pool::{Pool, available_threads, split};
pub use quantized::Quantized;
pub use rope::RopeTable;
pub use weight::WeightType;
