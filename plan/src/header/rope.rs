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
    let partial = match place {
        RopeFields::New(own) if own.present("partial_rotary_factor").is_some() => own.positive("partial_rotary_factor")?,
        _ => fields.positive("partial_rotary_factor")?,
    };
    let dims = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    if dims == 0 || dims > head_dim || !dims.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", "an even number of rotated values", &dims.into()));
    }
    let (base, (scaling, amplitude)) = match place {
        RopeFields::New(own) => (own.positive("rope_theta")?, hf_scaling(own, fields, dims)?),
        RopeFields::Old => {
            let scaling = match fields.object("rope_scaling")? {
                Some(own) => hf_scaling(&own, fields, dims)?,
                None => (RopeScaling::None, 1.0),
            };
            (fields.positive("rope_theta")?, scaling)
        }
    };
    Ok(Rope { base: base.unwrap_or(default_base), dims, layout: RopeLayout::Halves, scaling, amplitude })
}

/// Scaling of frequencies, and the factor of cosines and sines: what transformers' `modeling_rope_utils` makes of them.
fn hf_scaling(own: &Fields<'_>, fields: &Fields<'_>, dims: usize) -> Result<(RopeScaling, f64), HeaderError> {
    let kind = match own.text("rope_type")? {
        Some(kind) => Some(kind),
        None => own.text("type")?,
    };
    let number = |name: &str| own.positive(name)?.ok_or_else(|| own.missing(name, "a positive number"));
    let trained = || fields.positive("max_position_embeddings")?.ok_or_else(|| fields.missing("max_position_embeddings", "an integer"));
    let original = match own.positive("original_max_position_embeddings")? {
        Some(original) => Some(original),
        None => fields.positive("original_max_position_embeddings")?,
    };
    let needed = || original.ok_or_else(|| own.missing("original_max_position_embeddings", "a positive number"));
    let plain = |scaling| Ok((scaling, 1.0));
    match kind.unwrap_or("default") {
        "default" => plain(RopeScaling::None),
        "linear" => plain(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => {
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if low >= high {
                return Err(own.wrong("low_freq_factor", &format!("less than high_freq_factor, {high}"), &low.into()));
            }
            plain(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: needed()?,
            })
        }
        "dynamic" if dims < 4 => Err(own.wrong("rope_type", "at least 4 rotated values for dynamic scaling", &dims.into())),
        "dynamic" => plain(RopeScaling::Dynamic { factor: number("factor")?, trained_context: trained()? }),
        "yarn" => {
            let original_context = match original {
                Some(original) => original,
                None => trained()?,
            };
            let factor = match own.positive("factor")? {
                Some(factor) => factor,
                None => trained()? / original_context,
            };
            let (fast, slow) = (own.positive("beta_fast")?.unwrap_or(BETA_FAST), own.positive("beta_slow")?.unwrap_or(BETA_SLOW));
            let truncate = own.flag("truncate")?.unwrap_or(true);
            let amplitude = match (own.positive("attention_factor")?, own.positive("mscale")?, own.positive("mscale_all_dim")?) {
                (Some(given), ..) => given,
                (None, Some(scale), Some(all)) => yarn_amplitude(factor, scale) / yarn_amplitude(factor, all),
                _ => yarn_amplitude(factor, 1.0),
            };
            Ok((RopeScaling::Yarn { factor, original_context, beta_fast: fast, beta_slow: slow, truncate }, amplitude))
        }
        // The first files of Phi 3 call it "su".
        "longrope" | "su" => {
            let original_context = needed()?;
            let factor = match (fields.positive("original_max_position_embeddings")?, own.positive("factor")?) {
                (None, Some(factor)) => factor,
                _ => trained()? / original_context,
            };
            let amplitude = match own.positive("attention_factor")? {
                Some(given) => given,
                None if factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / original_context.ln()).sqrt(),
            };
            let list = |name: &str| own.positives(name, dims / 2);
            Ok((RopeScaling::LongRope { short: list("short_factor")?, long: list("long_factor")?, original_context }, amplitude))
        }
        got => Err(own.unsupported("rope_type", "default, linear, dynamic, yarn, longrope or llama3", got)),
    }
}

/// Turns above which YaRN keeps a frequency, where the file does not say.
const BETA_FAST: f64 = 32.0;
/// Turns below which YaRN divides a frequency, where the file does not say.
const BETA_SLOW: f64 = 1.0;

/// YaRN's factor of cosines and sines, whose square is one over the softmax's temperature: arXiv:2309.00071, section 3.4.
pub(super) fn yarn_amplitude(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// The context that `config.json` means: with scaling whose field counts the positions before it, the stretched one.
pub(super) fn hf_context(trained: usize, rope: &Rope) -> usize {
    match rope.scaling {
        RopeScaling::Dynamic { factor, .. } => (trained as f64 * factor.max(1.0)) as usize,
        RopeScaling::Yarn { factor, original_context, .. } => trained.max((original_context * factor) as usize),
        _ => trained,
    }
}

/// The settings in GGUF metadata; `layout` is the family's.
pub(super) fn gguf_rope(meta: &Meta<'_>, head_dim: usize, layout: RopeLayout) -> Result<Rope, HeaderError> {
    let dims = meta.arch_count("rope.dimension_count")?.unwrap_or(head_dim);
    if dims > head_dim || !dims.is_multiple_of(2) {
        return Err(meta.wrong("rope.dimension_count", &format!("an even number up to the head's {head_dim}"), &dims.to_string()));
    }
    let base = meta.positive("rope.freq_base")?.unwrap_or(DEFAULT_BASE);
    refuse_changed(meta, "rope.scaling.yarn_log_multiplier")?;
    let (scaling, amplitude) = gguf_scaling(meta)?;
    Ok(Rope { base, dims, layout, scaling, amplitude })
}

/// The settings of `dims` rotated values in GGUF metadata of latent attention, and what YaRN adds to the temperature of its scores.
///
/// There llama.cpp leaves cosines and sines as they are, and takes the temperature from `yarn_log_multiplier`, 0.1 of what `config.json` calls
/// `mscale_all_dim`.
pub(super) fn gguf_latent_rope(meta: &Meta<'_>, dims: usize) -> Result<(Rope, f64), HeaderError> {
    /// Digits of the temperature that 32 bits hold for sure.
    const DIGITS: f64 = 1e6;
    let base = meta.positive("rope.freq_base")?.unwrap_or(DEFAULT_BASE);
    refuse_changed(meta, "rope.scaling.attn_factor")?;
    let (scaling, _) = gguf_scaling(meta)?;
    let temperature = match scaling {
        RopeScaling::Yarn { .. } => meta.float("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0),
        _ => 0.0,
    };
    if !temperature.is_finite() || temperature < 0.0 {
        return Err(meta.wrong("rope.scaling.yarn_log_multiplier", "a number of at least 0", &temperature.to_string()));
    }
    let rope = Rope { base, dims, layout: RopeLayout::Adjacent, scaling, amplitude: 1.0 };
    Ok((rope, (temperature * 10.0 * DIGITS).round() / DIGITS))
}

/// Refuses a number that is neither 0 nor 1, where it is there.
fn refuse_changed(meta: &Meta<'_>, name: &str) -> Result<(), HeaderError> {
    match meta.float(name)?.filter(|&v| v != 1.0 && v != 0.0) {
        Some(value) => Err(meta.unsupported(name, "its default", &value.to_string())),
        None => Ok(()),
    }
}

/// The factor of scores of heads of `head_dim` values: one over the root, and with YaRN the temperature that goes with `temperature`.
pub(super) fn latent_scale(head_dim: usize, rope: &Rope, temperature: f64) -> f32 {
    let root = 1.0 / (head_dim as f64).sqrt();
    match rope.scaling {
        RopeScaling::Yarn { factor, .. } if temperature > 0.0 => (root * yarn_amplitude(factor, temperature).powi(2)) as f32,
        _ => root as f32,
    }
}

/// Scaling of frequencies, and the factor of cosines and sines: what llama.cpp makes of them.
fn gguf_scaling(meta: &Meta<'_>) -> Result<(RopeScaling, f64), HeaderError> {
    let amplitude = meta.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
    let has = |name: &str| meta.header.tensors.iter().any(|t| t.name == name);
    let original = || {
        let original = meta.positive_count("rope.scaling.original_context_length")?;
        original.ok_or_else(|| meta.wrong("rope.scaling.original_context_length", "an integer", "missing"))
    };
    for name in ["rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"] {
        refuse_changed(meta, name)?;
    }
    if has("rope_freqs.weight") {
        return Ok((RopeScaling::Tensor, amplitude));
    }
    if has("rope_factors_long.weight") {
        return Ok((RopeScaling::LongRopeTensors { original_context: original()? }, amplitude));
    }
    let factor = match meta.positive("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => meta.positive("rope.scale_linear")?,
    };
    match (meta.text(&meta.key("rope.scaling.type"))?, factor) {
        (Some("none"), _) | (None, None) => Ok((RopeScaling::None, amplitude)),
        (Some("linear") | None, Some(factor)) => {
            Ok((if factor == 1.0 { RopeScaling::None } else { RopeScaling::Linear { factor } }, amplitude))
        }
        (Some("yarn"), Some(factor)) => {
            let beta_fast = meta.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(BETA_FAST);
            let beta_slow = meta.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(BETA_SLOW);
            let scaling = RopeScaling::Yarn { factor, original_context: original()?, beta_fast, beta_slow, truncate: true };
            Ok((scaling, amplitude * yarn_amplitude(factor, 1.0)))
        }
        (Some("linear" | "yarn"), None) => Err(meta.wrong("rope.scaling.factor", "a positive number", "missing")),
        (Some(got), _) => Err(meta.unsupported("rope.scaling.type", "none, linear or yarn", got)),
    }
}
