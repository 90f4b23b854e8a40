//! Rotary divisors that a GGUF file holds as tensors, as what they were made of.

use anyhow::Context;
use kernels::{dequantize_rows, rope};
use plan::model::{ModelHeader, Role, RopeScaling, TensorId};
use source::Source;

use super::weight_type;
use crate::exit::{BadInput, Outcome};

/// Low and high factor of every Llama 3 that was published.
const LLAMA3: (f64, f64) = (1.0, 4.0);
/// Contexts before stretching that are tried: powers of two up to this one.
const MOST_CONTEXT: u32 = 20;

/// The model with its divisors in its config. Those of no scaling that is known stay where they are.
pub(super) fn scaling(source: &Source, mut header: ModelHeader) -> Outcome<ModelHeader> {
    let Some(found) = header
        .config
        .layers
        .iter()
        .map(|layer| layer.rope.clone())
        .find(|rope| matches!(rope.scaling, RopeScaling::Tensor | RopeScaling::LongRopeTensors { .. }))
    else {
        return Ok(header);
    };
    let read = |role| vector(source, &header, TensorId { layer: None, role });
    let scaling = match found.scaling {
        RopeScaling::LongRopeTensors { original_context } => {
            let (short, long) = (read(Role::ShortRopeFactors)?, read(Role::LongRopeFactors)?);
            Some(RopeScaling::LongRope { short, long, original_context })
        }
        _ => llama3(found.dims, found.base, &read(Role::RopeFactors)?),
    };
    if let Some(scaling) = scaling {
        for layer in header.config.layers.iter_mut().filter(|layer| layer.rope.scaling == found.scaling) {
            layer.rope.scaling = scaling.clone();
        }
    }
    Ok(header)
}

/// The divisors of a scaling, as files hold them.
pub(super) fn divisors(header: &ModelHeader, role: Role) -> Option<Vec<f32>> {
    header.config.layers.iter().find_map(|layer| match (&layer.rope.scaling, role) {
        (RopeScaling::LongRope { short, .. }, Role::ShortRopeFactors) => Some(short.clone()),
        (RopeScaling::LongRope { long, .. }, Role::LongRopeFactors) => Some(long.clone()),
        (RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }, Role::RopeFactors) => {
            let scaling = rope::RopeScaling::Llama3 {
                factor: *factor,
                low_freq_factor: *low_freq_factor,
                high_freq_factor: *high_freq_factor,
                original_context: *original_context,
            };
            Some(made(layer.rope.dims, layer.rope.base, &scaling))
        }
        _ => None,
    })
}

fn made(dims: usize, base: f64, scaling: &rope::RopeScaling) -> Vec<f32> {
    rope::divisors(dims, base, scaling).into_iter().map(|divisor| divisor as f32).collect()
}

/// The settings of Llama 3.1 and later that give these divisors, if any of those in use does.
fn llama3(dims: usize, base: f64, given: &[f32]) -> Option<RopeScaling> {
    let factor = f64::from(given.iter().copied().fold(1.0, f32::max));
    let (low_freq_factor, high_freq_factor) = LLAMA3;
    (0..=MOST_CONTEXT).map(|bits| f64::from(1_u32 << bits)).find_map(|original_context| {
        let scaling = rope::RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context };
        // Other writers compute them in 32 bits.
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * b.abs();
        let all = made(dims, base, &scaling);
        (all.len() == given.len() && given.iter().zip(&all).all(near)).then_some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        })
    })
}

fn vector(source: &Source, header: &ModelHeader, id: TensorId) -> Outcome<Vec<f32>> {
    let tensor = header.tensors.get(&id).with_context(|| format!("the model has no tensor of role {:?}", id.role))?;
    let mut bytes = vec![0; tensor.bytes as usize];
    source.read(tensor.file, tensor.offset..tensor.offset + tensor.bytes, &mut bytes).bad_input()?;
    Ok(dequantize_rows(weight_type(tensor.stored_type())?, tensor.shape[0], &bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_of_llama_3_are_told_by_their_divisors() {
        for (factor, original_context) in [(8.0, 8192.0), (32.0, 8192.0), (8.0, 64.0)] {
            let settings = rope::RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context };
            let given = made(64, 500_000.0, &settings);
            let Some(RopeScaling::Llama3 { factor: f, original_context: c, .. }) = llama3(64, 500_000.0, &given) else { panic!("none") };
            assert_eq!(
                made(
                    64,
                    500_000.0,
                    &rope::RopeScaling::Llama3 { factor: f, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: c }
                ),
                given
            );
        }
        let mut other = made(64, 500_000.0, &rope::RopeScaling::Linear { factor: 3.0 });
        other[5] = 2.0;
        assert_eq!(llama3(64, 500_000.0, &other), None);
    }
}
