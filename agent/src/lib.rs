//! Keeps one OPA in sync with opa-hub.
//!
//! ```text
//!  hub ─archives, events→ sync ─→ opa ─PATCH, PUT→ OPA
//!                          ├────→ server (policy bundle, health) ←─ OPA, kubelet
//!                          └────→ state (last good content, on disk)
//! ```
//!
//! Imports go one way: `app` → `sync` → `hub`, `opa`, `state`, `server` → `status`, `archive`, `http`, `config`.
//!
//! The agent has digests in memory, never data. Its state is in OPA (`data.system.opahub.<bundle>`), written in the
//! transaction that changes the data. An OPA that restarted has no such marker and is loaded. An agent that restarted
//! reads the marker and resumes.

pub mod app;
pub mod archive;
mod args;
mod backoff;
pub mod config;
mod http;
mod hub;
pub mod opa;
pub mod server;
pub mod state;
pub mod status;
pub mod sync;
