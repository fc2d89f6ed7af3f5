//! `GET /metrics` in OpenMetrics text. Values are read where they are kept, when somebody scrapes.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::Hub;
use crate::bundle::Part;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) async fn render(State(hub): State<Hub>) -> Response {
    let mut registry = Registry::with_prefix("opa_hub");
    registry.register_collector(Box::new(Scrape(hub)));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("written into memory");
    ([(CONTENT_TYPE, OPENMETRICS)], text).into_response()
}

type Sample<'a> = (Vec<(&'static str, &'a str)>, u64);

struct Scrape(Hub);

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl Collector for Scrape {
    fn encode(&self, mut out: DescriptorEncoder) -> fmt::Result {
        let hub = &self.0.0;
        let bundle = hub.bundle.name.as_str();
        let counters = &hub.bundle.counters;
        let one = |value: u64| vec![(vec![("bundle", bundle)], value)];
        let edition = hub.bundle.head().borrow().clone();
        let view = edition.as_ref().map(|edition| &edition.view);
        let parts = [Part::Whole, Part::Policy, Part::Data];
        let snapshots = parts.map(|part| {
            (vec![("bundle", bundle), ("part", part.name())], hub.snapshots[part as usize].load(Relaxed))
        });
        let feeds = hub.feeds.list();
        let by_feed = |value: fn(&crate::pipeline::FeedCounters) -> u64| {
            feeds.iter().map(|feed| (vec![("source", feed.name.as_str())], value(feed))).collect::<Vec<_>>()
        };

        let refused = hub
            .bundle
            .verdicts
            .with(|verdicts| verdicts.values().filter(|told| !told.verdict.faults.is_empty()).count() as u64);
        let gauges = [
            ("agents", "Streams that are open", one(hub.agents.load(Relaxed).unsigned_abs())),
            ("ready", "Whether every source has listed once", one(u64::from(view.is_some()))),
            ("entries", "Entries of the data", one(view.map_or(0, |view| view.entries() as u64))),
            ("modules", "Modules that are served", one(view.map_or(0, |view| view.modules.len() as u64))),
            ("json_bytes", "Bytes of the data as JSON", one(view.map_or(0, |view| view.json_bytes() as u64))),
            ("problems", "ConfigMaps and objects refused", one(hub.bundle.problems().len() as u64)),
            ("verdict_errors", "ConfigMaps whose newest content is refused", one(refused)),
            ("source_objects", "Objects that a source has", by_feed(|feed| feed.objects.load(Relaxed))),
        ];
        for (name, help, samples) in gauges {
            family(&mut out, name, help, MetricType::Gauge, &samples)?;
        }
        let counters = [
            (
                "source_events",
                "Objects that sources said exist, changed or are gone",
                by_feed(|feed| feed.events.load(Relaxed)),
            ),
            (
                "source_changes",
                "Replicated objects of which something that travels changed",
                by_feed(|feed| feed.changes.load(Relaxed)),
            ),
            ("view_changes", "Editions published", one(counters.view_changes.load(Relaxed))),
            (
                "frame_encodes",
                "Frames encoded, each for all agents at one revision",
                one(counters.frame_encodes.load(Relaxed)),
            ),
            ("snapshot_encodes", "Archives encoded", one(counters.snapshot_encodes.load(Relaxed))),
            ("snapshots_served", "Archives sent", snapshots.to_vec()),
            ("native_deltas_served", "OPA's own deltas sent", one(hub.native_deltas.load(Relaxed))),
            ("reconciles", "Reconcile requests answered", one(hub.reconciles.load(Relaxed))),
            ("reconcile_encodes", "Reconcile answers encoded", one(counters.reconcile_encodes.load(Relaxed))),
            (
                "verdict_writes",
                "Verdicts to be written to ConfigMaps",
                one(counters.verdict_writes.load(Relaxed)),
            ),
            (
                "unknown_revisions",
                "Streams refused for a revision that is not remembered",
                one(hub.unknown_revisions.load(Relaxed)),
            ),
        ];
        for (name, help, samples) in counters {
            family(&mut out, name, help, MetricType::Counter, &samples)?;
        }
        Ok(())
    }
}

fn family(
    out: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    kind: MetricType,
    samples: &[Sample],
) -> fmt::Result {
    let mut family = out.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in samples {
        let sample = family.encode_family(labels)?;
        match kind {
            MetricType::Counter => ConstCounter::new(*value).encode(sample)?,
            _ => ConstGauge::new(i64::try_from(*value).unwrap_or(i64::MAX)).encode(sample)?,
        }
    }
    Ok(())
}
