//! Single writer of a bundle. Pending changes become one snapshot. Policies are checked concurrently, so data never waits
//! for the compiler.
//!
//! Policies count as observed after their check, a list at its end. A failed watch has observed nothing, unless the
//! source denies or does not serve the resource.

pub mod auto_replication;
mod checker;
mod quota_check;
pub mod writer;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use opa_hub_proto::path::DirPath;
use tokio::sync::{mpsc, oneshot, watch};

use crate::model::WatchSpec;
use crate::policy::candidate::{Candidates, Resolution};
use crate::policy::dataflow::ReadSet;
use crate::policy::registry::LastGood;

pub use checker::check;

/// Delay of removing unread fields. Agents with the new policies need not reconcile.
pub const NARROW_AFTER: Duration = Duration::from_secs(5);

/// Health subject of the policy check.
pub const POLICIES: &str = "policies checked";

/// Command to the writer.
pub enum WriterCommand {
    /// Policies accepted before a restart.
    RestoreLastGood(LastGood),
    /// Result of the running check.
    ApplyCheck {
        /// Accepted policies.
        outcome: Resolution,
        /// Data that they read; `None` if fields do not follow policies.
        reads: Option<ReadSet>,
        /// Auto-replicated resources still read; `None` if unknown.
        resources: Option<BTreeSet<DirPath>>,
    },
    /// Repeats the check after a better analysis.
    Recheck,
    /// Replicates resources that policies under check read.
    AddWatches {
        /// Watches to add.
        feeds: Vec<WatchSpec>,
        /// Dropped once every watch has listed or failed.
        settled: oneshot::Sender<()>,
    },
}

/// Receivers of a writer's output.
pub struct WriterHandles {
    /// Policies to check, one set at a time.
    pub jobs: mpsc::UnboundedReceiver<Arc<Candidates>>,
    /// Accepted policies; `None` before the first check.
    pub good: watch::Receiver<Option<LastGood>>,
}
