//! Content of OPA, as the marker and the hub describe it.

use opa_hub_proto::revision::{Digest, Revision};

use crate::opa::{Marker, ModuleChanges};

pub(super) struct AppliedState {
    pub(super) marker: Marker,
    /// Digest of the hub's modules. The marker has another one while OPA rejects some.
    pub(super) modules: Digest,
    /// Changes that OPA rejects.
    pub(super) rejected: ModuleChanges,
}

impl AppliedState {
    pub(super) fn revision(&self) -> Revision {
        Revision { modules: self.modules, data: self.marker.data_digest() }
    }
}

/// Part of OPA's marker that a session may use, until OPA was repaired.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum MarkerTrust {
    Full,
    /// Not the revision: an event did not fit.
    Digests,
    /// Only names: OPA lacked content that the agent wrote.
    Names,
}

impl MarkerTrust {
    /// Removes from `marker` what is not trusted.
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
