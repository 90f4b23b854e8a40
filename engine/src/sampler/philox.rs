//! Randomness as a function of a key and a counter.

/// Philox 4x32 with 10 rounds: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let product = |m: u32, x: u32| u64::from(m) * u64::from(x);
        let (p0, p1) = (product(0xd251_1f53, counter[0]), product(0xcd9e_8d57, counter[2]));
        counter = [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

/// The number in [0, 1) for the draw after `position` of choice `choice`: a multiple of 2⁻⁵³.
pub(super) fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    let bits = philox([position, choice, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let high = u64::from(bits[0]) << 21 | u64::from(bits[1]) >> 11;
    high as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first two are known answers of the authors' library Random123 (`kat_vectors`).
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_ne!(philox([1, 0, 0, 0], [0; 2]), philox([0, 1, 0, 0], [0; 2]));
    }

    #[test]
    fn numbers_are_even_and_differ_by_every_part_of_the_key() {
        let numbers: Vec<f64> = (0..20_000).map(|position| uniform(7, 0, position)).collect();
        assert!(numbers.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        let below = numbers.iter().filter(|&&u| u < 0.1).count() as f64 / numbers.len() as f64;
        assert!((below - 0.1).abs() < 0.01, "{below} below 0.1");
        let all = [uniform(7, 0, 3), uniform(8, 0, 3), uniform(7 | 1 << 32, 0, 3), uniform(7, 1, 3), uniform(7, 0, 4)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{all:?}");
        }
    }
}
