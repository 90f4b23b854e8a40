//! Ids to text as they come: characters held back until whole, stop strings found across token borders.

use std::sync::Arc;

use plan::step::TokenId;

use crate::encode::Tokenizer;

/// Turns one sequence's tokens into text.
///
/// The text released in all is the same for any split into tokens: of all stop strings the one that ends first counts (of
/// those that end together, the one that starts first), and the text is cut before it.
pub struct Decoder {
    tokenizer: Arc<Tokenizer>,
    stops: Arc<[String]>,
    /// The first bytes of a character.
    partial: Vec<u8>,
    /// Text that could still become a stop string.
    held: String,
    /// A leading space of the next piece is dropped.
    strip: bool,
    /// Bytes and characters of text decoded so far, released or held.
    decoded: usize,
    characters: usize,
    stop: Option<usize>,
}

impl Decoder {
    /// A decoder of what follows `previous` (the last prompt token), ended by any of `stops` (none of them empty).
    pub fn new(tokenizer: Arc<Tokenizer>, stops: Arc<[String]>, previous: Option<TokenId>) -> Self {
        let strip = tokenizer.strips_space() && previous.is_none_or(|id| tokenizer.is_control(id));
        Self { tokenizer, stops, partial: Vec::new(), held: String::new(), strip, decoded: 0, characters: 0, stop: None }
    }

    /// Takes the next token and appends to `out` what became certain. With `scan` false no stop string is looked for, and
    /// one found later starts after this token's text. Returns whether a stop string was completed; nothing may follow then.
    pub fn push(&mut self, id: TokenId, scan: bool, out: &mut String) -> bool {
        if !self.tokenizer.is_control(id) {
            let tokenizer = Arc::clone(&self.tokenizer);
            let mut piece = tokenizer.piece(id);
            if self.strip && !piece.is_empty() {
                piece = piece.strip_prefix(b" ").unwrap_or(piece);
                self.strip = false;
            }
            self.partial.extend_from_slice(piece);
            self.take_whole(false);
        }
        self.release(scan, false, out)
    }

    /// Appends what is still held: the stream has ended. Returns whether a stop string was completed by it.
    pub fn finish(&mut self, scan: bool, out: &mut String) -> bool {
        if self.stop.is_some() {
            return true;
        }
        self.take_whole(true);
        self.release(scan, true, out)
    }

    /// Bytes of text decoded so far, released or held back as a possible stop string.
    pub fn decoded(&self) -> usize {
        self.decoded
    }

    /// Characters of text decoded so far.
    pub fn characters(&self) -> usize {
        self.characters
    }

    /// Whether the last token ended inside a character.
    pub fn is_inside_character(&self) -> bool {
        !self.partial.is_empty()
    }

    /// Which of the stop strings ended the text.
    pub fn stop(&self) -> Option<&str> {
        self.stop.map(|i| self.stops[i].as_str())
    }

    /// Moves whole characters from `partial` to `held`; what can never become one is replaced by U+FFFD.
    fn take_whole(&mut self, end: bool) {
        let before = self.held.len();
        let mut at = 0;
        while at < self.partial.len() {
            match std::str::from_utf8(&self.partial[at..]) {
                Ok(text) => {
                    self.held.push_str(text);
                    at = self.partial.len();
                }
                Err(e) => {
                    let valid = at + e.valid_up_to();
                    self.held.push_str(&String::from_utf8_lossy(&self.partial[at..valid]));
                    at = valid;
                    match e.error_len() {
                        Some(bad) => at += bad,
                        None if end => at = self.partial.len(),
                        None => break,
                    }
                    self.held.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
        self.partial.drain(..at);
        self.decoded += self.held.len() - before;
        self.characters += self.held[before..].chars().count();
    }

    fn release(&mut self, scan: bool, end: bool, out: &mut String) -> bool {
        if scan {
            let found = self.stops.iter().enumerate().filter_map(|(i, s)| self.held.find(s.as_str()).map(|at| (at + s.len(), at, i)));
            if let Some((_, at, i)) = found.min() {
                out.push_str(&self.held[..at]);
                self.held.clear();
                self.partial.clear();
                self.stop = Some(i);
                return true;
            }
        }
        let keep = if scan && !end { self.possible() } else { 0 };
        let release = self.held.len() - keep;
        out.push_str(&self.held[..release]);
        self.held.drain(..release);
        false
    }

    /// Bytes at the end of `held` that could be the beginning of a stop string.
    fn possible(&self) -> usize {
        let overlap = |stop: &String| {
            let most = (stop.len() - 1).min(self.held.len());
            (1..=most).rev().find(|&n| self.held.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
        };
        self.stops.iter().map(overlap).max().unwrap_or(0)
    }
}

/// The text of `ids` alone: control tokens left out unless `control`.
pub fn text(tokenizer: &Tokenizer, ids: &[TokenId], control: bool) -> String {
    let mut bytes = Vec::new();
    let mut strip = tokenizer.strips_space();
    for &id in ids.iter().filter(|&&id| control || !tokenizer.is_control(id)) {
        let mut piece = tokenizer.piece(id);
        if strip && !piece.is_empty() && !tokenizer.is_control(id) {
            piece = piece.strip_prefix(b" ").unwrap_or(piece);
            strip = false;
        }
        bytes.extend_from_slice(piece);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests;
