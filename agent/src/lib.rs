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
//! The agent stores no data. Its state is in OPA, written in the same transactions. An OPA without this marker is loaded;
//! an agent that restarted resumes from it.

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
