//! Fields of the resource that say how the number of replicas follows the load.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{
    quantity::{NumberOrText, number_or_text},
    validate::Problem,
};

/// How the number of replicas follows the load; of meaning on a cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct AutoscalingSpec {
    /// Who decides how many replicas there are. `Disabled`: whoever writes `replicas`. `Builtin`: the operator, by the targets and what
    /// routers report; `replicas` is then only the first size. `External`: another controller through the scale subresource; the operator
    /// never writes `replicas`. Default `Disabled`.
    pub mode: AutoscalingMode,
    /// Fewest replicas in mode `Builtin`, 0 to 1000; at 0 an idle deployment has no workers, and the first request wakes it. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(max = 1000)))]
    pub min_replicas: Option<u32>,
    /// Most replicas in mode `Builtin`, 1 to 1000; must be given there.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 1000)))]
    pub max_replicas: Option<u32>,
    /// What mode `Builtin` aims at, each measure at most once; the one that asks for most replicas decides.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(
        feature = "schema",
        schemars(length(max = 6), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))
    )]
    pub targets: Vec<TargetSpec>,
    /// How fast mode `Builtin` follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub behavior: Option<BehaviorSpec>,
    /// What happens to requests while there are no replicas, with minReplicas 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<ColdStartSpec>,
}

/// Who decides how many replicas there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "AutoscalingSpec says it")]
pub enum AutoscalingMode {
    #[default]
    Disabled,
    Builtin,
    External,
}

/// A measure and what it should be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TargetSpec {
    /// The measure. `QueueDepth`: requests that wait, for each replica. `InflightPerReplica`: requests that run or wait, for each replica.
    /// `KVCacheUtilization`: part of the KV blocks in use, above 0 and up to 1. `TTFTP90`, `ITLP90`: seconds to the first token and between
    /// tokens that nine of ten stay below. `TokensPerSecond`: tokens generated, for each replica.
    #[serde(rename = "type")]
    pub kind: TargetKind,
    /// A quantity above 0, such as `8`, `0.7` or `500m`.
    pub value: Amount,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "TargetSpec says it")]
pub enum TargetKind {
    QueueDepth,
    InflightPerReplica,
    KVCacheUtilization,
    TTFTP90,
    ITLP90,
    TokensPerSecond,
}

/// How fast the number of replicas follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct BehaviorSpec {
    /// More replicas only when they were asked for this long, 0 to 3600; default 0.
    #[cfg_attr(feature = "schema", schemars(range(max = 3600)))]
    pub scale_up_stabilization_seconds: u32,
    /// Fewer replicas only when more were not asked for this long, 0 to 3600; default 300.
    #[cfg_attr(feature = "schema", schemars(range(max = 3600)))]
    pub scale_down_stabilization_seconds: u32,
    /// Seconds without a request after which the last replica goes, with minReplicas 0; 1 to 86400, default 300.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 86400)))]
    pub idle_seconds_to_zero: Option<u32>,
}

impl Default for BehaviorSpec {
    fn default() -> Self {
        Self { scale_up_stabilization_seconds: 0, scale_down_stabilization_seconds: 300, idle_seconds_to_zero: None }
    }
}

/// What happens to requests while there are no replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ColdStartSpec {
    /// Most requests that a router holds until a replica answers, 1 to 100000; one more is refused. Default 100.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 100000)))]
    pub max_held_requests: u32,
    /// Longest that a request is held, 1 to 86400; default 300.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 86400)))]
    pub hold_timeout_seconds: u32,
}

impl Default for ColdStartSpec {
    fn default() -> Self {
        Self { max_held_requests: 100, hold_timeout_seconds: 300 }
    }
}

impl AutoscalingSpec {
    /// The decisions that the operator is to make; `None` where it makes none.
    pub fn builtin(&self) -> Option<Builtin> {
        let behavior = self.behavior.clone().unwrap_or_default();
        (self.mode == AutoscalingMode::Builtin).then(|| Builtin {
            min: self.min_replicas.unwrap_or(1),
            max: self.max_replicas.unwrap_or(1),
            targets: self.targets.iter().map(|t| (t.kind, t.value.0)).collect(),
            up_seconds: behavior.scale_up_stabilization_seconds.into(),
            down_seconds: behavior.scale_down_stabilization_seconds.into(),
            idle_seconds: behavior.idle_seconds_to_zero.unwrap_or(300).into(),
        })
    }

    /// What routers are to do with requests while there are no replicas; `None` where nothing would wake one.
    pub fn hold(&self) -> Option<crate::fleet::HoldSettings> {
        self.builtin().filter(|builtin| builtin.min == 0)?;
        let hold = self.cold_start.clone().unwrap_or_default();
        Some(crate::fleet::HoldSettings { requests: hold.max_held_requests as usize, seconds: hold.hold_timeout_seconds.into() })
    }

    /// Checks ranges, and that no field is given that its mode has no use for.
    pub(super) fn check(&self) -> Result<(), Problem> {
        let problem = |field: &str, message: String| Err(Problem::new(&format!("spec.autoscaling.{field}"), message));
        self.ranges()?;
        let repeated = (1..self.targets.len()).find(|&i| self.targets[..i].iter().any(|t| t.kind == self.targets[i].kind));
        if let Some(i) = repeated {
            return problem(&format!("targets[{i}].type"), format!("expected each once, got {:?} again", self.targets[i].kind));
        }
        match self.mode {
            // Switched off for a while, its settings may stay.
            AutoscalingMode::Disabled => Ok(()),
            AutoscalingMode::External => {
                let given = [
                    ("minReplicas", self.min_replicas.is_some()),
                    ("maxReplicas", self.max_replicas.is_some()),
                    ("targets", !self.targets.is_empty()),
                    ("behavior", self.behavior.is_some()),
                    ("coldStart", self.cold_start.is_some()),
                ];
                match given.into_iter().find(|(_, given)| *given) {
                    Some((field, _)) => {
                        problem(field, "expected mode Builtin beside it, got External, which has settings of its own".into())
                    }
                    None => Ok(()),
                }
            }
            AutoscalingMode::Builtin => {
                let min = self.min_replicas.unwrap_or(1);
                match self.max_replicas {
                    None => return problem("maxReplicas", "expected a number in mode Builtin, got none".into()),
                    Some(max) if max < min => return problem("maxReplicas", format!("expected at least minReplicas {min}, got {max}")),
                    Some(_) => {}
                }
                if self.targets.is_empty() {
                    return problem("targets", "expected at least one in mode Builtin, got none".into());
                }
                let zero = [
                    ("behavior.idleSecondsToZero", self.behavior.as_ref().is_some_and(|b| b.idle_seconds_to_zero.is_some())),
                    ("coldStart", self.cold_start.is_some()),
                ];
                match zero.into_iter().find(|(_, given)| *given && min > 0) {
                    Some((field, _)) => problem(field, format!("expected minReplicas 0 beside it, got {min}")),
                    None => Ok(()),
                }
            }
        }
    }

    fn ranges(&self) -> Result<(), Problem> {
        let (behavior, hold) = (self.behavior.as_ref(), self.cold_start.as_ref());
        for (field, value, low, high) in [
            ("minReplicas", self.min_replicas, 0, 1000),
            ("maxReplicas", self.max_replicas, 1, 1000),
            ("behavior.scaleUpStabilizationSeconds", behavior.map(|b| b.scale_up_stabilization_seconds), 0, 3600),
            ("behavior.scaleDownStabilizationSeconds", behavior.map(|b| b.scale_down_stabilization_seconds), 0, 3600),
            ("behavior.idleSecondsToZero", behavior.and_then(|b| b.idle_seconds_to_zero), 1, 86_400),
            ("coldStart.maxHeldRequests", hold.map(|h| h.max_held_requests), 1, 100_000),
            ("coldStart.holdTimeoutSeconds", hold.map(|h| h.hold_timeout_seconds), 1, 86_400),
        ] {
            if let Some(value) = value.filter(|v| !(low..=high).contains(v)) {
                return Err(Problem::new(&format!("spec.autoscaling.{field}"), format!("expected {low} to {high}, got {value}")));
            }
        }
        for (i, target) in self.targets.iter().enumerate() {
            if target.kind == TargetKind::KVCacheUtilization && target.value.0 > 1.0 {
                let message = format!("expected a part above 0 and up to 1 for KVCacheUtilization, got {}", target.value);
                return Err(Problem::new(&format!("spec.autoscaling.targets[{i}].value"), message));
            }
        }
        Ok(())
    }
}

/// What the operator decides by, with defaults in place.
#[derive(Clone, Debug, PartialEq)]
pub struct Builtin {
    /// Fewest replicas.
    pub min: u32,
    /// Most replicas, at least `min` and 1.
    pub max: u32,
    /// Measures and what they should be, above 0.
    pub targets: Vec<(TargetKind, f64)>,
    /// Seconds that more must have been asked for.
    pub up_seconds: i64,
    /// Seconds that more must not have been asked for.
    pub down_seconds: i64,
    /// Seconds without a request until zero, where `min` is 0.
    pub idle_seconds: i64,
}

/// A quantity above 0 that is no number of bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amount(pub f64);

/// The largest; beyond it there is only a mistake.
const MOST: f64 = 1e12;

impl NumberOrText for Amount {
    const EXPECTED: &'static str = "a quantity above 0, such as 8, 0.7 or 500m";

    fn from_number(value: f64) -> Option<Self> {
        (value > 0.0 && value <= MOST).then_some(Self(value))
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        number_or_text(from)
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Amount {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Amount".into()
    }

    fn inline_schema() -> bool {
        true
    }

    /// Parts are text on a cluster (`"0.7"`, `700m`): a schema there knows no union of integer, float and text.
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "x-kubernetes-int-or-string": true, "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G)?$" })
    }
}
