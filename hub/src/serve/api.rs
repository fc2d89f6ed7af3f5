//! `/v1/bundles`: what is served, for people and scripts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::Hub;
use super::error::Error;
use crate::bundle::{Bundle, forecast};

pub(super) async fn list(State(hub): State<Hub>) -> Json<Value> {
    let bundles: Vec<_> = hub.0.bundles.list().iter().map(|bundle| summary(&hub, bundle)).collect();
    Json(
        json!({ "bundles": bundles, "pending": hub.0.readiness.pendings(), "problems": hub.0.readiness.problems() }),
    )
}

pub(super) async fn show(State(hub): State<Hub>, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let bundle = hub.bundle(&name)?;
    let mut shown = summary(&hub, &bundle);
    shown["verdicts"] = bundle.verdicts.with(|verdicts| {
        verdicts.iter().map(|(key, told)| (key.to_string(), told.verdict.status())).collect()
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

/// What replicated objects cost, and who reads what of them.
pub(super) async fn fields(State(hub): State<Hub>, Path(name): Path<String>) -> Result<Json<Value>, Error> {
    let bundle = hub.bundle(&name)?;
    let follows = bundle.reading().reads.is_some();
    // Weighs thousands of objects.
    let forecast = tokio::task::spawn_blocking(move || bundle.forecast());
    let resources = forecast.await.expect("weighing does not panic");
    let by = follows.then(|| hub.0.checked_by.clone());
    Ok(Json(json!({ "name": name, "followPolicies": follows, "analysedBy": by, "resources": resources })))
}

fn summary(hub: &Hub, bundle: &Bundle) -> Value {
    let hub = &hub.0;
    let feeds = bundle.feeds.list();
    let feeds = feeds.iter().map(|feed| {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (objects, events) = (load(&feed.watch.objects), load(&feed.watch.events));
        json!({ "name": feed.name, "objects": objects, "events": events, "changes": load(&feed.changes) })
    });
    let mut problems = hub.readiness.problems();
    problems.extend(bundle.problems().iter().cloned());
    let mut summary = json!({
        "name": bundle.name,
        "ready": false,
        "agents": bundle.counters.agents.load(Ordering::Relaxed),
        "sources": feeds.collect::<Value>(),
        "pending": hub.readiness.pendings(),
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
            "opaBytes": forecast::opa_bytes(view.json_bytes(), view.entries()),
        });
    }
    summary
}
