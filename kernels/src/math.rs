//! Own exp, ln, pow, sin, cos, tanh and erf: fixed polynomials and fused multiply-adds, so that every machine computes the same bits.
//!
//! Nothing comes from the system's mathematics library but the square root and the fused multiply-add, which are exact roundings.

use crate::simd::Simd;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the first has 9 trailing zero bits, so that its products with exponents are exact.
const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);

/// `e^x` in every lane, within 2 units in the last place; 0 below -104, infinite above 88.8, NaN for NaN.
///
/// `x = n ln 2 + r`; the polynomial of degree 7 in `r` is the one of Cephes' `expf` (Moshier 1992).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(89.0), x);
    let x = s.max(s.splat(-104.0), x);
    let n = s.round(s.mul(x, s.splat(LOG2_E)));
    let r = s.fma(n, s.splat(-LN_2.0), x);
    let r = s.fma(n, s.splat(-LN_2.1), r);
    let mut p = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let y = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    // In two steps, so that results below the normal range are reached.
    let first = s.round(s.mul(n, s.splat(0.5)));
    s.mul(s.mul(y, s.exp2(first)), s.exp2(s.sub(n, first)))
}

/// `e^x` within 2 units in the last place; 0 below -104, infinite above 88.8, NaN for NaN. The bits of every vectorised kernel.
pub fn exp_f32(x: f32) -> f32 {
    let lanes = exp(crate::simd::Portable, [x; crate::simd::LANES]);
    lanes[0]
}

/// The error function in every lane, within 4e-7; NaN for NaN.
///
/// `x P(x²) / Q(x²)` for |x| up to 3.744, and its value there beyond: the rational approximation of Eigen and XLA.
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::F) -> S::F {
    const END: f32 = 3.743_921_2;
    let (one, minus_one) = (s.splat(1.0), s.splat(-1.0));
    let x = s.max(s.splat(-END), s.min(s.splat(END), x));
    let x2 = s.mul(x, x);
    let mut p = s.splat(2.290_506_5e-4);
    for coefficient in [3.408_291e-3, 5.095_569_5e-2, 1.852_083_3e-1, std::f32::consts::FRAC_2_SQRT_PI] {
        p = s.fma(p, x2, s.splat(coefficient));
    }
    let mut q = s.splat(-1.179_160_3e-7);
    for coefficient in [2.354_796_6e-5, 1.017_962_5e-3, 1.407_047e-2, 1.109_850_5e-1, 4.974_692_5e-1, 1.0] {
        q = s.fma(q, x2, s.splat(coefficient));
    }
    s.max(minus_one, s.min(one, s.div(s.mul(x, p), q)))
}

const LN_2_F64: (f64, f64) = (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10);

/// `2^n`, for `n` in `-1022..=1023`.
#[inline(always)]
fn exp2_f64(n: i64) -> f64 {
    f64::from_bits(((n + 1023) << 52).cast_unsigned())
}

/// `e^x`, within 2 units in the last place; saturates to 0 and infinity.
#[inline(always)]
pub fn exp_f64(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    let x = x.clamp(-750.0, 710.0);
    let n = (x * std::f64::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN_2_F64.1, n.mul_add(-LN_2_F64.0, x));
    // Taylor's series; the first term left out is below 2^-57 for |r| <= ln 2 / 2.
    let mut p = 1.0;
    for k in (1..=14).rev() {
        p = (p * r / f64::from(k)) + 1.0;
    }
    let first = (n * 0.5).round_ties_even();
    p * exp2_f64(first as i64) * exp2_f64((n - first) as i64)
}

/// Natural logarithm of a normal positive number, within 2 units in the last place; minus infinity for 0 and subnormals, NaN below 0.
#[inline(always)]
pub fn ln_f64(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x < f64::MIN_POSITIVE {
        return f64::NEG_INFINITY;
    }
    if x == f64::INFINITY {
        return x;
    }
    let bits = x.to_bits();
    let mut e = ((bits >> 52) as i64) - 1023;
    let mut m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 1023 << 52);
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    // ln m = 2 artanh t, t = (m - 1) / (m + 1), |t| < 0.172.
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let mut p = 0.0;
    for k in (0..=11).rev() {
        p = t2.mul_add(p, 1.0 / f64::from(2 * k + 1));
    }
    let e = e as f64;
    e.mul_add(LN_2_F64.0, e.mul_add(LN_2_F64.1, 2.0 * t * p))
}

/// `x^y` for positive `x`.
#[inline(always)]
pub fn pow_f64(x: f64, y: f64) -> f64 {
    exp_f64(y * ln_f64(x))
}

/// `(1 - e^-2|x|) / (1 + e^-2|x|)` with the sign of `x`, absolute error below 1e-15.
pub fn tanh_f64(x: f64) -> f64 {
    let e = exp_f64(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

/// Pi / 2 in two parts.
const HALF_PI: (f64, f64) = (std::f64::consts::FRAC_PI_2, 6.123_233_995_736_766e-17);

/// Sine and cosine of `x` radians, absolute error below 1e-15 (|x| < 1e6).
#[inline(always)]
pub fn sin_cos_f64(x: f64) -> (f64, f64) {
    let n = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
    let r = n.mul_add(-HALF_PI.1, n.mul_add(-HALF_PI.0, x));
    let r2 = r * r;
    // Taylor's series; the first terms left out are below 2^-57 for |r| <= pi / 4.
    let mut s = -1.0 / 1_307_674_368_000.0;
    for c in [1.0 / 6_227_020_800.0, -1.0 / 39_916_800.0, 1.0 / 362_880.0, -1.0 / 5_040.0, 1.0 / 120.0, -1.0 / 6.0] {
        s = r2.mul_add(s, c);
    }
    let sin = (r * r2).mul_add(s, r);
    let mut c = 1.0 / 20_922_789_888_000.0;
    for k in [-1.0 / 87_178_291_200.0, 1.0 / 479_001_600.0, -1.0 / 3_628_800.0, 1.0 / 40_320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5] {
        c = r2.mul_add(c, k);
    }
    let cos = r2.mul_add(c, 1.0);
    match (n as i64).rem_euclid(4) {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Isa,
        simd::{Kernel, LANES, vectorize},
    };

    struct Exp<'a>(&'a [[f32; LANES]]);

    impl Kernel for Exp<'_> {
        type Output = Vec<u32>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<u32> {
            let mut out = Vec::new();
            for x in self.0 {
                let mut y = [0.0; LANES];
                s.store(&mut y, exp(s, s.load(x)));
                out.extend(y.map(f32::to_bits));
            }
            out
        }
    }

    #[test]
    fn exp_is_close_and_the_same_bits_everywhere() {
        let mut inputs: Vec<f32> = (-4400..3600).map(|i| i as f32 * 0.025 + 0.001).collect();
        inputs.extend([0.0, -0.0, 1e-30, f32::INFINITY, f32::NEG_INFINITY, 88.7, 88.8, -87.4, -103.0, -103.9, -104.0, 1e30, -1e30]);
        inputs.resize(inputs.len().next_multiple_of(LANES), 1.0);
        let lanes = inputs.as_chunks::<LANES>().0;
        let spec = vectorize(Isa::Scalar, Exp(lanes));
        for isa in Isa::available() {
            assert_eq!(vectorize(isa, Exp(lanes)), spec, "{isa}");
        }
        for (&x, &y) in inputs.iter().zip(&spec) {
            let (y, want) = (f32::from_bits(y), f64::from(x).exp() as f32);
            if want.is_finite() && want > 1e-37 {
                assert!((y - want).abs() <= want * 3e-7, "exp({x}) = {y}, expected {want}");
            } else {
                assert!(y == want || (y - want).abs() < 1e-43, "exp({x}) = {y}, expected {want}");
            }
        }
        assert!(exp_f32(f32::NAN).is_nan());
        assert_eq!(exp_f32(0.0), 1.0);
    }

    struct Erf<'a>(&'a [[f32; LANES]]);

    impl Kernel for Erf<'_> {
        type Output = Vec<u32>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<u32> {
            let mut out = Vec::new();
            for x in self.0 {
                let mut y = [0.0; LANES];
                s.store(&mut y, erf(s, s.load(x)));
                out.extend(y.map(f32::to_bits));
            }
            out
        }
    }

    /// `2 / sqrt(π) Σ (-1)^n x^(2n+1) / (n! (2n+1))`: Abramowitz & Stegun 7.1.5, exact enough in f64 up to |x| = 4.
    fn erf_series(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..120 {
            let n = f64::from(n);
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn erf_is_close_and_the_same_bits_everywhere() {
        let mut inputs: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.001).collect();
        inputs.extend([0.0, -0.0, 1e-30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30, -1e30, 3.743_921_2, 3.744]);
        inputs.resize(inputs.len().next_multiple_of(LANES), 1.0);
        let lanes = inputs.as_chunks::<LANES>().0;
        let spec = vectorize(Isa::Scalar, Erf(lanes));
        for isa in Isa::available() {
            assert_eq!(vectorize(isa, Erf(lanes)), spec, "{isa}");
        }
        let mut worst: f64 = 0.0;
        for (&x, &y) in inputs.iter().zip(&spec) {
            let y = f32::from_bits(y);
            if x.is_nan() {
                assert!(y.is_nan());
            } else if x.abs() > 4.0 {
                worst = worst.max(f64::from((y - x.signum()).abs()));
            } else {
                worst = worst.max((f64::from(y) - erf_series(f64::from(x))).abs());
            }
        }
        assert!(worst < 4e-7, "off by {worst}");
        assert!((erf_series(0.5) - 0.520_499_877_813_046_5).abs() < 1e-15, "the series itself");
    }

    #[test]
    fn f64_functions_are_close() {
        for i in -2000..2000 {
            let x = f64::from(i) * 0.337 + 0.01;
            let (s, c) = sin_cos_f64(x * 100.0);
            assert!((s - (x * 100.0).sin()).abs() < 1e-15 && (c - (x * 100.0).cos()).abs() < 1e-15, "sin cos {x}");
            assert!((tanh_f64(x * 0.03) - (x * 0.03).tanh()).abs() < 1e-15, "tanh {x}");
            let e = x.exp();
            assert!(!e.is_normal() || (exp_f64(x) / e - 1.0).abs() < 1e-15, "exp {x}");
            let y = x.abs() * 1e3;
            assert!((ln_f64(y) - y.ln()).abs() <= 1e-15 * y.ln().abs().max(1.0), "ln {y}");
        }
        assert!((pow_f64(1e6, -0.25) - 1e6_f64.powf(-0.25)).abs() < 1e-16);
        assert_eq!(ln_f64(1.0), 0.0);
        assert_eq!(exp_f64(0.0), 1.0);
        assert_eq!((tanh_f64(0.0), tanh_f64(-800.0), tanh_f64(800.0)), (0.0, -1.0, 1.0));
    }
}
