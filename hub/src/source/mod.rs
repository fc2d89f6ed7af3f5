//! Sources of objects, which send `Event`s by watch.

pub mod folder;
pub mod kubernetes;
pub(crate) mod normalize;

use tokio::sync::mpsc;

use crate::model::Told;

/// Maximum events between source and store. A full queue holds back the watch.
pub const EVENT_QUEUE_MAX: usize = 1024;

/// Channel from sources to the store, closed at shutdown.
pub type Sender = mpsc::Sender<Told>;
