//! Speed of attention beside what the machine's fused multiply-adds can do.
//!
//! `cargo bench -p kernels --bench attention [-- FILTER]`: for each shape, entry type and ISA the time of one layer, its GFLOP/s (four per
//! visible key and dimension) and the cache read (GB/s); the best of several runs. FILTER selects lines that contain it, `threads=N` the
//! number of threads.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::time::{Duration, Instant};

use kernels::{Attention, Isa, KV_BLOCK, KvCache, KvSpan, KvType, Pool, available_threads};

struct Shape {
    name: &'static str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let threads = arguments.iter().find_map(|argument| argument.strip_prefix("threads=")?.parse().ok()).unwrap_or_else(available_threads);
    let filter: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with("threads=")).collect();
    let pool = Pool::new(threads);
    println!("{threads} threads");
    let shapes = [
        Shape { name: "gemma 270m", heads: 4, kv_heads: 1, head_dim: 256 },
        Shape { name: "llama 1b", heads: 32, kv_heads: 8, head_dim: 64 },
    ];
    for shape in &shapes {
        for dtype in KvType::ALL {
            // Sequences, the position of their first token, and tokens of each.
            for (sequences, first, tokens) in [(1, 1024, 1), (1, 64, 1), (16, 256, 1), (1, 0, 512), (1, 448, 64)] {
                for isa in Isa::available().into_iter().filter(|&isa| isa != Isa::Scalar) {
                    let line = format!("{} {dtype:?} {sequences} × {tokens} at {first} {isa}", shape.name);
                    if filter.iter().all(|filter| line.contains(*filter)) {
                        measure(&pool, isa, shape, dtype, (sequences, first, tokens), &line);
                    }
                }
            }
        }
    }
}

fn measure(pool: &Pool, isa: Isa, shape: &Shape, dtype: KvType, (sequences, first, tokens): (usize, usize, usize), line: &str) {
    let &Shape { heads, kv_heads, head_dim, .. } = shape;
    let per = (first + tokens).div_ceil(KV_BLOCK);
    let mut cache = KvCache::new(dtype, sequences * per, kv_heads, (head_dim, head_dim));
    let tables: Vec<Vec<u32>> = (0..sequences).map(|i| (0..per).map(|block| (block * sequences + i) as u32).collect()).collect();
    let noise = |n: usize| (0..n).map(|i| (i * 131 % 257) as f32 / 128.0 - 1.0).collect::<Vec<f32>>();
    let whole: Vec<KvSpan<'_>> = tables.iter().map(|table| KvSpan { table, first_position: 0, tokens: first + tokens }).collect();
    let entries = noise(sequences * (first + tokens) * kv_heads * head_dim);
    let writing = Instant::now();
    cache.write(isa, &whole, &entries, &entries);
    let writing = writing.elapsed();
    let spans: Vec<KvSpan<'_>> = tables.iter().map(|table| KvSpan { table, first_position: first, tokens }).collect();
    let readers: Vec<u32> = (0..heads).map(|head| (head * kv_heads / heads) as u32).collect();
    let queries = noise(sequences * tokens * heads * head_dim);
    let mut out = vec![0.0; queries.len()];
    let attention = Attention { cache: &cache, kv_heads: &readers, scale: 0.0625, window: None, causal: true };
    let seconds = best(&mut || attention.run(pool, isa, &spans, &queries, &mut out)).as_secs_f64();
    let visible: usize = (first + 1..=first + tokens).sum::<usize>() * sequences;
    let flops = (visible * heads * head_dim * 4) as f64;
    let bytes = (sequences * (first + tokens) * kv_heads * head_dim * 2 * dtype.bytes()) as f64;
    println!(
        "{line}: {:.1} µs, {:.1} GFLOP/s a thread, {:.1} GB/s; writing all {:.1} ns a token",
        seconds * 1e6,
        flops / seconds / pool.threads() as f64 / 1e9,
        bytes / seconds / 1e9,
        writing.as_secs_f64() * 1e9 / (sequences * (first + tokens)) as f64,
    );
}

/// The best of several runs, for a twentieth of a second.
fn best(run: &mut dyn FnMut()) -> Duration {
    let begin = Instant::now();
    let mut best = Duration::MAX;
    let mut runs = 0;
    while runs < 3 || begin.elapsed() < Duration::from_millis(50) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
        runs += 1;
    }
    best
}
