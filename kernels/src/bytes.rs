//! Floats as the bytes that cross between processes, little-endian as every supported processor has them.
#![expect(unsafe_code, reason = "a slice of floats is seen as bytes")]

/// The bytes of `values`.
pub fn of(values: &[f32]) -> &[u8] {
    // SAFETY: floats are plain bytes without padding; the length is theirs, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// As [`of`], to be written: every pattern of bytes is a float.
pub fn of_mut(values: &mut [f32]) -> &mut [u8] {
    let len = size_of_val(values);
    // SAFETY: as in `of`; borrowed exclusively, and whatever is written is a valid float.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_values_in_order() {
        let mut values = [1.5, -2.25];
        assert_eq!(of(&values), [1.5_f32.to_le_bytes(), (-2.25_f32).to_le_bytes()].concat());
        of_mut(&mut values)[4..].copy_from_slice(&7_f32.to_le_bytes());
        assert_eq!(values, [1.5, 7.0]);
        assert!(of(&[]).is_empty());
    }
}
