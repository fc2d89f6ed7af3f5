//! The hub's own account of its memory: every cache and queue, in bytes.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::Relaxed;

use crate::bundles::Bundles;

/// Resident bytes of an idle stream beside the kernel's buffers: `opa-hub-loadtest fanout` measures them.
const STREAM_BYTES: usize = 1100;

/// Resident bytes that were no file's before the hub began to work.
static START_BYTES: OnceLock<usize> = OnceLock::new();

/// Notes the resident memory of a program that has not begun to work.
pub fn note_start() {
    START_BYTES.get_or_init(|| resident().map_or(0, |resident| resident.all - resident.files));
}

/// Bytes by what takes them.
pub(super) fn account(bundles: &Bundles) -> BTreeMap<&'static str, usize> {
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
