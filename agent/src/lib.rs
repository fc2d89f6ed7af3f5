//! Keeps one OPA in step with the hub.
//!
//! ```text
//!  hub ─archive, events→ pull ─→ replica ─→ apply ─PATCH→ opa
//!                                   ├─────→ local (policy bundle, health) ←─ OPA, kubelet
//!                                   └─────→ state (last good, on disk)
//! ```
//!
//! The agent has digests in memory, never data: what OPA holds is written in OPA itself, in the same transaction as the
//! data (`data.system.opahub.<bundle>`). An OPA that restarted has no such marker and is loaded again; an agent that
//! restarted reads it and resumes.

pub mod config;

pub mod cli;

pub mod body;

pub mod authorities;

pub mod pull;

pub mod archive;

pub mod marker;

pub mod opa;

#[cfg(test)]
mod fake_opa;

pub mod rounds;

pub mod apply;

pub mod layout;

pub mod replica;

pub mod state;

pub mod status;

pub mod local;

pub mod server;

pub mod app;
