//! The bundle writer: stream ends, large commits, resources of removed policies, and the coverage of revisions.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opa_hub::bundle::namespaces::{SCOPE_IDLE, SCOPES_MAX};
use opa_hub::bundle::{CachedSnapshot, CatchUp};
use opa_hub::fields::masks::FieldMasks;
use opa_hub::health::Health;
use opa_hub::model::{Content, Event, NamespaceSelector, Object, ObjectKey, Resource, WatchId, WatchSpec};
use opa_hub::pipeline::WriterCommand;
use opa_hub::policy::candidate::{Resolution, Selection};
use opa_hub::policy::check::Dialect;
use opa_hub::policy::dataflow::{ReadDepth, ReadSet, Segment};
use opa_hub::policy::registry::LastGood;
use opa_hub::policy::resolve::settle;
use opa_hub::snapshot::bundle_archive::ArchiveKind;
use opa_hub::snapshot::history::BundleLimits;
use opa_hub::spec::{AutoFields, AutoReplication, BundleSpec, NamespaceScoping};
use opa_hub::store::Store;
use opa_hub_proto::path::DirPath;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::fold::AppliedState;
use crate::invariants::{DATA, NODES, PODS, POLICIES, Writer, feeds, key, runtime, snapshot};

const WATCHES: [WatchId; 4] = [POLICIES, DATA, PODS, NODES];

fn writer(spec: &BundleSpec) -> Writer {
    Writer::with_store(spec, Arc::new(Store::new(Health::default())), LastGood::new())
}

fn listed(spec: &BundleSpec) -> Writer {
    writer(spec).list()
}

fn scoped() -> BundleSpec {
    let scoped = Some(NamespaceScoping { root: "/kubernetes".parse().unwrap(), whole: BTreeSet::new() });
    BundleSpec { scoped, ..BundleSpec::of_feeds("main", feeds()) }
}

/// BundleSpec with policies, data and automatic replication.
fn auto() -> BundleSpec {
    let auto = Some(AutoReplication { path: "/kubernetes".parse().unwrap(), ignored: Vec::new() });
    BundleSpec { auto, ..BundleSpec::of_feeds("main", feeds().into_iter().take(2).collect()) }
}

impl Writer {
    fn put(&self, watch: WatchId, key: &ObjectKey, json: &Value) {
        let object = Object { key: key.clone(), json: json.to_string().into() };
        self.store.apply((watch, Event::Apply(object), None));
    }

    fn data(&self, name: u8, values: impl IntoIterator<Item = (String, u32)>) {
        let data: serde_json::Map<_, _> =
            values.into_iter().map(|(key, value)| (key, json!({ "x": value }).to_string().into())).collect();
        self.put(DATA, &key(1, 0, name), &json!({ "data": data }));
    }

    fn policy(&self, name: u8, text: &str) {
        self.put(POLICIES, &key(0, 0, name), &json!({ "data": { "p.rego": text } }));
    }

    /// Completes the running check; accepts everything.
    fn accept(&mut self, reads: Option<ReadSet>, resources: Option<&[&str]>) {
        let candidates = self.ends.jobs.try_recv().unwrap();
        let nothing_wrong = async |_: &Selection| Ok::<_, std::convert::Infallible>(Vec::new());
        let Ok(outcome) = futures::executor::block_on(settle(&candidates, nothing_wrong));
        self.finish_check(outcome, reads, resources);
    }

    fn finish_check(&mut self, outcome: Resolution, reads: Option<ReadSet>, resources: Option<&[&str]>) {
        let resources = resources.map(|paths| paths.iter().map(|path| path.parse().unwrap()).collect());
        self.pipeline.hear(WriterCommand::ApplyCheck { outcome, reads, resources });
        self.pipeline.commit();
    }

    /// Subscribes to pods, as policies that read them do.
    fn open_pods(&mut self) -> oneshot::Receiver<()> {
        let feed = WatchSpec {
            resource: Resource::named("pods"),
            scope: NamespaceSelector::AllExcept { ignored: Vec::new() },
            labels: Vec::new(),
            content: Content::Resource("/kubernetes/pods".parse().unwrap()),
        };
        let (settled, until) = oneshot::channel();
        self.pipeline.hear(WriterCommand::AddWatches { feeds: vec![feed], settled });
        self.pipeline.commit();
        until
    }

    fn pods(&self) -> usize {
        let head = self.head();
        let pods = head.view.dirs.iter().filter(|(dir, _)| dir.as_str().starts_with("/kubernetes/pods"));
        pods.map(|(_, dir)| dir.len()).sum()
    }
}

/// Advances `applied` to the head by frames, or else by reconcile. Returns whether by frames.
async fn catch_up(applied: &mut AppliedState, head: &Arc<CachedSnapshot>) -> bool {
    match head.next(applied.revision()) {
        CatchUp::UpToDate => true,
        CatchUp::Frame(bytes) => {
            applied.events(&bytes);
            true
        }
        CatchUp::TooOld => {
            let archive = head.reconcile(applied.reconcile()).await;
            applied.archive(&archive.unwrap().0.pieces.concat());
            false
        }
    }
}

/// Streams end when their bundle is replaced or removed.
#[test]
fn namespace_streams_end_with_their_bundle() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(async {
        let writer = listed(&scoped());
        let mut head = writer.bundle.of(Some("ns0")).unwrap().head();
        tokio::time::sleep(SCOPE_IDLE * 3).await;
        head.mark_unchanged();
        assert!(head.has_changed().is_ok(), "bundle is subscribed");
        drop(writer);
        let changed = tokio::time::timeout(SCOPE_IDLE * 3, head.changed()).await;
        assert!(changed.expect("the stream ends").is_err());
    });
}

/// I1: a commit larger than the history reaches every namespace, and no later frame starts before it.
#[test]
fn i1_commit_larger_than_history_reaches_every_namespace() {
    runtime().block_on(async {
        let limits = BundleLimits { log_keys_max: 4, ..BundleLimits::default() };
        let mut writer = listed(&BundleSpec { limits, ..scoped() });
        writer.data(0, (0..10).map(|index| (format!("k{index}"), 0)));
        writer.commit();
        let mut readers = Vec::new();
        for namespace in ["ns0", "ns1"] {
            readers.push((namespace, snapshot(&writer.head_of(namespace)).await));
        }
        let before = readers.clone();
        writer.data(0, (0..10).map(|index| (format!("k{index}"), 1)));
        writer.commit();
        for (namespace, applied) in &mut readers {
            assert_ne!(writer.head_of(namespace).view.revision, applied.revision(), "{namespace}");
            assert!(!catch_up(applied, &writer.head_of(namespace)).await);
        }
        writer.data(0, (0..10).map(|index| (format!("k{index}"), 1 + u32::from(index == 3))));
        writer.commit();
        for (namespace, mut applied) in readers.into_iter().chain(before) {
            let head = writer.head_of(namespace);
            catch_up(&mut applied, &head).await;
            assert_eq!(applied.content(), snapshot(&head).await.content(), "{namespace}");
            assert_eq!(applied.revision(), head.view.revision);
        }
    });
}

/// I10: an unused resource is removed after the policies that read it, also for disconnected clients.
#[test]
fn i10_resource_is_removed_after_its_policies() {
    runtime().block_on(async {
        let mut writer = listed(&auto());
        writer.policy(0, "package a\nx := data.kubernetes.pods");
        writer.pipeline.commit();
        let until = writer.open_pods();
        let pods = *writer.store.wanted().borrow().keys().last().unwrap();
        writer.store.apply((pods, Event::Init, None));
        for name in 0..3 {
            writer.put(pods, &key(2, 0, name), &json!({ "kind": "Pod" }));
        }
        writer.store.apply((pods, Event::InitDone, None));
        writer.pipeline.commit();
        assert!(until.await.is_err(), "check continues once pods are listed");
        writer.accept(None, Some(&["/kubernetes/pods"]));
        assert_eq!(writer.pods(), 3);
        let away = snapshot(&writer.head()).await;

        writer.policy(0, "package a\nx := 1");
        writer.pipeline.commit();
        writer.accept(None, Some(&[]));
        assert_eq!(writer.pods(), 3, "older policies are still active");
        let mut followed = away.clone();
        assert!(catch_up(&mut followed, &writer.head()).await);
        // A pod was removed, but the writer has not drained the event.
        writer.store.apply((pods, Event::Delete(key(2, 0, 0)), None));
        writer.pipeline.narrow();
        assert_eq!(writer.pods(), 0);
        assert!(!writer.store.wanted().borrow().contains_key(&pods));
        assert!(catch_up(&mut followed, &writer.head()).await);
        assert_eq!(followed.content(), snapshot(&writer.head()).await.content());

        let mut away = away;
        assert!(!catch_up(&mut away, &writer.head()).await, "no frame removes data and changes policies");
        assert!(
            away.data.pointer("/kubernetes/pods/ns0").is_some(),
            "policies were replaced after their data"
        );
        assert_ne!(away.revision(), writer.head().view.revision);
        catch_up(&mut away, &writer.head()).await;
        assert_eq!(away.content(), snapshot(&writer.head()).await.content());
        assert_eq!(away.revision(), writer.head().view.revision);

        // The resource is requested and released again before its removal.
        writer.policy(0, "package a\nx := data.kubernetes.pods");
        writer.pipeline.commit();
        _ = writer.open_pods();
        writer.accept(None, Some(&["/kubernetes/pods"]));
        writer.policy(0, "package a\nx := 2");
        writer.pipeline.commit();
        writer.accept(None, Some(&[]));
        writer.policy(0, "package a\nx := data.kubernetes.pods.a");
        writer.pipeline.commit();
        let until = writer.open_pods();
        let watches = writer.store.wanted().borrow().len();
        writer.pipeline.narrow();
        assert_eq!(writer.store.wanted().borrow().len(), watches, "watch is retained");
        let pods = *writer.store.wanted().borrow().keys().last().unwrap();
        writer.store.apply((pods, Event::InitDone, None));
        writer.pipeline.commit();
        assert!(until.await.is_err());
    });
}

/// A repeated check neither blocks clients nor changes the bundle without new results.
#[test]
fn rechecks_do_not_disturb_clients() {
    let mut writer = listed(&auto());
    writer.policy(0, "package a");
    writer.pipeline.commit();
    writer.accept(None, Some(&[]));
    let revision = writer.head().view.revision;
    for _ in 0..2 {
        writer.pipeline.hear(WriterCommand::Recheck);
        writer.pipeline.commit();
        assert_eq!(writer.head().view.revision, revision);
    }
    writer.accept(None, Some(&[]));
    assert_eq!(writer.head().view.revision, revision);
    writer.accept(None, Some(&[]));
    assert!(writer.ends.jobs.try_recv().is_err(), "one check per change after the check started");
    assert_eq!(writer.head().view.revision, revision);
}

/// A resource whose path is taken is not replicated. Removing its policies is harmless.
#[test]
fn resource_with_a_taken_path_is_not_replicated() {
    let mut writer = listed(&auto());
    let taken = ObjectKey { namespace: "kubernetes".into(), name: "pods".into() };
    writer.put(DATA, &taken, &json!({ "data": { "x": "{}" } }));
    writer.policy(0, "package a\nx := data.kubernetes.pods");
    writer.pipeline.commit();
    _ = writer.open_pods();
    writer.accept(None, Some(&["/kubernetes/pods"]));
    assert_eq!(writer.bundle.feeds.list().len(), 2);
    writer.policy(0, "package a\nx := 1");
    writer.pipeline.commit();
    writer.accept(None, Some(&[]));
    writer.pipeline.narrow();
    writer.data(0, [("k".to_owned(), 1)]);
    writer.commit();
    assert_eq!(writer.head().view.dirs.len(), 2);
}

/// A client removes other data at a resource's path before it applies the objects, although policies read the path.
#[test]
fn resource_replaces_other_data_at_its_path() {
    runtime().block_on(async {
        let mut writer = listed(&auto());
        let edit = |writer: &mut Writer, number: usize, reads: bool| {
            let value = if reads { "data.kubernetes.pods" } else { "1" };
            writer.policy(0, &format!("package a\nx := {value} # {number}"));
            writer.pipeline.commit();
        };
        let taken = ObjectKey { namespace: "kubernetes".into(), name: "pods".into() };
        writer.put(DATA, &taken, &json!({ "data": { "x": "{}" } }));
        edit(&mut writer, 0, true);
        _ = writer.open_pods();
        writer.accept(None, Some(&["/kubernetes/pods"]));
        let mut applied = snapshot(&writer.head()).await;
        assert!(applied.data.pointer("/kubernetes/pods/x").is_some());

        edit(&mut writer, 1, false);
        writer.accept(None, Some(&[]));
        writer.pipeline.narrow();
        writer.store.apply((DATA, Event::Delete(taken), None));
        edit(&mut writer, 2, true);
        _ = writer.open_pods();
        let pods = *writer.store.wanted().borrow().keys().last().unwrap();
        writer.store.apply((pods, Event::Init, None));
        writer.put(pods, &key(2, 0, 0), &json!({ "kind": "Pod" }));
        writer.store.apply((pods, Event::InitDone, None));
        writer.pipeline.commit();
        writer.accept(None, Some(&["/kubernetes/pods"]));
        edit(&mut writer, 3, false);
        writer.accept(None, Some(&[]));
        assert_eq!(writer.pods(), 1, "older policies are still active");

        let head = writer.head();
        for _ in 0..2 {
            applied.archive(&head.reconcile(applied.reconcile()).await.unwrap().0.pieces.concat());
            applied.entries();
        }
        assert_eq!(applied.revision(), head.view.revision);
    });
}

/// I10: an object removed from the source but not yet from the snapshot has all fields that policies read.
#[test]
fn i10_objects_have_all_fields_that_policies_read() {
    let mut spec = BundleSpec::of_feeds("main", feeds());
    let place: DirPath = "/kubernetes/pods".parse().unwrap();
    spec.fields.given = FieldMasks::default();
    spec.fields.follows = AutoFields { places: BTreeSet::from([place]), others: false };
    let mut writer = writer(&spec);
    for watch in WATCHES {
        writer.store.apply((watch, Event::Init, None));
        if watch == PODS {
            for name in 0..2 {
                writer.put(PODS, &key(2, 0, name), &json!({ "kind": "Pod", "spec": { "a": 1, "b": 2 } }));
            }
        }
        writer.store.apply((watch, Event::InitDone, None));
    }
    let reads = |field: &str| {
        let steps = ["kubernetes", "pods"].map(|name| Segment::Key(name.into())).into_iter();
        let steps = steps
            .chain([Segment::Wildcard, Segment::Wildcard])
            .chain(["spec", field].map(|name| Segment::Key(name.into())));
        Some(ReadSet::of([(steps.collect(), ReadDepth::Shallow)], &[]))
    };
    writer.policy(0, "package a");
    writer.pipeline.commit();
    writer.accept(reads("a"), None);
    assert_eq!(writer.pods(), 2);
    writer.policy(0, "package a\nx := 1");
    writer.pipeline.commit();
    writer.store.apply((PODS, Event::Delete(key(2, 0, 0)), None));
    let candidates = writer.ends.jobs.try_recv().unwrap();
    let nothing_wrong = async |_: &Selection| Ok::<_, std::convert::Infallible>(Vec::new());
    let Ok(outcome) = futures::executor::block_on(settle(&candidates, nothing_wrong));
    writer.pipeline.hear(WriterCommand::ApplyCheck { outcome, reads: reads("b"), resources: None });
    writer.pipeline.commit_some(0);
    let mut json = Vec::new();
    writer.head().view.dirs.values().for_each(|dir| dir.write_json(&mut json));
    assert_eq!(String::from_utf8(json).unwrap(), r#"{"o1~/%":{"spec":{"a":1,"b":2}}}"#);
}

/// I2: the revision covers an archive's empty maps and Rego version too.
#[test]
fn i2_revision_covers_settings() {
    runtime().block_on(async {
        let base = BundleSpec::of_feeds("main", feeds());
        let without_nodes = BundleSpec::of_feeds("main", feeds().into_iter().take(3).collect());
        let v1 = BundleSpec { dialect: Dialect::V1, ..base.clone() };
        let revisions = |spec: &BundleSpec| {
            let mut writer = listed(spec);
            writer.policy(0, "package a");
            writer.commit();
            let head = writer.head();
            [ArchiveKind::Full, ArchiveKind::Policy, ArchiveKind::Data].map(|part| part.revision(&head.view))
        };
        let [whole, policy, data] = revisions(&base);
        let [other_whole, other_policy, other_data] = revisions(&without_nodes);
        assert!(whole != other_whole && policy == other_policy && data != other_data);
        let [other_whole, other_policy, other_data] = revisions(&v1);
        assert!(whole != other_whole && policy != other_policy && data == other_data);
    });
}

/// A commit's cost is linear in rejected ConfigMaps, not in their product with changes.
#[test]
fn rejected_configmaps_cost_linear_time() {
    const COUNT: u32 = 2000;
    let started = Instant::now();
    let mut writer = writer(&BundleSpec::of_feeds("main", feeds()));
    let name = |kind: &str, index: u32| ObjectKey {
        namespace: "shop".into(),
        name: format!("{kind}{index}").into(),
    };
    for watch in WATCHES {
        writer.store.apply((watch, Event::Init, None));
        for index in 0..COUNT {
            match watch {
                POLICIES => writer.put(
                    watch,
                    &name("p", index),
                    &json!({ "data": { "p": format!("package shop.p{index}") } }),
                ),
                // The last policy owns the paths.
                DATA => writer.put(watch, &name("d", index), &json!({ "data": { "x": "{}" } })),
                _ => {}
            }
        }
        writer.store.apply((watch, Event::InitDone, None));
    }
    writer.commit();
    for index in 0..COUNT {
        writer.put(
            POLICIES,
            &name("p", index),
            &json!({ "data": { "p": format!("package shop\nx{index} := 1") } }),
        );
    }
    writer.commit();
    for index in 0..COUNT {
        writer.put(
            POLICIES,
            &name("p", index),
            &json!({ "data": { "p": format!("package other.p{index}") } }),
        );
        writer.put(DATA, &name("e", index), &json!({ "data": { "x": "{}" } }));
    }
    writer.commit();
    writer.commit();
    assert_eq!(writer.head().view.modules.len(), COUNT as usize);
    // Bound for debug builds; a quadratic cost would take minutes.
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

/// Views of unknown namespaces are evicted and block no real namespace.
#[test]
fn unknown_namespaces_retain_no_view() {
    runtime().block_on(async {
        let mut writer = listed(&scoped());
        writer.put(PODS, &key(2, 0, 0), &json!({ "kind": "Pod" }));
        writer.commit();
        for index in 0..SCOPES_MAX * 2 {
            writer.bundle.once(Some(&format!("invented{index}"))).unwrap();
        }
        let scopes = writer.bundle.scopes.as_ref().unwrap();
        assert!(scopes.namespaces().is_empty());
        let empty = writer.bundle.once(Some("invented")).unwrap().head().borrow().clone().unwrap();
        assert!(empty.view.dirs.is_empty());
        let namespaced = writer.bundle.once(Some("ns0")).unwrap().head().borrow().clone().unwrap();
        assert_eq!(namespaced.view.dirs.len(), 1);
        let read = writer.bundle.of(Some("read")).unwrap().head();
        for index in 0..SCOPES_MAX * 2 {
            writer.bundle.of(Some(&format!("invented{index}"))).unwrap();
        }
        let namespaces = scopes.namespaces();
        assert!(["ns0", "read"].iter().all(|name| namespaces.iter().any(|other| other == name)));
        // Shared content reaches namespaces without objects too.
        writer.data(0, [("k".to_owned(), 1)]);
        writer.commit();
        assert_eq!(read.borrow().as_ref().unwrap().view.dirs.len(), 1);
        assert_eq!(
            writer.bundle.once(Some("new")).unwrap().head().borrow().as_ref().unwrap().view.dirs.len(),
            1
        );
    });
}
