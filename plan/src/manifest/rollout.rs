//! Fields of the resource that say how replicas come and go.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// How replicas are replaced when the spec changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RolloutSpec {
    /// What makes room for new replicas. `Auto`: new ones beside the old, or in place of one where there is no room beside them.
    /// `RollingUpdate`: within maxSurge and maxUnavailable. `Recreate`: all old ones end first. Default `Auto`.
    pub strategy: RolloutStrategy,
    /// Replicas beyond `replicas` while `RollingUpdate` rolls, a number or a percentage of them, rounded up; default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_surge: Option<Share>,
    /// Replicas that may be missing while `RollingUpdate` rolls, a number or a percentage of `replicas`, rounded down; default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_unavailable: Option<Share>,
    /// Replace nothing until it is false again; replicas are still added and taken away. Default false.
    pub paused: bool,
    /// Seconds without progress after which a rollout is reported as stalled, 1 to 86400; the old replicas serve on. Default 1800.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 86400)))]
    pub progress_deadline_seconds: u32,
    /// Old revisions that are kept for going back to, 0 to 100; default 5.
    #[cfg_attr(feature = "schema", schemars(range(max = 100)))]
    pub revision_history_limit: u32,
}

impl Default for RolloutSpec {
    fn default() -> Self {
        Self {
            strategy: RolloutStrategy::Auto,
            max_surge: None,
            max_unavailable: None,
            paused: false,
            progress_deadline_seconds: 1800,
            revision_history_limit: 5,
        }
    }
}

impl RolloutSpec {
    /// Replicas beyond `replicas` and replicas that may be missing, while `RollingUpdate` rolls.
    pub fn bounds(&self, replicas: u32) -> (u32, u32) {
        let surge = self.max_surge.map_or(1, |share| share.up(replicas));
        let unavailable = self.max_unavailable.map_or(0, |share| share.down(replicas));
        // Percentages of few replicas can both come to nothing, and then nothing would ever move.
        if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
    }
}

/// What makes room for new replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "RolloutSpec says it")]
pub enum RolloutStrategy {
    #[default]
    Auto,
    RollingUpdate,
    Recreate,
}

/// How replicas are let go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RecoverySpec {
    /// Seconds that a replica which is let go may take to finish what it has begun, 0 to 86400; default 120.
    #[cfg_attr(feature = "schema", schemars(range(max = 86400)))]
    pub drain_seconds: u32,
}

impl Default for RecoverySpec {
    fn default() -> Self {
        Self { drain_seconds: 120 }
    }
}

/// How workers find nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct SchedulingSpec {
    /// Take back a replica whose workers do not all find a node in time, and try again later; default true.
    pub gang: bool,
}

impl Default for SchedulingSpec {
    fn default() -> Self {
        Self { gang: true }
    }
}

/// A number of replicas, or a percentage of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// That many.
    Count(u32),
    /// Of all replicas, 0 to 100.
    Percent(u32),
}

/// What a share looks like, for messages.
const EXPECTED: &str = "a number from 0 to 1000 or a percentage from 0% to 100%";
const MAX_COUNT: u64 = 1000;

impl Share {
    /// Of `replicas`, rounded up.
    pub fn up(self, replicas: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => (replicas * percent).div_ceil(100),
        }
    }

    /// Of `replicas`, rounded down.
    pub fn down(self, replicas: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => replicas * percent / 100,
        }
    }

    /// Whether it is none of any number.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Count(0) | Self::Percent(0))
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
        match text.strip_suffix('%') {
            Some(percent) => digits(percent).filter(|p| *p <= 100).map(|p| Self::Percent(p as u32)),
            None => digits(text).filter(|n| *n <= MAX_COUNT).map(|n| Self::Count(n as u32)),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Count(count) => to.serialize_u32(*count),
            Self::Percent(_) => to.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Share;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<Share, E> {
                let count = u32::try_from(v).ok().filter(|_| v <= MAX_COUNT);
                count.map(Share::Count).ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(v), &self))
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Share, E> {
                let count = u32::try_from(v).ok().filter(|n| u64::from(*n) <= MAX_COUNT);
                count.map(Share::Count).ok_or_else(|| E::invalid_value(de::Unexpected::Signed(v), &self))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Share, E> {
                Share::parse(v).ok_or_else(|| E::invalid_value(de::Unexpected::Str(v), &self))
            }
        }
        from.deserialize_any(Visitor)
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Share {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Share".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "x-kubernetes-int-or-string": true, "pattern": "^(100|[0-9]{1,2})%$", "minimum": 0, "maximum": MAX_COUNT })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_numbers_or_percentages() {
        for (text, expected) in [
            ("0", Some(Share::Count(0))),
            ("1000", Some(Share::Count(1000))),
            ("25%", Some(Share::Percent(25))),
            ("100%", Some(Share::Percent(100))),
            ("101%", None),
            ("1001", None),
            ("-1", None),
            ("+1", None),
            ("1.5", None),
            ("%", None),
            ("", None),
        ] {
            assert_eq!(Share::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn a_rollout_can_always_move() {
        let spec =
            |surge, unavailable| RolloutSpec { max_surge: Some(surge), max_unavailable: Some(unavailable), ..RolloutSpec::default() };
        assert_eq!(RolloutSpec::default().bounds(7), (1, 0));
        assert_eq!(spec(Share::Percent(25), Share::Percent(25)).bounds(5), (2, 1));
        assert_eq!(spec(Share::Count(0), Share::Percent(25)).bounds(3), (0, 1), "a quarter of three is none, and nothing would move");
        assert_eq!(spec(Share::Count(0), Share::Percent(50)).bounds(4), (0, 2));
    }
}
