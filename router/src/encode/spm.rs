//! SentencePiece vocabularies (`tokenizer.ggml.model` = `llama` and `t5`, and `tokenizer.model`): how text becomes pieces, merged by score here,
//! or taken by their probability from [`Unigram`].

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use ahash::AHashMap;
use plan::step::TokenId;

use super::normalizer::Normalizer;
use super::specials::{Parse, Specials};
use super::unigram::Unigram;

/// The word boundary of SentencePiece; here a plain space stands for it in text and vocabulary alike.
pub(super) const BOUNDARY: char = '\u{2581}';

/// A vocabulary of pieces.
pub(super) struct Spm {
    /// Tokens that merging may produce, boundary as space.
    pub(super) ids: AHashMap<Box<str>, TokenId>,
    /// Score of each id.
    pub(super) scores: Vec<f32>,
    /// Id of each single byte.
    pub(super) bytes: Box<[Option<TokenId>; 256]>,
    /// For bytes without a token.
    pub(super) unknown: Option<TokenId>,
    /// Tokens matched whole.
    pub(super) specials: Specials,
    /// Put a space before the text, and before text that follows a special token.
    pub(super) space_prefix: bool,
    /// Bytes of the longest token in `ids`.
    pub(super) longest: usize,
    /// Whose rules these are.
    pub(super) rules: Rules,
}

/// What is done where SentencePiece and llama.cpp differ.
pub(super) enum Rules {
    /// Tokens matched whole are taken out of the text first, the longest ones first; what is left is text with a space before it.
    LlamaCpp,
    /// Control tokens alone are taken out first. The text is prepared, with the space before it; then it is cut. Neighbours without a token
    /// are one unknown.
    SentencePiece {
        /// How the text is prepared.
        normalizer: Box<Normalizer>,
        /// How it is cut.
        cut: Cut,
        /// What has no token is spelled in bytes.
        bytes: bool,
    },
}

/// How a prepared text is cut.
pub(super) enum Cut {
    /// Tokens that are always matched, boundary as space, from the left; what is between them is merged by score.
    Merged(Box<Specials>),
    /// The likeliest pieces.
    Likeliest(Box<Unigram>),
}

struct Symbol {
    start: u32,
    /// 0 once merged into the one before.
    len: u32,
    prev: u32,
    next: u32,
}

const NONE: u32 = u32::MAX;

struct Pair {
    score: f32,
    left: u32,
    right: u32,
    len: u32,
}

impl Ord for Pair {
    /// The greatest is merged next: the highest score, of equals the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl Spm {
    /// Appends the ids of `text`.
    pub(super) fn encode(&self, text: &str, parse: Parse<'_>, ids: &mut Vec<TokenId>) {
        let mut at = 0;
        let found = match self.rules {
            Rules::LlamaCpp => self.specials.find_longest(text, parse),
            Rules::SentencePiece { .. } => self.specials.find_leftmost(text, parse, Some),
        };
        for found in found {
            self.fragment(&text[at..found.range.start], ids);
            ids.push(found.id);
            at = found.range.end;
        }
        self.fragment(&text[at..], ids);
    }

    /// Appends the ids of a text without specials; what is before it is a special token or nothing.
    fn fragment(&self, text: &str, ids: &mut Vec<TokenId>) {
        if text.is_empty() {
            return;
        }
        let (normalizer, cut) = match &self.rules {
            Rules::SentencePiece { normalizer, cut, .. } => (normalizer, cut),
            Rules::LlamaCpp => {
                let mut plain = String::with_capacity(text.len() + 1);
                plain.extend(self.space_prefix.then_some(' '));
                plain.extend(text.chars().map(|c| if c == BOUNDARY { ' ' } else { c }));
                return self.merge(&plain, ids);
            }
        };
        let plain = normalizer.normalize(text);
        let defined = match cut {
            Cut::Merged(defined) => defined,
            Cut::Likeliest(unigram) => {
                for (range, id) in unigram.cut(&plain) {
                    self.token(&plain[range], id, ids);
                }
                return;
            }
        };
        let mut at = 0;
        for found in defined.find_leftmost(&plain, Parse::Never, Some) {
            self.merge(&plain[at..found.range.start], ids);
            ids.push(found.id);
            at = found.range.end;
        }
        self.merge(&plain[at..], ids);
    }

    fn merge(&self, text: &str, ids: &mut Vec<TokenId>) {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        for (i, (start, c)) in text.char_indices().enumerate() {
            let i = i as u32;
            symbols.push(Symbol { start: start as u32, len: c.len_utf8() as u32, prev: i.wrapping_sub(1), next: i + 1 });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let mut queue = BinaryHeap::with_capacity(symbols.len());
        for i in 1..symbols.len() as u32 {
            self.offer(text, &symbols, i - 1, i, &mut queue);
        }
        while let Some(pair) = queue.pop() {
            let (left, right) = (&symbols[pair.left as usize], &symbols[pair.right as usize]);
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.len {
                continue;
            }
            let (prev, next) = (left.prev, right.next);
            symbols[pair.left as usize].len = pair.len;
            symbols[pair.left as usize].next = next;
            symbols[pair.right as usize].len = 0;
            if next != NONE {
                symbols[next as usize].prev = pair.left;
                self.offer(text, &symbols, pair.left, next, &mut queue);
            }
            if prev != NONE {
                self.offer(text, &symbols, prev, pair.left, &mut queue);
            }
        }
        for symbol in symbols.iter().filter(|s| s.len > 0) {
            let token = &text[symbol.start as usize..(symbol.start + symbol.len) as usize];
            self.token(token, self.ids.get(token).copied(), ids);
        }
    }

    /// Appends a token, or what stands for text that has none.
    fn token(&self, text: &str, id: Option<TokenId>, ids: &mut Vec<TokenId>) {
        match id {
            Some(id) => ids.push(id),
            None if matches!(self.rules, Rules::SentencePiece { bytes: false, .. }) => {
                ids.extend(self.unknown.filter(|unknown| ids.last() != Some(unknown)));
            }
            None => ids.extend(text.bytes().filter_map(|b| self.bytes[usize::from(b)].or(self.unknown))),
        }
    }

    fn offer(&self, text: &str, symbols: &[Symbol], left: u32, right: u32, queue: &mut BinaryHeap<Pair>) {
        let (l, r) = (&symbols[left as usize], &symbols[right as usize]);
        let len = l.len + r.len;
        if len as usize > self.longest {
            return;
        }
        if let Some(&id) = self.ids.get(&text[l.start as usize..(l.start + len) as usize]) {
            queue.push(Pair { score: self.scores[id as usize], left, right, len });
        }
    }
}
