//! The hub's ends of the connections of the fault test.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use opa_hub::bundle::{Bundle, Edition, Next};
use opa_hub_proto::revision::Revision;
use tokio::sync::watch::Receiver;

/// Those that are open.
#[derive(Default)]
pub(super) struct Streams(pub(super) Vec<Stream>);

/// The hub's end of a connection.
pub(super) struct Stream {
    /// Of this bundle.
    pub(super) id: u64,
    pub(super) name: &'static str,
    pub(super) namespace: &'static str,
    head: Receiver<Option<Arc<Edition>>>,
    pub(super) held: Revision,
    wire: Wire,
}

/// What is under way to an agent.
#[derive(Default)]
pub(super) struct UnderWay {
    pub(super) bytes: VecDeque<u8>,
    /// The revisions that whole changes lead to: one of data and policies comes in two events.
    pub(super) ends: VecDeque<String>,
}

/// None once the agent closed it. The hub's end is dropped where the hub closes it, or dies.
pub(super) type Wire = Arc<Mutex<Option<UnderWay>>>;

impl Streams {
    /// Follows a bundle from `held` on.
    pub(super) fn open(&mut self, part: &Bundle, of: (&'static str, &'static str), held: Revision) -> Wire {
        let wire = Wire::default();
        *wire.lock().unwrap() = Some(UnderWay::default());
        let ((name, namespace), head) = (of, part.head());
        self.0.push(Stream { id: part.id, name, namespace, head, held, wire: Arc::clone(&wire) });
        wire
    }

    /// Brings its streams to the head, but those whose reader `stalls`. Returns how many the log did not reach back to.
    pub(super) fn write(&mut self, mut stalls: impl FnMut() -> bool) -> usize {
        let mut behind = 0;
        self.0.retain_mut(|stream| {
            let mut wire = stream.wire.lock().unwrap();
            let Some(under_way) = wire.as_mut() else { return false };
            // A reader that stalls keeps its place.
            if !under_way.bytes.is_empty() && stalls() {
                return true;
            }
            let is_over = stream.head.has_changed().is_err();
            let Some(head) = stream.head.borrow().clone() else { return !is_over };
            match head.next(stream.held) {
                Next::UpToDate => {}
                Next::Frames(frames) => {
                    under_way.bytes.extend(&frames[..]);
                    under_way.ends.push_back(head.view.revision.to_string());
                    stream.held = head.view.revision;
                }
                // What is under way still comes.
                Next::Unknown => {
                    behind += 1;
                    return false;
                }
            }
            // Another bundle took the name of this one.
            !is_over
        });
        behind
    }
}
