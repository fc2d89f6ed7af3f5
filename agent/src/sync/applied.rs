//! Content of OPA.

use opa_hub_proto::revision::{Digest, Revision};

use crate::opa::{Marker, ModuleChanges};

pub(super) struct AppliedState {
    pub(super) marker: Marker,
    /// The hub's modules. The marker differs while OPA rejects some.
    pub(super) modules: Digest,
    /// Rejected by OPA.
    pub(super) rejected: ModuleChanges,
}

impl AppliedState {
    pub(super) fn revision(&self) -> Revision {
        Revision { modules: self.modules, data: self.marker.data_digest() }
    }
}

/// Usable part of OPA's marker until a repair.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum MarkerTrust {
    Full,
    /// Not the revision: an event did not fit.
    Digests,
    /// No digests: OPA lacked content.
    Names,
}

impl MarkerTrust {
    /// Removes untrusted content.
    pub(super) fn restrict(self, marker: &mut Marker) {
        if self != Self::Full {
            marker.revision = None;
        }
        if self == Self::Names {
            marker.dirs.values_mut().for_each(|digest| *digest = None);
            marker.modules.values_mut().for_each(|digest| *digest = None);
        }
    }
}
