//! The protocol between hub and agents.
//!
//! ```text
//!  agent                                        hub
//!    │  GET /bundles/main/data, …/policy         │   archive: header, data.json files, modules
//!    │ ────────────────────────────────────────▶ │
//!    │  GET /bundles/main/stream                 │   text/event-stream
//!    │      Last-Event-ID: <revision>            │
//!    │ ────────────────────────────────────────▶ │   event: delta   a JSON patch
//!    │                                           │   event: policy  changed modules
//!    │                                           │   : comment      synced, then every 5 s
//!    │  410 Gone: unknown revision               │
//!    │  POST /bundles/main/reconcile             │   archive of the differences
//!    │      digests                              │
//!    │ ────────────────────────────────────────▶ │
//! ```
//!
//! A revision is a digest of content, so an agent resumes from any replica. It rejects a frame whose `from` differs
//! from its revision.

pub mod revision;

pub mod position;

pub mod path;

pub mod patch;

pub mod frame;

pub mod sse;

pub mod manifest;

pub mod head;

pub mod reconcile;

pub mod poll;

pub mod flag;
