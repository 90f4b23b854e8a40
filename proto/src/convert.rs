//! Conversions between wire messages and the plain types of `plan`, with errors that name the field a peer sent wrong.

mod adapter;
mod error;
mod fleet;
mod output;
mod step;
#[cfg(test)]
mod tests;

pub use adapter::{decode_load, encode_load};
pub use error::ConvertError;
pub use fleet::{decode_fleet, encode_fleet};
pub use output::{decode_logprobs, decode_output, encode_logprobs, encode_output, f32s_from_bytes, f32s_to_bytes};
pub use step::{decode_mask, decode_sampling, decode_step, decode_wants, encode_mask, encode_sampling, encode_step, encode_want};

use plan::worker::Epoch;

use crate::worker as wire;

/// An epoch as it crosses the wire.
pub fn encode_epoch(epoch: Epoch) -> wire::Epoch {
    wire::Epoch { number: epoch.number, session: epoch.session }
}

/// An epoch from the wire; `field` names it in the error.
///
/// # Errors
/// If it is missing.
pub fn decode_epoch(epoch: Option<wire::Epoch>, field: &'static str) -> Result<Epoch, ConvertError> {
    let epoch = epoch.ok_or_else(|| ConvertError::missing(field))?;
    Ok(Epoch { number: epoch.number, session: epoch.session })
}
