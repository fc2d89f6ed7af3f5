//! The hub's own account of its memory: every cache and queue, in bytes.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::time::Instant;

use crate::bundles::Bundles;

/// Resident bytes of an idle stream beside the kernel's buffers: `opa-hub-loadtest fanout` measures them.
const STREAM_BYTES: usize = 1100;

/// Resident bytes that were no file's before the hub began to work.
static START_BYTES: OnceLock<usize> = OnceLock::new();

/// Notes the resident memory of a program that has not begun to work.
pub fn note_start() {
    START_BYTES.get_or_init(|| resident().map_or(0, |resident| resident.all - resident.files));
}

/// Minimum time between two accounts: each looks at every object under the store's lock.
const ACCOUNT_INTERVAL: Duration = Duration::from_secs(5);

/// The last account, which scrapes within a while share.
#[derive(Default)]
pub(super) struct Account(tokio::sync::Mutex<Option<(Instant, Bytes)>>);

/// Bytes by what takes them.
pub(super) type Bytes = BTreeMap<&'static str, usize>;

impl Account {
    /// Counts, or returns what was counted lately.
    pub(super) async fn get(&self, bundles: &Arc<Bundles>) -> Bytes {
        let mut last = self.0.lock().await;
        if let Some((at, bytes)) = &*last
            && at.elapsed() < ACCOUNT_INTERVAL
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

fn account(bundles: &Bundles) -> Bytes {
    let program = START_BYTES.get().copied().unwrap_or_default();
    let mut bytes = BTreeMap::from([("program", program + resident().map_or(0, |resident| resident.files))]);
    let mut add = |what, more| *bytes.entry(what).or_default() += more;
    if let Some(store) = bundles.store.get() {
        let (objects, queues) = store.memory();
        add("objects", objects);
        add("queues", queues);
    }
    for bundle in bundles.list() {
        bundle.memory().into_iter().for_each(|(what, more)| add(what, more));
        let streams = usize::try_from(bundle.counters.agents.load(Relaxed)).unwrap_or_default();
        add("streams", streams * STREAM_BYTES);
    }
    bytes
}

/// Resident bytes of the process.
pub(super) struct Resident {
    /// All of them.
    pub(super) all: usize,
    /// Those that belong to files: the program's text, mostly.
    files: usize,
}

/// Resident bytes of the process (proc_pid_statm(5)); `None` where there is no such file.
pub(super) fn resident() -> Option<Resident> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = statm.split(' ').skip(1).map_while(|pages| pages.parse::<usize>().ok());
    Some(Resident { all: pages.next()? * PAGE_BYTES, files: pages.next()? * PAGE_BYTES })
}

/// Bytes of a page: x86-64 and arm64 with Linux's default.
const PAGE_BYTES: usize = 4096;
