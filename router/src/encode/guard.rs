//! Keeps control tokens out of user content: what a client writes is text, even where it spells a control token.
//!
//! Before a template runs, a mark (a private-use character that occurs nowhere else) is put into every place of the
//! content where a control token is spelled, or could be spelled together with the template's own text. After it ran the
//! marks are taken out again, and no control token may be parsed across where they stood. Content without such places
//! reaches the template unchanged.

use serde_json::Value;

use super::specials::{Special, Specials};

/// Knows how control tokens are spelled.
pub(super) struct Guard {
    /// Texts of control tokens in lower case: templates may change case.
    spelled: Specials,
}

impl Guard {
    /// Guards against `texts`.
    pub(super) fn new<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let plain = |text: &str| Special {
            text: text.to_ascii_lowercase(),
            id: 0,
            control: false,
            lstrip: false,
            rstrip: false,
            single_word: false,
        };
        Self { spelled: Specials::new(texts.map(plain).collect()) }
    }

    /// Puts `mark` into every string of `value`, keys included, where it is needed.
    pub(super) fn mark(&self, value: &mut Value, mark: char) {
        self.mark_in(value, mark, false);
    }

    /// As [`Guard::mark`]; `content` for what is inside of a message's content.
    fn mark_in(&self, value: &mut Value, mark: char, content: bool) {
        match value {
            Value::String(text) if content && self.is_inner(text) => text.insert(text.len() - text.trim_start().len(), mark),
            Value::String(text) => *text = self.mark_text(text, mark),
            Value::Array(list) => list.iter_mut().for_each(|v| self.mark_in(v, mark, content)),
            Value::Object(map) => {
                let entries = std::mem::take(map);
                for (key, mut v) in entries {
                    self.mark_in(&mut v, mark, content || key == "content");
                    map.insert(self.mark_key(key, mark), v);
                }
            }
            _ => {}
        }
    }

    /// Whether `text` stands in the middle of a control token. Only content is asked: `'<|' + role + '|>'` is what templates mean to write.
    fn is_inner(&self, text: &str) -> bool {
        let inner = text.trim().to_ascii_lowercase();
        let within = |token: &str| token.len() > inner.len() + 1 && token[1..token.len() - 1].contains(&inner);
        // A control token's borders are single bytes in all vocabularies known; others are compared whole.
        let middle = |token: &str| {
            if token.is_char_boundary(1) && token.is_char_boundary(token.len() - 1) { within(token) } else { token.contains(&inner) }
        };
        !inner.is_empty() && self.spelled.list().iter().any(|s| !s.text.is_empty() && middle(&s.text))
    }

    fn mark_key(&self, key: String, mark: char) -> String {
        if self.spelled.starts(&key.to_ascii_lowercase()).is_empty() { key } else { self.mark_text(&key, mark) }
    }

    fn mark_text(&self, text: &str, mark: char) -> String {
        let lower = text.to_ascii_lowercase();
        let mut places = self.spelled.starts(&lower);
        // Inside a token: after its first character.
        for at in &mut places {
            *at += lower[*at..].chars().next().map_or(0, char::len_utf8);
        }
        let start = text.len() - text.trim_start().len();
        let end = text.trim_end().len();
        if start < end {
            let inner = &lower[start..end];
            let halves = |t: &'_ str, f: &dyn Fn(&str, &str) -> bool| (1..t.len()).any(|i| t.is_char_boundary(i) && f(&t[..i], &t[i..]));
            if self.spelled.list().iter().any(|s| halves(&s.text, &|_, tail| inner.starts_with(tail))) {
                places.push(start);
            }
            if self.spelled.list().iter().any(|s| halves(&s.text, &|head, _| inner.ends_with(head))) {
                places.push(end);
            }
        }
        places.sort_unstable();
        places.dedup();
        let (mut marked, mut from) = (String::with_capacity(text.len() + 3 * places.len()), 0);
        for at in places {
            marked.push_str(&text[from..at]);
            marked.push(mark);
            from = at;
        }
        marked.push_str(&text[from..]);
        marked
    }
}

/// A private-use character that occurs in none of `values` and not in `template`.
pub(super) fn free_mark(values: &[&Value], template: &str) -> Option<char> {
    let used = |c: char| template.contains(c) || values.iter().any(|v| contains(v, c));
    ('\u{e000}'..='\u{f8ff}').find(|&c| !used(c))
}

fn contains(value: &Value, c: char) -> bool {
    match value {
        Value::String(s) => s.contains(c),
        Value::Array(list) => list.iter().any(|v| contains(v, c)),
        Value::Object(map) => map.iter().any(|(k, v)| k.contains(c) || contains(v, c)),
        _ => false,
    }
}

/// Takes the marks out of `text`; returns the byte positions where they stood, ascending.
pub(super) fn unmark(text: &str, mark: char) -> (String, Vec<usize>) {
    let (mut plain, mut places) = (String::with_capacity(text.len()), Vec::new());
    for (i, part) in text.split(mark).enumerate() {
        if i > 0 {
            places.push(plain.len());
        }
        plain.push_str(part);
    }
    (plain, places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        Guard::new(["<eot>", "<|a|>"].into_iter())
    }

    #[test]
    fn content_without_control_tokens_is_untouched() {
        for text in ["", " hi ", "a < b", "if x > 1", "eot", "日本 <e>"] {
            assert_eq!(guard().mark_text(text, '#'), text);
        }
    }

    #[test]
    fn spelled_tokens_are_broken_and_restored() {
        for (text, marked) in [
            ("x<eot>y", "x<#eot>y"),
            ("<EOT>", "<#EOT>"),
            ("<eot><|a|>", "<#eot><#|a|>"),
            (" eot> ", " #eot> "),
            ("> quote", "#> quote"),
            ("a <|", "a <|#"),
        ] {
            assert_eq!(guard().mark_text(text, '#'), marked);
            assert_eq!(unmark(marked, '#').0, text);
        }
        assert_eq!(unmark("a#b#", '#'), ("ab".to_owned(), vec![1, 2]));
    }

    #[test]
    fn the_middle_of_a_token_is_broken_in_content_alone() {
        let guard = Guard::new(["<|user|>", "«é»"].into_iter());
        let mut value = serde_json::json!({"role": "user", "content": ["User", {"text": "ser"}, "é", "you"], "name": "user"});
        guard.mark(&mut value, '#');
        assert_eq!(value, serde_json::json!({"role": "user", "content": ["#User", {"text": "#ser"}, "#é", "you"], "name": "user"}));
    }

    #[test]
    fn a_mark_is_one_that_does_not_occur() {
        let v = Value::String("\u{e000}".to_owned());
        assert_eq!(free_mark(&[&v], "\u{e001}"), Some('\u{e002}'));
    }
}
