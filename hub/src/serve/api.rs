//! `/v1/bundles`: bundles as JSON.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::bundle::watches::WatchStatus;
use crate::fields::cost;
use crate::model::Problem;
use crate::serve::Hub;
use crate::serve::error::Error;

pub(super) async fn list(State(hub): State<Hub>) -> Json<Value> {
    let (pending, mut problems) = (hub.0.readiness.pendings(), hub.0.readiness.problems());
    let listed = hub.0.bundles.list();
    let bundles: Vec<_> = listed.iter().map(|bundle| summary(&hub, bundle, &pending, &problems)).collect();
    for bundle in &listed {
        let range = problem_range(&bundle.name, &problems);
        problems.drain(range);
    }
    let notices = hub.0.readiness.notices();
    Json(json!({ "bundles": bundles, "pending": pending, "problems": problems, "notices": notices }))
}

pub(super) async fn show(State(hub): State<Hub>, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let bundle = hub.bundle(&name)?;
    let mut shown = summary(&hub, &bundle, &hub.0.readiness.pendings(), &hub.0.readiness.problems());
    shown["verdicts"] = bundle.verdicts.with(|verdicts| {
        verdicts.iter().map(|(key, observed)| (key.to_string(), observed.verdict.status())).collect()
    });
    if let Some(edition) = bundle.head().borrow().clone() {
        let view = &edition.view;
        let directories = view.dirs.iter().map(|(path, dir)| {
            json!({ "path": path, "entries": dir.len(), "jsonBytes": dir.json_bytes(), "digest": dir.digest })
        });
        shown["directories"] = directories.collect();
        let modules = view.modules.iter().map(|(id, module)| {
            json!({ "id": id, "package": module.package(), "bytes": module.text.len(), "digest": module.digest })
        });
        shown["modules"] = modules.collect();
    }
    Ok(Json(shown))
}

pub(super) async fn fields(State(hub): State<Hub>, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let bundle = hub.bundle(&name)?;
    let follows = bundle.reading().reads.is_some();
    // Forecasts copy all objects.
    let permit = Arc::clone(&hub.0.forecasts).acquire_owned().await.expect("the semaphore is never closed");
    let forecast = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        bundle.forecast()
    });
    let resources = forecast.await.expect("a forecast does not panic");
    let analyser = follows.then(|| hub.0.checked_by.clone());
    Ok(Json(
        json!({ "name": name, "followPolicies": follows, "analysedBy": analyser, "resources": resources }),
    ))
}

/// Prefix of a bundle's entries in `Health`, except the bundle of the flags.
fn prefix(bundle: &str) -> String {
    format!("bundle {bundle}: ")
}

/// `problems` is sorted by subject.
fn problem_range(bundle: &str, problems: &[Problem]) -> Range<usize> {
    let prefix = prefix(bundle);
    let first = problems.partition_point(|problem| problem.subject < prefix);
    let count = problems[first..].partition_point(|problem| problem.subject.starts_with(&prefix));
    first..first + count
}

/// Includes those of the bundle's watches.
fn pending_of<'a>(
    bundle: &str,
    feeds: &[Arc<WatchStatus>],
    pending: &'a BTreeMap<String, String>,
) -> BTreeMap<&'a String, &'a String> {
    let prefix = prefix(bundle);
    let entries = pending.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix));
    entries.chain(feeds.iter().filter_map(|feed| pending.get_key_value(&feed.name))).collect()
}

fn summary(hub: &Hub, bundle: &Bundle, pending: &BTreeMap<String, String>, problems: &[Problem]) -> Value {
    let hub = &hub.0;
    let feeds = bundle.feeds.list();
    let sources = feeds.iter().map(|feed| {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (objects, events) = (load(&feed.watch.objects), load(&feed.watch.events));
        json!({ "name": feed.name, "objects": objects, "events": events, "changes": load(&feed.changes) })
    });
    let rejected = bundle.problems();
    let problems: Vec<_> =
        problems[problem_range(&bundle.name, problems)].iter().chain(rejected.iter()).collect();
    let mut summary = json!({
        "name": bundle.name,
        "ready": false,
        "agents": bundle.counters.agents.load(Ordering::Relaxed),
        "sources": sources.collect::<Value>(),
        "pending": pending_of(&bundle.name, &feeds, pending),
        "stale": bundle.feeds.stale().map(|stale| stale.to_string()),
        "problems": problems,
        "checkedBy": hub.checked_by,
    });
    if let Some(scopes) = &bundle.scopes {
        summary["namespaces"] = json!(scopes.namespaces());
    }
    if let Some(edition) = bundle.head().borrow().as_ref() {
        let view = &edition.view;
        let published = edition.published.duration_since(UNIX_EPOCH).unwrap_or_default();
        summary["ready"] = json!(true);
        summary["revision"] = json!(view.revision);
        summary["position"] = json!(bundle.position());
        summary["publishedUnixSeconds"] = json!(published.as_secs_f64());
        summary["counts"] = json!({
            "modules": view.modules.len(),
            "directories": view.dirs.len(),
            "entries": view.entries(),
            "jsonBytes": view.json_bytes(),
            "opaBytes": cost::opa_bytes(view.json_bytes(), view.entries()),
        });
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundle_summary_has_only_its_own_problems() {
        let subjects = ["Bundle a", "bundle a: policies", "bundle a: v1/pods", "bundle ab: policies", "opa"];
        let problem = |subject: &&str| Problem { subject: (*subject).to_owned(), message: String::new() };
        let problems: Vec<_> = subjects.iter().map(problem).collect();
        let pending: BTreeMap<_, _> =
            subjects.iter().map(|name| ((*name).to_owned(), "not listed yet".to_owned())).collect();
        for (bundle, expected) in [
            ("a", &["bundle a: policies", "bundle a: v1/pods"][..]),
            ("ab", &["bundle ab: policies"]),
            ("main", &[]),
        ] {
            let shown =
                problems[problem_range(bundle, &problems)].iter().map(|problem| problem.subject.as_str());
            assert_eq!(shown.collect::<Vec<_>>(), expected);
            assert_eq!(pending_of(bundle, &[], &pending).into_keys().collect::<Vec<_>>(), expected);
        }
    }
}
