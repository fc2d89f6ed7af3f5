//! Sources of objects: the Kubernetes API or a folder. They send [`Event`]s by watch and do not know bundles.

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
