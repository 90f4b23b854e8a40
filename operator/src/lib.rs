//! The operator: reconciles `ModelDeployment` resources into routers and workers, and pushes the fleet to routers.
//!
//! A reconcile is five steps, one file each: [`dereference`] reads, [`validate`] and [`build`] compute, [`apply`] writes, [`status`] says what
//! came of it. The routers of a namespace are reconciled apart, in [`pool`], because all its deployments share them.

pub mod apply;
pub mod args;
pub mod build;
pub mod certificates;
pub mod controller;
pub mod crd;
pub mod dereference;
pub mod fleet;
pub mod lease;
pub mod metrics;
pub mod models;
pub mod names;
pub mod pool;
pub mod resource;
pub mod serve;
pub mod status;
pub mod validate;
