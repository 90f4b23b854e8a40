//! YAML as a tree with positions, and the serde deserializer that reads types from it and knows the path it is at.

use std::fmt;

use serde::{
    Deserialize,
    de::{
        self, DeserializeOwned, DeserializeSeed, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess, VariantAccess, Visitor,
        value::StrDeserializer,
    },
    forward_to_deserialize_any,
};
use serde_yaml::Spanned;

use super::ManifestError;

/// Largest manifest file in bytes; Kubernetes' own limit is 1.5 MiB.
const MAX_BYTES: usize = 1 << 20;
/// Deepest nesting.
const MAX_DEPTH: usize = 32;
/// Most nodes of all documents, aliases expanded.
const MAX_NODES: usize = 50_000;

/// Fields that the resource will have, each with the feature that uses it.
const LATER: [&str; 34] = [
    "spec.model.revision",
    "spec.model.files",
    "spec.model.caBundleRef",
    "spec.model.tokenizerURI",
    "spec.chat.defaults",
    "spec.autoscaling.behavior.schedules",
    "spec.autoscaling.coldStart.progressEvents",
    "spec.rollout.partition",
    "spec.rollout.canary",
    "spec.recovery.policy",
    "spec.recovery.maxRestarts",
    "spec.recovery.backoffSeconds",
    "spec.scheduling.schedulerName",
    "spec.scheduling.priorityClassName",
    "spec.scheduling.queueName",
    "spec.scheduling.topology",
    "spec.workers.image",
    "spec.workers.resources.requests",
    "spec.workers.resources.claims",
    "spec.workers.resources.limits.cpu",
    "spec.workers.env",
    "spec.workers.serviceAccountName",
    "spec.workers.podTemplateOverlay",
    "spec.cache.claimTemplate",
    "spec.router.apis",
    "spec.router.service",
    "spec.router.gateway",
    "spec.router.inferencePool",
    "spec.access",
    "spec.security",
    "spec.observability",
    "spec.experimental",
    "metadata.generateName",
    "metadata.finalizers",
];
/// Values that some enumerations will have.
const LATER_VALUES: [(&str, &[&str]); 3] =
    [("spec.model.format", &["PyTorch"]), ("spec.engine.dtype", &["F32", "F16", "BF16"]), ("spec.engine.device", &["CUDA"])];

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Item {
    at: At,
    node: Node,
}

/// Line and column from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct At {
    line: u64,
    column: u64,
}

#[derive(Clone, Debug)]
enum Node {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
    List(Vec<Item>),
    Map(Vec<(String, At, Item)>),
}

/// What is wrong with a document.
#[derive(Debug)]
pub(super) struct Problem {
    at: Option<At>,
    path: String,
    message: String,
}

impl Problem {
    pub(super) fn in_file(self, file: &str) -> ManifestError {
        let At { line, column } = self.at.unwrap_or(At { line: 1, column: 1 });
        ManifestError { file: file.to_owned(), line, column, path: self.path, message: self.message }
    }

    /// Adds the position and path of `item`, unless a deeper one is known.
    fn or_at(mut self, at: At, path: &str) -> Self {
        if self.at.is_none() {
            (self.at, self.path) = (Some(at), path.to_owned());
        }
        self
    }
}

/// Parses all documents of a file.
pub(super) fn parse(yaml: &str) -> Result<Vec<Item>, Problem> {
    let plain = |message: String| Problem { at: None, path: String::new(), message };
    if yaml.len() > MAX_BYTES {
        return Err(plain(format!("expected at most {MAX_BYTES} bytes, got {}", yaml.len())));
    }
    let options = serde_yaml::options! {
        budget: serde_yaml::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_events: 4 * MAX_NODES,
            max_aliases: 200,
            max_anchors: 200,
            max_documents: 100,
        },
        alias_limits: serde_yaml::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: 8,
        },
        strict_booleans: true,
        with_snippet: false,
    };
    let documents: Result<Vec<Spanned<Node>>, _> = serde_yaml::from_multiple_with_options(yaml, options);
    match documents {
        Ok(documents) => Ok(documents.into_iter().map(Item::from).collect()),
        Err(error) => {
            let at = error.location().map(|l| At { line: l.line().max(1), column: l.column().max(1) });
            let text = error.without_snippet().to_string();
            // The position is said once, in front.
            let text = text.split(" at line ").next().unwrap_or(&text);
            // Advice to programs that parse YAML is not for people who write it.
            let text = text.split(", set DuplicateKeyPolicy").next().unwrap_or(text).to_owned();
            Err(Problem { at, path: String::new(), message: text })
        }
    }
}

impl From<Spanned<Node>> for Item {
    fn from(spanned: Spanned<Node>) -> Self {
        Self { at: at(&spanned), node: spanned.value }
    }
}

fn at<T>(spanned: &Spanned<T>) -> At {
    At { line: spanned.referenced.line().max(1), column: spanned.referenced.column().max(1) }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: de::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Node;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }
            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }
            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }
            fn visit_some<D: de::Deserializer<'de>>(self, from: D) -> Result<Node, D::Error> {
                Node::deserialize(from)
            }
            fn visit_bool<E>(self, v: bool) -> Result<Node, E> {
                Ok(Node::Bool(v))
            }
            fn visit_u64<E>(self, v: u64) -> Result<Node, E> {
                Ok(Node::Unsigned(v))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Node, E> {
                Ok(u64::try_from(v).map_or(Node::Signed(v), Node::Unsigned))
            }
            fn visit_f64<E>(self, v: f64) -> Result<Node, E> {
                Ok(Node::Float(v))
            }
            fn visit_str<E>(self, v: &str) -> Result<Node, E> {
                Ok(Node::Text(v.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element::<Spanned<Node>>()? {
                    items.push(item.into());
                }
                Ok(Node::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    let key_at = at(&key);
                    let value: Spanned<Node> = map.next_value()?;
                    entries.push((key.value, key_at, value.into()));
                }
                Ok(Node::Map(entries))
            }
        }
        from.deserialize_any(Any)
    }
}

impl Item {
    /// Reads a type from this document.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        T::deserialize(De { item: self, path: "" })
    }

    /// The text of a top-level field.
    pub(super) fn text_of(&self, key: &str) -> Result<&str, Problem> {
        match self.get(key).map(|i| &i.node) {
            Some(Node::Text(text)) => Ok(text),
            Some(other) => Err(self.fail(key, format!("expected text, got {other}"))),
            None => Err(Problem { at: Some(self.at), path: key.to_owned(), message: "expected text, the field is missing".to_owned() }),
        }
    }

    /// A problem of the field at `path`, with the position of the deepest part of it that is there.
    pub(super) fn fail(&self, path: &str, message: String) -> Problem {
        let mut item = self;
        for part in path.split('.') {
            let (name, indices) = part.split_once('[').map_or((part, ""), |(n, rest)| (n, rest.trim_end_matches(']')));
            let Some(next) = item.get(name) else { break };
            item = next;
            if let (Ok(index), Node::List(list)) = (indices.parse::<usize>(), &item.node)
                && let Some(next) = list.get(index)
            {
                item = next;
            }
        }
        Problem { at: Some(item.at), path: path.to_owned(), message }
    }

    fn get(&self, key: &str) -> Option<&Self> {
        if let Node::Map(entries) = &self.node { entries.iter().find(|e| e.0 == key).map(|e| &e.2) } else { None }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("nothing"),
            Self::Bool(v) => write!(f, "{v}"),
            Self::Unsigned(v) => write!(f, "{v}"),
            Self::Signed(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{v}"),
            Self::Text(v) => write!(f, "{v:?}"),
            Self::List(_) => f.write_str("a list"),
            Self::Map(_) => f.write_str("a mapping"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

impl std::error::Error for Problem {}

impl de::Error for Problem {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { at: None, path: String::new(), message: message.to_string() }
    }

    fn invalid_type(got: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let got = match got {
            de::Unexpected::Map => "a mapping".to_owned(),
            de::Unexpected::Seq => "a list".to_owned(),
            de::Unexpected::Unit => "nothing".to_owned(),
            other => other.to_string(),
        };
        Self::custom(format!("expected {}, got {got}", plain_type(&expected.to_string())))
    }

    fn invalid_value(got: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(got, expected)
    }

    fn missing_field(field: &'static str) -> Self {
        Self::custom(format!("the field {field} is missing"))
    }
}

/// Serde's words for a type, for people who do not write Rust.
fn plain_type(expected: &str) -> &str {
    match expected {
        "u32" | "u64" => "a whole number of at least 0",
        "a string" => "text",
        "a boolean" => "true or false",
        "a map" => "a mapping",
        "a sequence" => "a list",
        other if other.starts_with("struct ") => "a mapping",
        other => other,
    }
}

/// Deserializer of one item at a path.
#[derive(Clone, Copy)]
struct De<'a> {
    item: &'a Item,
    path: &'a str,
}

impl<'a> De<'a> {
    fn join(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn fail(&self, message: String) -> Problem {
        Problem { at: Some(self.item.at), path: self.path.to_owned(), message }
    }
}

impl<'de> de::Deserializer<'de> for De<'_> {
    type Error = Problem;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        let result = match &self.item.node {
            Node::Null => visitor.visit_unit(),
            Node::Bool(v) => visitor.visit_bool(*v),
            Node::Unsigned(v) => visitor.visit_u64(*v),
            Node::Signed(v) => visitor.visit_i64(*v),
            Node::Float(v) => visitor.visit_f64(*v),
            Node::Text(v) => visitor.visit_str(v),
            Node::List(items) => visitor.visit_seq(List { items: items.iter().enumerate(), path: self.path }),
            Node::Map(entries) => visitor.visit_map(Entries { de: self, entries: entries.iter(), value: None }),
        };
        result.map_err(|e| e.or_at(self.item.at, self.path))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        if matches!(self.item.node, Node::Null) { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Problem> {
        let Node::Map(entries) = &self.item.node else {
            return Err(self.fail(format!("expected a mapping, got {}", self.item.node)));
        };
        for (key, at, _) in entries {
            if !fields.contains(&key.as_str()) {
                let path = self.join(key);
                let message = if LATER.contains(&path.as_str()) {
                    "is not supported yet".to_owned()
                } else {
                    format!("unknown field, expected one of {}", fields.join(", "))
                };
                return Err(Problem { at: Some(*at), path, message });
            }
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Problem> {
        let expected = variants.join(", ");
        let Node::Text(text) = &self.item.node else {
            return Err(self.fail(format!("expected one of {expected}, got {}", self.item.node)));
        };
        if variants.contains(&text.as_str()) {
            return visitor.visit_enum(Variant(text)).map_err(|e| e.or_at(self.item.at, self.path));
        }
        let later = LATER_VALUES.iter().any(|(path, values)| *path == self.path && values.contains(&text.as_str()));
        let message = if later {
            format!("{text} is not supported yet; expected one of {expected}")
        } else {
            format!("expected one of {expected}, got {text:?}")
        };
        Err(self.fail(message))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map
        identifier ignored_any
    }
}

struct List<'a> {
    items: std::iter::Enumerate<std::slice::Iter<'a, Item>>,
    path: &'a str,
}

impl<'de> SeqAccess<'de> for List<'_> {
    type Error = Problem;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Problem> {
        let Some((index, item)) = self.items.next() else { return Ok(None) };
        let path = format!("{}[{index}]", self.path);
        seed.deserialize(De { item, path: &path }).map(Some).map_err(|e| e.or_at(item.at, &path))
    }
}

struct Entries<'a> {
    de: De<'a>,
    entries: std::slice::Iter<'a, (String, At, Item)>,
    value: Option<(&'a str, &'a Item)>,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Problem;

    /// The next key whose value is not null: null means absent, as on the cluster.
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Problem> {
        let Some((key, at, item)) = self.entries.find(|e| !matches!(e.2.node, Node::Null)) else { return Ok(None) };
        self.value = Some((key, item));
        let from: StrDeserializer<'_, Problem> = key.as_str().into_deserializer();
        seed.deserialize(from).map(Some).map_err(|e| e.or_at(*at, &self.de.join(key)))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Problem> {
        let (key, item) = self.value.take().ok_or_else(|| Problem::custom("a value without its key"))?;
        let path = self.de.join(key);
        seed.deserialize(De { item, path: &path }).map_err(|e| e.or_at(item.at, &path))
    }
}

/// A unit variant.
struct Variant<'a>(&'a str);

impl<'de> EnumAccess<'de> for Variant<'_> {
    type Error = Problem;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Problem> {
        let from: StrDeserializer<'_, Problem> = self.0.into_deserializer();
        Ok((seed.deserialize(from)?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = Problem;

    fn unit_variant(self) -> Result<(), Problem> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Problem> {
        Err(Problem::custom("expected a name alone"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Problem> {
        Err(Problem::custom("expected a name alone"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Problem> {
        Err(Problem::custom("expected a name alone"))
    }
}
