//! I1–I5 for random event scripts and join points.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use opa_hub::bundle::namespaces;
use opa_hub::bundle::namespaces::SCOPE_IDLE;
use opa_hub::bundle::{Bundle, CachedSnapshot, CatchUp};
use opa_hub::health::Health;
use opa_hub::model::{Content, Event, NamespaceSelector, Object, ObjectKey, Resource, WatchId, WatchSpec};
use opa_hub::pipeline::writer::BundleWriter;
use opa_hub::pipeline::{WriterCommand, WriterHandles};
use opa_hub::policy::candidate::Selection;
use opa_hub::policy::registry::LastGood;
use opa_hub::policy::resolve::settle;
use opa_hub::snapshot::bundle_archive::ArchiveKind;
use opa_hub::spec::{BundleSpec, NamespaceScoping};
use opa_hub::store::Store;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fold::AppliedState;

pub(crate) const POLICIES: WatchId = WatchId(0);
pub(crate) const DATA: WatchId = WatchId(1);
pub(crate) const PODS: WatchId = WatchId(2);
pub(crate) const NODES: WatchId = WatchId(3);

/// A script step: sets or removes (`None`) a feed's object.
type Segment = (u8, u8, u8, Option<u8>);

type Script = Vec<Vec<Segment>>;

fn scripts() -> impl Strategy<Value = Script> {
    let step = (0u8..4, 0u8..3, 0u8..6, proptest::option::weighted(0.7, 0u8..4));
    proptest::collection::vec(proptest::collection::vec(step, 0..8), 1..12)
}

pub(crate) struct Writer {
    pub(crate) store: Arc<Store>,
    pub(crate) pipeline: BundleWriter,
    pub(crate) ends: WriterHandles,
    pub(crate) bundle: Arc<Bundle>,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self::scoped(None)
    }

    fn scoped(root: Option<&str>) -> Self {
        let mut spec = BundleSpec::of_feeds("main", feeds());
        spec.scoped =
            root.map(|root| NamespaceScoping { root: root.parse().unwrap(), whole: BTreeSet::new() });
        Self::with_store(&spec, Arc::new(Store::new(Health::default())), LastGood::new())
    }

    /// Creates a bundle over a shared store, with last good modules.
    pub(crate) fn with_store(spec: &BundleSpec, store: Arc<Store>, good: LastGood) -> Self {
        let bundle = Arc::new(Bundle::new(spec.name.clone(), spec.scoped.clone()));
        let (mut pipeline, ends) = BundleWriter::new(spec, bundle.clone(), &store, Health::default());
        pipeline.hear(WriterCommand::RestoreLastGood(good));
        Self { store, pipeline, ends, bundle }
    }

    /// Commits, with a compiler that accepts everything.
    pub(crate) fn commit(&mut self) {
        self.pipeline.commit();
        while self.check() {}
    }

    /// Checks pending policies. Returns whether any were pending.
    pub(crate) fn check(&mut self) -> bool {
        let Ok(candidates) = self.ends.jobs.try_recv() else { return false };
        let nothing_wrong = async |_: &Selection| Ok::<_, Infallible>(Vec::new());
        let Ok(outcome) = futures::executor::block_on(settle(&candidates, nothing_wrong));
        self.pipeline.hear(WriterCommand::ApplyCheck { outcome, reads: None, resources: None });
        self.pipeline.commit();
        true
    }

    fn listed() -> Self {
        Self::new().list()
    }

    pub(crate) fn list(self) -> Self {
        let mut writer = self;
        for feed in [POLICIES, DATA, PODS, NODES] {
            writer.store.apply((feed, Event::Init, None));
            writer.store.apply((feed, Event::InitDone, None));
        }
        writer.commit();
        writer
    }

    fn step(&mut self, (feed, namespace, name, value): Segment) {
        let (feed, key) = (WatchId(feed.into()), key(feed, namespace, name));
        let event = match value {
            None => Event::Delete(key),
            Some(value) => Event::Apply(Object { json: json(feed, name, value).to_string().into(), key }),
        };
        self.store.apply((feed, event, None));
    }

    fn run(&mut self, script: &Script) {
        for batch in script {
            for step in batch {
                self.step(*step);
            }
            self.commit();
        }
    }

    pub(crate) fn head_of(&self, namespace: &str) -> Arc<CachedSnapshot> {
        let bundle = self.bundle.of(Some(namespace)).unwrap();
        bundle.head().borrow().clone().expect("published")
    }

    pub(crate) fn head(&self) -> Arc<CachedSnapshot> {
        self.bundle.head().borrow().clone().expect("published")
    }
}

/// WatchStatuses of policies, data and two replicated resources.
pub(crate) fn feeds() -> Vec<WatchSpec> {
    let feed = |plural, content, scope| WatchSpec {
        resource: Resource { plural: String::from(plural), ..Resource::configmaps() },
        scope,
        labels: Vec::new(),
        content,
    };
    let namespaced = || NamespaceSelector::AllExcept { ignored: Vec::new() };
    vec![
        feed("policies", Content::PolicyRegistry, namespaced()),
        feed("data", Content::Data, namespaced()),
        feed("pods", Content::Resource("/kubernetes/pods".parse().unwrap()), namespaced()),
        feed(
            "nodes",
            Content::Resource("/kubernetes/nodes".parse().unwrap()),
            NamespaceSelector::ClusterScoped,
        ),
    ]
}

pub(crate) fn key(feed: u8, namespace: u8, name: u8) -> ObjectKey {
    let namespace = if WatchId(feed.into()) == NODES { String::new() } else { format!("ns{namespace}") };
    ObjectKey {
        namespace: namespace.into(),
        name: format!("o{name}~/%").replace(if feed < 2 { "~/%" } else { "" }, "").into(),
    }
}

/// Source object. Value 3 of a ConfigMap is rejected.
pub(crate) fn json(feed: WatchId, name: u8, value: u8) -> Value {
    let keys = |text: &dyn Fn(u8) -> String| {
        let keys: BTreeMap<_, _> = (0..=value).map(|key| (format!("k{key}"), text(key))).collect();
        json!({ "data": keys })
    };
    match feed {
        POLICIES if value == 3 => json!({ "data": { "k0": "package" } }),
        DATA if value == 3 => json!({ "data": { "k0": "[]" } }),
        POLICIES => keys(&|key| format!("package p{name}.q{key}\nx := {value}")),
        DATA => keys(&|_| format!("{{\"x\": {value}}}")),
        _ => json!({ "kind": "x", "value": value, "text": "~1/%\n" }),
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

pub(crate) async fn snapshot(edition: &Arc<CachedSnapshot>) -> AppliedState {
    let mut applied = AppliedState::empty();
    applied.archive(&edition.archive(ArchiveKind::Full).await.pieces.concat());
    applied
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// I1, I3: an archive and the frames after it produce the snapshot, from any join point. Patches are applied by an
    /// RFC 6902 implementation that fails wherever OPA does.
    #[test]
    fn i1_i3_archive_and_frames_produce_the_snapshot(script in scripts(), joins in proptest::collection::vec(any::<bool>(), 12)) {
        runtime().block_on(async {
            let mut writer = Writer::listed();
            let mut readers: Vec<AppliedState> = vec![snapshot(&writer.head()).await];
            for (batch, joins) in script.iter().zip(joins) {
                for step in batch {
                    writer.step(*step);
                }
                writer.commit();
                let head = writer.head();
                if joins {
                    readers.push(snapshot(&head).await);
                }
                // Every second client follows; the others lag until the end.
                for applied in readers.iter_mut().step_by(2) {
                    follow(applied, &head);
                }
            }
            let head = writer.head();
            let expected = snapshot(&head).await;
            assert_eq!(expected.revision(), head.view.revision);
            for mut applied in readers {
                follow(&mut applied, &head);
                assert_eq!(applied.content(), expected.content());
                assert_eq!(applied.modules, expected.modules);
                for place in head.view.ensure.iter() {
                    assert!(applied.data.pointer(place.as_str()).is_some_and(Value::is_object), "{place} is a map, possibly empty");
                }
            }
        });
    }

    /// I1 for a namespace's view: its own and cluster-scoped content.
    #[test]
    fn i1_frames_produce_a_namespace_view(script in scripts(), joins in proptest::collection::vec(0u8..4, 12)) {
        runtime().block_on(async {
            let mut writer = Writer::scoped(Some("/kubernetes")).list();
            let mut readers: Vec<(String, AppliedState)> = Vec::new();
            for (index, (batch, join)) in script.iter().zip(joins).enumerate() {
                for step in batch {
                    writer.step(*step);
                }
                writer.commit();
                let namespace = format!("ns{join}");
                let head = writer.head_of(&namespace);
                readers.push((namespace, snapshot(&head).await));
                for (namespace, applied) in readers.iter_mut().skip(index % 2).step_by(2) {
                    follow(applied, &writer.head_of(namespace));
                }
            }
            let whole = snapshot(&writer.head()).await;
            for (namespace, mut applied) in readers {
                follow(&mut applied, &writer.head_of(&namespace));
                let mut expected = whole.clone();
                expected.data["kubernetes"]["pods"].as_object_mut().unwrap().retain(|other, _| *other == namespace);
                assert_eq!(applied.content(), expected.content(), "{namespace}");
                assert_eq!(applied.modules, expected.modules);
            }
        });
    }

    /// I1: a hub without history repairs any content by digests.
    #[test]
    fn i1_reconcile_produces_the_snapshot(before in scripts(), after in scripts()) {
        runtime().block_on(async {
            let mut one = Writer::listed();
            one.run(&before);
            let mut applied = snapshot(&one.head()).await;
            let mut other = Writer::listed();
            other.run(&after);
            let head = other.head();
            let archive = head.reconcile(applied.reconcile()).await.unwrap().0.pieces.concat();
            applied.archive(&archive);
            let expected = snapshot(&head).await;
            assert_eq!(applied.content(), expected.content());
            assert_eq!(applied.modules, expected.modules);
            assert_eq!(applied.revision(), head.view.revision);
        });
    }

    /// I2: replicas that applied steps or one list, in any order, have equal revisions and archives.
    #[test]
    fn i2_replicas_agree(script in scripts()) {
        runtime().block_on(async {
            // A rejected ConfigMap keeps its last good content, unknown to a new hub.
            let script: Script = script.into_iter().map(|batch| {
                batch.into_iter().filter(|(feed, _, _, value)| *feed >= 2 || *value != Some(3)).collect()
            }).collect();
            let mut one = Writer::listed();
            one.run(&script);
            let mut last = BTreeMap::new();
            for (feed, namespace, name, value) in script.iter().flatten() {
                last.insert((*feed, key(*feed, *namespace, *name)), (*feed, *namespace, *name, *value));
            }
            let mut other = Writer::new();
            for feed in [NODES, PODS, DATA, POLICIES] {
                other.store.apply((feed, Event::Init, None));
                let of_feed = last.values().rev().filter(|(watch, _, _, value)| WatchId((*watch).into()) == feed && value.is_some());
                of_feed.for_each(|step| other.step(*step));
                other.store.apply((feed, Event::InitDone, None));
                other.commit();
            }
            assert_eq!(one.head().view.revision, other.head().view.revision);
            for part in [ArchiveKind::Full, ArchiveKind::Policy, ArchiveKind::Data] {
                let bytes = [&one, &other].map(Writer::head);
                let one = bytes[0].archive(part).await.pieces.concat();
                assert_eq!(one, bytes[1].archive(part).await.pieces.concat());
            }
        });
    }
}

fn follow(applied: &mut AppliedState, head: &CachedSnapshot) {
    match head.next(applied.revision()) {
        CatchUp::UpToDate => {}
        CatchUp::Frame(bytes) => applied.events(&bytes),
        CatchUp::TooOld => panic!("history is shorter than the script"),
    }
    assert_eq!(applied.revision(), head.view.revision);
}

/// I4: each frame, archive and reconcile response is encoded once for all clients.
#[test]
fn i4_encodes_are_independent_of_clients() {
    runtime().block_on(async {
        let mut writer = Writer::listed();
        let start = writer.head().view.revision;
        writer.run(&vec![vec![(2, 0, 0, Some(1)), (0, 0, 0, Some(1))]]);
        let head = writer.head();
        let applied = AppliedState::empty().reconcile();
        let asks = (0..1000).map(|_| async {
            assert!(matches!(head.next(start), CatchUp::Frame(_)));
            head.archive(ArchiveKind::Full).await;
            head.reconcile(applied.clone()).await.unwrap();
        });
        futures::future::join_all(asks).await;
        let counters = writer.bundle.counters.clone();
        let counts = [&counters.frame_encodes, &counters.snapshot_encodes, &counters.reconcile_encodes];
        assert_eq!(counts.map(|count| count.load(Relaxed)), [1, 1, 1]);
        // Data changes reuse the policy archive.
        head.archive(ArchiveKind::Policy).await;
        writer.run(&vec![vec![(2, 0, 0, Some(2))]]);
        writer.head().archive(ArchiveKind::Policy).await;
        assert_eq!(counters.snapshot_encodes.load(Relaxed), 2);
    });
}

/// I4: clients of a namespace share encodings; changes elsewhere encode nothing.
#[test]
fn i4_namespace_views_are_encoded_once() {
    const NAMESPACES: u8 = 200;
    const AGENTS: usize = 5;
    runtime().block_on(async {
        let mut writer = Writer::scoped(Some("/kubernetes")).list();
        assert_eq!(writer.bundle.of(None).err(), Some(namespaces::Error::NoNamespace));
        assert!(matches!(writer.bundle.of(Some("a/b")), Err(namespaces::Error::Invalid(_))));
        let pods =
            |value| (0..NAMESPACES).map(|namespace| (2, namespace, 0, Some(value))).collect::<Vec<_>>();
        writer.run(&vec![pods(0)]);
        let mut agents = Vec::new();
        for namespace in (0..NAMESPACES).map(|namespace| format!("ns{namespace}")) {
            for _ in 0..AGENTS {
                let applied = snapshot(&writer.head_of(&namespace)).await;
                let names: Vec<_> = applied.data["kubernetes"]["pods"].as_object().unwrap().keys().collect();
                assert_eq!(names, [&namespace], "no content of other namespaces");
                agents.push((namespace.clone(), applied));
            }
        }
        let counters = writer.bundle.counters.clone();
        let counts =
            || [&counters.snapshot_encodes, &counters.frame_encodes].map(|count| count.load(Relaxed));
        assert_eq!(counts(), [u64::from(NAMESPACES), 0]);
        writer.run(&vec![pods(1)]);
        for (namespace, applied) in &mut agents {
            follow(applied, &writer.head_of(namespace));
        }
        assert_eq!(counts(), [u64::from(NAMESPACES), u64::from(NAMESPACES)]);
        // Quiet namespaces retain encodings up to the cache limit.
        assert!(counters.frame_bytes.load(Relaxed) > 0);
        for namespace in 0..NAMESPACES {
            writer.head_of(&format!("ns{namespace}")).forget_frames();
        }
        assert_eq!(counters.frame_bytes.load(Relaxed), 0);
        let before = writer.head_of("ns1").view.revision;
        writer.run(&vec![vec![(2, 0, 0, Some(2))]]);
        assert_eq!(writer.head_of("ns1").view.revision, before);
        assert_ne!(writer.head_of("ns0").view.revision, agents[0].1.revision());
    });
}

/// Unused namespace views are evicted, and recreated on demand.
#[test]
fn idle_namespace_views_are_evicted() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let writer = Writer::scoped(Some("/kubernetes")).list();
        let namespaces = || writer.bundle.scopes.as_ref().unwrap().namespaces();
        let read = writer.bundle.of(Some("read")).unwrap().head();
        writer.head_of("asked");
        assert_eq!(namespaces(), ["asked", "read"]);
        tokio::time::sleep(SCOPE_IDLE * 3).await;
        assert_eq!(namespaces(), ["read"]);
        drop(read);
        tokio::time::sleep(SCOPE_IDLE * 3).await;
        assert!(namespaces().is_empty());
        writer.head_of("asked");
    });
}

/// I5: nothing is served before every source has listed; an incomplete relist removes nothing.
#[test]
fn i5_bundle_waits_for_lists_and_relists_are_atomic() {
    let mut writer = Writer::new();
    for (index, feed) in [POLICIES, DATA, PODS, NODES].into_iter().enumerate() {
        writer.store.apply((feed, Event::Init, None));
        writer.step((feed.0.try_into().unwrap(), 0, 0, Some(0)));
        writer.commit();
        assert!(writer.bundle.head().borrow().is_none(), "{index} of 4 sources have listed");
        writer.store.apply((feed, Event::InitDone, None));
        writer.commit();
    }
    let revision = writer.head().view.revision;
    writer.store.apply((PODS, Event::Init, None));
    writer.commit();
    assert_eq!(writer.head().view.revision, revision);
    writer.store.apply((PODS, Event::InitDone, None));
    writer.commit();
    assert_eq!(writer.head().view.dirs.len(), 2, "pods missing from a complete list are removed");
}

/// Events without content changes publish no snapshot.
#[test]
fn unchanged_objects_publish_nothing() {
    let mut writer = Writer::listed();
    writer.run(&vec![vec![(2, 0, 0, Some(1))]]);
    let changes = writer.bundle.counters.view_changes.load(Relaxed);
    writer.run(&vec![
        vec![(2, 0, 0, Some(1))],
        vec![(2, 0, 0, Some(2)), (2, 0, 0, Some(1))],
        vec![(2, 1, 1, None)],
    ]);
    assert_eq!(writer.bundle.counters.view_changes.load(Relaxed), changes);
}
