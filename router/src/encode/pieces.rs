//! The bytes of every token.

use plan::step::TokenId;

/// Bytes of each token by id, in one buffer.
#[derive(Default)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// End of each piece in `bytes`.
    ends: Vec<u32>,
}

impl Pieces {
    /// Adds the piece of the next id.
    pub(super) fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(self.bytes.len() as u32);
    }

    /// Number of ids.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of `id`; nothing for an id outside the vocabulary.
    pub(super) fn get(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// The byte that a character of the GPT-2 alphabet stands for: printable Latin-1 stands for itself, the others follow from U+0100 on.
pub(super) fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The bytes of a token of a byte-level vocabulary; characters outside the alphabet stand for themselves.
pub(super) fn byte_level(token: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(token.len());
    for c in token.chars() {
        match byte_of(c) {
            Some(b) => bytes.push(b),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

/// The byte that `<0xHH>` names.
pub(super) fn named_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()) { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut seen = [0; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(b) = byte_of(c) {
                seen[usize::from(b)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('Ń'), Some(0xad));
    }

    #[test]
    fn pieces_are_found_by_id() {
        let mut p = Pieces::default();
        for piece in ["a", "", "xyz"] {
            p.push(piece.as_bytes());
        }
        assert_eq!((p.get(0), p.get(1), p.get(2), p.get(3)), (&b"a"[..], &b""[..], &b"xyz"[..], &b""[..]));
    }

    #[test]
    fn byte_names_are_read() {
        assert_eq!(named_byte("<0x0A>"), Some(10));
        assert_eq!(named_byte("<0xGG>"), None);
        assert_eq!(named_byte("<0x+1>"), None);
    }
}
