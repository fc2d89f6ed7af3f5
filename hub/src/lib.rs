//! One watch of the API server for many OPA sidecars.
//!
//! ```text
//!  kubernetes watch ┐
//!  manifest folder  ┴ source ─Event→ store ─Change→ bundle (project, view, log, snapshot) ─→ serve ─HTTP→ agent, OPA
//! ```
//!
//! Data flows one way. Bundles share the objects in `store`. `pipeline` is the single writer of a bundle and publishes
//! immutable snapshots; `serve` only reads. `documents` and `bundles` manage the running bundles, `app` joins all parts.

pub mod app;
pub mod args;
mod backoff;
pub mod bundle;
pub mod fields;
mod fields_command;
pub mod health;
mod json;
pub mod k8s;
pub mod logging;
pub mod manager;
pub mod model;
pub mod pipeline;
pub mod policy;
pub mod projection;
pub mod serve;
pub mod snapshot;
pub mod source;
pub mod spec;
pub mod status;
pub mod store;
