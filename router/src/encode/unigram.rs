//! SentencePiece's unigram vocabularies: the pieces of a text whose probabilities have the greatest product (Kudo 2018, arXiv:1804.10959).
//!
//! Sums and ties are those of `EncodeOptimized` in SentencePiece's `unigram_model.cc`, in 32 bits as there: of equal ways the first one stays.

use std::ops::Range;

use plan::gguf::{TokenType, Tokenizer as Stored};
use plan::step::TokenId;

use super::spm::BOUNDARY;

/// How much less likely than the least likely piece a character without one is.
const UNKNOWN_PENALTY: f32 = 10.0;
/// Score of a piece that is always matched: so high that it always is.
const DEFINED: f32 = -0.1;

/// Pieces and their scores.
pub(super) struct Unigram {
    /// Pieces that text is cut into, a space for the boundary; ascending by bytes.
    pieces: Vec<(Box<str>, TokenId)>,
    /// Score of each id.
    scores: Vec<f32>,
    /// Score of a character without a piece.
    unknown: f32,
}

/// The best way to a place of the text.
#[derive(Clone, Copy)]
struct Node {
    score: f32,
    /// Where its last piece begins; [`NOWHERE`] where nothing led here yet.
    start: u32,
    id: Option<TokenId>,
}

const NOWHERE: u32 = u32::MAX;

impl Unigram {
    /// The model of the first `pieces` tokens of a vocabulary with a score for each token.
    pub(super) fn new(stored: &Stored, pieces: usize) -> Self {
        let kind = |id: usize| stored.types.get(id).copied().unwrap_or(TokenType::Normal);
        // A text has no plain spaces once they are boundaries.
        let cut = |&(id, token): &(usize, &String)| {
            matches!(kind(id), TokenType::Normal | TokenType::UserDefined) && !token.is_empty() && !token.contains(' ')
        };
        let piece = |(id, token): (usize, &String)| (token.replace(BOUNDARY, " ").into_boxed_str(), id as TokenId);
        let mut sorted: Vec<(Box<str>, TokenId)> = stored.tokens.iter().enumerate().take(pieces).filter(cut).map(piece).collect();
        sorted.sort_unstable();
        // Of equal ones the first counts.
        sorted.dedup_by(|later, first| later.0 == first.0);
        let least = |id: usize| if kind(id) == TokenType::Normal { stored.scores[id] } else { f32::MAX };
        let least = (0..pieces).map(least).fold(f32::MAX, f32::min);
        let score = |id: usize| if kind(id) == TokenType::UserDefined { DEFINED } else { stored.scores[id] };
        Self { pieces: sorted, scores: (0..pieces).map(score).collect(), unknown: least - UNKNOWN_PENALTY }
    }

    /// The pieces of `text`, in order; none for a character that has no piece.
    pub(super) fn cut(&self, text: &str) -> Vec<(Range<usize>, Option<TokenId>)> {
        let mut best = vec![Node { score: 0.0, start: NOWHERE, id: None }; text.len() + 1];
        for (start, character) in text.char_indices() {
            let before = best[start].score;
            let width = character.len_utf8();
            let mut alone = false;
            self.pieces_at(&text.as_bytes()[start..], |len, id| {
                let score = self.scores[id as usize] + before;
                let node = &mut best[start + len];
                if node.start == NOWHERE || score > node.score {
                    *node = Node { score, start: start as u32, id: Some(id) };
                }
                alone |= len == width;
            });
            let (node, score) = (&mut best[start + width], self.unknown + before);
            if !alone && (node.start == NOWHERE || score > node.score) {
                *node = Node { score, start: start as u32, id: None };
            }
        }
        let (mut cut, mut end) = (Vec::new(), text.len());
        while end > 0 {
            let node = best[end];
            cut.push((node.start as usize..end, node.id));
            end = node.start as usize;
        }
        cut.reverse();
        cut
    }

    /// Hands every piece that `text` begins with, and its length, to `found`, the shortest first.
    fn pieces_at(&self, text: &[u8], mut found: impl FnMut(usize, TokenId)) {
        let mut left = &self.pieces[..];
        for (depth, &byte) in text.iter().enumerate() {
            let at = |piece: &(Box<str>, TokenId)| piece.0.as_bytes().get(depth).copied();
            let from = left.partition_point(|piece| at(piece) < Some(byte));
            let to = from + left[from..].partition_point(|piece| at(piece) == Some(byte));
            left = &left[from..to];
            match left.first() {
                None => return,
                Some((piece, id)) if piece.len() == depth + 1 => found(depth + 1, *id),
                Some(_) => {}
            }
        }
    }
}
