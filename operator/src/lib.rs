//! The operator: reconciles `ModelDeployment` resources into routers and workers, and pushes the fleet to routers.
//!
//! A reconcile is five steps, one file each: [`dereference`] reads (and [`inspect`], where nodes alone can; which may, [`host`] says), [`validate`] and [`build`] compute, [`apply`] writes, [`status`] says what
//! came of it. Which replicas are built is planned by [`rollout`] from what [`observe`] sees of them, each of a [`revision`]. The routers of a namespace are reconciled apart, in [`pool`], because all its deployments share them.

pub mod apply;
pub mod args;
pub mod autoscale;
pub mod build;
pub mod cache;
pub mod certificates;
pub mod controller;
pub mod crd;
pub mod dereference;
pub mod fleet;
pub mod host;
pub mod inspect;
pub mod issuer;
pub mod lease;
pub mod lost;
pub mod metrics;
#[cfg(test)]
pub(crate) mod mock;
pub mod models;
pub mod names;
pub mod observe;
pub mod pool;
pub mod requests;
pub mod resource;
pub mod revision;
pub mod rollout;
pub mod routers;
pub mod scaling;
pub mod serve;
mod setbacks;
pub mod status;
pub mod stop;
pub mod validate;
