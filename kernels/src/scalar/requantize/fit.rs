//! Searches for the scale with which integers come closest to values, where some errors count more than others.
//!
//! Each tries some scales, takes the integers that a scale gives, and the best scale for those integers: least squares.

/// A value that rounds to a whole number, halves away from zero.
pub(super) fn nearest(x: f32) -> f32 {
    x.round()
}

/// 1 / x, or 0.
pub(super) fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The value of the largest magnitude; the first of equals.
pub(super) fn peak(x: &[f32]) -> f32 {
    x.iter().copied().reduce(|peak, x| if x.abs() > peak.abs() { x } else { peak }).unwrap_or(0.0)
}

/// How much the errors of at most 32 values count.
pub(super) struct Weights([f32; 32]);

impl Weights {
    /// By default more for larger values, and that times the importance where it is known.
    pub(super) fn new(x: &[f32], importance: Option<&[f32]>) -> Self {
        let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        let size = square.sqrt();
        let mut weights = [0.0; 32];
        for (i, (weight, x)) in weights.iter_mut().zip(x).enumerate() {
            *weight = importance.map_or(size + x.abs(), |given| given[i] * (square + x * x).sqrt());
        }
        Self(weights)
    }

    /// How much the scale of the values counts beside those of others.
    pub(super) fn sum(&self) -> f32 {
        self.0.iter().sum()
    }
}

/// What may be taken off the values.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Offset {
    /// Nothing, or something below them.
    AtLeastZero,
    /// Anything.
    Any,
}

/// Scale and minimum with which `levels + 1` integers come closest to `x`, as `scale · q − minimum`; the scale is at least 0.
pub(super) fn line(x: &[f32], weights: &Weights, levels: f32, offset: Offset) -> (f32, f32) {
    let least = if offset == Offset::Any { f32::MAX } else { 0.0 };
    let (low, high) = x.iter().fold((least, f32::MIN), |(low, high), &x| (low.min(x), high.max(x)));
    if high <= low {
        return (0.0, -low);
    }
    let error = |scale: f32, min: f32| {
        let id = inverse(scale);
        x.iter()
            .zip(weights.0)
            .map(|(x, w)| {
                let q = nearest((x + min) * id).clamp(0.0, levels);
                let off = scale * q - min - x;
                w * off * off
            })
            .sum::<f32>()
    };
    let mut best = ((high - low) / levels, -low);
    let mut least = error(best.0, best.1);
    for step in 0..=20 {
        let id = (levels - 1.0 + 0.1 * step as f32) / (high - low);
        // The line through the integers that this scale gives, by least squares.
        let (mut w, mut l, mut l2, mut xl, mut xs) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (x, weight) in x.iter().zip(weights.0) {
            let q = nearest((x - low) * id).clamp(0.0, levels);
            w += weight;
            l += weight * q;
            l2 += weight * q * q;
            xl += weight * q * x;
            xs += weight * x;
        }
        let determinant = w * l2 - l * l;
        if determinant <= 0.0 {
            continue;
        }
        let (mut scale, mut min) = ((w * xl - xs * l) / determinant, (l * xl - l2 * xs) / determinant);
        if min < 0.0 && offset == Offset::AtLeastZero {
            (scale, min) = (xl / l2, 0.0);
        }
        if scale <= 0.0 || !scale.is_finite() {
            continue;
        }
        let off = error(scale, min);
        if off < least {
            (least, best) = (off, (scale, min));
        }
    }
    best
}

/// Scale with which integers in `range` come closest to `x`; around the one that makes `end` of the largest magnitude.
pub(super) fn scale(x: &[f32], weights: &Weights, end: f32, range: (f32, f32)) -> f32 {
    let ids = (-9..=9).map(|step: i32| end + end.signum() * 0.1 * step as f32);
    best(x, weights, ids, |x| nearest(x).clamp(range.0, range.1))
}

/// Scale with which numbers of an ascending table come closest to `x`.
pub(super) fn scale_of_table(x: &[f32], weights: &Weights, table: &[i8; 16]) -> f32 {
    let ids = (-7..=7).map(|step: i32| f32::from(table[0]) + step as f32);
    best(x, weights, ids, |x| f32::from(table[usize::from(nearest_of(table, x))]))
}

/// The place in an ascending table of the number that is nearest to `x`.
pub(super) fn nearest_of(table: &[i8; 16], x: f32) -> u8 {
    table.windows(2).map(|pair| u8::from(x > f32::from(i16::from(pair[0]) + i16::from(pair[1])) / 2.0)).sum()
}

/// The best scale for the numbers that `rounded` makes of `x`, when its value of the largest magnitude becomes one of `ends`.
fn best(x: &[f32], weights: &Weights, ends: impl Iterator<Item = f32>, rounded: impl Fn(f32) -> f32) -> f32 {
    let peak = peak(x);
    if peak.abs() < 1e-15 {
        return 0.0;
    }
    let (mut best, mut most) = (0.0, 0.0);
    for end in ends {
        let id = end / peak;
        let (mut xl, mut l2) = (0.0, 0.0);
        for (x, weight) in x.iter().zip(weights.0) {
            let q = rounded(x * id);
            xl += weight * x * q;
            l2 += weight * q * q;
        }
        // What the best scale for these integers takes off the error.
        if l2 > 0.0 && xl * xl > most * l2 {
            (most, best) = (xl * xl / l2, xl / l2);
        }
    }
    best
}

/// What a scale of scales has to fit: the scales, each as much as its values count.
pub(super) fn scale_of_scales(scales: &[f32; 16], sums: [f32; 16], end: f32, range: (f32, f32)) -> f32 {
    let mut weights = [0.0; 32];
    weights[..16].copy_from_slice(&sums);
    scale(scales, &Weights(weights), end, range)
}
