//! Last good state of one OPA on disk. OPA and agent start from it while no hub answers.
//!
//! The file is a redb database of one complete state. A commit is atomic; pages have checksums, which are verified before
//! use. A thread writes, and syncs at most once per second: a crash loses that time. If the disk fails, the state is
//! discarded: a disk must not stop OPA.
//!
//! - `store`: handle of the thread
//! - `writer`: the thread
//! - `draft`: changes since the last commit
//! - `reader`: reads a committed state
//! - `tables`: layout of the file
//! - `error`: failures of the file

mod draft;
mod error;
mod reader;
mod store;
mod tables;
mod writer;

pub use store::StateStore;
pub use tables::Meta;
pub(crate) use tables::StateSummary;
