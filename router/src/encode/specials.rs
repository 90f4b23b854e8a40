//! Finds tokens that are matched whole in text: control tokens (where allowed) and user-defined ones (everywhere).

use std::collections::BTreeMap;
use std::ops::Range;

use plan::step::TokenId;

/// Where control tokens may be parsed from text.
#[derive(Clone, Copy, Debug)]
pub(super) enum Parse<'a> {
    /// Nowhere.
    Never,
    /// Everywhere.
    Always,
    /// Everywhere but across these byte positions, ascending.
    Between(&'a [usize]),
}

impl Parse<'_> {
    /// Whether a control token may span `range`.
    fn allows(self, range: &Range<usize>) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::Between(barriers) => {
                let next = barriers.partition_point(|&b| b <= range.start);
                barriers.get(next).is_none_or(|&b| b >= range.end)
            }
        }
    }
}

/// A token matched whole.
#[derive(Clone, Debug)]
pub(super) struct Special {
    /// Its text, not empty.
    pub(super) text: String,
    /// Its id.
    pub(super) id: TokenId,
    /// Matched only where [`Parse`] allows.
    pub(super) control: bool,
    /// Takes white space before it along.
    pub(super) lstrip: bool,
    /// Takes white space after it along.
    pub(super) rstrip: bool,
    /// Matched only between characters that are not part of words.
    pub(super) single_word: bool,
}

#[derive(Default)]
struct Node {
    /// Ascending by byte.
    children: Vec<(u8, u32)>,
    special: Option<u32>,
}

/// A set of specials with a trie over their bytes.
pub(super) struct Specials {
    list: Vec<Special>,
    nodes: Vec<Node>,
    first: [bool; 256],
}

/// A special found in text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Bytes it stands for.
    pub(super) range: Range<usize>,
    /// Its id.
    pub(super) id: TokenId,
}

impl Specials {
    /// Builds the trie. Of equal texts the first one counts; empty texts are left out.
    pub(super) fn new(list: Vec<Special>) -> Self {
        let mut nodes = vec![Node::default()];
        let mut first = [false; 256];
        for (index, special) in list.iter().enumerate() {
            let Some(&byte) = special.text.as_bytes().first() else { continue };
            first[usize::from(byte)] = true;
            let mut at = 0;
            for &byte in special.text.as_bytes() {
                at = match nodes[at].children.binary_search_by_key(&byte, |c| c.0) {
                    Ok(i) => nodes[at].children[i].1 as usize,
                    Err(i) => {
                        let new = nodes.len();
                        nodes[at].children.insert(i, (byte, new as u32));
                        nodes.push(Node::default());
                        new
                    }
                };
            }
            nodes[at].special.get_or_insert(index as u32);
        }
        Self { list, nodes, first }
    }

    /// All specials.
    pub(super) fn list(&self) -> &[Special] {
        &self.list
    }

    /// The longest special of at most `limit` bytes that starts at `at` and that `keep` accepts.
    pub(super) fn longest_at(
        &self,
        text: &[u8],
        at: usize,
        limit: usize,
        keep: impl Fn(&Special, Range<usize>) -> bool,
    ) -> Option<&Special> {
        if !self.first[usize::from(*text.get(at)?)] {
            return None;
        }
        let (mut node, mut best) = (0, None);
        for (i, &byte) in text[at..].iter().take(limit).enumerate() {
            let Ok(child) = self.nodes[node].children.binary_search_by_key(&byte, |c| c.0) else { break };
            node = self.nodes[node].children[child].1 as usize;
            if let Some(special) = self.nodes[node].special {
                let special = &self.list[special as usize];
                if keep(special, at..at + i + 1) {
                    best = Some(special);
                }
            }
        }
        best
    }

    /// Every position at which a special starts.
    pub(super) fn starts(&self, text: &str) -> Vec<usize> {
        (0..text.len()).filter(|&at| self.longest_at(text.as_bytes(), at, usize::MAX, |_, _| true).is_some()).collect()
    }

    /// Matches by length: the longest special in the text first, then the next longest in what is left (llama.cpp's order).
    /// Ascending by position.
    pub(super) fn find_longest(&self, text: &str, parse: Parse<'_>) -> Vec<Found> {
        let bytes = text.as_bytes();
        let keep = |s: &Special, range: Range<usize>| !s.control || parse.allows(&range);
        let mut by_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for at in 0..bytes.len() {
            if let Some(special) = self.longest_at(bytes, at, usize::MAX, keep) {
                by_length.entry(special.text.len()).or_default().push(at);
            }
        }
        let mut taken: BTreeMap<usize, Found> = BTreeMap::new();
        while let Some((length, mut starts)) = by_length.pop_last() {
            starts.sort_unstable();
            for at in starts {
                if taken.range(..=at).next_back().is_some_and(|(_, f)| f.range.end > at) {
                    continue;
                }
                let room = taken.range(at..).next().map_or(usize::MAX, |(&start, _)| start - at);
                if let Some(special) = self.longest_at(bytes, at, room.min(length), keep) {
                    let len = special.text.len();
                    if len == length {
                        taken.insert(at, Found { range: at..at + len, id: special.id });
                    } else {
                        by_length.entry(len).or_default().push(at);
                    }
                }
            }
        }
        taken.into_values().collect()
    }

    /// Matches from the left, the longest at each position (the order of tokenizer.json), with stripping and word rules.
    /// `origin` maps a range of `text` to the text that `parse` speaks of. Ascending, not overlapping.
    pub(super) fn find_leftmost(&self, text: &str, parse: Parse<'_>, origin: impl Fn(Range<usize>) -> Option<Range<usize>>) -> Vec<Found> {
        let bytes = text.as_bytes();
        let keep = |s: &Special, range: Range<usize>| {
            let alone = || {
                let before = text[..range.start].chars().next_back().is_none_or(|c| !is_word(c));
                before && text[range.end..].chars().next().is_none_or(|c| !is_word(c))
            };
            (!s.control || origin(range.clone()).is_some_and(|r| parse.allows(&r))) && (!s.single_word || alone())
        };
        let (mut found, mut at, mut free): (Vec<Found>, usize, usize) = (Vec::new(), 0, 0);
        while at < bytes.len() {
            let Some(special) = self.longest_at(bytes, at, usize::MAX, keep) else {
                at += 1;
                continue;
            };
            let (mut start, mut end) = (at, at + special.text.len());
            if special.lstrip {
                start = text[..start].trim_end().len().max(free);
            }
            if special.rstrip {
                end += text[end..].len() - text[end..].trim_start().len();
            }
            found.push(Found { range: start..end, id: special.id });
            (at, free) = (end, end);
        }
        found
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials(texts: &[&str]) -> Specials {
        let make = |(i, t): (usize, &&str)| Special {
            text: (*t).to_owned(),
            id: i as u32,
            control: t.starts_with('<'),
            lstrip: false,
            rstrip: false,
            single_word: false,
        };
        Specials::new(texts.iter().enumerate().map(make).collect())
    }

    fn ids(found: &[Found]) -> Vec<(usize, u32)> {
        found.iter().map(|f| (f.range.start, f.id)).collect()
    }

    #[test]
    fn the_longest_special_wins_even_when_it_starts_later() {
        let s = specials(&["abc", "cdefg", "ab"]);
        assert_eq!(ids(&s.find_longest("abcdefg", Parse::Never)), [(0, 2), (2, 1)]);
        assert_eq!(ids(&s.find_leftmost("abcdefg", Parse::Never, Some)), [(0, 0)]);
    }

    #[test]
    fn runs_are_cut_into_longest_pieces_from_the_left() {
        let s = specials(&["\n", "\n\n", "\n\n\n"]);
        assert_eq!(ids(&s.find_longest(&"\n".repeat(8), Parse::Never)), [(0, 2), (3, 2), (6, 1)]);
    }

    #[test]
    fn control_tokens_are_found_only_where_allowed() {
        let s = specials(&["<a>", "b"]);
        assert_eq!(ids(&s.find_longest("<a>b<a>", Parse::Never)), [(3, 1)]);
        assert_eq!(ids(&s.find_longest("<a>b<a>", Parse::Always)), [(0, 0), (3, 1), (4, 0)]);
        assert_eq!(ids(&s.find_longest("<a>b<a>", Parse::Between(&[5]))), [(0, 0), (3, 1)]);
        assert_eq!(ids(&s.find_leftmost("<a>b<a>", Parse::Between(&[1]), Some)), [(3, 1), (4, 0)]);
        assert_eq!(ids(&s.find_leftmost("<a>b<a>", Parse::Between(&[0, 3, 4, 7]), Some)), [(0, 0), (3, 1), (4, 0)]);
    }
}
