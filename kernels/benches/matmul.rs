//! Speed of the matrix products beside what the machine can do.
//!
//! `cargo bench -p kernels [-- FILTER]`: for each type, ISA and number of tokens the weights read (GB/s), the products (GMAC/s) and the time
//! of one product; the best of several runs. FILTER selects lines that contain it, `threads=N` the number of threads.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::time::{Duration, Instant};

use kernels::{Input, Isa, Matrix, Pool, Quantized, WeightType, available_threads, matmul, probe};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let threads = arguments.iter().find_map(|argument| argument.strip_prefix("threads=")?.parse().ok()).unwrap_or_else(available_threads);
    let filter: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("threads=")).collect();
    let pool = Pool::new(threads);
    println!("{threads} threads, read bandwidth {:.1} GB/s", probe::Memory::new(&pool).read_bandwidth(&pool, 5) / 1e9);
    for isa in Isa::available() {
        println!("{isa}: 8-bit peak {:.0} GMAC/s", probe::int8_peak(&pool, isa, 20) / 1e9);
    }
    let cases = [
        ("vocabulary", WeightType::Q8_0, 262_144, 640, &[1, 8, 12, 32][..]),
        ("gate", WeightType::Q5_0, 2048, 640, &[1, 8, 16, 512]),
        ("value", WeightType::Q8_0, 2048, 640, &[1, 8, 16, 512]),
        ("down", WeightType::Q4_K, 640, 2048, &[1, 8, 16, 512]),
        ("down", WeightType::Q6_K, 640, 2048, &[1, 8, 16, 512]),
        ("large", WeightType::Q4_K, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::Q6_K, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::Q5_0, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::Q4_0, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::Q4_1, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::Q5_1, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::IQ4_NL, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::MXFP4, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::Q2_K, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::Q3_K, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("large", WeightType::Q5_K, 8192, 2048, &[1, 2, 3, 4, 6, 8, 32]),
        ("memory", WeightType::Q8_0, 65_536, 2048, &[1, 4, 8, 12, 32, 40, 48, 64]),
        ("memory", WeightType::Q5_0, 65_536, 2048, &[1, 4, 8, 12, 32, 40, 48, 64]),
        ("memory", WeightType::Q4_0, 65_536, 2048, &[1, 4, 8, 12, 32, 40, 48, 64]),
        ("memory", WeightType::Q4_K, 65_536, 2048, &[1, 4, 8, 12, 32, 40, 48, 64]),
        ("memory", WeightType::Q6_K, 65_536, 2048, &[1, 4, 8, 12, 32, 40, 48, 64]),
        ("memory", WeightType::F16, 65_536, 2048, &[1]),
        ("half", WeightType::F16, 2048, 640, &[1, 8, 64]),
    ];
    for (name, dtype, rows, k, tokens) in cases {
        for isa in Isa::available().into_iter().filter(|&isa| isa != Isa::Scalar) {
            let mut lines =
                tokens.iter().map(|&tokens| (format!("{name} {dtype} [{rows}, {k}] {isa} × {tokens}"), tokens)).collect::<Vec<_>>();
            lines.retain(|(line, _)| filter.iter().all(|filter| line.contains(*filter)));
            if lines.is_empty() {
                continue;
            }
            let matrix = pack(&pool, isa, dtype, rows, k);
            for (line, tokens) in lines {
                measure(&pool, isa, &matrix, tokens, &line);
            }
        }
    }
}

/// A matrix of arbitrary bytes with harmless scales.
fn pack(pool: &Pool, isa: Isa, dtype: WeightType, rows: usize, k: usize) -> Matrix {
    let mut bytes: Vec<u8> = (0..rows * k / dtype.block_len() * dtype.block_bytes()).map(|i| (i * 37 + i / 509) as u8).collect();
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for at in match dtype {
            WeightType::Q6_K => [208, 208],
            WeightType::Q2_K => [80, 82],
            WeightType::Q3_K => [108, 108],
            WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => [0, 2],
            _ => [0, 0],
        } {
            block[at..at + 2].copy_from_slice(&[0x0a, 0x1c]);
        }
    }
    match Matrix::pack(isa, dtype, rows, k, &bytes, pool) {
        Ok(matrix) => matrix,
        Err(error) => unreachable!("the sizes above are whole blocks: {error}"),
    }
}

fn measure(pool: &Pool, isa: Isa, matrix: &Matrix, tokens: usize, line: &str) {
    let (rows, k) = (matrix.rows(), matrix.k());
    let x: Vec<f32> = (0..tokens * k).map(|i| (i * 131 % 257) as f32 / 128.0 - 1.0).collect();
    let mut out = vec![0.0; tokens * rows];
    let mut quantized = Quantized::new(matrix.activation_block().unwrap_or(32));
    let mut quantize = || {
        if matrix.activation_block().is_some() {
            quantized.quantize(pool, isa.for_products(tokens, [matrix.dtype()]), &x, tokens, k);
        }
    };
    let quantizing = best(&mut quantize);
    quantize();
    let input = if matrix.activation_block().is_some() { Input::Quantized(&quantized) } else { Input::F32(&x) };
    let time = best(&mut || matmul(pool, isa, matrix, 0..rows, input, tokens, &mut out));
    let (bytes, products) = (matrix.bytes() as f64, (rows * k * tokens) as f64);
    let seconds = time.as_secs_f64();
    println!(
        "{line}: {:.1} GB/s, {:.0} GMAC/s, {:.1} µs; quantizing {:.1} µs",
        bytes / seconds / 1e9,
        products / seconds / 1e9,
        seconds * 1e6,
        quantizing.as_secs_f64() * 1e6
    );
}

/// The best of several runs, for a tenth of a second at most.
fn best(run: &mut dyn FnMut()) -> Duration {
    let begin = Instant::now();
    let mut best = Duration::MAX;
    let mut runs = 0;
    while runs < 3 || begin.elapsed() < Duration::from_millis(60) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
        runs += 1;
    }
    best
}
