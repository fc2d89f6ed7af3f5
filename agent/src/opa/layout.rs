//! Warning about packages that make OPA slow.
//!
//! If a package and data share their first name, OPA copies all data below at each write (OPA v1/storage/inmem/txn.go).
//! Delivery as a bundle avoids this (`server/local.rs`).

use std::collections::{BTreeMap, BTreeSet};

use opa_hub_proto::path::DirPath;

use super::client::OpaClient;
use super::marker::Marker;

#[derive(Default)]
pub(crate) struct Layout(BTreeMap<String, String>);

impl Layout {
    /// Records an added or removed (`None`) module.
    pub(crate) fn record(&mut self, id: &str, text: Option<&str>) {
        match text {
            Some(text) => self.0.insert(id.to_owned(), first_name(text).to_owned()),
            None => self.0.remove(id),
        };
    }

    /// Stops at an error: a warning must not end a session.
    pub(crate) async fn read(&mut self, opa: &OpaClient, marker: &Marker) {
        for id in marker.modules.keys() {
            if self.0.contains_key(id) {
                continue;
            }
            let Ok(text) = opa.module(id).await else { return };
            self.record(id, Some(text.as_deref().unwrap_or_default()));
        }
    }

    pub(crate) fn notice(&self, marker: &Marker) -> Option<String> {
        // Directories of ConfigMaps have two segments, and little data.
        let is_replicated = |path: &&str| path.split('/').count() > 2;
        let dirs = marker.dirs.keys().map(DirPath::relative).filter(is_replicated);
        let paths = dirs.chain(marker.ensure.iter().map(DirPath::relative));
        let replicated: BTreeSet<_> = paths.filter_map(|path| path.split('/').next()).collect();
        let packages = marker.modules.keys().filter_map(|id| self.0.get(id)).map(String::as_str);
        let shared: BTreeSet<_> = packages.filter(|name| replicated.contains(name)).collect();
        let shared: Vec<_> = shared.into_iter().map(|name| format!("data.{name}")).collect();
        (!shared.is_empty()).then(|| {
            format!(
                "OPA copies {} at every change of data: packages and replicated data share the name; set \
                 --policy-delivery bundle and configure OPA as --help shows, or rename the packages",
                shared.join(", ")
            )
        })
    }
}

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
    fn first_names_are_parsed() {
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
    fn packages_next_to_replicated_data_cause_a_notice() {
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
