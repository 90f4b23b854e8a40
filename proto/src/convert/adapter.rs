//! Adapters that workers are to load.

use plan::adapter::AdapterSource;

use super::ConvertError;
use crate::worker as wire;

/// An adapter for a slot, as it crosses the wire.
pub fn encode_load(slot: u32, adapter: &AdapterSource) -> wire::LoadAdapter {
    let AdapterSource { uri, digest, numerics } = adapter.clone();
    wire::LoadAdapter { slot, uri, digest, numerics }
}

/// An adapter from the wire, and its slot.
///
/// # Errors
/// If the slot is 0, which is the bare model's, or a field is empty.
pub fn decode_load(load: wire::LoadAdapter) -> Result<(u32, AdapterSource), ConvertError> {
    let wire::LoadAdapter { slot, uri, digest, numerics } = load;
    if slot == 0 {
        return Err(ConvertError::value("load_adapter.slot", 0, "1 or more"));
    }
    for (field, value) in [("uri", &uri), ("numerics", &numerics)] {
        if value.is_empty() {
            return Err(ConvertError::missing(format!("load_adapter.{field}")));
        }
    }
    Ok((slot, AdapterSource { uri, digest, numerics }))
}
