//! Packages next to replicated data, which make OPA slow.
//!
//! After each write OPA looks whether rules and data collide. For that it copies all data below the first name of a
//! package that data shares (OPA v1/storage/inmem/txn.go): with thousands of objects a change takes seconds. With
//! policies as bundles OPA can be told that there is nothing to look at (`local`); with `rest` the agent can only warn.

use std::collections::{BTreeMap, BTreeSet};

use opa_hub_proto::path::DirPath;

use crate::marker::Marker;
use crate::opa::Opa;

/// First names of the packages in OPA, by the ids of their modules.
#[derive(Default)]
pub struct Layout(BTreeMap<String, String>);

impl Layout {
    /// Records a module that OPA is given (`Some`) or loses (`None`).
    pub fn record(&mut self, id: &str, text: Option<&str>) {
        match text {
            Some(text) => self.0.insert(id.to_owned(), first_name(text).to_owned()),
            None => self.0.remove(id),
        };
    }

    /// Reads modules from OPA that an agent before this one gave it. A failure ends the reading: a warning is not worth a
    /// session.
    pub async fn read(&mut self, opa: &Opa, marker: &Marker) {
        for id in marker.modules.keys() {
            if self.0.contains_key(id) {
                continue;
            }
            let Ok(text) = opa.module(id).await else { return };
            self.record(id, Some(text.as_deref().unwrap_or_default()));
        }
    }

    /// The warning for the modules of `marker` next to its data; `None` where no name is shared.
    pub fn notice(&self, marker: &Marker) -> Option<String> {
        // A ConfigMap's directory has two names, and little data.
        let is_replicated = |path: &&str| path.split('/').count() > 2;
        let dirs = marker.dirs.keys().map(DirPath::relative).filter(is_replicated);
        let places = dirs.chain(marker.ensure.iter().map(DirPath::relative));
        let replicated: BTreeSet<_> = places.filter_map(|path| path.split('/').next()).collect();
        let packages = marker.modules.keys().filter_map(|id| self.0.get(id)).map(String::as_str);
        let shared: BTreeSet<_> = packages.filter(|name| replicated.contains(name)).collect();
        let shared: Vec<_> = shared.into_iter().map(|name| format!("data.{name}")).collect();
        (!shared.is_empty()).then(|| {
            format!(
                "OPA copies all of {} at every change of data, since packages and replicated data share the name: give \
                 --policy-delivery bundle and OPA the bundles of --help, or rename the packages",
                shared.join(", ")
            )
        })
    }
}

/// First name of the package that a module begins with; empty where it begins with none.
fn first_name(text: &str) -> &str {
    let code = text.trim_start_matches('\u{feff}').lines().filter_map(|line| line.split('#').next());
    let mut words = code.flat_map(str::split_whitespace);
    match (words.next(), words.next()) {
        (Some("package"), Some(name)) => name.split(['.', '[']).next().unwrap_or_default(),
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_names_are_read() {
        for (text, expected) in [
            ("package kubernetes.admission\n", "kubernetes"),
            ("\u{feff}# METADATA\n# title: a\n\npackage # here\n  shop\nallow := true\n", "shop"),
            ("package kubernetes[\"a b\"]", "kubernetes"),
            ("package", ""),
            ("import data.kubernetes", ""),
            ("", ""),
        ] {
            assert_eq!(first_name(text), expected, "{text:?}");
        }
    }

    #[test]
    fn packages_next_to_replicated_data_are_noticed() {
        for (package, dirs, ensure, is_noticed) in [
            ("kubernetes.admission", &["/kubernetes/nodes/x"][..], &["/kubernetes/nodes"][..], true),
            ("kubernetes.admission", &["/kubernetes/pods/shop"], &[], true),
            ("kubernetes.admission", &[], &["/kubernetes/nodes"], true),
            ("shop.orders", &["/kubernetes/pods/shop"], &["/kubernetes/pods"], false),
            ("shop.orders", &["/shop/roles"], &[], false),
            ("kubernetes.admission", &[], &[], false),
        ] {
            let mut layout = Layout::default();
            layout.record("shop/authz/a.rego", Some(&format!("package {package}")));
            let mut marker = Marker {
                dirs: dirs.iter().map(|dir| (dir.parse().unwrap(), None)).collect(),
                ensure: ensure.iter().map(|map| map.parse().unwrap()).collect(),
                ..Marker::default()
            };
            marker.modules.insert("shop/authz/a.rego".to_owned(), None);
            let notice = layout.notice(&marker);
            assert_eq!(notice.is_some(), is_noticed, "{package} {dirs:?} {ensure:?}: {notice:?}");
            layout.record("shop/authz/a.rego", None);
            assert_eq!(layout.notice(&marker), None);
        }
    }
}
