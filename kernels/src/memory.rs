//! Zeroed byte buffers aligned for vectors, on huge pages.
#![expect(unsafe_code, reason = "aligned memory and huge pages are asked of the system by pointer")]

#[cfg(unix)]
mod mapping;

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Buffers from this size on are cut from mappings: zero without being written to, so that the threads which fill them touch them first.
const MAPPED_FROM: usize = 128 << 10;
const VECTOR: usize = 64;

/// Bytes of a page of the system.
#[cfg(unix)]
pub(crate) fn page_size() -> usize {
    // SAFETY: asks for a constant.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Asks for the lines of bytes that will be read soon, into the second-level cache.
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "there is no stable instruction for it"))]
pub(crate) fn ask_for(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(VECTOR) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: any address may be asked for; nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
}

/// A fixed number of bytes, zero at first, aligned to 64 bytes; on huge pages, where the system has them, unless it is small.
#[derive(Debug)]
pub(crate) struct AlignedBytes {
    start: NonNull<u8>,
    len: usize,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    Empty,
    Heap(Layout),
    #[cfg(unix)]
    Cut(#[expect(dead_code, reason = "held until the buffer goes")] mapping::Cut),
}

// SAFETY: the buffer owns its memory alone, like a `Box<[u8]>`.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access only reads plain bytes.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `len` zero bytes. Aborts when memory is exhausted, as a `Vec` does.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { start: NonNull::<Line>::dangling().cast(), len, origin: Origin::Empty };
        }
        #[cfg(unix)]
        if len >= MAPPED_FROM
            && let Some(cut) = mapping::Cut::new(len)
        {
            return Self { start: cut.start(), len, origin: Origin::Cut(cut) };
        }
        Self::heap(len)
    }

    fn heap(len: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(len, VECTOR) else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the layout's size is not zero, `zeroed` saw to that.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Self { start, len, origin: Origin::Heap(layout) }
    }
}

/// Gives the dangling pointer of an empty buffer the alignment of a full one.
#[repr(align(64))]
struct Line;

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if let Origin::Heap(layout) = self.origin {
            // SAFETY: allocated in `heap` with this layout and never freed before.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

/// Numbers that bytes can be viewed as.
///
/// # Safety
/// Every pattern of bytes is a value, without padding, and the alignment is at most 64.
pub unsafe trait Number: Copy {}
// SAFETY: 4 bytes, any of which make a value.
unsafe impl Number for f32 {}
// SAFETY: one byte, any of which makes a value.
unsafe impl Number for u8 {}
// SAFETY: as above.
unsafe impl Number for i8 {}
// SAFETY: 2 bytes, any of which make a value.
unsafe impl Number for u16 {}

impl AlignedBytes {
    /// The bytes as numbers; a rest too short for one is left out.
    pub(crate) fn numbers<T: Number>(&self) -> &[T] {
        // SAFETY: initialised bytes, aligned to 64 (dangling but aligned when empty), and every pattern is a `T`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / size_of::<T>()) }
    }

    /// As [`AlignedBytes::numbers`], to be written.
    pub(crate) fn numbers_mut<T: Number>(&mut self) -> &mut [T] {
        // SAFETY: as in `numbers`; borrowed exclusively, and every `T` is plain bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len / size_of::<T>()) }
    }
}

/// Numbers, zero at first, on huge pages unless they are few.
pub struct Buffer<T> {
    bytes: AlignedBytes,
    of: PhantomData<T>,
}

impl<T: Number> Buffer<T> {
    /// `len` zeros. Aborts when memory is exhausted, as a `Vec` does.
    pub fn zeroed(len: usize) -> Self {
        let Some(bytes) = len.checked_mul(size_of::<T>()) else { handle_alloc_error(Layout::new::<T>()) };
        Self { bytes: AlignedBytes::zeroed(bytes), of: PhantomData }
    }

    /// The first `len` numbers; if there are fewer, more are made, zero all of them.
    pub fn first(&mut self, len: usize) -> &mut [T] {
        if self.len() < len {
            // What is not touched takes no memory.
            *self = Self::zeroed(len.max(2 * self.len()));
        }
        &mut self[..len]
    }
}

impl<T: Number + fmt::Debug> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<T: Number> Default for Buffer<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.bytes.numbers()
    }
}

impl<T: Number> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.bytes.numbers_mut()
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `len` initialised bytes for the life of `self` (dangling and aligned when `len` is 0).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_grows_and_keeps_its_memory() {
        let mut buffer = Buffer::<f32>::default();
        assert!(buffer.is_empty() && buffer.first(0).is_empty());
        buffer.first(3).copy_from_slice(&[1.0, 2.0, 3.0]);
        assert_eq!(buffer.first(2), [1.0, 2.0]);
        let first = buffer.first(100_000);
        assert!(first.len() == 100_000 && first.iter().all(|&x| x == 0.0));
        let start = buffer.as_ptr();
        assert_eq!((buffer.first(70_000).len(), buffer.as_ptr()), (70_000, start));
    }

    #[test]
    fn buffers_are_zero_and_aligned() {
        for len in [0, 1, 63, 4096, MAPPED_FROM - 1, MAPPED_FROM, MAPPED_FROM + 5, 70 << 20] {
            let mut buffer = AlignedBytes::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(VECTOR));
            assert!(buffer.iter().all(|&b| b == 0));
            if let Some(last) = buffer.last_mut() {
                *last = 7;
                assert_eq!(buffer[len - 1], 7);
            }
        }
    }
}
