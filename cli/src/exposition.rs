//! Metrics in the text exposition of Prometheus, as far as the plugin reads them.

use std::collections::BTreeMap;

/// Name, labels and value of a line such as `name{a="b"} 1`.
pub(crate) fn sample(line: &str) -> Option<(&str, BTreeMap<String, String>, f64)> {
    let (name, rest) = line.split_once('{')?;
    let (labels, value) = rest.rsplit_once("} ")?;
    let mut found = BTreeMap::new();
    let mut rest = labels;
    while let Some((key, quoted)) = rest.split_once("=\"") {
        let (mut text, mut chars) = (String::new(), quoted.char_indices());
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => match chars.next()?.1 {
                    'n' => text.push('\n'),
                    other => text.push(other),
                },
                (_, other) => text.push(other),
            }
        };
        found.insert(key.to_owned(), text);
        rest = quoted[end + 1..].trim_start_matches(',');
    }
    Some((name, found, value.split(' ').next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_may_hold_anything() {
        let (name, labels, value) = sample("n{a=\"x\\\"y,z=\\\\\",b=\"} 2\\n\"} 1.5").expect("a sample");
        assert_eq!((name, value), ("n", 1.5));
        assert_eq!((labels["a"].as_str(), labels["b"].as_str(), labels.len()), ("x\"y,z=\\", "} 2\n", 2));
        for line in ["n 1", "n{a=\"b\"", "n{a=\"b} 1", "n{} x"] {
            assert_eq!(sample(line), None, "{line}");
        }
    }
}
