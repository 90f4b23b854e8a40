//! Mappings that many buffers share, so that all of them, and their ends, lie on huge pages: what misses the address cache of a
//! virtual machine can wait for its host, 130 µs at times, and small pages miss 512 times as often.
#![expect(unsafe_code, reason = "memory is mapped and given back by pointer")]

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::page_size;

const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a mapping, or more: what is not touched takes no memory.
const SHARED: usize = 64 << 20;

/// Zeroed memory; unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    mapped: NonNull<u8>,
    mapped_len: usize,
    /// The first huge page.
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: only an address and its length, until `drop`, which has it alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// At least `len` bytes; `None` if the system has not that many.
    fn new(len: usize) -> Option<Self> {
        let len = len.max(SHARED).checked_next_multiple_of(HUGE_PAGE)?;
        let mapped_len = len.checked_add(HUGE_PAGE)?;
        // SAFETY: a new private anonymous mapping touches no existing memory.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), mapped_len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if address == libc::MAP_FAILED {
            return None;
        }
        let mapped = NonNull::new(address.cast::<u8>())?;
        // SAFETY: less than a huge page, by which the mapping is longer than `len`.
        let start = unsafe { mapped.add(mapped.as_ptr().align_offset(HUGE_PAGE)) };
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies in the mapping; the advice changes no content, and its failure is harmless.
        unsafe {
            libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
        }
        Some(Self { mapped, mapped_len, start, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this address and length, never unmapped before, and no cut of it is left.
        unsafe {
            libc::munmap(self.mapped.as_ptr().cast(), self.mapped_len);
        }
    }
}

/// The mapping with the most room, and how much of it is given out.
static ROOM: Mutex<(Weak<Mapping>, usize)> = Mutex::new((Weak::new(), 0));

/// Whole pages of a mapping, each of which is given out once.
#[derive(Debug)]
pub(super) struct Cut {
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
}

impl Cut {
    /// At least `len` zero bytes; `None` if the system has not that many.
    pub(super) fn new(len: usize) -> Option<Self> {
        let len = len.checked_next_multiple_of(page_size())?;
        let mut room = ROOM.lock().unwrap_or_else(PoisonError::into_inner);
        let (current, given) = (room.0.upgrade(), room.1);
        let left = current.as_ref().map_or(0, |mapping| mapping.len - given);
        if let Some(mapping) = current.filter(|_| left >= len) {
            room.1 += len;
            return Some(Self { mapping, offset: given, len });
        }
        let mapping = Arc::new(Mapping::new(len)?);
        if mapping.len - len >= left {
            *room = (Arc::downgrade(&mapping), len);
        }
        Some(Self { mapping, offset: 0, len })
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        // SAFETY: within the mapping.
        unsafe { self.mapping.start.add(self.offset) }
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        // Others may keep the mapping for long.
        // SAFETY: whole pages of a mapping that is still there, which nobody else was given.
        unsafe {
            libc::madvise(self.start().as_ptr().cast(), self.len, libc::MADV_DONTNEED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_share_mappings_and_no_byte() {
        // Others of this process may cut in between.
        let cuts: Vec<Cut> = (1..40).map(|i| Cut::new(i * 100_000).unwrap()).collect();
        let mut ranges: Vec<_> = cuts.iter().map(|cut| (cut.start().as_ptr().addr(), cut.len)).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{ranges:?}");
        assert!(cuts.iter().filter(|cut| cut.offset > 0).count() > 30, "{cuts:?}");
        assert!(cuts.iter().all(|cut| cut.mapping.start.as_ptr().addr().is_multiple_of(HUGE_PAGE)), "{cuts:?}");
    }

    #[test]
    fn a_large_cut_has_a_mapping_as_large() {
        let large = Cut::new(SHARED + 1).unwrap();
        assert!(large.mapping.len > SHARED && large.offset + large.len <= large.mapping.len, "{large:?}");
    }
}
