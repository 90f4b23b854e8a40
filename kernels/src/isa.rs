//! Instruction sets as values: holding an [`Avx2`], [`AvxVnni`], [`Avx512`] or [`Amx`] proves that this CPU has it.
#![cfg_attr(all(target_arch = "x86_64", target_os = "linux"), expect(unsafe_code, reason = "the system is asked for the matrix unit"))]

use std::fmt;

use crate::WeightType;

/// Proof that this CPU has AVX2, FMA and F16C; only [`Avx2::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// Proof that this CPU has AVX-VNNI, 8-bit dot products in 256-bit vectors, and everything [`Avx2`] proves; only [`AvxVnni::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvxVnni(());

/// Proof that this CPU has AVX-512 F, BW, VL, DQ and VNNI, and everything [`Avx2`] proves; only [`Avx512::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

/// Proof that this CPU has a matrix unit of 8-bit products (AMX-TILE, AMX-INT8), which the system lets this process use, and everything
/// [`Avx512`] proves; only [`Amx::detect`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amx(());

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

impl Amx {
    /// The proof, if this CPU has the unit and the system lets this process use it.
    pub fn detect() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            static HAS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
            if Avx512::detect().is_some() && *HAS.get_or_init(has_matrix_unit) {
                return Some(Self(()));
            }
        }
        None
    }

    /// What AMX comes with here.
    pub fn avx512(self) -> Avx512 {
        Avx512(())
    }
}

/// Whether the CPU has AMX-TILE and AMX-INT8, and the system saves the state of the unit for this process from now on.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_matrix_unit() -> bool {
    const REQUEST_PERMISSION: libc::c_ulong = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
    // SAFETY: a request that changes nothing but what this process may use; it is refused where the CPU or the system lacks the unit.
    features & (1 << 24) != 0
        && features & (1 << 25) != 0
        && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
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
    /// 512-bit vectors, and a matrix unit of 8-bit products.
    Amx(Amx),
}

/// Why an instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// No such name.
    #[error("unknown instruction set {name:?}, expected auto, scalar, avx2, avxvnni, avx512 or amx")]
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

    /// The instructions that multiply quantized activations of so many tokens with weights of these types, by what was measured. A matrix unit
    /// multiplies Q8_0 as it is stored, from 8 tokens on faster than vectors; other weights have to be made into what it reads, which it
    /// repays from 25 on.
    pub fn for_products(self, tokens: usize, types: impl IntoIterator<Item = WeightType>) -> Self {
        let from = if types.into_iter().all(|dtype| dtype == WeightType::Q8_0) { 8 } else { 25 };
        match self {
            Self::Amx(proof) if tokens < from => Self::Avx512(proof.avx512()),
            _ => self,
        }
    }

    /// The proof that this one comes with, all but scalar code.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn avx2(self) -> Option<Avx2> {
        match self {
            Self::Scalar => None,
            Self::Avx2(proof) => Some(proof),
            Self::AvxVnni(proof) => Some(proof.avx2()),
            Self::Avx512(proof) => Some(proof.avx2()),
            Self::Amx(proof) => Some(proof.avx512().avx2()),
        }
    }

    /// Every instruction set of this CPU, narrowest first.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Scalar];
        all.extend(Avx2::detect().map(Self::Avx2));
        all.extend(AvxVnni::detect().map(Self::AvxVnni));
        all.extend(Avx512::detect().map(Self::Avx512));
        all.extend(Amx::detect().map(Self::Amx));
        all
    }

    /// The instruction set called `name`: `auto` (the best), `scalar`, `avx2`, `avxvnni`, `avx512` or `amx`.
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
            "amx" => Amx::detect().map(Self::Amx).ok_or_else(|| missing("amx")),
            _ => Err(IsaError::Unknown { name: name.to_owned() }),
        }
    }

    /// `scalar`, `avx2`, `avxvnni`, `avx512` or `amx`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2(_) => "avx2",
            Self::AvxVnni(_) => "avxvnni",
            Self::Avx512(_) => "avx512",
            Self::Amx(_) => "amx",
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
