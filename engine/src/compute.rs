//! Where kernels run.

use std::sync::Arc;

use kernels::{Isa, Pool};

/// Threads and instructions, shared by all that compute.
#[derive(Clone, Debug)]
pub(crate) struct Compute {
    pub(crate) pool: Arc<Pool>,
    pub(crate) isa: Isa,
}
