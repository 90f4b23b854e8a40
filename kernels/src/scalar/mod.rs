//! The specification of the bits: what every vector kernel must equal.

pub(crate) mod blocks;
pub(crate) mod dot;
pub(crate) mod quantize;
pub(crate) mod requantize;
