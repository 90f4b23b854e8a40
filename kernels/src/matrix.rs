//! Weight matrices, packed for the kernels.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::layout::{LINE, Layout, ROWS};
use crate::memory::{AlignedBytes, Buffer};
use crate::scalar::blocks;
use crate::{Isa, Pool, WeightType};

/// Bytes of stored rows that a thread reads before it packs them: less than the second cache of a core holds.
const PIECE_BYTES: usize = 256 << 10;

/// Why a matrix cannot be packed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The rows are not whole blocks.
    #[error("rows of {k} values are not whole blocks of {block} values of {dtype}")]
    Blocks {
        /// The type.
        dtype: WeightType,
        /// Values of a row.
        k: usize,
        /// Values of a block.
        block: usize,
    },
    /// The size does not fit in memory's address range.
    #[error("a matrix of {rows} rows of {k} values of {dtype} is too large")]
    Size {
        /// The type.
        dtype: WeightType,
        /// Number of rows.
        rows: usize,
        /// Values of a row.
        k: usize,
    },
    /// The source has not the matrix's length, or a piece is not whole rows.
    #[error("{got} bytes of weights came, expected {expected}")]
    Length {
        /// Bytes that came.
        got: usize,
        /// Bytes expected; for a piece that is not whole rows, the nearest whole number of rows.
        expected: usize,
    },
}

/// Packed weights `[rows, k]`.
///
/// Quantized types are interleaved in tiles of 16 rows for the vector kernels (`layout.rs`); for [`Isa::Scalar`], and float types always, the
/// rows stay as they are stored. Every instruction set multiplies with every matrix and gives the same bits; the one it was packed for is
/// the fast one.
#[derive(Debug)]
pub struct Matrix {
    dtype: WeightType,
    rows: usize,
    k: usize,
    row_bytes: usize,
    layout: Option<Layout>,
    data: AlignedBytes,
}

impl Matrix {
    /// Packs `source`, `[rows, k]` row-major as stored in a file.
    ///
    /// # Errors
    /// If `k` is not whole blocks or `source` has another length.
    pub fn pack(isa: Isa, dtype: WeightType, rows: usize, k: usize, source: &[u8], pool: &Pool) -> Result<Self, MatrixError> {
        let mut builder = MatrixBuilder::new(isa, dtype, rows, k)?;
        builder.push(source, pool)?;
        builder.finish()
    }

    /// Number of rows (outputs).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row (inputs).
    pub fn k(&self) -> usize {
        self.k
    }

    /// Storage type.
    pub fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// Values per block of the quantized activation a product takes; `None`: it takes f32.
    pub fn activation_block(&self) -> Option<usize> {
        self.dtype.activation_block()
    }

    /// Dequantizes row `row` into `out`, `[k]`, by the formula of the file format.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not `k` values.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.k, "values of a row");
        self.with_stored_row(row, |stored| blocks::dequantize(self.dtype, stored, out));
    }

    /// Hands `read` the row as it is stored in files.
    pub(crate) fn with_stored_row<R>(&self, row: usize, read: impl FnOnce(&[u8]) -> R) -> R {
        match &self.layout {
            None => read(&self.data[row * self.row_bytes..(row + 1) * self.row_bytes]),
            Some(layout) => {
                let mut stored = vec![0; self.row_bytes];
                layout.unpack(self.tile(layout, row / ROWS), row % ROWS, &mut stored);
                read(&stored)
            }
        }
    }

    /// The layout of the tiles, if the rows are interleaved.
    pub(crate) fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    /// Tile `index`: rows 16 · index and up.
    pub(crate) fn tile(&self, layout: &Layout, index: usize) -> &[u8] {
        &self.data[index * layout.tile()..(index + 1) * layout.tile()]
    }

    /// Rows `rows` as stored, if they are not interleaved.
    pub(crate) fn stored_rows(&self, rows: Range<usize>) -> Option<&[u8]> {
        self.layout.is_none().then(|| &self.data[rows.start * self.row_bytes..rows.end * self.row_bytes])
    }
}

thread_local! {
    /// Stored rows that this thread packs next.
    static STORED: RefCell<Buffer<u8>> = RefCell::default();
}

/// Packs a matrix from pieces, so that the source need never be in memory whole.
#[derive(Debug)]
pub struct MatrixBuilder {
    matrix: Matrix,
    /// Source rows taken so far.
    taken: usize,
    /// Stored rows of a tile that is not yet full.
    pending: Vec<u8>,
}

impl MatrixBuilder {
    /// Begins a matrix `[rows, k]`.
    ///
    /// # Errors
    /// If `k` is not whole blocks, or the size overflows.
    pub fn new(isa: Isa, dtype: WeightType, rows: usize, k: usize) -> Result<Self, MatrixError> {
        let block = dtype.block_len();
        if !k.is_multiple_of(block) {
            return Err(MatrixError::Blocks { dtype, k, block });
        }
        let too_large = MatrixError::Size { dtype, rows, k };
        // A tile is at most 16 rows, 64 bytes and 3 % larger than its source: far from overflow when twice its size is.
        let padded = rows.checked_next_multiple_of(ROWS);
        let Some((row_bytes, _)) = dtype.row_bytes(k).zip(padded).filter(|&(bytes, rows)| {
            bytes.checked_add(LINE).and_then(|bytes| bytes.checked_mul(rows)).is_some_and(|total| total < isize::MAX as usize / 2)
        }) else {
            return Err(too_large);
        };
        let layout = if isa == Isa::Scalar { None } else { Layout::new(dtype, k) };
        let bytes = layout.map_or(row_bytes * rows, |layout| layout.tile() * rows.div_ceil(ROWS));
        let matrix = Matrix { dtype, rows, k, row_bytes, layout, data: AlignedBytes::zeroed(bytes) };
        Ok(Self { matrix, taken: 0, pending: Vec::new() })
    }

    /// Takes the next rows, as stored: any number of whole rows. Whole tiles are packed in parallel.
    ///
    /// # Errors
    /// If `rows` is not whole rows, or more rows come than the matrix has.
    pub fn push(&mut self, rows: &[u8], pool: &Pool) -> Result<(), MatrixError> {
        let row_bytes = self.matrix.row_bytes;
        let left = (self.matrix.rows - self.taken) * row_bytes;
        if rows.len() > left {
            return Err(MatrixError::Length { got: rows.len(), expected: left });
        }
        if row_bytes == 0 {
            return Ok(());
        }
        if !rows.len().is_multiple_of(row_bytes) {
            return Err(MatrixError::Length { got: rows.len(), expected: rows.len() / row_bytes * row_bytes });
        }
        let start = self.taken;
        self.taken += rows.len() / row_bytes;
        let Some(layout) = self.matrix.layout else {
            self.matrix.data[start * row_bytes..self.taken * row_bytes].copy_from_slice(rows);
            return Ok(());
        };
        let (tile_bytes, source_bytes) = (layout.tile(), ROWS * row_bytes);
        let data = &mut self.matrix.data;
        let mut rest = rows;
        if !self.pending.is_empty() {
            let (head, tail) = rest.split_at(rest.len().min(source_bytes - self.pending.len()));
            self.pending.extend_from_slice(head);
            rest = tail;
            if self.pending.len() == source_bytes {
                let tile = start / ROWS;
                layout.pack(&self.pending, &mut data[tile * tile_bytes..(tile + 1) * tile_bytes]);
                self.pending.clear();
            }
        }
        let tiles = rest.len() / source_bytes;
        let (whole, tail) = rest.split_at(tiles * source_bytes);
        if tiles > 0 {
            let first = (start + (rows.len() - rest.len()) / row_bytes) / ROWS;
            pool.for_rows(&mut data[first * tile_bytes..(first + tiles) * tile_bytes], tile_bytes, 1, |first, out| {
                for (i, tile) in out.chunks_exact_mut(tile_bytes).enumerate() {
                    layout.pack(&whole[(first + i) * source_bytes..(first + i + 1) * source_bytes], tile);
                }
            });
        }
        self.pending.extend_from_slice(tail);
        Ok(())
    }

    /// Takes all rows: the pool's threads read pieces of at most 256 KiB (or one tile) with `read(rows, into)` as they pack them, so
    /// that a piece is packed while the cache has it.
    ///
    /// # Errors
    /// One that `read` gave; the matrix is then of no use.
    ///
    /// # Panics
    /// If rows came before.
    pub fn fill<E: Send>(&mut self, pool: &Pool, read: impl Fn(Range<usize>, &mut [u8]) -> Result<(), E> + Sync) -> Result<(), E> {
        assert_eq!(self.taken, 0, "a matrix is filled at once, or in pieces");
        let Matrix { rows, row_bytes, layout, .. } = self.matrix;
        self.taken = rows;
        if row_bytes == 0 || rows == 0 {
            return Ok(());
        }
        // As they are stored, the rows are tiles of one.
        let (tile_rows, tile_bytes) = layout.map_or((1, row_bytes), |layout| (ROWS, layout.tile()));
        let piece = (PIECE_BYTES / (tile_rows * row_bytes)).max(1);
        let failed = Mutex::new(None);
        pool.for_rows(&mut self.matrix.data, tile_bytes, 1, |first, part| {
            for (i, tiles) in part.chunks_mut(piece * tile_bytes).enumerate() {
                let first = (first + i * piece) * tile_rows;
                let rows = first..rows.min(first + tiles.len() / tile_bytes * tile_rows);
                let done = match layout {
                    None => read(rows, tiles),
                    Some(layout) => STORED.with_borrow_mut(|buffer| {
                        let stored = buffer.first(rows.len() * row_bytes);
                        read(rows, stored)?;
                        let stored = stored.chunks(ROWS * row_bytes);
                        stored.zip(tiles.chunks_exact_mut(tile_bytes)).for_each(|(stored, tile)| layout.pack(stored, tile));
                        Ok(())
                    }),
                };
                if let Err(error) = done {
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    return;
                }
            }
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// The matrix.
    ///
    /// # Errors
    /// If rows are missing.
    pub fn finish(self) -> Result<Matrix, MatrixError> {
        let Self { mut matrix, taken, pending } = self;
        if taken < matrix.rows && matrix.row_bytes > 0 {
            return Err(MatrixError::Length { got: taken * matrix.row_bytes, expected: matrix.rows * matrix.row_bytes });
        }
        if let Some(layout) = matrix.layout
            && !pending.is_empty()
        {
            let start = matrix.rows / ROWS * layout.tile();
            layout.pack(&pending, &mut matrix.data[start..start + layout.tile()]);
        }
        Ok(matrix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_give_the_matrix_of_the_whole() {
        let pool = Pool::new(2);
        for isa in Isa::available() {
            for dtype in WeightType::ALL {
                let (rows, k) = (53, 512);
                let row_bytes = dtype.row_bytes(k).unwrap();
                let source: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 31 + i / 251) as u8).collect();
                let whole = Matrix::pack(isa, dtype, rows, k, &source, &pool).unwrap();
                for piece in [1, 3, 16, 17, 40] {
                    let mut builder = MatrixBuilder::new(isa, dtype, rows, k).unwrap();
                    for rows in source.chunks(piece * row_bytes) {
                        builder.push(rows, &pool).unwrap();
                    }
                    assert!(*builder.finish().unwrap().data == *whole.data, "{dtype} {isa} in pieces of {piece}");
                }
                let mut builder = MatrixBuilder::new(isa, dtype, rows, k).unwrap();
                let read = |rows: Range<usize>, into: &mut [u8]| {
                    into.copy_from_slice(&source[rows.start * row_bytes..rows.end * row_bytes]);
                    Ok::<_, ()>(())
                };
                builder.fill(&pool, read).unwrap();
                assert!(*builder.finish().unwrap().data == *whole.data, "{dtype} {isa} read by threads");
                whole.with_stored_row(37, |row| assert_eq!(row, &source[37 * row_bytes..38 * row_bytes]));
            }
        }
    }

    #[test]
    fn large_matrices_are_read_in_pieces_and_stop_at_an_error() {
        let (pool, dtype, (rows, k)) = (Pool::new(3), WeightType::Q4_0, (5000, 256));
        let row_bytes = dtype.row_bytes(k).unwrap();
        let source: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 31 + i / 251) as u8).collect();
        let whole = Matrix::pack(Isa::best(), dtype, rows, k, &source, &pool).unwrap();
        let (reads, bad) = (Mutex::new(0), Mutex::new(usize::MAX));
        let read = |rows: Range<usize>, into: &mut [u8]| {
            assert!(rows.len() * row_bytes <= PIECE_BYTES);
            *reads.lock().unwrap() += 1;
            into.copy_from_slice(&source[rows.start * row_bytes..rows.end * row_bytes]);
            if rows.contains(&*bad.lock().unwrap()) { Err(rows.start) } else { Ok(()) }
        };
        let mut builder = MatrixBuilder::new(Isa::best(), dtype, rows, k).unwrap();
        builder.fill(&pool, read).unwrap();
        assert!(*builder.finish().unwrap().data == *whole.data);
        assert!(*reads.lock().unwrap() >= source.len().div_ceil(PIECE_BYTES));
        *bad.lock().unwrap() = 2500;
        let failed = MatrixBuilder::new(Isa::best(), dtype, rows, k).unwrap().fill(&pool, read).unwrap_err();
        assert!((1..=2500).contains(&failed), "{failed}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (isa, pool) = (Isa::best(), Pool::new(1));
        let dtype = WeightType::Q8_0;
        assert_eq!(MatrixBuilder::new(isa, dtype, 1, 33).unwrap_err(), MatrixError::Blocks { dtype, k: 33, block: 32 });
        assert!(matches!(MatrixBuilder::new(isa, dtype, usize::MAX, 32), Err(MatrixError::Size { .. })));
        assert!(matches!(MatrixBuilder::new(isa, dtype, 1 << 40, 1 << 40), Err(MatrixError::Size { .. })));
        let mut builder = MatrixBuilder::new(isa, dtype, 2, 32).unwrap();
        assert_eq!(builder.push(&[0; 103], &pool), Err(MatrixError::Length { got: 103, expected: 68 }));
        assert_eq!(builder.push(&[0; 33], &pool), Err(MatrixError::Length { got: 33, expected: 0 }));
        builder.push(&[0; 34], &pool).unwrap();
        assert_eq!(builder.finish().unwrap_err(), MatrixError::Length { got: 34, expected: 68 });
    }
}
