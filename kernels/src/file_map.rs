//! Read-only mapping of whole files.
#![expect(unsafe_code, reason = "mapping a file is a system call on raw pointers")]

use std::fs::File;
use std::io;
use std::path::Path;

/// A file mapped into memory, read only. On systems without `mmap` its content is read instead.
///
/// The file must not be truncated while it is mapped: reading past its new end kills the process (as for every mapped file). Skein maps
/// only blobs of its own cache, which are renamed into place whole and never changed, and files the user names as weights.
#[derive(Debug)]
pub struct FileMap {
    #[cfg(unix)]
    start: *mut libc::c_void,
    #[cfg(unix)]
    len: usize,
    #[cfg(not(unix))]
    content: Vec<u8>,
}

// SAFETY: the mapping is private, read only and owned by this value alone.
#[cfg(unix)]
unsafe impl Send for FileMap {}
// SAFETY: shared access only reads.
#[cfg(unix)]
unsafe impl Sync for FileMap {}

impl FileMap {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// Those of opening and mapping the file.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::of(&File::open(path)?)
    }

    /// Maps an open file; the mapping outlives the handle.
    ///
    /// # Errors
    /// Those of mapping the file.
    #[cfg(unix)]
    pub fn of(file: &File) -> io::Result<Self> {
        use std::os::fd::AsRawFd;

        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if len == 0 {
            return Ok(Self { start: std::ptr::null_mut(), len });
        }
        // SAFETY: a new private read-only mapping of an open file touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { start, len }) }
    }

    /// Reads an open file.
    ///
    /// # Errors
    /// Those of reading the file.
    #[cfg(not(unix))]
    pub fn of(file: &File) -> io::Result<Self> {
        use std::io::Read;

        let mut content = Vec::new();
        { file }.read_to_end(&mut content)?;
        Ok(Self { content })
    }

    /// The file's content.
    #[cfg(unix)]
    pub fn bytes(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: mapped readable for `len` bytes until `self` is dropped.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.len) }
    }

    /// The file's content.
    #[cfg(not(unix))]
    pub fn bytes(&self) -> &[u8] {
        &self.content
    }

    /// Tells the system that the bytes in `range` were used and can leave memory; a later read fetches them again.
    pub fn release(&self, range: std::ops::Range<usize>) {
        #[cfg(unix)]
        {
            let page = crate::memory::page_size();
            let (start, end) = (range.start.next_multiple_of(page), range.end.min(self.len) / page * page);
            if start < end {
                // SAFETY: whole pages inside the mapping; a private clean file mapping is read again on the next access.
                unsafe {
                    libc::madvise(self.start.cast::<u8>().add(start).cast(), end - start, libc::MADV_DONTNEED);
                }
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

#[cfg(unix)]
impl Drop for FileMap {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: mapped in `of` with this address and length and never unmapped before.
            unsafe {
                libc::munmap(self.start, self.len);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_content_and_empty_files() {
        let path = std::env::temp_dir().join(format!("skein-file-map-{}", std::process::id()));
        let content: Vec<u8> = (0..20_000_u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let map = FileMap::open(&path).unwrap();
        map.release(0..content.len());
        assert_eq!(map.bytes(), content);
        std::fs::write(&path, []).unwrap();
        assert!(FileMap::open(&path).unwrap().bytes().is_empty());
        std::fs::remove_file(&path).unwrap();
        assert!(FileMap::open(&path).is_err());
    }
}
