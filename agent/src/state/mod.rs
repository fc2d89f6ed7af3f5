//! Last good state of one OPA on disk, for starts without a hub.
//!
//! A redb file: commits are atomic, and checksums are verified before use. Syncs at most once per second: a crash loses
//! that time. If the disk fails, the state is discarded: a disk must not stop OPA.
//!
//! - `store`: handle of the thread
//! - `writer`: the thread
//! - `draft`: uncommitted changes
//! - `reader`: committed state
//! - `tables`: layout
//! - `error`: failures

mod draft;
mod error;
mod reader;
mod store;
mod tables;
mod writer;

pub use store::StateStore;
pub use tables::Meta;
pub(crate) use tables::StateSummary;
