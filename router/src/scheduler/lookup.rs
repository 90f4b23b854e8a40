//! Prompt lookup: what a sequence may say next, guessed from where its last ids stood before.
//!
//! The last two ids lead to a chain of the places where they stood earlier, as compressors keep them (LZ77 with hash chains): the
//! one whose ids before agree the longest is taken, the latest of equals. An id costs one entry, a guess a bounded number of
//! comparisons, whatever the length of the sequence.
//!
//! Guesses are scored as ids come, whether they were run as drafts or not. So a sequence that does not repeat itself is known for
//! it at no cost, and one that begins to is noticed.

use std::collections::HashMap;

use plan::step::TokenId;

/// Ids that lead to a chain; the fewest that must agree.
const LEAST: usize = 2;
/// Ids that are compared at most: with this many a place is taken without looking further.
const LONGEST: usize = 16;
/// Places of a chain that are looked at.
const TRIES: usize = 16;
/// Ids before the first guess that are looked through; earlier ones are not remembered.
const REACH: usize = 32_768;
/// Weight of the latest guess in the share of guesses that came true.
const WEIGHT: f32 = 0.25;
/// Shortest matches whose guesses are scored apart.
const CLASSES: [usize; 4] = [2, 3, 5, 9];
/// No earlier place.
const NONE: u32 = u32::MAX;

/// What is remembered of one sequence's ids.
#[derive(Clone, Debug, Default)]
pub(super) struct Lookup {
    /// First position that is remembered.
    start: usize,
    /// Ids that were followed.
    seen: usize,
    /// Last position of the latest occurrence of each pair.
    latest: HashMap<[TokenId; LEAST], u32>,
    /// For each position from `start` on, where the pair that ends there ended before.
    before: Vec<u32>,
    /// Where the last ids stood before.
    found: Option<Match>,
    /// Share of guesses that came true, by the length of the match.
    shares: [f32; CLASSES.len()],
}

/// An earlier place that ends like the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Match {
    /// The position behind it.
    next: usize,
    /// Ids that agree.
    length: usize,
}

impl Lookup {
    /// Takes in ids that came since the last call: scores the guess that stood, and makes the next.
    pub(super) fn follow(&mut self, ids: &[TokenId]) {
        if ids.len() == self.seen {
            return;
        }
        self.score(ids);
        if self.seen == 0 {
            self.start = ids.len().saturating_sub(REACH);
        }
        for end in (self.start + self.before.len())..ids.len() {
            let earlier = if end > self.start { self.latest.insert([ids[end - 1], ids[end]], end as u32) } else { None };
            self.before.push(earlier.unwrap_or(NONE));
        }
        self.seen = ids.len();
        self.found = self.find(ids);
    }

    /// How far a guess of what follows `ids` is to be trusted: the share of such guesses that came true, 0 to 1. `None` where there is no
    /// guess, or ids came that were not followed.
    pub(super) fn trust(&self, ids: &[TokenId]) -> Option<f32> {
        self.found.filter(|_| self.seen == ids.len()).map(|found| self.shares[class(found.length)])
    }

    /// The `n` ids that are guessed to follow `ids`; none where there is no guess. What runs over the end goes on with what was guessed.
    pub(super) fn guess(&self, ids: &[TokenId], n: usize) -> Vec<TokenId> {
        let mut guess = Vec::with_capacity(n);
        if let Some(Match { next, .. }) = self.found.filter(|_| self.seen == ids.len()) {
            for at in next..next + n {
                guess.push(ids.get(at).copied().unwrap_or_else(|| guess[at - ids.len()]));
            }
        }
        guess
    }

    /// Compares what came with what was guessed, up to the first that differs.
    fn score(&mut self, ids: &[TokenId]) {
        let Some(found) = self.found else { return };
        let came = &ids[self.seen..];
        let share = &mut self.shares[class(found.length)];
        // Ids that came right continue the earlier place where it runs over the end.
        for (id, guessed) in came.iter().zip(&ids[found.next..]) {
            let right = id == guessed;
            *share += WEIGHT * (f32::from(right) - *share);
            if !right {
                return;
            }
        }
    }

    fn find(&self, ids: &[TokenId]) -> Option<Match> {
        let end = ids.len() - 1;
        let mut best: Option<Match> = None;
        let mut at = *self.before.get(end - self.start)?;
        for _ in 0..TRIES {
            if at == NONE {
                break;
            }
            let place = at as usize;
            let agree = ids[..=place].iter().rev().zip(ids.iter().rev()).take(LONGEST).take_while(|(a, b)| a == b).count();
            if best.is_none_or(|best| agree > best.length) {
                best = Some(Match { next: place + 1, length: agree });
            }
            if agree == LONGEST {
                break;
            }
            at = self.before[place - self.start];
        }
        best
    }
}

/// Which of the classes a match belongs to.
fn class(length: usize) -> usize {
    CLASSES.partition_point(|shortest| *shortest <= length).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn followed(ids: &[TokenId]) -> Lookup {
        let mut lookup = Lookup::default();
        (1..=ids.len()).for_each(|n| lookup.follow(&ids[..n]));
        lookup
    }

    #[test]
    fn the_longest_match_wins_and_the_latest_of_equals() {
        // 2 3 stood three times before: behind 1 (then 7), behind 9 (then 8), behind 5 (then 6).
        let ids = [1, 2, 3, 7, 9, 2, 3, 8, 5, 2, 3, 6, 9, 2, 3];
        assert_eq!(followed(&ids).guess(&ids, 3), [8, 5, 2]);
        let ids = [1, 2, 3, 7, 9, 2, 3, 8, 5, 2, 3, 6, 4, 2, 3];
        assert_eq!(followed(&ids).guess(&ids, 3), [6, 4, 2]);
        let ids = [1, 2, 3, 7, 1, 3];
        assert_eq!(followed(&ids).trust(&ids), None, "one id alone is no match");
        assert!(followed(&ids).guess(&ids, 3).is_empty());
        assert_eq!(Lookup::default().trust(&[]), None);
    }

    #[test]
    fn a_text_that_repeats_is_guessed_past_its_end() {
        let ids = [4, 5, 6, 4, 5, 6, 4, 5];
        assert_eq!(followed(&ids).guess(&ids, 7), [6, 4, 5, 6, 4, 5, 6]);
        let ids = [9, 1, 1, 1];
        assert_eq!(followed(&ids).guess(&ids, 5), [1; 5]);
    }

    #[test]
    fn following_in_one_piece_finds_what_following_one_by_one_does() {
        let ids: Vec<TokenId> = (0..400u32).map(|i| (i * i / 7) % 23).collect();
        let mut whole = Lookup::default();
        whole.follow(&ids);
        let single = followed(&ids);
        assert!(whole.found.is_some());
        assert_eq!((whole.found, &whole.before), (single.found, &single.before));
    }

    #[test]
    fn trust_is_the_share_of_guesses_that_came_true() {
        let period: Vec<TokenId> = (0..40).collect();
        let ids: Vec<TokenId> = period.iter().cycle().take(120).copied().collect();
        assert!(followed(&ids).trust(&ids) > Some(0.99), "a text that repeats");
        // Each id stands behind the same pair as before, and another follows.
        let other: Vec<TokenId> = (0..80).flat_map(|i| [1, 2, 100 + i]).chain([1, 2]).collect();
        let never = followed(&other);
        assert_eq!(never.trust(&other), Some(0.0));
        assert_eq!(never.guess(&other, 1), [179], "there is a guess all the same");
        // In pieces, as accepted drafts come: the second is wrong from its third id on.
        let mut lookup = followed(&ids);
        let before = lookup.trust(&ids).expect("a match");
        let longer: Vec<TokenId> = ids.iter().copied().chain([0, 1, 99]).collect();
        lookup.follow(&longer);
        let expected = [true, true, false].iter().fold(before, |share, right| share + WEIGHT * (f32::from(*right) - share));
        assert_eq!(lookup.shares[3], expected);
    }

    #[test]
    fn what_lies_too_far_back_is_forgotten() {
        let ids: Vec<TokenId> = (0..REACH as u32 + 10).chain([0, 1]).collect();
        let mut lookup = Lookup::default();
        lookup.follow(&ids);
        assert_eq!((lookup.trust(&ids), lookup.before.len()), (None, REACH));
        let near: Vec<TokenId> = ids.iter().copied().chain([20, 21]).collect();
        assert!(lookup.guess(&near, 2).is_empty(), "they were not followed yet");
        lookup.follow(&near);
        assert_eq!(lookup.guess(&near, 2), [22, 23]);
    }
}
