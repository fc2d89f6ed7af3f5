//! One hub in place of a watch per sidecar.
//!
//! ```text
//!  kubernetes watch ┐
//!  manifest folder  ┴ source ─Event→ store ─Change→ bundle (project, view, log, snapshot) ─→ serve ─HTTP→ agent, OPA
//! ```
//!
//! Data flows one way. `source` says what exists; `store` turns that into what changed, once for all bundles; `bundle`
//! keeps the immutable view that all readers share and the log that frames are computed from; `serve` only reads.
//! `pipeline` is the one writer of a bundle, `documents` and `bundles` say which there are, `app` joins the stages.

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
