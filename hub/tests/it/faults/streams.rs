//! The hub's side of the fault test's connections.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use opa_hub::bundle::{Bundle, CachedSnapshot, CatchUp};
use opa_hub_proto::revision::Revision;
use tokio::sync::watch::Receiver;

#[derive(Default)]
pub(super) struct Streams(pub(super) Vec<Stream>);

/// The hub's side of a connection.
pub(super) struct Stream {
    pub(super) id: u64,
    pub(super) name: &'static str,
    pub(super) namespace: &'static str,
    head: Receiver<Option<Arc<CachedSnapshot>>>,
    pub(super) applied: Revision,
    wire: Wire,
}

/// Bytes in transit to an agent.
#[derive(Default)]
pub(super) struct UnderWay {
    pub(super) bytes: VecDeque<u8>,
    /// Revisions after complete changes: data and policies arrive as two events.
    pub(super) ends: VecDeque<String>,
}

/// `None` once the agent closed the connection. The hub drops its side on close or restart.
pub(super) type Wire = Arc<Mutex<Option<UnderWay>>>;

impl Streams {
    pub(super) fn open(
        &mut self,
        part: &Bundle,
        client: (&'static str, &'static str),
        applied: Revision,
    ) -> Wire {
        let wire = Wire::default();
        *wire.lock().unwrap() = Some(UnderWay::default());
        let ((name, namespace), head) = (client, part.head());
        self.0.push(Stream { id: part.id, name, namespace, head, applied, wire: Arc::clone(&wire) });
        wire
    }

    /// Advances the streams to the head, except if the client `stalls`. Returns the number of streams older than the
    /// history.
    pub(super) fn write(&mut self, mut stalls: impl FnMut() -> bool) -> usize {
        let mut behind = 0;
        self.0.retain_mut(|stream| {
            let mut wire = stream.wire.lock().unwrap();
            let Some(under_way) = wire.as_mut() else { return false };
            // A stalled client keeps its position.
            if !under_way.bytes.is_empty() && stalls() {
                return true;
            }
            let is_over = stream.head.has_changed().is_err();
            let Some(head) = stream.head.borrow().clone() else { return !is_over };
            match head.next(stream.applied) {
                CatchUp::UpToDate => {}
                CatchUp::Frame(frames) => {
                    under_way.bytes.extend(&frames[..]);
                    under_way.ends.push_back(head.view.revision.to_string());
                    stream.applied = head.view.revision;
                }
                // Bytes in transit still arrive.
                CatchUp::TooOld => {
                    behind += 1;
                    return false;
                }
            }
            // The bundle was replaced.
            !is_over
        });
        behind
    }
}
