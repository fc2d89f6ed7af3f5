//! What the hub and its agents say to each other.
//!
//! ```text
//!  agent                                        hub
//!    │  GET /bundles/main/data, …/policy         │   archive: head, one data.json a directory, one .rego a module
//!    │ ────────────────────────────────────────▶ │
//!    │  GET /bundles/main/stream                 │   text/event-stream, from the revision in Last-Event-ID
//!    │      Last-Event-ID: <revision>            │
//!    │ ────────────────────────────────────────▶ │   event: delta   keys that changed, as a JSON patch
//!    │                                           │   event: policy  modules that changed
//!    │                                           │   : a comment once all is told, and every 5 s
//!    │  410 Gone: the revision is unknown        │
//!    │  POST /bundles/main/reconcile             │   an archive of what differs only
//!    │      digests of every directory           │
//!    │ ────────────────────────────────────────▶ │
//! ```
//!
//! A revision is the digest of content, so any replica of the hub, at any time, gives equal content the same name.
//! An agent therefore resumes wherever it likes, and refuses a frame whose `from` is not what it holds.

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
