//! SentencePiece's `tokenizer.model`: the pieces and settings in it, read from its protocol buffer as data.
//!
//! Fields are those of `sentencepiece_model.proto`; what no decoder needs is skipped.

use crate::gguf::{TokenType, Tokenizer};

/// Most pieces; far above any vocabulary.
const MOST_PIECES: usize = 1 << 22;

/// A `tokenizer.model` that cannot be used: which field, where, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} at byte {offset}: {problem}")]
pub struct SentencePieceError {
    /// The field: `piece 17`, `trainer_spec.model_type`, …
    pub field: String,
    /// Byte of the file at which it begins.
    pub offset: usize,
    /// What is wrong with it.
    pub problem: String,
}

/// One field of a message.
enum Field<'a> {
    /// A whole number.
    Number(u64),
    /// 32 bits.
    Bits(u32),
    /// Bytes: text, or a message.
    Bytes(&'a [u8]),
    /// 64 bits, which nothing here uses.
    Long,
}

/// The fields of a message, one after the other.
struct Message<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Byte of the file at which the message begins.
    start: usize,
    name: &'static str,
}

impl<'a> Message<'a> {
    fn wrong(&self, problem: &str) -> SentencePieceError {
        SentencePieceError { field: self.name.to_owned(), offset: self.start + self.at, problem: problem.to_owned() }
    }

    fn number(&mut self) -> Result<u64, SentencePieceError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let Some(&byte) = self.bytes.get(self.at) else { return Err(self.wrong("the file ends in a number")) };
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.wrong("a number has more than 64 bits"))
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], SentencePieceError> {
        let left = self.bytes.len() - self.at;
        if len > left as u64 {
            return Err(self.wrong(&format!("needs {len} bytes, {left} are left")));
        }
        let bytes = &self.bytes[self.at..self.at + len as usize];
        self.at += len as usize;
        Ok(bytes)
    }

    /// The next field: its number, the byte at which its content begins, and the content.
    fn next(&mut self) -> Result<Option<(u64, usize, Field<'a>)>, SentencePieceError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let key = self.number()?;
        let (number, kind) = (key >> 3, key & 7);
        let mut start = self.start + self.at;
        let field = match kind {
            0 => Field::Number(self.number()?),
            1 => {
                self.take(8)?;
                Field::Long
            }
            2 => {
                let len = self.number()?;
                start = self.start + self.at;
                Field::Bytes(self.take(len)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Field::Bits(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            _ => return Err(self.wrong(&format!("fields of wire type {kind} are not known"))),
        };
        Ok(Some((number, start, field)))
    }
}

/// What the settings of a model say.
struct Settings {
    model_type: u64,
    byte_fallback: bool,
    unknown: u64,
    bos: u64,
    eos: u64,
    padding: u64,
    dummy_prefix: bool,
    extra_spaces_removed: bool,
    /// What comes after a word rather than before it is marked.
    suffix: bool,
    escaped: bool,
}

/// An id of the settings; −1 stands for none.
fn id(number: u64) -> Option<u32> {
    u32::try_from(number).ok()
}

/// Reads a model that merges by score (`llama`) or takes the likeliest pieces (`t5`), as what a GGUF header would say of it.
///
/// # Errors
/// When it is damaged, or does what is not supported: another algorithm, marks behind words, a table for texts that are put together.
pub fn read(bytes: &[u8]) -> Result<Tokenizer, SentencePieceError> {
    let mut settings = Settings {
        model_type: 1,
        byte_fallback: false,
        unknown: 0,
        bos: 1,
        eos: 2,
        padding: u64::MAX,
        dummy_prefix: true,
        extra_spaces_removed: true,
        suffix: false,
        escaped: true,
    };
    let mut tokenizer = Tokenizer { model: "llama".to_owned(), ..Tokenizer::default() };
    let mut model = Message { bytes, at: 0, start: 0, name: "tokenizer.model" };
    while let Some((number, start, field)) = model.next()? {
        match (number, field) {
            (1, Field::Bytes(bytes)) => piece(&mut tokenizer, Message { bytes, at: 0, start, name: "piece" })?,
            (2, Field::Bytes(bytes)) => {
                let mut spec = Message { bytes, at: 0, start, name: "trainer_spec" };
                while let Some((number, _, field)) = spec.next()? {
                    match (number, field) {
                        (3, Field::Number(n)) => settings.model_type = n,
                        (24, Field::Number(n)) => settings.suffix = n != 0,
                        (35, Field::Number(n)) => settings.byte_fallback = n != 0,
                        (40, Field::Number(n)) => settings.unknown = n,
                        (41, Field::Number(n)) => settings.bos = n,
                        (42, Field::Number(n)) => settings.eos = n,
                        (43, Field::Number(n)) => settings.padding = n,
                        _ => {}
                    }
                }
            }
            (3, Field::Bytes(bytes)) => {
                let mut spec = Message { bytes, at: 0, start, name: "normalizer_spec" };
                while let Some((number, _, field)) = spec.next()? {
                    match (number, field) {
                        (2, Field::Bytes(map)) => tokenizer.charsmap = map.to_vec(),
                        (3, Field::Number(n)) => settings.dummy_prefix = n != 0,
                        (4, Field::Number(n)) => settings.extra_spaces_removed = n != 0,
                        (5, Field::Number(n)) => settings.escaped = n != 0,
                        _ => {}
                    }
                }
            }
            (5, Field::Bytes(bytes)) => {
                let mut spec = Message { bytes, at: 0, start, name: "denormalizer_spec" };
                while let Some((number, _, field)) = spec.next()? {
                    if let (2, Field::Bytes(map)) = (number, field)
                        && !map.is_empty()
                    {
                        return Err(spec.wrong(&format!("a precompiled_charsmap of {} bytes is not supported, expected none", map.len())));
                    }
                }
            }
            _ => {}
        }
    }
    finish(tokenizer, &settings)
}

/// Adds a piece.
fn piece(tokenizer: &mut Tokenizer, mut message: Message<'_>) -> Result<(), SentencePieceError> {
    let place = tokenizer.tokens.len();
    let wrong = |problem: String, offset| SentencePieceError { field: format!("piece {place}"), offset, problem };
    if place == MOST_PIECES {
        return Err(wrong(format!("more than {MOST_PIECES} pieces"), message.start));
    }
    let (mut text, mut score, mut kind) = (None, 0.0, TokenType::Normal);
    while let Some((number, start, field)) = message.next()? {
        match (number, field) {
            (1, Field::Bytes(bytes)) => {
                let given = std::str::from_utf8(bytes).map_err(|_| wrong("expected UTF-8 text".to_owned(), start))?;
                text = Some(given.to_owned());
            }
            (2, Field::Bits(bits)) => score = f32::from_bits(bits),
            (3, Field::Number(n)) => {
                kind = match n {
                    1 => TokenType::Normal,
                    2 => TokenType::Unknown,
                    3 => TokenType::Control,
                    4 => TokenType::UserDefined,
                    5 => TokenType::Unused,
                    6 => TokenType::Byte,
                    _ => return Err(wrong(format!("expected a type from 1 to 6, got {n}"), start)),
                };
            }
            _ => {}
        }
    }
    tokenizer.tokens.push(text.ok_or_else(|| wrong("it has no text".to_owned(), message.start))?);
    tokenizer.scores.push(score);
    tokenizer.types.push(kind);
    Ok(())
}

/// Checks the settings and takes them over.
fn finish(mut tokenizer: Tokenizer, settings: &Settings) -> Result<Tokenizer, SentencePieceError> {
    let wrong = |field: &str, problem: String| SentencePieceError { field: field.to_owned(), offset: 0, problem };
    if tokenizer.tokens.is_empty() {
        return Err(wrong("tokenizer.model", "it has no pieces".to_owned()));
    }
    let kind = match settings.model_type {
        1 | 2 => None,
        3 => Some("word"),
        4 => Some("char"),
        _ => Some("unknown"),
    };
    if let Some(kind) = kind {
        return Err(wrong(
            "trainer_spec.model_type",
            format!("{kind} is not supported, expected unigram or bpe; tokenizer.json can say more"),
        ));
    }
    if settings.suffix {
        let problem = "true is not supported, expected false; tokenizer.json can say more".to_owned();
        return Err(wrong("trainer_spec.treat_whitespace_as_suffix", problem));
    }
    if !settings.escaped {
        let problem = "false is not supported, expected true; tokenizer.json can say more".to_owned();
        return Err(wrong("normalizer_spec.escape_whitespaces", problem));
    }
    if settings.model_type == 1 {
        tokenizer.model = "t5".to_owned();
    }
    for (field, number) in [("unk_id", settings.unknown), ("bos_id", settings.bos), ("eos_id", settings.eos), ("pad_id", settings.padding)]
    {
        // Negative numbers are written as 64 bits.
        if (number as i64) >= tokenizer.tokens.len() as i64 {
            let problem = format!("{number} is past the {} pieces", tokenizer.tokens.len());
            return Err(wrong(&format!("trainer_spec.{field}"), problem));
        }
    }
    (tokenizer.unknown, tokenizer.bos) = (id(settings.unknown), id(settings.bos));
    (tokenizer.eos, tokenizer.padding) = (id(settings.eos), id(settings.padding));
    tokenizer.add_space_prefix = Some(settings.dummy_prefix);
    tokenizer.remove_extra_whitespaces = Some(settings.extra_spaces_removed);
    if !settings.byte_fallback {
        // Byte pieces without fallback are plain text.
        tokenizer.types.iter_mut().filter(|t| **t == TokenType::Byte).for_each(|t| *t = TokenType::Normal);
    }
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(field: u64, value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for mut n in [field << 3, value] {
            while n >= 0x80 {
                bytes.push(n as u8 | 0x80);
                n >>= 7;
            }
            bytes.push(n as u8);
        }
        bytes
    }

    fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
        let mut out = number(field, content.len() as u64);
        out[0] |= 2;
        out.extend(content);
        out
    }

    fn a_piece(text: &str, score: f32, kind: u64) -> Vec<u8> {
        let score = [&[2 << 3 | 5][..], &score.to_le_bytes()].concat();
        bytes(1, &[bytes(1, text.as_bytes()), score, number(3, kind)].concat())
    }

    fn model(trainer: &[Vec<u8>], normalizer: &[Vec<u8>]) -> Vec<u8> {
        let pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x0A>", 0.0, 6), ("▁a", -1.0, 1), ("a", -2.0, 1)];
        let pieces = pieces.map(|(text, score, kind)| a_piece(text, score, kind)).concat();
        [pieces, bytes(2, &trainer.concat()), bytes(3, &normalizer.concat())].concat()
    }

    fn usual() -> Vec<u8> {
        model(&[number(3, 2), number(35, 1)], &[number(3, 1), number(4, 0)])
    }

    #[test]
    fn pieces_and_settings_are_read() {
        let t = read(&usual()).unwrap();
        assert_eq!(t.tokens, ["<unk>", "<s>", "</s>", "<0x0A>", "▁a", "a"]);
        assert_eq!(t.scores[4..], [-1.0, -2.0]);
        assert_eq!(t.types[..4], [TokenType::Unknown, TokenType::Control, TokenType::Control, TokenType::Byte]);
        assert_eq!((t.unknown, t.bos, t.eos, t.padding, t.add_space_prefix), (Some(0), Some(1), Some(2), None, Some(true)));
    }

    #[test]
    fn how_text_is_prepared_is_read() {
        let t = read(&model(&[number(3, 1)], &[bytes(2, b"map")])).unwrap();
        assert_eq!((t.model.as_str(), &t.charsmap[..], t.remove_extra_whitespaces), ("t5", &b"map"[..], Some(true)));
        assert_eq!(t.types[3], TokenType::Normal, "a byte without fallback is text");
        let back = [usual(), bytes(5, &bytes(2, b"map"))].concat();
        assert!(read(&back).unwrap_err().to_string().contains("denormalizer_spec"));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let said = |trainer: &[Vec<u8>], normalizer: &[Vec<u8>]| read(&model(trainer, normalizer)).unwrap_err().to_string();
        assert!(said(&[number(3, 3)], &[number(4, 0)]).contains("model_type"));
        assert!(said(&[number(3, 2), number(24, 1)], &[number(4, 0)]).contains("treat_whitespace_as_suffix"));
        assert!(said(&[number(3, 2)], &[number(5, 0)]).contains("escape_whitespaces"));
        assert!(said(&[number(3, 2), number(41, 900)], &[number(4, 0)]).contains("bos_id"));
    }

    #[test]
    fn damaged_files_are_refused_with_their_place() {
        let whole = usual();
        for end in 1..whole.len() {
            if let Err(error) = read(&whole[..end]) {
                assert!(error.offset <= end, "{error}");
            }
        }
        for wrong in [
            &b"\x0a\xff\xff\xff\xff\x0f"[..],
            b"\x0b",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x0a\x02\x0a\x05",
            b"\x0a\x03\x0a\x01\xff",
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
        assert!(read(b"").unwrap_err().problem.contains("no pieces"));
    }
}
