//! Memory of the hub's caches and queues.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;

use crate::bundle::registry::BundleRegistry;

/// Without kernel buffers; measured by `opa-hub-loadtest fanout`.
const STREAM_BYTES: usize = 1100;

/// Resident bytes at startup, without file pages.
static START_BYTES: OnceLock<usize> = OnceLock::new();

/// Records resident memory at startup.
pub fn note_start() {
    START_BYTES.get_or_init(|| resident().map_or(0, |resident| resident.all - resident.files));
}

/// A count visits every object under the store's lock.
const ACCOUNT_INTERVAL: Duration = Duration::from_secs(5);

/// The last count, shared by scrapes.
#[derive(Default)]
pub(super) struct Account(tokio::sync::Mutex<Option<(Instant, Bytes)>>);

pub(super) type Bytes = BTreeMap<&'static str, usize>;

impl Account {
    pub(super) async fn get(&self, bundles: &Arc<BundleRegistry>) -> Bytes {
        let mut last = self.0.lock().await;
        if let Some((counted_at, bytes)) = &*last
            && counted_at.elapsed() < ACCOUNT_INTERVAL
        {
            return bytes.clone();
        }
        let bundles = Arc::clone(bundles);
        let counted = tokio::task::spawn_blocking(move || account(&bundles)).await;
        let bytes = counted.expect("counting does not panic");
        *last = Some((Instant::now(), bytes.clone()));
        bytes
    }
}

fn account(bundles: &BundleRegistry) -> Bytes {
    let program = START_BYTES.get().copied().unwrap_or_default();
    let mut bytes = BTreeMap::from([("program", program + resident().map_or(0, |resident| resident.files))]);
    let mut add = |kind, more| *bytes.entry(kind).or_default() += more;
    if let Some(store) = bundles.store.get() {
        let (objects, queues) = store.memory();
        add("objects", objects);
        add("queues", queues);
    }
    for bundle in bundles.list() {
        bundle.memory().into_iter().for_each(|(kind, more)| add(kind, more));
        let streams = usize::try_from(bundle.counters.agents.load(Relaxed)).unwrap_or_default();
        add("streams", streams * STREAM_BYTES);
    }
    bytes
}

pub(super) struct Resident {
    pub(super) all: usize,
    /// Mostly the program's text.
    files: usize,
}

/// See proc_pid_statm(5). `None` without procfs.
pub(super) fn resident() -> Option<Resident> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = statm.split(' ').skip(1).map_while(|pages| pages.parse::<usize>().ok());
    Some(Resident { all: pages.next()? * PAGE_BYTES, files: pages.next()? * PAGE_BYTES })
}

/// Linux default on x86-64 and arm64.
const PAGE_BYTES: usize = 4096;
