//! Zeroed byte buffers aligned for vectors and huge pages.
#![expect(unsafe_code, reason = "aligned memory and huge pages are asked of the system by pointer")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Buffers from this size on are mapped: zero without being written to, so that the threads which fill them touch them first.
const MAPPED_FROM: usize = 128 << 10;
/// Buffers from this size on are aligned to huge pages and marked for them.
const HUGE_FROM: usize = 4 << 20;
const HUGE_PAGE: usize = 2 << 20;
const VECTOR: usize = 64;

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

/// A fixed number of bytes, zero at first, aligned to 64 bytes; to 2 MiB with transparent huge pages when large.
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
    Mapped {
        start: NonNull<u8>,
        len: usize,
    },
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
            && let Some(buffer) = Self::mapped(len)
        {
            return buffer;
        }
        Self::heap(len)
    }

    fn heap(len: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(len, VECTOR) else { handle_alloc_error(Layout::new::<u8>()) };
        // SAFETY: the layout's size is not zero, `zeroed` saw to that.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Self { start, len, origin: Origin::Heap(layout) }
    }

    #[cfg(unix)]
    fn mapped(len: usize) -> Option<Self> {
        let huge = len >= HUGE_FROM;
        let whole = if huge { len.checked_next_multiple_of(HUGE_PAGE)?.checked_add(HUGE_PAGE)? } else { len };
        // SAFETY: a new private anonymous mapping touches no existing memory.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), whole, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if address == libc::MAP_FAILED {
            return None;
        }
        let origin = NonNull::new(address.cast::<u8>())?;
        let skip = if huge { origin.as_ptr().align_offset(HUGE_PAGE) } else { 0 };
        // SAFETY: `skip` is 0, or less than HUGE_PAGE where the mapping is HUGE_PAGE longer than `len` rounded up.
        let start = unsafe { origin.add(skip) };
        #[cfg(target_os = "linux")]
        if huge {
            // SAFETY: the range lies in the mapping; the advice changes no content, and its failure is harmless.
            unsafe {
                libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
            }
        }
        Some(Self { start, len, origin: Origin::Mapped { start: origin, len: whole } })
    }
}

/// Gives the dangling pointer of an empty buffer the alignment of a full one.
#[repr(align(64))]
struct Line;

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        match self.origin {
            Origin::Empty => {}
            // SAFETY: allocated in `heap` with this layout and never freed before.
            Origin::Heap(layout) => unsafe { dealloc(self.start.as_ptr(), layout) },
            #[cfg(unix)]
            // SAFETY: mapped in `mapped` with this address and length and never unmapped before.
            Origin::Mapped { start, len } => unsafe {
                libc::munmap(start.as_ptr().cast(), len);
            },
        }
    }
}

/// Numbers that bytes can be viewed as.
///
/// # Safety
/// Every pattern of bytes is a value, without padding, and the alignment is at most 64.
pub(crate) unsafe trait Number: Copy {}
// SAFETY: 4 bytes, any of which make a value.
unsafe impl Number for f32 {}
// SAFETY: one byte, any of which makes a value.
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
    fn buffers_are_zero_and_aligned() {
        for len in [0, 1, 63, 4096, MAPPED_FROM - 1, MAPPED_FROM, MAPPED_FROM + 5, HUGE_FROM - 1, HUGE_FROM, HUGE_FROM + 5] {
            let mut buffer = AlignedBytes::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(VECTOR));
            assert!(buffer.iter().all(|&b| b == 0));
            if let Some(last) = buffer.last_mut() {
                *last = 7;
                assert_eq!(buffer[len - 1], 7);
            }
        }
        assert!(AlignedBytes::zeroed(HUGE_FROM).as_ptr().addr().is_multiple_of(HUGE_PAGE));
    }
}
