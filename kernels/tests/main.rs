//! Fast kernels against the specification, bit for bit.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "tests fail by panicking, and name what the CPU lacks")]

mod attention;
mod golden;
mod inputs;
mod kv;
mod matmul;
mod quantized;
mod rope;
mod vocab;

/// The CPU's vector instruction sets; names those it lacks.
fn vector_isas() -> Vec<kernels::Isa> {
    for name in ["avx2", "avxvnni", "avx512", "amx"] {
        if let Err(error) = kernels::Isa::named(name) {
            println!("not tested: {error}");
        }
    }
    kernels::Isa::available().into_iter().filter(|&isa| isa != kernels::Isa::Scalar).collect()
}
