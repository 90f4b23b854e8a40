//! Rotary settings of `config.json` and of GGUF metadata.

use super::{HeaderError, fields::Fields, metadata::Meta};
use crate::model::{Rope, RopeLayout, RopeScaling};

/// Rotary base when a file gives none, as in transformers and llama.cpp.
pub(super) const DEFAULT_BASE: f64 = 10_000.0;

/// Where a layer kind's rotary settings are in `config.json`.
pub(super) enum RopeFields<'a> {
    /// `rope_parameters`.
    New(Fields<'a>),
    /// `rope_theta` and `rope_scaling`.
    Old,
}

/// The place of the settings of all layers, or of those of one kind.
pub(super) fn rope_fields<'a>(fields: &Fields<'a>, kind: Option<&str>) -> Result<RopeFields<'a>, HeaderError> {
    let Some(parameters) = fields.object("rope_parameters")? else { return Ok(RopeFields::Old) };
    match kind {
        None => Ok(RopeFields::New(parameters)),
        Some(kind) => match parameters.object(kind)? {
            Some(own) => Ok(RopeFields::New(own)),
            None => Err(parameters.missing(kind, "an object")),
        },
    }
}

/// The settings at `place`.
pub(super) fn hf_rope(place: &RopeFields<'_>, fields: &Fields<'_>, default_base: f64, head_dim: usize) -> Result<Rope, HeaderError> {
    let (base, scaling) = match place {
        RopeFields::New(own) => (own.positive("rope_theta")?, hf_scaling(own, fields)?),
        RopeFields::Old => {
            let scaling = match fields.object("rope_scaling")? {
                Some(own) => hf_scaling(&own, fields)?,
                None => RopeScaling::None,
            };
            (fields.positive("rope_theta")?, scaling)
        }
    };
    let partial = match place {
        RopeFields::New(own) if own.present("partial_rotary_factor").is_some() => own.positive("partial_rotary_factor")?,
        _ => fields.positive("partial_rotary_factor")?,
    };
    let dims = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    if dims == 0 || dims > head_dim || !dims.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", "an even number of rotated values", &dims.into()));
    }
    Ok(Rope { base: base.unwrap_or(default_base), dims, layout: RopeLayout::Halves, scaling })
}

fn hf_scaling(own: &Fields<'_>, fields: &Fields<'_>) -> Result<RopeScaling, HeaderError> {
    let kind = match own.text("rope_type")? {
        Some(kind) => Some(kind),
        None => own.text("type")?,
    };
    let number = |name: &str| own.positive(name)?.ok_or_else(|| own.missing(name, "a positive number"));
    match kind.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => {
            let original = match own.positive("original_max_position_embeddings")? {
                Some(original) => Some(original),
                None => fields.positive("original_max_position_embeddings")?,
            };
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if low >= high {
                return Err(own.wrong("low_freq_factor", &format!("less than high_freq_factor, {high}"), &low.into()));
            }
            Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original.ok_or_else(|| own.missing("original_max_position_embeddings", "a positive number"))?,
            })
        }
        got => Err(own.unsupported("rope_type", "default, linear or llama3", got)),
    }
}

/// The settings in GGUF metadata; `layout` is the family's.
pub(super) fn gguf_rope(meta: &Meta<'_>, head_dim: usize, layout: RopeLayout) -> Result<Rope, HeaderError> {
    let dims = meta.arch_count("rope.dimension_count")?.unwrap_or(head_dim);
    if dims > head_dim || !dims.is_multiple_of(2) {
        return Err(meta.wrong("rope.dimension_count", &format!("an even number up to the head's {head_dim}"), &dims.to_string()));
    }
    let base = meta.positive("rope.freq_base")?.unwrap_or(DEFAULT_BASE);
    Ok(Rope { base, dims, layout, scaling: gguf_scaling(meta)? })
}

fn gguf_scaling(meta: &Meta<'_>) -> Result<RopeScaling, HeaderError> {
    if let Some(factor) = meta.float("rope.scaling.attn_factor")?.filter(|&f| f != 1.0) {
        return Err(meta.unsupported("rope.scaling.attn_factor", "1", &factor.to_string()));
    }
    if meta.header.tensors.iter().any(|t| t.name == "rope_freqs.weight") {
        return Ok(RopeScaling::Tensor);
    }
    let factor = match meta.positive("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => meta.positive("rope.scale_linear")?,
    };
    match (meta.text(&meta.key("rope.scaling.type"))?, factor) {
        (Some("none"), _) | (None, None) => Ok(RopeScaling::None),
        (Some("linear") | None, Some(factor)) => Ok(if factor == 1.0 { RopeScaling::None } else { RopeScaling::Linear { factor } }),
        (Some("linear"), None) => Err(meta.wrong("rope.scaling.factor", "a positive number", "missing")),
        (Some(got), _) => Err(meta.unsupported("rope.scaling.type", "none or linear", got)),
    }
}
