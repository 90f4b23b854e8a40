//! `quantization_config` of `config.json`: which packing, and what of it block types cannot hold exactly.

use serde_json::{Map, Value};

use super::Packing;
use crate::header::{
    HeaderError,
    fields::{FILE, Fields},
};

const FIELD: &str = "quantization_config";

/// How the matrices of a checkpoint are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::header) struct Scheme {
    pub(super) packing: Packing,
    /// 4 or 8.
    pub(super) bits: u32,
    /// Values of a row that share a scale; `None`: all of them.
    pub(super) group: Option<usize>,
    /// Zero points are the middle of the range.
    pub(super) symmetric: bool,
}

impl Scheme {
    /// That of a `config.json`, if its weights are packed.
    pub(super) fn of(json: &[u8]) -> Result<Option<Self>, HeaderError> {
        let map: Map<String, Value> = serde_json::from_slice(json).map_err(|source| HeaderError::Json { file: FILE.to_owned(), source })?;
        Self::read(&Fields { file: FILE, map: &map, path: String::new() })
    }

    /// That of the fields of `config.json`, if its weights are packed.
    ///
    /// # Errors
    /// When it is another one than those that block types hold.
    pub(in crate::header) fn read(fields: &Fields<'_>) -> Result<Option<Self>, HeaderError> {
        let Some(fields) = fields.object(FIELD)? else { return Ok(None) };
        match fields.text("quant_method")?.ok_or_else(|| fields.missing("quant_method", METHODS))? {
            "gptq" => gptq(&fields),
            "awq" => awq(&fields),
            "compressed-tensors" => compressed(&fields),
            other => Err(fields.unsupported("quant_method", METHODS, other)),
        }
        .map(Some)
    }
}

const METHODS: &str = "gptq, awq or compressed-tensors";

/// A number of bits, 4 or 8.
fn bits(fields: &Fields<'_>, name: &str) -> Result<u32, HeaderError> {
    match fields.required(name)? {
        4 => Ok(4),
        8 => Ok(8),
        other => Err(fields.unsupported(name, "4 or 8 bits", &format!("{other} bits"))),
    }
}

/// A size of groups; −1 stands for whole rows.
fn group(fields: &Fields<'_>, name: &str) -> Result<Option<usize>, HeaderError> {
    match fields.present(name) {
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        _ => fields.required(name).map(Some),
    }
}

/// Refuses a setting that is there and says anything at all.
fn absent(fields: &Fields<'_>, name: &str, expected: &'static str) -> Result<(), HeaderError> {
    match fields.present(name) {
        None => Ok(()),
        Some(Value::Object(map)) if map.is_empty() => Ok(()),
        Some(other) => Err(fields.unsupported(name, expected, &other.to_string().chars().take(100).collect::<String>())),
    }
}

/// Refuses 8 bits around other zero points than 128: `q − zero` takes nine.
fn narrow(fields: &Fields<'_>, name: &str, scheme: Scheme) -> Result<Scheme, HeaderError> {
    if scheme.bits == 8 && !scheme.symmetric {
        return Err(fields.unsupported(name, "8 bits around 0", "8 bits around other zero points"));
    }
    Ok(scheme)
}

fn gptq(fields: &Fields<'_>) -> Result<Scheme, HeaderError> {
    if fields.flag("desc_act")?.unwrap_or(false) {
        return Err(fields.unsupported("desc_act", "groups of values that lie together", "groups in the order of activations"));
    }
    absent(fields, "dynamic", "one packing for all matrices")?;
    let zero_offset = match fields.text("checkpoint_format")?.unwrap_or("gptq") {
        "gptq" => 1,
        "gptq_v2" => 0,
        other => return Err(fields.unsupported("checkpoint_format", "gptq or gptq_v2", other)),
    };
    let symmetric = fields.flag("sym")?.unwrap_or(true);
    let packing = Packing::Gptq { zero_offset };
    narrow(fields, "sym", Scheme { packing, bits: bits(fields, "bits")?, group: group(fields, "group_size")?, symmetric })
}

fn awq(fields: &Fields<'_>) -> Result<Scheme, HeaderError> {
    let version = fields.text("version")?.unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(fields.unsupported("version", "gemm", version));
    }
    if !fields.flag("zero_point")?.unwrap_or(true) {
        return Err(fields.unsupported("zero_point", "stored zero points", "none"));
    }
    let bits = bits(fields, "bits")?;
    if bits != 4 {
        return Err(fields.unsupported("bits", "4 bits", &format!("{bits} bits")));
    }
    Ok(Scheme { packing: Packing::Awq, bits, group: group(fields, "group_size")?, symmetric: false })
}

fn compressed(fields: &Fields<'_>) -> Result<Scheme, HeaderError> {
    absent(fields, "kv_cache_scheme", "caches of floats")?;
    absent(fields, "transform_config", "weights that are not rotated")?;
    if let Some(sparsity) = fields.object("sparsity_config")?
        && let Some(format) = sparsity.text("format")?.filter(|format| *format != "dense")
    {
        return Err(sparsity.unsupported("format", "dense", format));
    }
    let packing = match fields.text("format")?.unwrap_or_default() {
        "pack-quantized" => Packing::Rows,
        "int-quantized" => Packing::Bytes,
        other => return Err(fields.unsupported("format", "pack-quantized or int-quantized", other)),
    };
    let groups = fields.object("config_groups")?.ok_or_else(|| fields.missing("config_groups", "an object"))?;
    let names: Vec<&String> = groups.map.keys().collect();
    let [name] = names[..] else {
        return Err(fields.unsupported("config_groups", "one packing for all matrices", &format!("{} of them", names.len())));
    };
    let part = groups.object(name)?.ok_or_else(|| groups.missing(name, "an object"))?;
    absent(&part, "output_activations", "results of floats")?;
    if let Some(input) = part.object("input_activations")?
        && !input.flag("dynamic")?.unwrap_or(false)
    {
        return Err(input.unsupported("dynamic", "true", "scales of inputs that are stored"));
    }
    let weights = part.object("weights")?.ok_or_else(|| part.missing("weights", "an object"))?;
    if let Some(kind) = weights.text("type")?.filter(|kind| *kind != "int") {
        return Err(weights.unsupported("type", "int", kind));
    }
    // Those of weights alone are undone before they are stored.
    if let Some(order) = weights.present("actorder").filter(|o| !matches!(o.as_str(), Some("static" | "weight"))) {
        return Err(weights.unsupported("actorder", "groups of values that lie together", &order.to_string()));
    }
    let group = match weights.text("strategy")?.unwrap_or_default() {
        "group" => group(&weights, "group_size")?,
        "channel" => None,
        other => return Err(weights.unsupported("strategy", "group or channel", other)),
    };
    let symmetric = weights.flag("symmetric")?.unwrap_or(true);
    let scheme = Scheme { packing, bits: bits(&weights, "num_bits")?, group, symmetric };
    if packing == Packing::Bytes && scheme.bits != 8 {
        return Err(weights.unsupported("num_bits", "8 bits in bytes", "4 bits"));
    }
    narrow(&weights, "symmetric", scheme)
}
