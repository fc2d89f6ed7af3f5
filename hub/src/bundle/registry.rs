//! Bundles by name.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use tokio::sync::Notify;

use crate::bundle::Bundle;
use crate::store::Store;

/// Served bundles, by name.
#[derive(Default)]
pub struct BundleRegistry {
    served: RwLock<BTreeMap<String, Arc<Bundle>>>,
    /// Watched objects, set at startup.
    pub store: OnceLock<Arc<Store>>,
    /// Notified of new verdicts.
    pub verdicts: Arc<Notify>,
    /// Attempted verdict writes.
    pub verdict_writes: AtomicU64,
}

impl BundleRegistry {
    /// Returns a bundle.
    pub fn get(&self, name: &str) -> Option<Arc<Bundle>> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Returns all bundles by name.
    pub fn list(&self) -> Vec<Arc<Bundle>> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Adds or replaces a bundle.
    pub fn serve(&self, bundle: Arc<Bundle>) {
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        served.insert(bundle.name.clone(), bundle);
    }

    /// Removes a bundle and ends its streams.
    pub fn withdraw(&self, name: &str) {
        self.served.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}
