//! `GET /metrics` in OpenMetrics text, collected at each scrape.

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

use crate::bundle::watches::WatchStatus;
use crate::bundle::{Bundle, Counters};
use crate::policy::verdict::Told;
use crate::serve::Hub;
use crate::serve::memory::{self, resident};
use crate::snapshot::Snapshot;
use crate::snapshot::bundle_archive::ArchiveKind;

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

struct Samples<'a>(&'a [Arc<Bundle>]);

impl Samples<'_> {
    fn by_bundle(&self, value: impl Fn(&Bundle) -> u64) -> Vec<Sample> {
        self.0.iter().map(|bundle| (vec![("bundle", bundle.name.clone())], value(bundle))).collect()
    }

    fn counters(&self, value: impl Fn(&Counters) -> &AtomicU64) -> Vec<Sample> {
        self.by_bundle(|bundle| value(&bundle.counters).load(Relaxed))
    }

    /// 0 without a view.
    fn views(&self, value: impl Fn(&Snapshot) -> usize) -> Vec<Sample> {
        self.by_bundle(|bundle| {
            bundle.head().borrow().as_ref().map_or(0, |edition| value(&edition.view)) as u64
        })
    }

    fn by_feed(&self, value: impl Fn(&WatchStatus) -> &AtomicU64) -> Vec<Sample> {
        let samples = |bundle: &Arc<Bundle>| {
            let name = &bundle.name;
            let feeds = bundle.feeds.list();
            let sample = |feed: &Arc<WatchStatus>| {
                let labels = vec![("bundle", name.clone()), ("source", feed.name.clone())];
                (labels, value(feed).load(Relaxed))
            };
            feeds.iter().map(sample).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(samples).collect()
    }

    fn snapshots(&self) -> Vec<Sample> {
        let samples = |bundle: &Arc<Bundle>| {
            [ArchiveKind::Full, ArchiveKind::Policy, ArchiveKind::Data].map(|part| {
                let labels = vec![("bundle", bundle.name.clone()), ("part", part.name().to_owned())];
                (labels, bundle.counters.snapshots[part as usize].load(Relaxed))
            })
        };
        self.0.iter().flat_map(samples).collect()
    }
}

fn rejected_configmaps(bundle: &Bundle) -> u64 {
    let is_rejected = |observed: &&Told| !observed.verdict.faults.is_empty();
    bundle.verdicts.with(|verdicts| verdicts.values().filter(is_rejected).count() as u64)
}

impl Collector for Scrape {
    fn encode(&self, mut out: DescriptorEncoder) -> fmt::Result {
        let hub = &self.0.0;
        let bundles = hub.bundles.list();
        let samples = Samples(&bundles);
        let gauges = [
            (
                "agents",
                "Number of open streams",
                samples.by_bundle(|bundle| bundle.counters.agents.load(Relaxed).unsigned_abs()),
            ),
            (
                "ready",
                "Whether every resource has been listed",
                samples.by_bundle(|bundle| u64::from(bundle.head().borrow().is_some())),
            ),
            (
                "stale",
                "Whether a source has been unavailable for too long",
                samples.by_bundle(|bundle| u64::from(bundle.feeds.stale().is_some())),
            ),
            ("entries", "Number of data entries", samples.views(Snapshot::entries)),
            ("modules", "Number of modules served", samples.views(|view| view.modules.len())),
            ("json_bytes", "Number of data bytes as JSON", samples.views(Snapshot::json_bytes)),
            (
                "problems",
                "Number of rejected ConfigMaps and objects",
                samples.by_bundle(|bundle| bundle.problems().len() as u64),
            ),
            (
                "verdict_errors",
                "Number of ConfigMaps whose newest content is rejected",
                samples.by_bundle(rejected_configmaps),
            ),
            ("source_objects", "Number of objects of a source", samples.by_feed(|feed| &feed.watch.objects)),
        ];
        let memory = self.1.iter().map(|(kind, bytes)| (vec![("what", (*kind).to_owned())], *bytes as u64));
        let gauges = gauges.into_iter().chain([
            ("memory_bytes", "Number of bytes in memory by kind, as counted by the hub", memory.collect()),
            (
                "resident_memory_bytes",
                "Number of resident bytes of the process",
                resident().map(|resident| (Vec::new(), resident.all as u64)).into_iter().collect(),
            ),
        ]);
        for (name, help, samples) in gauges {
            family(&mut out, name, help, MetricType::Gauge, &samples)?;
        }
        let counters = [
            ("source_events", "Total watch events received", samples.by_feed(|feed| &feed.watch.events)),
            (
                "source_changes",
                "Total changes to served fields of replicated objects",
                samples.by_feed(|feed| &feed.changes),
            ),
            ("view_changes", "Total editions published", samples.counters(|counters| &counters.view_changes)),
            ("frame_encodes", "Total frames encoded", samples.counters(|counters| &counters.frame_encodes)),
            (
                "snapshot_encodes",
                "Total archives encoded",
                samples.counters(|counters| &counters.snapshot_encodes),
            ),
            ("snapshots_served", "Total archives sent", samples.snapshots()),
            (
                "reconciles",
                "Total reconcile requests answered",
                samples.counters(|counters| &counters.reconciles),
            ),
            (
                "reconcile_encodes",
                "Total reconcile answers encoded",
                samples.counters(|counters| &counters.reconcile_encodes),
            ),
            (
                "verdict_writes",
                "Total attempts to write a verdict to a ConfigMap",
                vec![(Vec::new(), hub.bundles.verdict_writes.load(Relaxed))],
            ),
            (
                "unknown_revisions",
                "Total streams rejected for an unknown revision",
                samples.counters(|counters| &counters.unknown_revisions),
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
