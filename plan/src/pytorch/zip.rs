//! The directory of a ZIP archive whose entries are stored as they are, with where each entry's bytes lie in the file.
//!
//! Nothing is decompressed and nothing but the directory is held, so an entry is read by ranges like any other file.

use std::{collections::BTreeMap, ops::Range};

use super::{Problem, PytorchError, ReadAt, read_at};

/// Longest comment behind the directory, and the record before it.
const TAIL: u64 = 22 + 65_535;
/// Longest directory.
const MAX_DIRECTORY: u64 = 64 << 20;
const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const LOCATOR64: u32 = 0x0706_4b50;
const ENTRY: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

/// One entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Byte of the file at which its local header begins.
    pub(super) header: u64,
    /// Its bytes.
    pub(super) bytes: u64,
    /// Byte of the file at which it stands in the directory.
    pub(super) listed_at: u64,
}

/// Entries by name.
pub(super) type Directory = BTreeMap<String, Entry>;

fn u16_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map(u16::from_le_bytes).map(u64::from)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes).map(u64::from)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes)
}

/// Reads the directory of a file of `file_bytes` bytes.
pub(super) fn directory(read: &mut ReadAt<'_>, file_bytes: u64) -> Result<Directory, PytorchError> {
    let (count, place) = find(read, file_bytes)?;
    let fail = |offset, problem| PytorchError::new("archive directory", offset, problem);
    if place.end > file_bytes || place.start > place.end {
        return Err(fail(place.start, Problem::OutOfFile { begin: place.start, end: place.end, file: file_bytes }));
    }
    let bytes = place.end - place.start;
    // An entry takes 46 bytes and a name.
    if bytes > MAX_DIRECTORY || count > bytes / 46 {
        return Err(fail(
            place.start,
            Problem::Invalid { expected: "a directory as long as its entries".into(), got: format!("{count} entries in {bytes} bytes") },
        ));
    }
    let directory = read_at(read, "archive directory", place.start, bytes)?;
    entries(&directory, place.start, count, file_bytes)
}

/// The number of entries, and where the directory lies.
fn find(read: &mut ReadAt<'_>, file_bytes: u64) -> Result<(u64, Range<u64>), PytorchError> {
    let start = file_bytes.saturating_sub(TAIL);
    let tail = read_at(read, "end of the archive", start, file_bytes - start)?;
    let fail = |offset, got: &str| {
        let expected = "a ZIP archive that ends with its directory".to_owned();
        PytorchError::new("end of the archive", offset, Problem::Invalid { expected, got: got.to_owned() })
    };
    let at = (0..=tail.len().saturating_sub(22))
        .rev()
        .find(|&at| {
            u32_at(&tail, at) == Some(u64::from(END))
                && u16_at(&tail, at + 20).is_some_and(|comment| at as u64 + 22 + comment == tail.len() as u64)
        })
        .ok_or_else(|| fail(start, "no such record (the file is cut off, or something else)"))?;
    let record = &tail[at..];
    let fields = [u16_at(record, 4), u16_at(record, 6), u16_at(record, 10), u32_at(record, 12), u32_at(record, 16)];
    let [Some(disk), Some(first), Some(mut count), Some(mut bytes), Some(mut offset)] = fields else {
        return Err(fail(start, "half a record"));
    };
    if (disk, first) != (0, 0) && (disk, first) != (0xffff, 0xffff) {
        return Err(fail(start + at as u64, "an archive of several disks"));
    }
    if count == 0xffff || bytes == 0xffff_ffff || offset == 0xffff_ffff {
        let locator = at.checked_sub(20).map(|at| &tail[at..]).filter(|l| u32_at(l, 0) == Some(u64::from(LOCATOR64)));
        let record = locator.and_then(|l| u64_at(l, 8)).ok_or_else(|| fail(start + at as u64, "no place of the 64-bit record"))?;
        if record.checked_add(56).is_none_or(|end| end > file_bytes) {
            return Err(fail(start + at as u64, "a 64-bit record past the end of the file"));
        }
        let large = read_at(read, "end of the archive", record, 56)?;
        let fields = [u64_at(&large, 32), u64_at(&large, 40), u64_at(&large, 48)];
        let (Some(END64_U64), [Some(entries), Some(length), Some(begin)]) = (u32_at(&large, 0), fields) else {
            return Err(fail(record, "something else than a 64-bit record"));
        };
        (count, bytes, offset) = (entries, length, begin);
    }
    Ok((count, offset..offset.saturating_add(bytes)))
}

const END64_U64: u64 = END64 as u64;

fn entries(bytes: &[u8], start: u64, count: u64, file_bytes: u64) -> Result<Directory, PytorchError> {
    let mut directory = Directory::new();
    let mut at = 0;
    for _ in 0..count {
        let listed_at = start + at as u64;
        let fail = |name: &str, problem| PytorchError::new(&format!("archive entry {name}"), listed_at, problem);
        let short = || fail("", Problem::Truncated);
        let head = bytes.get(at..at + 46).ok_or_else(short)?;
        if u32_at(head, 0) != Some(u64::from(ENTRY)) {
            let expected = "an entry of the directory".to_owned();
            return Err(fail("", Problem::Invalid { expected, got: "something else".into() }));
        }
        let field16 = |at| u16_at(head, at).unwrap_or_default();
        let field32 = |at| u32_at(head, at).unwrap_or_default();
        let (flags, method) = (field16(8), field16(10));
        let (mut packed, mut size, mut header) = (field32(20), field32(24), field32(42));
        let (name_len, extra_len, comment_len) = (field16(28) as usize, field16(30) as usize, field16(32) as usize);
        let name = bytes.get(at + 46..at + 46 + name_len).ok_or_else(short)?;
        let extra = bytes.get(at + 46 + name_len..at + 46 + name_len + extra_len).ok_or_else(short)?;
        at += 46 + name_len + extra_len + comment_len;
        let name = std::str::from_utf8(name).map_err(|_| fail("", Problem::Utf8))?;
        large_fields(extra, [&mut size, &mut packed, &mut header]).ok_or_else(|| fail(name, Problem::Truncated))?;
        if method != 0 {
            return Err(fail(name, Problem::Compressed { method }));
        }
        if flags & 1 != 0 {
            return Err(fail(name, Problem::Encrypted));
        }
        let end = header.checked_add(30).and_then(|end| end.checked_add(size));
        if packed != size || end.is_none_or(|end| end > file_bytes) {
            return Err(fail(name, Problem::OutOfFile { begin: header, end: end.unwrap_or(u64::MAX), file: file_bytes }));
        }
        if let Some(first) = directory.insert(name.to_owned(), Entry { header, bytes: size, listed_at }) {
            return Err(fail(name, Problem::Duplicate { first: first.listed_at }));
        }
    }
    Ok(directory)
}

/// Takes from the 64-bit extra field what stands there of `[size, packed size, place]`; `None` if something is missing.
fn large_fields(mut extra: &[u8], fields: [&mut u64; 3]) -> Option<()> {
    let mut wanted = fields.into_iter().filter(|field| **field == 0xffff_ffff).peekable();
    if wanted.peek().is_none() {
        return Some(());
    }
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0)?, u16_at(extra, 2)? as usize);
        let body = extra.get(4..4 + len)?;
        if id == 1 {
            for (i, field) in wanted.enumerate() {
                *field = u64_at(body, 8 * i)?;
            }
            return Some(());
        }
        extra = &extra[4 + len..];
    }
    None
}

/// Where the bytes of `entry` lie in the file, after its local header.
pub(super) fn data(read: &mut ReadAt<'_>, name: &str, entry: &Entry, file_bytes: u64) -> Result<Range<u64>, PytorchError> {
    let field = format!("archive entry {name}");
    let fail = |problem| PytorchError::new(&field, entry.header, problem);
    // The directory may say one thing and the entry's own header another: who reads the one must not get what the other hides.
    let own = 30 + name.len() as u64;
    let head = read_at(read, &field, entry.header, own.min(file_bytes.saturating_sub(entry.header)))?;
    let fields = (u32_at(&head, 0), u16_at(&head, 6), u16_at(&head, 8), u16_at(&head, 26), u16_at(&head, 28));
    let (Some(signature), Some(flags), Some(method), Some(name_len), Some(extra_len)) = fields else {
        return Err(fail(Problem::Truncated));
    };
    if signature != u64::from(LOCAL) || name_len != name.len() as u64 || head.get(30..) != Some(name.as_bytes()) {
        return Err(fail(Problem::Invalid { expected: "the entry's own header".into(), got: "that of something else".into() }));
    }
    if method != 0 {
        return Err(fail(Problem::Compressed { method }));
    }
    if flags & 1 != 0 {
        return Err(fail(Problem::Encrypted));
    }
    let begin = entry.header + 30 + name_len + extra_len;
    match begin.checked_add(entry.bytes).filter(|&end| end <= file_bytes) {
        Some(end) => Ok(begin..end),
        None => Err(fail(Problem::OutOfFile { begin, end: begin.saturating_add(entry.bytes), file: file_bytes })),
    }
}
