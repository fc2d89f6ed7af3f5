//! The protocol between hub and agents.
//!
//! ```text
//! GET /bundles/main/{data,policy}               archive
//! GET /bundles/main/stream, Last-Event-ID       event: delta, event: policy, `:` heartbeat
//!                                               410 Gone: unknown revision, reconcile
//! POST /bundles/main/reconcile, digests         archive of the differences
//! ```
//!
//! A revision is a digest of content, so an agent resumes from any replica.

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
