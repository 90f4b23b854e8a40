//! What precedes every slice on a socket.

/// Bytes of a header.
pub(super) const HEADER: usize = 32;
/// `skn2`, little-endian: the second form of frames. The first had another checksum; a rank that speaks it is told apart by its first word.
const MAGIC: u32 = u32::from_le_bytes(*b"skn2");
/// Bytes that the checksum covers, before the payload's.
const COVERED: usize = 28;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// A rank introduces itself; `sequence` is the epoch's number, the payload a [`Hello`].
    Hello = 1,
    /// The answer to it.
    Welcome = 2,
    /// The other answer; the payload says why.
    Refused = 3,
    /// A slice for every rank.
    AllGather = 4,
    /// A slice for rank 0.
    Gather = 5,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Hello, Self::Welcome, Self::Refused, Self::AllGather, Self::Gather].into_iter().find(|k| *k as u8 == byte)
    }
}

/// Magic (4 bytes), kind (1), rank (1), reserved (2), session of the epoch (8), sequence (8), bytes of the payload (4), CRC-32C of these
/// 28 bytes and the payload (4); all little-endian. CRC-32C (Castagnoli's polynomial, RFC 3720) is the one that CPUs have an instruction for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Who sends it.
    pub(super) rank: u8,
    /// The random part of the epoch.
    pub(super) session: u64,
    /// Number of the exchange in its epoch.
    pub(super) sequence: u64,
    /// Of the payload.
    pub(super) bytes: u32,
}

impl Header {
    /// The header of `payload`.
    pub(super) fn encode(&self, payload: &[u8]) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = self.kind as u8;
        out[5] = self.rank;
        out[8..16].copy_from_slice(&self.session.to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..28].copy_from_slice(&self.bytes.to_le_bytes());
        let mut sum = Checksum::new(&out);
        sum.add(payload);
        out[COVERED..].copy_from_slice(&sum.0.to_le_bytes());
        out
    }

    /// The header in `bytes`, and the sum that its payload must complete.
    ///
    /// # Errors
    /// If it is not a header of this protocol.
    pub(super) fn decode(bytes: &[u8; HEADER]) -> Result<(Self, Checksum, u32), String> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if word(0) != MAGIC {
            return Err(format!("a frame with magic {:08x}", word(0)));
        }
        let kind = Kind::of(bytes[4]).ok_or_else(|| format!("a frame of kind {}", bytes[4]))?;
        let header = Self { kind, rank: bytes[5], session: long(8), sequence: long(16), bytes: word(24) };
        Ok((header, Checksum::new(bytes), word(COVERED)))
    }
}

/// The sum over a header and the payload so far.
pub(super) struct Checksum(u32);

impl Checksum {
    fn new(header: &[u8; HEADER]) -> Self {
        Self(crc32c::crc32c(&header[..COVERED]))
    }

    pub(super) fn add(&mut self, payload: &[u8]) {
        self.0 = crc32c::crc32c_append(self.0, payload);
    }

    pub(super) fn is(self, expected: u32) -> bool {
        self.0 == expected
    }
}

/// The payload of [`Kind::Hello`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) stage: u32,
    /// The rank it is meant for.
    pub(super) to: u32,
    /// And its incarnation.
    pub(super) to_incarnation: u64,
}

/// Bytes of a [`Hello`].
pub(super) const HELLO: usize = 16;

impl Hello {
    pub(super) fn encode(&self) -> [u8; HELLO] {
        let mut out = [0; HELLO];
        out[0..4].copy_from_slice(&self.stage.to_le_bytes());
        out[4..8].copy_from_slice(&self.to.to_le_bytes());
        out[8..16].copy_from_slice(&self.to_incarnation.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8; HELLO]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { stage: word(0), to: word(4), to_incarnation: u64::from(word(8)) | u64::from(word(12)) << 32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, bit by bit: Castagnoli's polynomial, reflected.
    fn castagnoli(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |sum, &byte| (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0x82f6_3b78 * (sum & 1))))
    }

    #[test]
    fn the_sum_is_crc_32c_however_the_payload_comes() {
        assert_eq!(castagnoli(b"123456789"), 0xe306_9283, "the check value of RFC 3720's sum");
        let payload: Vec<u8> = (0..5000_u32).map(|i| ((i * i) >> 3) as u8).collect();
        let header = Header { kind: Kind::AllGather, rank: 1, session: 7, sequence: 9, bytes: 5000 }.encode(&payload);
        let whole = [&header[..COVERED], &payload].concat();
        let (_, _, sent) = Header::decode(&header).expect("a header");
        assert_eq!(sent, castagnoli(&whole));
        for piece in [1, 7, 4096] {
            let (_, mut sum, expected) = Header::decode(&header).expect("a header");
            payload.chunks(piece).for_each(|part| sum.add(part));
            assert!(sum.is(expected), "in pieces of {piece}");
        }
    }

    #[test]
    fn the_first_form_of_frames_is_told_apart() {
        let mut header = Header { kind: Kind::Hello, rank: 1, session: 7, sequence: 9, bytes: 0 }.encode(b"");
        header[..4].copy_from_slice(b"skn1");
        assert!(Header::decode(&header).is_err_and(|said| said.contains("magic")));
    }

    #[test]
    fn a_changed_bit_is_seen() {
        let header = Header { kind: Kind::Gather, rank: 3, session: u64::MAX - 2, sequence: 1 << 40, bytes: 5 };
        let bytes = header.encode(b"slice");
        let check = |bytes: &[u8; HEADER], payload: &[u8]| {
            let (got, mut sum, expected) = Header::decode(bytes).ok()?;
            sum.add(payload);
            sum.is(expected).then_some(got)
        };
        assert_eq!(check(&bytes, b"slice"), Some(header));
        assert_eq!(check(&bytes, b"slide"), None);
        for bit in 0..HEADER * 8 {
            let mut changed = bytes;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(check(&changed, b"slice"), None, "bit {bit} was not seen");
        }
        let hello = Hello { stage: 1, to: 2, to_incarnation: 0x0102_0304_0506_0708 };
        assert_eq!(Hello::decode(&hello.encode()), hello);
    }
}
