//! Speed of packing stored weights into the layout of the kernels, beside copying the same bytes.
//!
//! `cargo bench -p kernels --bench pack [-- FILTER]`: for each weight type GB/s of stored bytes; the best of several runs. FILTER selects
//! lines that contain it, `threads=N` the number of threads.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use kernels::{Isa, MatrixBuilder, Pool, WeightType, available_threads};

/// Rows and values of a row: a matrix of more bytes than caches hold.
const SHAPE: (usize, usize) = (16_384, 2048);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let threads = arguments.iter().find_map(|argument| argument.strip_prefix("threads=")?.parse().ok()).unwrap_or_else(available_threads);
    let filter: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("threads=")).collect();
    let pool = Pool::new(threads);
    println!("{threads} threads, {} x {}", SHAPE.0, SHAPE.1);
    for dtype in WeightType::ALL {
        for isa in [Isa::Scalar, Isa::best()] {
            let line = format!("{dtype} for {isa}");
            if filter.iter().all(|filter| line.contains(*filter)) {
                measure(&pool, isa, dtype, &line);
            }
        }
    }
}

fn measure(pool: &Pool, isa: Isa, dtype: WeightType, line: &str) {
    let (rows, k) = SHAPE;
    let Some(row_bytes) = dtype.row_bytes(k) else { return };
    let source: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 131 % 251) as u8).collect();
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let Ok(mut builder) = MatrixBuilder::new(isa, dtype, rows, k) else { return };
        let start = Instant::now();
        let read = |rows: std::ops::Range<usize>, into: &mut [u8]| {
            into.copy_from_slice(&source[rows.start * row_bytes..rows.end * row_bytes]);
            Ok::<_, ()>(())
        };
        let filled = builder.fill(pool, read);
        best = best.min(start.elapsed());
        assert!(filled.is_ok());
        black_box(builder.finish().is_ok());
    }
    let gigabytes = source.len() as f64 / 1e9;
    println!("{line}: {:.2} ms; {:.2} GB/s", best.as_secs_f64() * 1e3, gigabytes / best.as_secs_f64());
}
