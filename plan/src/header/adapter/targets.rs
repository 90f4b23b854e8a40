//! Which modules an adapter of PEFT is for: names, patterns and layers, as PEFT reads them.

use regex::{Regex, RegexBuilder};
use serde_json::Value;

use super::Module;
use crate::header::{HeaderError, fields::Fields};

/// Most bytes that a pattern may take, compiled.
const PATTERN_BYTES: usize = 1 << 20;
/// Most names or patterns of a list.
const MOST: usize = 4096;

/// A choice of modules.
enum Choice {
    /// These, each by its whole name or by its last parts.
    Names(Vec<String>),
    /// Whole names that match.
    Pattern(Regex),
    /// All of them, but for the vocabulary.
    All,
}

/// The modules that an adapter is for.
pub(super) struct Targets {
    chosen: Choice,
    excluded: Option<Choice>,
    layers: Option<Vec<usize>>,
    /// What stands before a layer's number, where layers are chosen; none: anything.
    layer_patterns: Vec<Regex>,
}

impl Targets {
    /// Reads them from `adapter_config.json`.
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self, HeaderError> {
        let chosen = choice(fields, "target_modules")?.ok_or_else(|| fields.missing("target_modules", "a list of names, or a pattern"))?;
        let excluded = choice(fields, "exclude_modules")?;
        let layers = match fields.present("layers_to_transform") {
            Some(Value::Number(_)) => Some(vec![fields.number("layers_to_transform")?.unwrap_or(0)]),
            Some(_) => Some(fields.indices("layers_to_transform")?).filter(|layers| !layers.is_empty()),
            None => None,
        };
        let named = match fields.present("layers_pattern") {
            None => Vec::new(),
            Some(Value::String(one)) => vec![one.clone()],
            Some(_) => texts(fields, "layers_pattern")?,
        };
        let layer_patterns = named.iter().filter(|p| !p.is_empty());
        let layer_patterns = layer_patterns.map(|p| pattern(fields, "layers_pattern", &format!(r"^.*\.(?:{p})\.(\d+)\.")));
        Ok(Self { chosen, excluded, layers, layer_patterns: layer_patterns.collect::<Result<_, _>>()? })
    }

    /// Whether the adapter changes `module`, which PEFT calls `name`.
    pub(super) fn have(&self, module: &Module, name: &str) -> bool {
        let Some(layer) = module.layer else { return false };
        if self.excluded.as_ref().is_some_and(|excluded| excluded.has(name)) || !self.chosen.has(name) {
            return false;
        }
        let (Choice::Names(names), Some(layers)) = (&self.chosen, &self.layers) else { return true };
        if names.iter().any(|n| n == name) {
            return true;
        }
        let placed = self.layer_patterns.is_empty() || self.layer_patterns.iter().any(|pattern| pattern.is_match(name));
        placed && layers.contains(&(layer as usize))
    }
}

impl Choice {
    fn has(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Pattern(pattern) => pattern.is_match(name),
            Self::Names(names) => names.iter().any(|n| ends_with(name, n)),
        }
    }
}

/// Whether a module's name ends with `end`, a whole number of parts.
fn ends_with(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn choice(fields: &Fields<'_>, name: &str) -> Result<Option<Choice>, HeaderError> {
    Ok(match fields.present(name) {
        None => None,
        Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Some(Choice::All),
        Some(Value::String(text)) => Some(Choice::Pattern(pattern(fields, name, &format!("^(?:{text})$"))?)),
        Some(_) => Some(Choice::Names(texts(fields, name)?)).filter(|c| !matches!(c, Choice::Names(n) if n.is_empty())),
    })
}

fn texts(fields: &Fields<'_>, name: &str) -> Result<Vec<String>, HeaderError> {
    let Some(value) = fields.present(name) else { return Ok(Vec::new()) };
    let list = value.as_array().filter(|list| list.len() <= MOST);
    let texts: Option<Vec<String>> = list.and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect());
    texts.ok_or_else(|| fields.wrong(name, &format!("a list of at most {MOST} names"), value))
}

/// A pattern of Python's, as far as it needs no looking around.
fn pattern(fields: &Fields<'_>, name: &str, text: &str) -> Result<Regex, HeaderError> {
    RegexBuilder::new(text).size_limit(PATTERN_BYTES).build().map_err(|_| {
        let got = fields.present(name).map_or_else(|| text.to_owned(), Value::to_string);
        fields.unsupported(name, "regular expressions without look-around and back-references", &got)
    })
}

/// A number that some modules have instead of the usual one: those whose names end as a pattern says.
pub(super) struct Exceptions(Vec<(Regex, Value)>);

impl Exceptions {
    /// Reads the object called `name`.
    pub(super) fn read(fields: &Fields<'_>, name: &'static str) -> Result<Self, HeaderError> {
        let Some(object) = fields.object(name)? else { return Ok(Self(Vec::new())) };
        if object.map.len() > MOST {
            return Err(fields.wrong(name, &format!("at most {MOST} patterns"), &object.map.len().into()));
        }
        let one = |(key, value): (&String, &Value)| Ok((pattern(fields, name, &format!(r"^(?:.*\.)?(?:{key})$"))?, value.clone()));
        Ok(Self(object.map.iter().map(one).collect::<Result<_, _>>()?))
    }

    /// What the first pattern that fits says.
    pub(super) fn of(&self, module: &str) -> Option<&Value> {
        self.0.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| value)
    }
}
