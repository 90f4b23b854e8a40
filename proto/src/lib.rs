//! What crosses the wire: generated messages and services, and their conversions to the plain types of `plan`.
//!
//! The code in `src/generated/` is made from `proto/` by `cargo xtask codegen` and committed; a test fails when it is stale.
//! Other crates let generated types reach no further than their own servers and clients.

pub mod bearer;
pub mod convert;

/// `skein.v1`: the typed interface for clients.
pub mod inference {
    #![expect(missing_docs, unused_qualifications, reason = "generated")]
    include!("generated/skein.v1.rs");

    /// Encoded `FileDescriptorSet` of this package, for reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/skein.v1.binpb");
}

/// `skein.worker.v1`: sessions, links and epochs.
pub mod worker {
    #![expect(missing_docs, unused_qualifications, reason = "generated")]
    include!("generated/skein.worker.v1.rs");
}

/// `skein.pool.v1`: routers of a pool among themselves.
pub use skein::pool::v1 as pool;

/// The packages as generated code of one names types of another: relative to where both would lie.
mod skein {
    pub(crate) mod pool {
        pub mod v1 {
            #![expect(missing_docs, unused_qualifications, clippy::large_enum_variant, reason = "generated")]
            include!("generated/skein.pool.v1.rs");
        }
    }
    pub(crate) mod fleet {
        pub(crate) use crate::fleet as v1;
    }
    pub(crate) mod worker {
        pub(crate) use crate::worker as v1;
    }
}

/// `skein.fleet.v1`: the fleet and its load.
pub mod fleet {
    #![expect(missing_docs, unused_qualifications, reason = "generated")]
    include!("generated/skein.fleet.v1.rs");

    /// Metadata of a router's call to the control plane: the deployment whose own router it is.
    pub const POOL_HEADER: &str = "skein-pool";
}
