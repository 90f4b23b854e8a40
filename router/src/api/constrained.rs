//! What a request wants its output to match: `response_format` of OpenAI's interface, `structured_outputs` and `guided_…` of vLLM's.

use std::sync::Arc;

use proto::inference as wire;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::parameters::Parameters;
use crate::grammar::{Constraint, GrammarSource, Grammars, any_object};

/// Most texts to choose from.
const MOST_CHOICES: usize = 1024;

/// A constraint as it came.
#[derive(Clone, Debug)]
pub(crate) struct Constrained {
    /// The parameter that says it.
    name: String,
    source: Arc<GrammarSource>,
}

impl Constrained {
    /// Reads the parameters that constrain; at most one of them may be there.
    pub(crate) fn read(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let mut all = Vec::new();
        if let Some(value) = fields.take("response_format") {
            all.extend(response_format(&value)?);
        }
        if let Some(value) = fields.take("structured_outputs") {
            let map = value.as_object().ok_or_else(|| wrong("structured_outputs", &value, "an object"))?;
            for (key, value) in map.iter().filter(|(_, value)| !value.is_null()) {
                all.extend(option(&format!("structured_outputs.{key}"), key, value)?);
            }
        }
        for key in ["json", "regex", "choice", "grammar", "json_object", "structural_tag"] {
            let name = format!("guided_{key}");
            if let Some(value) = fields.take(&name) {
                all.extend(option(&name, key, &value)?);
            }
        }
        match &all[..] {
            [first, second, ..] => {
                let message = format!("{} and {} constrain the output, expected one of them", first.name, second.name);
                Err(ApiError::parameter(&second.name, message))
            }
            _ => Ok(all.pop()),
        }
    }

    /// That of the typed interface.
    pub(crate) fn of(constraint: wire::Constraint) -> Result<Self, ApiError> {
        use wire::constraint::Kind;
        let missing = || ApiError::parameter("constraint", "constraint says nothing, expected json_schema, json_object, regex or choices");
        let (name, source) = match constraint.kind.ok_or_else(missing)? {
            Kind::JsonSchema(text) => ("json_schema", GrammarSource::JsonSchema(text)),
            Kind::JsonObject(_) => ("json_object", any_object()),
            Kind::Regex(text) => ("regex", GrammarSource::Regex(text)),
            Kind::Choices(choices) => ("choices", one_of("constraint.choices", &choices.texts)?),
        };
        Ok(Self::new(format!("constraint.{name}"), source))
    }

    fn new(name: impl Into<String>, source: GrammarSource) -> Self {
        Self { name: name.into(), source: Arc::new(source) }
    }

    /// Refuses what would keep the output from ending where it must.
    pub(crate) fn check(&self, parameters: &Parameters) -> Result<(), ApiError> {
        let with = |name: &str, value: &str| {
            let message = format!("{name} is {value}, expected it to be left out with {}, which says where the output ends", self.name);
            Err(ApiError::parameter(name, message))
        };
        match (parameters.ignore_eos, parameters.min_tokens) {
            (true, _) => with("ignore_eos", "true"),
            (_, 1..) => with("min_tokens", &parameters.min_tokens.to_string()),
            _ => Ok(()),
        }
    }

    /// Compiles it for the tokens of a model; takes its time.
    pub(crate) fn compile(self, grammars: &Grammars) -> Result<Constraint, ApiError> {
        let grammar = grammars.compile(&self.source);
        let grammar = grammar.map_err(|error| ApiError::parameter(&self.name, format!("{}: {error}", self.name)))?;
        Ok(Constraint { source: self.source, grammar: Some(grammar) })
    }
}

fn response_format(value: &Value) -> Result<Option<Constrained>, ApiError> {
    let expected = "an object with type \"text\", \"json_object\" or \"json_schema\"";
    let map = value.as_object().ok_or_else(|| wrong("response_format", value, expected))?;
    let kind = map.get("type").and_then(Value::as_str).ok_or_else(|| wrong("response_format", value, expected))?;
    let (of, found) = match kind {
        "text" => (None, None),
        "json_object" => (None, Some(Constrained::new("response_format", any_object()))),
        "json_schema" => (Some(kind), Some(json_schema(map.get(kind).unwrap_or(&Value::Null))?)),
        _ => {
            let kind = map.get("type").unwrap_or(&Value::Null);
            let refusal = wrong("response_format.type", kind, "\"text\", \"json_object\" or \"json_schema\"");
            return Err(ApiError { code: "unsupported_parameter", ..refusal });
        }
    };
    only(map, "response_format", |key| key == "type" || Some(key) == of)?;
    Ok(found)
}

/// A named schema.
fn json_schema(value: &Value) -> Result<Constrained, ApiError> {
    const NAME: &str = "response_format.json_schema";
    let map = value.as_object().ok_or_else(|| wrong(NAME, value, "an object with name and schema"))?;
    for key in ["name", "description"] {
        if let Some(value) = map.get(key).filter(|v| !v.is_null() && !v.is_string()) {
            return Err(wrong(&format!("{NAME}.{key}"), value, "a string"));
        }
    }
    // Without `strict` the model may do as it likes, and what the schema accepts is among that.
    if let Some(value) = map.get("strict").filter(|v| !v.is_null() && !v.is_boolean()) {
        return Err(wrong(&format!("{NAME}.strict"), value, "true or false"));
    }
    only(map, NAME, |key| matches!(key, "name" | "description" | "strict" | "schema"))?;
    let name = format!("{NAME}.schema");
    let schema = map.get("schema").unwrap_or(&Value::Null);
    let schema = schema.as_object().ok_or_else(|| wrong(&name, schema, "an object"))?;
    Ok(Constrained::new(name, GrammarSource::JsonSchema(Value::Object(schema.clone()).to_string())))
}

/// Refuses keys that are not known.
fn only(map: &Map<String, Value>, name: &str, known: impl Fn(&str) -> bool) -> Result<(), ApiError> {
    match map.iter().find(|(key, value)| !value.is_null() && !known(key)) {
        Some((key, value)) => Err(ApiError { code: "unknown_parameter", ..wrong(&format!("{name}.{key}"), value, "it to be left out") }),
        None => Ok(()),
    }
}

/// An option of vLLM's interface; `name` is the whole parameter's.
fn option(name: &str, key: &str, value: &Value) -> Result<Option<Constrained>, ApiError> {
    let text = || value.as_str().map(str::to_owned).ok_or_else(|| wrong(name, value, "a string"));
    let source = match key {
        "json" => match value {
            Value::Object(_) => GrammarSource::JsonSchema(value.to_string()),
            Value::String(schema) => GrammarSource::JsonSchema(schema.clone()),
            _ => return Err(wrong(name, value, "a JSON schema, as an object or as text")),
        },
        "json_object" => match value.as_bool() {
            Some(true) => any_object(),
            Some(false) => return Ok(None),
            None => return Err(wrong(name, value, "true or false")),
        },
        "regex" => GrammarSource::Regex(text()?),
        "choice" => {
            let texts = value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>());
            one_of(name, &texts.ok_or_else(|| wrong(name, value, "a list of strings"))?)?
        }
        _ => {
            let refusal = wrong(name, value, "json, json_object, regex or choice: other constraints are not supported");
            return Err(ApiError { code: "unsupported_parameter", ..refusal });
        }
    };
    Ok(Some(Constrained::new(name, source)))
}

/// One of a few texts.
fn one_of(name: &str, texts: &[String]) -> Result<GrammarSource, ApiError> {
    if texts.is_empty() || texts.len() > MOST_CHOICES || texts.iter().any(String::is_empty) {
        let message = format!("{name} has {} texts, expected 1 to {MOST_CHOICES}, none of them empty", texts.len());
        return Err(ApiError::parameter(name, message));
    }
    let escaped: Vec<String> = texts.iter().map(|text| regex::escape(text)).collect();
    Ok(GrammarSource::Regex(escaped.join("|")))
}
