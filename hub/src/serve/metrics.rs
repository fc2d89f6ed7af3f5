//! `GET /metrics` in OpenMetrics text. Values are read where they are kept, when somebody scrapes.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
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
use super::memory::{self, resident};
use crate::bundle::feeds::Feed;
use crate::bundle::view::View;
use crate::bundle::{Bundle, Counters, Part};
use crate::policy::verdict::Told;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) async fn render(State(hub): State<Hub>) -> Response {
    let mut registry = Registry::with_prefix("opa_hub");
    let memory = hub.0.memory.get(&hub.0.bundles).await;
    registry.register_collector(Box::new(Scrape(hub, memory)));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("written into memory");
    ([(CONTENT_TYPE, OPENMETRICS)], text).into_response()
}

type Sample = (Vec<(&'static str, String)>, u64);

struct Scrape(Hub, memory::Bytes);

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

/// Every family, as read from the bundles.
struct Families<'a>(&'a [Arc<Bundle>]);

impl Families<'_> {
    /// One sample a bundle.
    fn one(&self, value: impl Fn(&Bundle) -> u64) -> Vec<Sample> {
        self.0.iter().map(|bundle| (vec![("bundle", bundle.name.clone())], value(bundle))).collect()
    }

    /// The same of what it counts.
    fn count(&self, value: impl Fn(&Counters) -> &AtomicU64) -> Vec<Sample> {
        self.one(|bundle| value(&bundle.counters).load(Relaxed))
    }

    /// The same of its newest view; 0 while there is none.
    fn view(&self, value: impl Fn(&View) -> usize) -> Vec<Sample> {
        self.one(|bundle| bundle.head().borrow().as_ref().map_or(0, |edition| value(&edition.view)) as u64)
    }

    /// One sample a feed of a bundle.
    fn by_feed(&self, value: impl Fn(&Feed) -> &AtomicU64) -> Vec<Sample> {
        let of = |bundle: &Arc<Bundle>| {
            let name = &bundle.name;
            let feeds = bundle.feeds.list();
            let sample = |feed: &Arc<Feed>| {
                let labels = vec![("bundle", name.clone()), ("source", feed.name.clone())];
                (labels, value(feed).load(Relaxed))
            };
            feeds.iter().map(sample).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(of).collect()
    }

    fn snapshots(&self) -> Vec<Sample> {
        let of = |bundle: &Arc<Bundle>| {
            [Part::Whole, Part::Policy, Part::Data].map(|part| {
                let labels = vec![("bundle", bundle.name.clone()), ("part", part.name().to_owned())];
                (labels, bundle.counters.snapshots[part as usize].load(Relaxed))
            })
        };
        self.0.iter().flat_map(of).collect()
    }
}

fn refused(bundle: &Bundle) -> u64 {
    let refused = |told: &&Told| !told.verdict.faults.is_empty();
    bundle.verdicts.with(|verdicts| verdicts.values().filter(refused).count() as u64)
}

impl Collector for Scrape {
    fn encode(&self, mut out: DescriptorEncoder) -> fmt::Result {
        let hub = &self.0.0;
        let bundles = hub.bundles.list();
        let of = Families(&bundles);
        let gauges = [
            (
                "agents",
                "Streams that are open",
                of.one(|bundle| bundle.counters.agents.load(Relaxed).unsigned_abs()),
            ),
            (
                "ready",
                "Whether every source has listed once",
                of.one(|bundle| u64::from(bundle.head().borrow().is_some())),
            ),
            (
                "stale",
                "Whether a source was not heard for too long",
                of.one(|bundle| u64::from(bundle.feeds.stale().is_some())),
            ),
            ("entries", "Entries of the data", of.view(View::entries)),
            ("modules", "Modules that are served", of.view(|view| view.modules.len())),
            ("json_bytes", "Bytes of the data as JSON", of.view(View::json_bytes)),
            ("problems", "ConfigMaps and objects refused", of.one(|bundle| bundle.problems().len() as u64)),
            ("verdict_errors", "ConfigMaps whose newest content is refused", of.one(refused)),
            ("source_objects", "Objects that a source has", of.by_feed(|feed| &feed.watch.objects)),
        ];
        let of_memory =
            self.1.iter().map(|(what, bytes)| (vec![("what", (*what).to_owned())], *bytes as u64));
        let gauges = gauges.into_iter().chain([
            ("memory_bytes", "Bytes by what takes them, as the hub counts them", of_memory.collect()),
            (
                "resident_memory_bytes",
                "Resident bytes of the process",
                resident().map(|resident| (Vec::new(), resident.all as u64)).into_iter().collect(),
            ),
        ]);
        for (name, help, samples) in gauges {
            family(&mut out, name, help, MetricType::Gauge, &samples)?;
        }
        let counters = [
            (
                "source_events",
                "Objects that sources said exist, changed or are gone",
                of.by_feed(|feed| &feed.watch.events),
            ),
            (
                "source_changes",
                "Replicated objects of which something that travels changed",
                of.by_feed(|feed| &feed.changes),
            ),
            ("view_changes", "Editions published", of.count(|counters| &counters.view_changes)),
            (
                "frame_encodes",
                "Frames encoded, each for all agents at one revision",
                of.count(|counters| &counters.frame_encodes),
            ),
            ("snapshot_encodes", "Archives encoded", of.count(|counters| &counters.snapshot_encodes)),
            ("snapshots_served", "Archives sent", of.snapshots()),
            ("native_deltas_served", "OPA's own deltas sent", of.count(|counters| &counters.native_deltas)),
            ("reconciles", "Reconcile requests answered", of.count(|counters| &counters.reconciles)),
            (
                "reconcile_encodes",
                "Reconcile answers encoded",
                of.count(|counters| &counters.reconcile_encodes),
            ),
            (
                "verdict_writes",
                "Verdicts to be written to ConfigMaps",
                vec![(Vec::new(), hub.bundles.verdict_writes.load(Relaxed))],
            ),
            (
                "unknown_revisions",
                "Streams refused for a revision that is not remembered",
                of.count(|counters| &counters.unknown_revisions),
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
