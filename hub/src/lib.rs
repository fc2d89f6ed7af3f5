//! One watch of the API server for many OPA sidecars.
//!
//! ```text
//!  kubernetes watch ┐
//!  manifest folder  ┴ source ─Event→ store ─Change→ bundle (project, view, log, snapshot) ─→ serve ─HTTP→ agent, OPA
//! ```
//!
//! Data flows one way. Bundles share the objects in `store`. `pipeline` is the single writer of a bundle and publishes
//! immutable snapshots; `serve` only reads. `documents` and `bundles` manage the running bundles, `app` joins all parts.

pub mod config;

pub mod cli;

pub mod model;

pub mod readiness;

pub mod source;

pub mod store;

pub mod policy;

pub mod bundle;

pub mod pipeline;

pub mod bundles;

pub mod documents;

pub mod writeback;

pub mod serve;

pub mod telemetry;

pub mod fields_of;

pub mod app;
