//! Fast kernels against the specification, bit for bit.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests fail by panicking, and name what the CPU lacks")]

mod inputs;
mod matmul;
mod quantized;
