//! Quantization of activations to 8 bits.

/// Quantizes one block: `q = round_half_even(x · (127 / amax))` with `amax = max|x|`. Returns the scale `amax / 127`.
///
/// A block of zeros, or of values so small that 127 / amax overflows, has scale 0 and q = 0. A block that holds an infinity or a NaN has
/// that as its scale and q = 0, so that it shows in every product.
pub(crate) fn quantize_block(x: &[f32], q: &mut [i8]) -> f32 {
    // The bits of |x| order like the values, and a NaN above all.
    let amax = f32::from_bits(x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0));
    let inverse = 127.0 / amax;
    if !amax.is_finite() || !inverse.is_finite() {
        q.fill(0);
        return if amax.is_finite() { 0.0 } else { amax };
    }
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * inverse).round_ties_even() as i8;
    }
    amax / 127.0
}
