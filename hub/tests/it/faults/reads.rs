//! Reads of the fault test's policies. Policies declare them in lines such as `# reads services` or
//! `# reads pods metadata.labels.app`; a path that ends with `!` reads the whole subtree.

use std::collections::BTreeSet;

use opa_hub::policy::dataflow::{Place, ReadDepth, ReadSet, Segment};
use serde_json::Value;

use super::source::ALWAYS;
use crate::fold::AppliedState;

pub(super) const READS: &str = "# reads ";
pub(super) const READABLE: [&str; 9] = [
    "jobs",
    "services",
    "services",
    "pods !",
    "pods metadata.labels.!",
    "pods metadata.labels.app",
    "pods spec",
    "pods spec.image",
    "pods spec.size.cpu",
];
/// Fields of every pod.
const LEAVES: [&str; 8] = [
    "kind",
    "metadata.labels.app",
    "metadata.labels.tier",
    "padding",
    "round",
    "spec.image",
    "spec.size.cpu",
    "text",
];

/// Returns the distinct read lines of these modules.
pub(super) fn lines<'a>(texts: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
    texts.flat_map(str::lines).filter_map(|line| line.strip_prefix(READS)).collect()
}

/// Returns the pod paths of `lines`.
pub(super) fn paths<'a>(lines: &BTreeSet<&'a str>) -> Vec<Vec<&'a str>> {
    let paths = lines.iter().filter_map(|line| line.strip_prefix("pods "));
    paths.map(|path| path.split('.').collect()).collect()
}

/// Returns `lines` as the hub's analysis would.
pub(super) fn analyzed(lines: &BTreeSet<&str>) -> ReadSet {
    let places = paths(lines).into_iter().flat_map(|path| {
        let pods = ["kubernetes", "pods", "*", "*"];
        let steps: Vec<_> = pods.into_iter().chain(path).collect();
        (1..=steps.len()).map(move |length| place(&steps[..length])).collect::<Vec<_>>()
    });
    ReadSet::of(places, &[])
}

fn place(path: &[&str]) -> (Place, ReadDepth) {
    let (path, extent) = match path.split_last() {
        Some((&"!", above)) => (above, ReadDepth::Whole),
        _ => (path, ReadDepth::Shallow),
    };
    let step = |name: &&str| if *name == "*" { Segment::Wildcard } else { Segment::Key((*name).into()) };
    (path.iter().map(step).collect(), extent)
}

/// Prunes `value` to these paths: scalars, emptied containers, and whole subtrees for `!`.
pub(super) fn cut(value: &Value, paths: &[Vec<&str>]) -> Value {
    if paths.iter().any(|path| path.first() == Some(&"!")) {
        return value.clone();
    }
    let Value::Object(members) = value else { return value.clone() };
    let below = |name: &str| {
        let paths = paths.iter().filter(|path| path.first() == Some(&name));
        paths.map(|path| path[1..].to_vec()).collect::<Vec<_>>()
    };
    let pruned = members.iter().map(|(name, value)| (name, value, below(name)));
    let pruned = pruned.filter(|(_, _, paths)| !paths.is_empty());
    Value::Object(pruned.map(|(name, value, paths)| (name.clone(), cut(value, &paths))).collect())
}

/// I10: every pod has all fields that the modules read.
pub(super) fn i10(applied: &AppliedState) {
    let paths = paths(&lines(applied.modules.values().map(String::as_str)));
    let namespaces = applied.data.pointer("/kubernetes/pods").and_then(Value::as_object);
    for (namespace, pods) in namespaces.into_iter().flatten() {
        for (name, pod) in pods.as_object().into_iter().flatten() {
            for path in &paths {
                let missing = missing(pod, path);
                assert_eq!(missing, None, "I10: {namespace}/{name} is {pod}, policies read {path:?}");
            }
        }
    }
}

/// I10: resources that the modules read are present. Between the halves of a reconcile response, resources of older
/// modules may be missing.
pub(super) fn i10_auto(applied: &AppliedState) {
    let lines = lines(applied.modules.values().map(String::as_str));
    let [namespace, name] = ALWAYS;
    let service = applied.data.pointer(&format!("/kubernetes/services/{namespace}/{name}"));
    assert!(service.is_some() || !lines.contains("services"), "I10: policies read services, none exist");
}

/// Returns the first required field below `path` that is missing.
fn missing(pod: &Value, path: &[&str]) -> Option<String> {
    let needed: Vec<String> = match path.split_last() {
        Some((&"!", above)) => {
            let is_below = |leaf: &str| leaf.split('.').take(above.len()).eq(above.iter().copied());
            LEAVES.into_iter().filter(|leaf| is_below(leaf)).map(str::to_owned).collect()
        }
        _ => vec![path.join(".")],
    };
    needed.into_iter().find(|path| pod.pointer(&format!("/{}", path.replace('.', "/"))).is_none())
}
