//! Kubernetes quantities, and the memory of a KV cache.

use std::{fmt, marker::PhantomData};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Memory as bytes or as a part of what a worker has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Memory {
    /// Bytes.
    Bytes(u64),
    /// More than 0, at most 1.
    Fraction(f64),
}

/// Suffixes of quantities and their factors.
const SUFFIXES: [(&str, f64); 13] = [
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("Pi", 1_125_899_906_842_624.0),
    ("m", 1e-3),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("P", 1e15),
    ("e3", 1e3),
    ("", 1.0),
];

/// Parses a quantity such as `1.5Gi`, `200M` or `1024`; `None` when it is not one.
pub fn parse_quantity(text: &str) -> Option<f64> {
    let (suffix, factor) = SUFFIXES.iter().find(|(s, _)| text.ends_with(s))?;
    let digits = &text[..text.len() - suffix.len()];
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let value: f64 = if plain { digits.parse().ok()? } else { return None };
    Some(value * factor).filter(|v| v.is_finite())
}

/// What a manifest writes as a number or as text.
pub(super) trait NumberOrText: Sized {
    /// What it looks like, for messages.
    const EXPECTED: &'static str;

    /// `None` when the number is out of bounds.
    fn from_number(value: f64) -> Option<Self>;

    /// A quantity, unless said otherwise; `None` when the text is none.
    fn from_text(text: &str) -> Option<Self> {
        parse_quantity(text).and_then(Self::from_number)
    }
}

/// Reads one.
///
/// # Errors
/// When it is neither, or out of bounds; says what was expected.
pub(super) fn number_or_text<'de, T: NumberOrText, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    struct Visitor<T>(PhantomData<T>);
    impl<T: NumberOrText> de::Visitor<'_> for Visitor<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(T::EXPECTED)
        }
        fn visit_u64<E: de::Error>(self, v: u64) -> Result<T, E> {
            T::from_number(v as f64).ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(v), &self))
        }
        fn visit_i64<E: de::Error>(self, v: i64) -> Result<T, E> {
            T::from_number(v as f64).ok_or_else(|| E::invalid_value(de::Unexpected::Signed(v), &self))
        }
        fn visit_f64<E: de::Error>(self, v: f64) -> Result<T, E> {
            T::from_number(v).ok_or_else(|| E::invalid_value(de::Unexpected::Float(v), &self))
        }
        fn visit_str<E: de::Error>(self, v: &str) -> Result<T, E> {
            T::from_text(v).ok_or_else(|| E::invalid_value(de::Unexpected::Str(v), &self))
        }
    }
    from.deserialize_any(Visitor(PhantomData))
}

impl NumberOrText for Memory {
    const EXPECTED: &'static str = "bytes such as 512Mi or 2G, or a fraction above 0 and up to 1";

    fn from_number(value: f64) -> Option<Self> {
        if value > 0.0 && value <= 1.0 {
            return Some(Self::Fraction(value));
        }
        (value > 1.0 && value < 9e18).then_some(Self::Bytes(value as u64))
    }

    fn from_text(text: &str) -> Option<Self> {
        Self::parse(text)
    }
}

impl Memory {
    /// Parses a quantity or a fraction; `None` when it is neither.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(percent) = text.strip_suffix('%') {
            return parse_quantity(percent).map(|p| p / 100.0).filter(|f| *f > 0.0 && *f <= 1.0).map(Self::Fraction);
        }
        parse_quantity(text).and_then(Self::from_number)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Fraction(fraction) => write!(f, "{fraction}"),
        }
    }
}

impl Serialize for Memory {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        number_or_text(from)
    }
}

/// A quantity of bytes, at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        number_or_text(from)
    }
}

impl NumberOrText for Bytes {
    const EXPECTED: &'static str = "bytes such as 512Mi or 2G";

    fn from_number(value: f64) -> Option<Self> {
        (1.0..9e18).contains(&value).then_some(Self(value as u64))
    }
}

/// What the API server checks of a quantity of bytes.
#[cfg(feature = "schema")]
const QUANTITY: &str = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|m|k|M|G|T|P|e3)?$";

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Bytes {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Bytes".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "x-kubernetes-int-or-string": true, "pattern": QUANTITY })
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Memory {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Memory".into()
    }

    fn inline_schema() -> bool {
        true
    }

    /// Fractions are text on a cluster (`"0.5"`, `50%`): a schema there knows no union of integer, float and text.
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let pattern = QUANTITY.replace(")?$", "|%)?$");
        schemars::json_schema!({ "x-kubernetes-int-or-string": true, "pattern": pattern })
    }
}

#[cfg(test)]
mod tests {
    use super::Memory;

    #[test]
    fn quantities_and_fractions() {
        for (text, expected) in [
            ("512Mi", Some(Memory::Bytes(512 << 20))),
            ("1.5Gi", Some(Memory::Bytes(3 << 29))),
            ("2G", Some(Memory::Bytes(2_000_000_000))),
            ("1024", Some(Memory::Bytes(1024))),
            ("3e3", Some(Memory::Bytes(3000))),
            ("0.25", Some(Memory::Fraction(0.25))),
            ("30%", Some(Memory::Fraction(0.3))),
            ("1", Some(Memory::Fraction(1.0))),
            ("0", None),
            ("-1Gi", None),
            ("Gi", None),
            ("1 Gi", None),
            ("nan", None),
            ("inf", None),
            ("120%", None),
            ("99999999999Pi", None),
            ("", None),
        ] {
            assert_eq!(Memory::parse(text), expected, "{text}");
        }
    }
}
