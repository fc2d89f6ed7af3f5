//! Frames: the events that lead a client to the newest view.

use std::collections::BTreeMap;

use opa_hub_proto::frame::{DELTA_EVENT, Delta, FRAME_BYTES_MAX, POLICY_EVENT, Policy, write_event};
use opa_hub_proto::patch::{PATCH_OPS_MAX, PatchWriter};
use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::{Bounds, Position};
use opa_hub_proto::revision::{Digest, Revision};
use serde_json::value::RawValue;

use crate::snapshot::history::{ChangesSince, History};
use crate::snapshot::{Snapshot, edit, within};

/// Maximum keys and edit operations of a frame: an agent applies one PATCH.
const EDIT_OPS_MAX: usize = PATCH_OPS_MAX / 2;

/// Encodes data, then the modules that may read it. `None` if the client must reconcile: unknown revision, events too
/// large, or fields removed that its modules read (I10).
pub(crate) fn encode(view: &Snapshot, log: &History, bounds: &Bounds, from: Revision) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut reached = from;
    if reached.data != view.revision.data {
        let since = log.data_since(reached.data)?;
        if since.narrows && reached.modules != view.revision.modules {
            return None;
        }
        let json = delta(view, &since, bounds, reached.data)?;
        reached.data = view.revision.data;
        write_event(&mut out, reached, DELTA_EVENT, &json);
    }
    if reached.modules != view.revision.modules {
        let json = policy(view, &log.modules_since(reached.modules)?, bounds, reached.modules);
        reached.modules = view.revision.modules;
        write_event(&mut out, reached, POLICY_EVENT, &json);
    }
    (out.len() <= FRAME_BYTES_MAX).then_some(out)
}

fn delta(view: &Snapshot, since: &ChangesSince, bounds: &Bounds, from: Digest) -> Option<Vec<u8>> {
    let mut patch = PatchWriter::default();
    let mut ensure = Vec::new();
    let mut digests = BTreeMap::new();
    let keys: usize = since.dirs.values().map(|(_, keys)| keys.len()).sum();
    let mut edit_ops = EDIT_OPS_MAX.saturating_sub(keys);
    // Removes first, inner directories before outer ones: new ones may be above or below.
    for (path, _) in
        since.dirs.iter().rev().filter(|(path, (existed, _))| *existed && !view.dirs.contains_key(*path))
    {
        let has_inner = within(&view.dirs, path).next().is_some();
        if has_inner || view.ensure.contains(path) {
            patch.add_dir(path, b"{}");
        } else {
            patch.remove_dir(path);
        }
    }
    for (path, (existed, keys)) in &since.dirs {
        match (existed, view.dirs.get(path)) {
            (false, None) => continue,
            (true, None) => {}
            (existed, Some(dir)) => {
                let edits = keys.iter().filter_map(|(key, since)| {
                    let ops = edit::merge(since.edits.as_deref()?, &dir.get(key)?.value)?;
                    edit_ops = edit_ops.checked_sub(ops.len())?;
                    Some((key, ops))
                });
                let edits: BTreeMap<_, _> = edits.collect();
                let differs = |key: &str, existed: bool| existed || dir.get(key).is_some();
                let whole = keys.iter().filter(|(key, _)| !edits.contains_key(key));
                let ops = whole.filter(|(key, since)| differs(key, since.existed)).count();
                if !existed && enclosing(view, path).is_none() {
                    ensure.push(path.clone());
                }
                // Cheaper than many operations, for OPA and the wire.
                if !existed || ops * 2 > dir.len() {
                    if patch.len() + dir.json_bytes() > FRAME_BYTES_MAX {
                        return None;
                    }
                    let mut json = Vec::with_capacity(dir.json_bytes());
                    dir.write_json(&mut json);
                    patch.add_dir(path, &json);
                } else {
                    for (key, since) in keys {
                        match (edits.get(key), dir.get(key)) {
                            (Some(ops), _) => ops.iter().for_each(|(below, value)| {
                                patch.member(path, key, below, value.map(str::as_bytes));
                            }),
                            (None, Some(entry)) => patch.add(path, key, &entry.value),
                            (None, None) if since.existed => patch.remove(path, key),
                            (None, None) => {}
                        }
                    }
                }
            }
        }
        digests.insert(path.clone(), view.dirs.get(path).map(|dir| dir.digest));
        if patch.len() > FRAME_BYTES_MAX {
            return None;
        }
    }
    let ops = patch.ops();
    let patch = String::from_utf8(patch.into_array()).expect("JSON values are UTF-8");
    let patch = RawValue::from_string(patch).expect("operations are written as JSON");
    let (to, narrows) = (view.revision.data, since.narrows);
    let (position, newest) = position_and_newest(bounds);
    let delta = Delta { from, to, position, newest, ensure, dirs: digests, narrows, ops, patch: &patch };
    Some(serde_json::to_vec(&delta).expect("a frame has text keys only"))
}

fn position_and_newest(Bounds { all, newest }: &Bounds) -> (Position, Option<Position>) {
    (all.clone(), (newest != all).then(|| newest.clone()))
}

pub(super) fn enclosing<'a>(view: &'a Snapshot, dir: &DirPath) -> Option<&'a DirPath> {
    view.ensure.iter().find(|prefix| dir.is_within(prefix))
}

fn policy(view: &Snapshot, ids: &[&str], bounds: &Bounds, from: Digest) -> Vec<u8> {
    let reads = view.reads.as_deref().map(str::to_owned);
    let (put, remove) = (BTreeMap::new(), Vec::new());
    let (position, newest) = position_and_newest(bounds);
    let mut policy = Policy { from, to: view.revision.modules, position, newest, put, remove, reads };
    for id in ids {
        match view.modules.get(*id) {
            Some(module) => _ = policy.put.insert((*id).to_owned(), module.text.clone()),
            None => policy.remove.push((*id).to_owned()),
        }
    }
    serde_json::to_vec(&policy).expect("a frame has text keys only")
}
