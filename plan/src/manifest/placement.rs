//! Fields of the resource that say which nodes workers may run on, with Kubernetes' own rules for them.

use serde::{Deserialize, Serialize};

use super::{types::WorkersSpec, validate::Problem};

/// Most labels that a node is asked for, and most taints that are tolerated.
const MOST: usize = 64;
/// Longest name of a label or taint, longest value, and longest prefix of a name.
const MAX_NAME: usize = 63;
const MAX_PREFIX: usize = 253;

/// A taint of nodes that is no hindrance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct TolerationSpec {
    /// The taint's key; every taint where it is absent, which needs operator `Exists`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = 317)))]
    pub key: Option<String>,
    /// `Equal`: the taint's value is `value`. `Exists`: whatever the taint's value is. Default `Equal`.
    pub operator: TolerationOperator,
    /// The taint's value; with operator `Equal` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 63)))]
    pub value: Option<String>,
    /// The taint's effect; any where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
    /// Seconds that a worker stays on a node which gets the taint; with effect `NoExecute` alone. For good where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(max = 31536000)))]
    pub toleration_seconds: Option<u32>,
}

/// How a taint is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "TolerationSpec says it")]
pub enum TolerationOperator {
    #[default]
    Equal,
    Exists,
}

/// What a taint does to pods that do not tolerate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "named as Kubernetes names them")]
pub enum TaintEffect {
    NoSchedule,
    PreferNoSchedule,
    NoExecute,
}

/// The schema of labels: values are checked by the API server, keys by the parser.
#[cfg(feature = "schema")]
pub(super) fn labels(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "maxProperties": MOST,
        "additionalProperties": { "type": "string", "maxLength": MAX_NAME, "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$" },
    })
}

/// Checks labels and tolerations.
pub(super) fn check(workers: &WorkersSpec) -> Result<(), Problem> {
    let path = "spec.workers.nodeSelector";
    most(path, workers.node_selector.len())?;
    for (key, value) in &workers.node_selector {
        named(&format!("{path}.{key}"), key)?;
        valued(&format!("{path}.{key}"), value)?;
    }
    let path = "spec.workers.tolerations";
    most(path, workers.tolerations.len())?;
    workers.tolerations.iter().enumerate().try_for_each(|(index, toleration)| tolerates(&format!("{path}[{index}]"), toleration))
}

fn most(path: &str, count: usize) -> Result<(), Problem> {
    if count > MOST { Err(Problem::new(path, format!("expected at most {MOST}, got {count}"))) } else { Ok(()) }
}

fn tolerates(path: &str, toleration: &TolerationSpec) -> Result<(), Problem> {
    let field = |name: &str| format!("{path}.{name}");
    let exists = toleration.operator == TolerationOperator::Exists;
    match &toleration.key {
        Some(key) => named(&field("key"), key)?,
        None if exists => {}
        None => return Err(Problem::new(&field("key"), "expected a taint's key, or operator Exists".to_owned())),
    }
    if let Some(value) = &toleration.value {
        if exists {
            return Err(Problem::new(&field("value"), "expected none beside operator Exists".to_owned()));
        }
        valued(&field("value"), value)?;
    }
    if toleration.toleration_seconds.is_some() && toleration.effect != Some(TaintEffect::NoExecute) {
        return Err(Problem::new(&field("tolerationSeconds"), "expected effect NoExecute beside it".to_owned()));
    }
    Ok(())
}

/// Letters, digits, and between them `-`, `_` and `.`: what labels and taints are called, and their values where those are not empty.
fn is_word(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let inner = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    text.len() <= MAX_NAME && inner && ends(text.chars().next()) && ends(text.chars().next_back())
}

/// Parts of a DNS name.
fn is_prefix(text: &str) -> bool {
    let label = |part: &str| {
        let inner = part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        !part.is_empty() && inner && !part.starts_with('-') && !part.ends_with('-')
    };
    text.len() <= MAX_PREFIX && text.split('.').all(label)
}

fn named(path: &str, key: &str) -> Result<(), Problem> {
    let well = match key.split_once('/') {
        Some((prefix, name)) => is_prefix(prefix) && is_word(name),
        None => is_word(key),
    };
    let expected = || format!("expected a name such as example.com/gpu, of at most {MAX_NAME} characters after a '/', got {key:?}");
    if well { Ok(()) } else { Err(Problem::new(path, expected())) }
}

fn valued(path: &str, value: &str) -> Result<(), Problem> {
    let expected =
        || format!("expected at most {MAX_NAME} letters, digits, '-', '_' and '.', the first and last a letter or digit, got {value:?}");
    if value.is_empty() || is_word(value) { Ok(()) } else { Err(Problem::new(path, expected())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_those_that_kubernetes_takes() {
        let named = |key: &str| named("p", key).is_ok();
        let long = "a".repeat(63);
        for key in ["a", "A_b.c-1", "example.com/gpu", &long, &format!("example.com/{long}")] {
            assert!(named(key), "{key}");
        }
        for key in ["", "-a", "a-", "/a", "a/", "a/b/c", "Example.com/gpu", "a..b/c", "ä", &format!("{long}a")] {
            assert!(!named(key), "{key}");
        }
        let valued = |value: &str| valued("p", value).is_ok();
        assert!(valued("") && valued("a.b") && valued(&long));
        assert!(!valued("a b") && !valued("-") && !valued(&format!("{long}a")));
    }
}
