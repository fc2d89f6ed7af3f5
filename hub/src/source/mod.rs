//! Where objects come from. Every source speaks [`Event`], watch by watch, and knows nothing of
//! bundles: what a list no longer names is the store's arithmetic, what an object means the bundle's.

pub mod trim;

pub mod kubernetes;

pub mod folder;

pub mod auto;

use tokio::sync::mpsc;

use crate::model::{Event, Version, WatchId};

/// What a source says of which watch, and how far that is then, where the source can tell.
pub type Told = (WatchId, Event, Option<Version>);

/// The way from the sources to the store; closed when the hub shuts down.
pub type Sender = mpsc::Sender<Told>;
