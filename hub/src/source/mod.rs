//! Sources of objects, which send [`Event`]s by watch.

pub mod trim;

pub mod kubernetes;

pub mod folder;

pub mod auto;

use tokio::sync::mpsc;

use crate::model::{Event, Version, WatchId};

/// An event with the watch's version after it, if known.
pub type Told = (WatchId, Event, Option<Version>);

/// Channel from sources to the store, closed at shutdown.
pub type Sender = mpsc::Sender<Told>;
