//! Instruction sets as values: holding an [`Avx2`], [`AvxVnni`] or [`Avx512`] proves that this CPU has it.

use std::fmt;

/// Proof that this CPU has AVX2, FMA and F16C; only [`Avx2::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// Proof that this CPU has AVX-VNNI, 8-bit dot products in 256-bit vectors, and everything [`Avx2`] proves; only [`AvxVnni::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvxVnni(());

/// Proof that this CPU has AVX-512 F, BW, VL, DQ and VNNI, and everything [`Avx2`] proves; only [`Avx512::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

impl Avx2 {
    /// The proof, if this CPU has the instructions.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            return Some(Self(()));
        }
        None
    }
}

impl AvxVnni {
    /// The proof, if this CPU has the instructions.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if Avx2::detect().is_some() && is_x86_feature_detected!("avxvnni") {
            return Some(Self(()));
        }
        None
    }

    /// What AVX-VNNI comes with.
    pub fn avx2(self) -> Avx2 {
        Avx2(())
    }
}

impl Avx512 {
    /// The proof, if this CPU has the instructions.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni")
        {
            return Some(Self(()));
        }
        None
    }

    /// What AVX-512 implies.
    pub fn avx2(self) -> Avx2 {
        Avx2(())
    }
}

/// The instruction set the kernels use. Results are the same bits on all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain code; the specification.
    Scalar,
    /// 256-bit vectors.
    Avx2(Avx2),
    /// 256-bit vectors with 8-bit dot products.
    AvxVnni(AvxVnni),
    /// 512-bit vectors with 8-bit dot products.
    Avx512(Avx512),
}

/// Why an instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// No such name.
    #[error("unknown instruction set {name:?}, expected auto, scalar, avx2, avxvnni or avx512")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// This CPU lacks it.
    #[error("this CPU lacks {name}; it has {available}")]
    Missing {
        /// What was asked for.
        name: &'static str,
        /// The names this CPU has, separated by commas.
        available: String,
    },
}

impl Isa {
    /// The widest instruction set of this CPU.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self::Scalar)
    }

    /// Every instruction set of this CPU, narrowest first.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Scalar];
        all.extend(Avx2::detect().map(Self::Avx2));
        all.extend(AvxVnni::detect().map(Self::AvxVnni));
        all.extend(Avx512::detect().map(Self::Avx512));
        all
    }

    /// The instruction set called `name`: `auto` (the best), `scalar`, `avx2`, `avxvnni` or `avx512`.
    ///
    /// # Errors
    /// If there is no such name, or the CPU lacks it.
    pub fn named(name: &str) -> Result<Self, IsaError> {
        let missing =
            |name| IsaError::Missing { name, available: Self::available().into_iter().map(Self::name).collect::<Vec<_>>().join(", ") };
        match name {
            "auto" => Ok(Self::best()),
            "scalar" => Ok(Self::Scalar),
            "avx2" => Avx2::detect().map(Self::Avx2).ok_or_else(|| missing("avx2")),
            "avxvnni" => AvxVnni::detect().map(Self::AvxVnni).ok_or_else(|| missing("avxvnni")),
            "avx512" => Avx512::detect().map(Self::Avx512).ok_or_else(|| missing("avx512")),
            _ => Err(IsaError::Unknown { name: name.to_owned() }),
        }
    }

    /// `scalar`, `avx2`, `avxvnni` or `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2(_) => "avx2",
            Self::AvxVnni(_) => "avxvnni",
            Self::Avx512(_) => "avx512",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_the_value() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()), Ok(isa));
        }
        assert_eq!(Isa::named("auto"), Ok(Isa::best()));
        assert_eq!(Isa::named("sse9"), Err(IsaError::Unknown { name: "sse9".to_owned() }));
    }
}
