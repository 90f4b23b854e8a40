//! Matrix products: `out[t, r] = Σ_k weights[r, k] · input[t, k]`.
#![expect(unsafe_code, reason = "threads write disjoint parts of the output")]

use std::cell::RefCell;
use std::ops::Range;

use crate::layout::{Layout, ROWS};
use crate::memory::{self, Buffer};
use crate::pool::{Disjoint, Shares};
use crate::quantized::{PANEL, Panel, WIDE_PANEL};
use crate::scalar::{blocks, dot};
use crate::{Isa, Matrix, Pool, Quantized};

/// The input of a product, `[tokens, k]`.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Row-major floats, for float weights.
    F32(&'a [f32]),
    /// Quantized, in blocks of [`Matrix::activation_block`], for quantized weights.
    Quantized(&'a Quantized),
}

/// One of several products that share their input.
#[derive(Debug)]
pub struct Product<'a> {
    /// The weights.
    pub weights: &'a Matrix,
    /// The rows wanted.
    pub rows: Range<usize>,
    /// `[tokens, rows.len()]`, row-major.
    pub out: &'a mut [f32],
}

/// Multiplies the rows `rows` of `weights` with `tokens` inputs, in parallel: `out`, `[tokens, rows.len()]` row-major.
///
/// The bits of an output depend on its row and its token's input alone: not on the other rows and tokens, the threads or the ISA.
///
/// # Panics
/// If `rows` is out of bounds, `out` or `input` has another size, or the input's form is not the one the weights need.
pub fn matmul(pool: &Pool, isa: Isa, weights: &Matrix, rows: Range<usize>, input: Input<'_>, tokens: usize, out: &mut [f32]) {
    matmul_group(pool, isa, &mut [Product { weights, rows, out }], input, tokens);
}

/// Several products with the same input, in one parallel region.
///
/// # Panics
/// As [`matmul`], for any of the products.
pub fn matmul_group(pool: &Pool, isa: Isa, products: &mut [Product<'_>], input: Input<'_>, tokens: usize) {
    for product in &*products {
        check(product.weights, &product.rows, input, tokens);
        assert_eq!(product.out.len(), tokens * product.rows.len(), "outputs of {tokens} tokens and rows {:?}", product.rows);
    }
    let threads = pool.threads();
    let jobs: Vec<Job<'_>> = products
        .iter_mut()
        .map(|product| Job {
            part: Part {
                weights: product.weights,
                rows: product.rows.clone(),
                out: Output::new(&mut *product.out, product.rows.len(), tokens),
            },
            shares: Shares::new(product.rows.len().div_ceil(ROWS), threads),
            grain: grain(product.weights, tokens),
        })
        .collect();
    pool.run(&|thread| {
        for (i, job) in jobs.iter().enumerate() {
            while let Some(units) = job.shares.own(thread, job.grain) {
                ask_for_small(jobs.get(i + 1));
                compute(isa, &job.part, job.columns(units), input, tokens);
            }
        }
        for other in (thread + 1..threads).chain(0..thread) {
            for (i, job) in jobs.iter().enumerate().rev() {
                while let Some(units) = job.shares.of(other, job.grain) {
                    ask_for_small(i.checked_sub(1).map(|before| &jobs[before]));
                    compute(isa, &job.part, job.columns(units), input, tokens);
                }
            }
        }
    });
}

/// Multiplies the first `rows` rows of `weights` with `tokens` inputs as [`matmul`] does, in pieces of `piece` rows, of which the last may be short.
/// What comes of a piece, `[tokens, rows of the piece]`, is looked at by the thread that made it, `look(thread, rows, results)`, while it
/// lies in the cache, and is not kept.
///
/// # Panics
/// As [`matmul`], or if `piece` is 0.
pub(crate) fn matmul_pieces(
    pool: &Pool,
    isa: Isa,
    (weights, rows): (&Matrix, usize),
    input: Input<'_>,
    tokens: usize,
    piece: usize,
    look: impl Fn(usize, Range<usize>, &[f32]) + Sync,
) {
    check(weights, &(0..rows), input, tokens);
    let threads = pool.threads();
    let shares = Shares::new(rows.div_ceil(piece), threads);
    pool.run(&|thread| {
        RESULTS.with_borrow_mut(|scratch| {
            let mut multiply = |pieces: Range<usize>| {
                for at in pieces {
                    let rows = at * piece..((at + 1) * piece).min(rows);
                    let results = scratch.first(tokens * rows.len());
                    let part = Part { weights, rows: rows.clone(), out: Output::new(results, rows.len(), tokens) };
                    compute(isa, &part, 0..rows.len(), input, tokens);
                    look(thread, rows, results);
                }
            };
            while let Some(pieces) = shares.own(thread, 1) {
                multiply(pieces);
            }
            for other in (thread + 1..threads).chain(0..thread) {
                while let Some(pieces) = shares.of(other, 1) {
                    multiply(pieces);
                }
            }
        });
    });
}

/// Asks memory for the tile of a job that is one: kernels ask within a matrix, and not from one scattered row to the next.
fn ask_for_small(job: Option<&Job<'_>>) {
    let Some(Part { weights, rows, .. }) = job.map(|job| &job.part).filter(|part| (1..=ROWS).contains(&part.rows.len())) else { return };
    if let Some(layout) = weights.layout() {
        memory::ask_for(weights.tile(layout, rows.start / ROWS));
    }
}

/// Rows of a matrix, and where their results go.
struct Part<'a> {
    weights: &'a Matrix,
    rows: Range<usize>,
    out: Output<'a>,
}

struct Job<'a> {
    part: Part<'a>,
    /// Runs of 16 columns of the output, of each thread.
    shares: Shares,
    /// Fewest of them that a thread takes at a time.
    grain: usize,
}

impl Job<'_> {
    /// The columns of runs.
    fn columns(&self, units: Range<usize>) -> Range<usize> {
        units.start * ROWS..(units.end * ROWS).min(self.part.rows.len())
    }
}

/// Fewest runs of 16 rows worth taking: those whose way from memory is long beside the taking, or, with many columns, a block of tiles.
fn grain(weights: &Matrix, tokens: usize) -> usize {
    let row = weights.dtype().row_bytes(weights.k()).unwrap_or(0).max(1);
    if tokens <= PANEL { TAKEN_BYTES / (row * ROWS) } else { BLOCK_BYTES / (weights.k().max(1) * ROWS) }.max(1)
}

/// The output of a product, of which threads write different columns (rows of the matrix).
struct Output<'a> {
    values: Disjoint<'a, f32>,
    width: usize,
    tokens: usize,
}

impl<'a> Output<'a> {
    fn new(out: &'a mut [f32], width: usize, tokens: usize) -> Self {
        Self { values: Disjoint::new(out), width, tokens }
    }

    fn tokens(&self) -> usize {
        self.tokens
    }

    /// Stores the results of `token` for columns from `first` on.
    ///
    /// # Safety
    /// No other thread may write these columns.
    unsafe fn store(&self, token: usize, first: usize, results: &[f32]) {
        assert!(first + results.len() <= self.width, "columns {first} + {} of {}", results.len(), self.width);
        let start = token * self.width + first;
        // SAFETY: this token's columns, which the caller has for itself; the borrow ends with this call.
        let out = unsafe { self.values.slice(start..start + results.len()) };
        match (<&mut [f32; ROWS]>::try_from(&mut *out), <&[f32; ROWS]>::try_from(results)) {
            // A copy of known length.
            (Ok(out), Ok(results)) => *out = *results,
            _ => out.copy_from_slice(results),
        }
    }
}

fn check(weights: &Matrix, rows: &Range<usize>, input: Input<'_>, tokens: usize) {
    assert!(rows.start <= rows.end && rows.end <= weights.rows(), "rows {rows:?} of {}", weights.rows());
    match input {
        Input::F32(x) => {
            assert!(weights.activation_block().is_none(), "{} weights need a quantized input", weights.dtype());
            assert_eq!(x.len(), tokens * weights.k(), "inputs of {tokens} tokens of {}", weights.k());
        }
        Input::Quantized(x) => {
            assert_eq!(weights.activation_block(), Some(x.block()), "activation block of {} weights", weights.dtype());
            assert_eq!((x.tokens(), x.k()), (tokens, weights.k()), "quantized tokens and values");
        }
    }
}

/// Computes the columns `columns` of a part.
fn compute(isa: Isa, part: &Part<'_>, columns: Range<usize>, input: Input<'_>, tokens: usize) {
    // What lies as the matrix unit reads it is for that alone, and it reads nothing else.
    let isa = match (isa, input) {
        (Isa::Amx(_), Input::Quantized(x)) if x.is_wide() => isa,
        (_, Input::Quantized(x)) if x.is_wide() => Isa::Scalar,
        (Isa::Amx(proof), _) => Isa::Avx512(proof.avx512()),
        _ => isa,
    };
    match (isa, input) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx(proof), Input::Quantized(x)) if part.weights.layout().is_some() => {
            tiles(part, columns, x, &crate::x86_64::amx::AmxTiles(proof));
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512(_) | Isa::AvxVnni(_) | Isa::Avx2(_), Input::Quantized(x)) if part.weights.layout().is_some() => {
            if crate::x86_64::is_intel() {
                tiles_of_vectors::<crate::x86_64::PageAhead>(isa, part, columns, x);
            } else {
                tiles_of_vectors::<crate::x86_64::FarAhead>(isa, part, columns, x);
            }
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512(proof), Input::F32(x)) => floats(part, columns, x, |rows, store| {
            crate::x86_64::float::multiply512(proof, part.weights.dtype(), rows, part.weights.k(), x, store);
        }),
        #[cfg(target_arch = "x86_64")]
        (Isa::AvxVnni(proof), Input::F32(x)) => floats(part, columns, x, |rows, store| {
            crate::x86_64::float::multiply256(proof.avx2(), part.weights.dtype(), rows, part.weights.k(), x, store);
        }),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2(proof), Input::F32(x)) => floats(part, columns, x, |rows, store| {
            crate::x86_64::float::multiply256(proof, part.weights.dtype(), rows, part.weights.k(), x, store);
        }),
        _ => scalar(part, columns, input, tokens),
    }
}

/// Results of a tile: 16 rows of each column of a panel.
pub(crate) type Results = [[f32; ROWS]; WIDE_PANEL];

/// The kernels of one instruction set for interleaved tiles.
pub(crate) trait Tiles {
    /// What this thread has set up for panels of some number of columns, until it is dropped.
    type Ready;

    /// Bytes `expand` writes for a tile; 0: tiles of this type are never expanded.
    fn expanded_bytes(&self, layout: &Layout) -> usize;
    /// Whether tiles that can be expanded are, for `panels` panels of `columns` columns.
    fn wants_expanded(&self, layout: &Layout, panels: usize, columns: usize) -> bool;
    /// Expands the weights of a tile to bytes.
    fn expand(&self, layout: &Layout, tile: &[u8], out: &mut [u8]);
    /// Gets ready for panels of `columns` columns.
    fn ready(&self, layout: &Layout, columns: usize) -> Self::Ready;
    /// Multiplies a tile with the columns of a panel. `expanded`: what `expand` made of the tile, if it did.
    fn multiply(&self, ready: &Self::Ready, layout: &Layout, tile: &[u8], expanded: Option<&[u8]>, panel: &Panel<'_>, out: &mut Results);
}

/// Bytes of weights that a thread takes at a time, or more.
const TAKEN_BYTES: usize = 32 << 10;

/// Bytes of weights a thread keeps in its second-level cache while all panels pass over them.
const BLOCK_BYTES: usize = 256 << 10;

thread_local! {
    /// Expanded tiles of this thread.
    static EXPANDED: RefCell<Buffer<u8>> = RefCell::default();
    /// Results of a piece that this thread multiplied.
    static RESULTS: RefCell<Buffer<f32>> = RefCell::default();
}

/// Products of interleaved tiles: blocks of tiles that fit in the cache, expanded once, and every panel over each block.
fn tiles(part: &Part<'_>, columns: Range<usize>, x: &Quantized, kernels: &impl Tiles) {
    let Some(layout) = part.weights.layout() else { return };
    if x.tokens() == 0 {
        return;
    }
    let (first, last) = (part.rows.start + columns.start, part.rows.start + columns.end);
    let whole = first / ROWS..last.div_ceil(ROWS);
    let expanded_bytes = if kernels.wants_expanded(layout, x.panels(), x.panel(0).1.n) { kernels.expanded_bytes(layout) } else { 0 };
    let block = if x.panels() == 1 { 1 } else { (BLOCK_BYTES / expanded_bytes.max(layout.tile()).max(1)).max(1) };
    EXPANDED.with_borrow_mut(|scratch| {
        let scratch = scratch.first(block * expanded_bytes);
        let mut results = [[0.0; ROWS]; WIDE_PANEL];
        let mut ready = (0, None);
        for start in whole.clone().step_by(block) {
            let block = start..(start + block).min(whole.end);
            if expanded_bytes > 0 {
                for (tile, out) in block.clone().zip(scratch.chunks_exact_mut(expanded_bytes)) {
                    kernels.expand(layout, part.weights.tile(layout, tile), out);
                }
            }
            for p in 0..x.panels() {
                let (tokens, panel) = x.panel(p);
                if ready.0 != panel.n {
                    // Giving one back clears the unit, so the old one goes first.
                    ready.1 = None;
                    ready = (panel.n, Some(kernels.ready(layout, panel.n)));
                }
                let Some(ready) = &ready.1 else { continue };
                for tile in block.clone() {
                    let bytes = (expanded_bytes > 0).then(|| &scratch[(tile - start) * expanded_bytes..][..expanded_bytes]);
                    kernels.multiply(ready, layout, part.weights.tile(layout, tile), bytes, &panel, &mut results);
                    let lanes = first.max(tile * ROWS)..last.min((tile + 1) * ROWS);
                    for (token, results) in tokens.clone().zip(&results) {
                        let results = &results[lanes.start - tile * ROWS..lanes.end - tile * ROWS];
                        // SAFETY: every column is given to one thread.
                        unsafe { part.out.store(token, lanes.start - part.rows.start, results) };
                    }
                }
            }
        }
    });
}

/// Products of interleaved tiles by vectors, whose lines are asked for as `A` says.
#[cfg(target_arch = "x86_64")]
fn tiles_of_vectors<A: crate::x86_64::Ahead>(isa: Isa, part: &Part<'_>, columns: Range<usize>, x: &Quantized) {
    use crate::x86_64::{Avx2Tiles, Avx512Tiles};
    match isa {
        Isa::Avx512(proof) => tiles(part, columns, x, &Avx512Tiles::<A>::new(proof)),
        Isa::AvxVnni(proof) => tiles(part, columns, x, &Avx2Tiles::<A>::new(proof.avx2(), Some(proof))),
        Isa::Avx2(proof) => tiles(part, columns, x, &Avx2Tiles::<A>::new(proof, None)),
        Isa::Scalar | Isa::Amx(_) => unreachable!("{isa} has no tiles of vectors"),
    }
}

/// Products of float rows, four at a time: `multiply(rows, store)` computes them for all tokens.
fn floats(part: &Part<'_>, columns: Range<usize>, x: &[f32], multiply: impl Fn(&[&[u8]], &mut dyn FnMut(usize, usize, f32))) {
    if x.is_empty() {
        // Inputs of no values have products of 0.
        return scalar(part, columns, Input::F32(x), part.out.tokens());
    }
    for start in columns.clone().step_by(4) {
        let rows = part.rows.start + start..part.rows.start + (start + 4).min(columns.end);
        let Some(stored) = part.weights.stored_rows(rows.clone()) else { return };
        let rows: Vec<&[u8]> = stored.chunks_exact(stored.len() / rows.len()).collect();
        multiply(&rows, &mut |row, token, result| {
            // SAFETY: every column is given to one thread.
            unsafe { part.out.store(token, start + row, &[result]) };
        });
    }
}

fn scalar(part: &Part<'_>, columns: Range<usize>, input: Input<'_>, tokens: usize) {
    let k = part.weights.k();
    let mut values = vec![0.0; if part.weights.activation_block().is_none() { k } else { 0 }];
    let activations = match input {
        Input::Quantized(x) => rows_of(x),
        Input::F32(_) => (Vec::new(), Vec::new()),
    };
    for column in columns {
        let row = part.rows.start + column;
        part.weights.with_stored_row(row, |stored| {
            if let Input::F32(_) = input {
                blocks::floats(part.weights.dtype(), stored, &mut values);
            }
            for token in 0..tokens {
                let result = match input {
                    Input::F32(x) => dot::float(&values, &x[token * k..(token + 1) * k]),
                    Input::Quantized(x) => {
                        let n = k / x.block();
                        let activation = dot::Activation {
                            q: &activations.0[token * k..(token + 1) * k],
                            scales: &activations.1[token * n..(token + 1) * n],
                        };
                        dot::quantized(part.weights.dtype(), stored, activation)
                    }
                };
                // SAFETY: every column is given to one thread.
                unsafe { part.out.store(token, column, &[result]) };
            }
        });
    }
}

/// Row-major copies of q, `[tokens, k]`, and the scales, `[tokens, k / block]`.
fn rows_of(x: &Quantized) -> (Vec<i8>, Vec<f32>) {
    let (tokens, k, n) = (x.tokens(), x.k(), x.k() / x.block());
    let (mut q, mut scales) = (vec![0; tokens * k], vec![0.0; tokens * n]);
    for token in 0..tokens {
        x.token(token, &mut q[token * k..(token + 1) * k], &mut scales[token * n..(token + 1) * n]);
    }
    (q, scales)
}
