//! Policy checks with a failing OPA.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use opa_hub::bundle::Bundle;
use opa_hub::fields::masks::FieldMasks;
use opa_hub::health::Health;
use opa_hub::model::{Object, ObjectKey, Replicated};
use opa_hub::pipeline::auto_replication::Auto;
use opa_hub::pipeline::{self, WriterCommand};
use opa_hub::policy::candidate::{
    CHECK_FAILED, Candidate, Candidates, ModuleSet, Progress, Rejection, Resolution, Selected, Selection,
};
use opa_hub::policy::check::{Compiler, Dialect, Modules};
use opa_hub::policy::divide::RETRY_AFTER;
use opa_hub::policy::modules::Module;
use opa_hub::policy::reads::Analyst;
use opa_hub::spec::{AutoReplication, BundleSpec};
use opa_hub_loadtest::lab::assets;
use opa_hub_proto::path::DirPath;
use serde_json::json;
use tokio::sync::mpsc;

/// Checks candidates one job at a time.
struct Checks {
    jobs: mpsc::UnboundedSender<Arc<Candidates>>,
    receiver: mpsc::Receiver<WriterCommand>,
}

impl Checks {
    async fn settle(&mut self, candidates: &Candidates) -> Resolution {
        self.jobs.send(Arc::new(candidates.clone())).unwrap();
        loop {
            match self.receiver.recv().await {
                Some(WriterCommand::ApplyCheck { outcome, .. }) => return outcome,
                // Resources are available immediately.
                Some(WriterCommand::AddWatches { .. }) => {}
                _ => panic!("check returned no outcome"),
            }
        }
    }
}

fn key(name: &str) -> ObjectKey {
    ObjectKey { namespace: "ns".into(), name: name.into() }
}

fn texts(name: &str, text: &str) -> Arc<ModuleSet> {
    let module = Arc::new(Module::read(&format!("package {name}\n{text}")).unwrap());
    Arc::new(ModuleSet {
        modules: BTreeMap::from([(format!("ns/{name}/m"), module)]),
        ..ModuleSet::default()
    })
}

fn install(dir: &Path) {
    symlink(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake-opa.sh"), dir.join("opa")).unwrap();
}

/// Runs `script` concurrently with a checker that uses a fake OPA.
async fn run(script: impl AsyncFnOnce(Checks, &Path, &Health)) {
    run_with(None, script).await;
}

async fn run_with(auto: Option<Auto>, script: impl AsyncFnOnce(Checks, &Path, &Health)) {
    run_of(BundleSpec::of_feeds("main", Vec::new()), Vec::new(), auto, script).await;
}

async fn run_of(
    spec: BundleSpec,
    objects: Vec<(DirPath, Object)>,
    auto: Option<Auto>,
    script: impl AsyncFnOnce(Checks, &Path, &Health),
) {
    let dir = tempfile::tempdir().unwrap();
    install(dir.path());
    let compiler = Compiler::find(Some(&dir.path().join("opa")), Dialect::Default).await.unwrap();
    let (jobs, queue) = mpsc::unbounded_channel();
    let (sender, receiver) = mpsc::channel(1);
    let bundle = Arc::new(Bundle::new("main".into(), None));
    bundle.set_objects(Box::new(move || Replicated { objects: objects.clone(), ..Replicated::default() }));
    let readiness = Health::default();
    readiness.problem("--replicate-auto", Some("of the document before".into()));
    let checking = pipeline::check(compiler, queue, sender, auto, Arc::new(spec), bundle, readiness.clone());
    tokio::select! {
        () = checking => panic!("checker stopped"),
        () = script(Checks { jobs, receiver }, dir.path(), &readiness) => {}
    }
}

#[tokio::test]
async fn checker_takes_newer_edits_after_opa_could_not_run() {
    run(async |mut checks, dir, readiness| {
        let edit = |text: &str| {
            let (good, wanted) = (Some(texts("a", "old")), Some(texts("a", text)));
            Candidates::from([(key("a"), Candidate { good, wanted, refused: None })])
        };
        std::fs::remove_file(dir.join("opa")).unwrap();
        let outcome = checks.settle(&edit("first")).await;
        assert_eq!(outcome.accepted, BTreeMap::from([(key("a"), texts("a", "old"))]));
        assert!(outcome.faults.is_empty() && outcome.untried.contains(&key("a")), "{outcome:?}");
        assert!(readiness.problems()[0].message.contains("running OPA failed"), "{:?}", readiness.problems());
        install(dir);
        let outcome = checks.settle(&edit("newest")).await;
        assert_eq!(outcome.accepted, BTreeMap::from([(key("a"), texts("a", "newest"))]));
        assert!(readiness.problems().is_empty());
    })
    .await;
}

#[tokio::test]
async fn opa_failing_at_everything_rejects_no_configmap() {
    run(async |mut checks, dir, readiness| {
        std::fs::remove_file(dir.join("opa")).unwrap();
        std::fs::write(dir.join("opa"), "#!/bin/sh\nexit 2\n").unwrap();
        std::fs::set_permissions(dir.join("opa"), Permissions::from_mode(0o755)).unwrap();
        let new = Candidate { wanted: Some(texts("a", "x")), ..Candidate::default() };
        let candidates = Candidates::from([(key("a"), new)]);
        let outcome = checks.settle(&candidates).await;
        assert!(outcome.faults.is_empty() && outcome.untried.contains(&key("a")), "{outcome:?}");
        assert!(readiness.problems()[0].message.contains("OPA failed with"), "{:?}", readiness.problems());
        std::fs::remove_file(dir.join("opa")).unwrap();
        install(dir);
        let outcome = checks.settle(&candidates).await;
        assert_eq!(outcome.accepted, BTreeMap::from([(key("a"), texts("a", "x"))]));
    })
    .await;
}

/// A hundred decisions need more plans than one analysis may compute.
#[tokio::test]
async fn analysis_continues_an_unfinished_division() {
    let dir = tempfile::tempdir().unwrap();
    install(dir.path());
    let compiler = Compiler::find(Some(&dir.path().join("opa")), Dialect::Default).await.unwrap();
    let texts: Vec<_> = (0..100).map(|index| texts(&format!("p{index}"), "")).collect();
    let modules: Modules = texts.iter().flat_map(|texts| &texts.modules).collect();
    let log = dir.path().join("log");
    let plans = || std::fs::read_to_string(&log).unwrap().lines().filter(|run| *run == "build").count();
    let mut analyst = Analyst::new(Duration::from_secs(60));
    let mut counts = Vec::new();
    while counts.last() != Some(&0) {
        let before = plans();
        let found = analyst.reads(&compiler, &modules, &[]).await.unwrap().unwrap();
        assert_eq!(found.opaque.len() + found.left.len(), 100);
        counts.push(plans() - before);
    }
    assert_eq!(counts, [64, 64, 64, 7, 0]);
}

/// Names and fields of other packages are still found, in one run per change.
#[tokio::test]
async fn package_without_dependencies_does_not_affect_others() {
    let dir = tempfile::tempdir().unwrap();
    install(dir.path());
    let compiler = Compiler::find(Some(&dir.path().join("opa")), Dialect::Default).await.unwrap();
    let all_texts = |names: &[&str]| names.iter().map(|name| texts(name, "")).collect::<Vec<_>>();
    let (before, after) = (all_texts(&["a", "b", "c", "stuck"]), all_texts(&["a", "b", "d", "stuck"]));
    let log = dir.path().join("log");
    let runs = |what: &str| std::fs::read_to_string(&log).unwrap().lines().filter(|run| *run == what).count();
    let (mut analyst, kubernetes) =
        (Analyst::new(Duration::from_secs(60)), DirPath::new(["kubernetes"]).unwrap());
    // Runs: [a b c stuck] [a b] [c stuck] [c] [stuck], none, then the others together.
    for (texts, expected) in [(&before, 5), (&before, 0), (&after, 1)] {
        let modules: Modules = texts.iter().flat_map(|texts| &texts.modules).collect();
        let count = runs("deps");
        let names = analyst.names(&compiler, &modules, &kubernetes).await.unwrap().unwrap();
        assert_eq!(names.names, BTreeSet::from(["pods".to_owned()]));
        assert!(!names.is_dynamic);
        assert!(names.unknown.keys().eq([&DirPath::new(["stuck"]).unwrap()]), "{names:?}");
        assert_eq!(runs("deps") - count, expected);
    }
    // No package can be planned, but the dependencies are known.
    let modules: Modules = after.iter().flat_map(|texts| &texts.modules).collect();
    let count = runs("deps");
    let found = analyst.reads(&compiler, &modules, &[]).await.unwrap().unwrap();
    assert_eq!((found.opaque.len(), found.unnamed.len(), runs("deps") - count), (4, 1, 0));
}

fn auto() -> Auto {
    let path = DirPath::new(["kubernetes"]).unwrap();
    Auto::new(AutoReplication { path, ignored: Vec::new() }, &[])
}

fn packages(names: impl IntoIterator<Item = String>) -> Candidates {
    let candidate = |name: &str| Candidate { wanted: Some(texts(name, "")), ..Candidate::default() };
    names.into_iter().map(|name| (key(&name), candidate(&name))).collect()
}

/// The division continues without an edit, and the bundle is checked again.
#[tokio::test]
async fn analysis_out_of_time_resumes_without_an_edit() {
    let names = (0..100).map(|index| format!("p{index:02}{}", if index % 2 == 0 { "" } else { "stuck" }));
    let mut candidates = packages(names);
    run_with(Some(auto()), async |mut checks, _, readiness| {
        let problem = || readiness.problems()[0].message.clone();
        let accepted = checks.settle(&candidates).await.accepted;
        assert!(problem().contains("packages are left"), "{}", problem());
        assert!(matches!(checks.receiver.recv().await, Some(WriterCommand::Recheck)));
        for candidate in candidates.values_mut() {
            candidate.good.clone_from(&candidate.wanted);
        }
        assert_eq!(checks.settle(&candidates).await.accepted, accepted);
        assert!(problem().contains("data/p01stuck reads cannot be found: OPA failed"), "{}", problem());
    })
    .await;
}

/// `maxBytes` is applied only once field masks are known: a partial analysis would include everything.
#[tokio::test]
async fn unfinished_analysis_rejects_no_policy() {
    let mut spec = BundleSpec { max_bytes: Some(100), ..BundleSpec::of_feeds("main", Vec::new()) };
    spec.fields.given = FieldMasks::default();
    spec.fields.follows.others = true;
    let nodes = DirPath::new(["kubernetes", "nodes"]).unwrap();
    let object = Object { key: key("node"), json: json!({ "x": "x".repeat(1000) }).to_string().into() };
    let modules = (0..50).flat_map(|index| texts(&format!("p{index:02}late"), "").modules.clone());
    let wanted = Some(Arc::new(ModuleSet { modules: modules.collect(), ..ModuleSet::default() }));
    run_of(spec, vec![(nodes, object)], None, async |mut checks, _, _| {
        for good in [None, wanted.clone()] {
            let candidate = Candidate { good: good.clone(), wanted: wanted.clone(), refused: None };
            let outcome = checks.settle(&Candidates::from([(key("all"), candidate)])).await;
            assert_eq!(outcome.accepted.get(&key("all")), wanted.as_ref(), "{:?}", outcome.faults);
        }
    })
    .await;
}

/// A temporary failure, such as a busy machine, has no lasting effect.
#[tokio::test]
async fn failed_analysis_is_retried() {
    let candidates = packages(["a".into(), "stuck".into()]);
    run_with(Some(auto()), async |mut checks, dir, readiness| {
        checks.settle(&candidates).await;
        assert!(readiness.problems()[0].message.contains("data/stuck reads cannot be found"));
        std::fs::write(dir.join("calm"), "").unwrap();
        let checked = tokio::time::timeout(Duration::from_millis(200), checks.receiver.recv()).await;
        assert!(checked.is_err(), "not before {RETRY_AFTER:?}");
        tokio::time::pause();
        tokio::time::advance(RETRY_AFTER).await;
        tokio::time::resume();
        assert!(matches!(checks.receiver.recv().await, Some(WriterCommand::Recheck)));
        checks.settle(&candidates).await;
        assert!(readiness.problems().is_empty(), "{:?}", readiness.problems());
    })
    .await;
}

/// Older OPAs omit dependencies. Resources are then found in the texts, and unplannable packages read everything.
#[tokio::test]
async fn checker_skips_opa_deps_of_older_versions() {
    let dir = tempfile::tempdir().unwrap();
    install(dir.path());
    let texts = texts("a", "x := data.kubernetes.nodes");
    let (modules, kubernetes) = (texts.modules.iter().collect(), DirPath::new(["kubernetes"]).unwrap());
    for (version, is_whole) in
        [("0.70.0", false), ("1.9.3", false), ("1.20.2", false), ("1.21.0-dev", true), ("2.0.0", true)]
    {
        std::fs::write(dir.path().join("version"), version).unwrap();
        let compiler = Compiler::find(Some(&dir.path().join("opa")), Dialect::Default).await.unwrap();
        let mut analyst = Analyst::new(Duration::from_secs(60));
        let names = analyst.names(&compiler, &modules, &kubernetes).await.unwrap().unwrap();
        let expected = if is_whole { "pods" } else { "nodes" };
        assert!(names.names.iter().eq([expected]) && names.unknown.is_empty() == is_whole, "{names:?}");
        assert!(is_whole || names.unknown.values().all(|reason| reason.contains("use OPA 1.21 or later")));
        let found = analyst.reads(&compiler, &modules, &[]).await.unwrap().unwrap();
        let (all, pods) = (DirPath::new(["shop"]).unwrap(), DirPath::new(["kubernetes", "pods"]).unwrap());
        assert!(FieldMasks::of_reads(&found.reads, [(pods.clone(), None)]).of(&pods).is_all(), "{version}");
        assert_eq!(
            FieldMasks::of_reads(&found.reads, [(all.clone(), None)]).of(&all).is_all(),
            !is_whole,
            "{version}"
        );
    }
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert_eq!(log.lines().filter(|run| *run == "deps").count(), 2, "one run per newer version");
}

/// Exceeding OPA's memory bound is rejected like any OPA failure.
#[tokio::test]
async fn policies_exhausting_opa_memory_are_rejected() {
    let opa = tokio::task::spawn_blocking(assets::folder).await.unwrap().unwrap().join("opa");
    let compiler = Compiler::find(Some(&opa), Dialect::Default).await.unwrap();
    // Nine tenfold repetitions of the text: 10 GB.
    let longer = |index: usize| {
        format!("\tx{} := concat(\"\", [{}])\n", index + 1, vec![format!("x{index}"); 10].join(", "))
    };
    let longer: String = (0..9).map(longer).collect();
    let test = format!("test_x if {{\n\tx0 := \"0123456789\"\n{longer}\tcount(x9) > 0\n}}");
    let module = |text: &str| Arc::new(Module::read(text).unwrap());
    let texts = ModuleSet {
        modules: BTreeMap::from([("ns/a/m".to_owned(), module("package a\n\nx := 1\n"))]),
        tests: BTreeMap::from([("ns/a/t".to_owned(), module(&format!("package a_test\n\n{test}\n")))]),
    };
    let key = key("a");
    let selection = Selection::from([(&key, Selected { texts: &texts, is_changed: true })]);
    let faults = compiler.check(&selection).await.unwrap();
    assert_eq!(faults.len(), 1);
    assert!(faults[0].message.contains("OPA failed with"), "{faults:?}");
}

#[tokio::test]
async fn configmap_crashing_opa_is_rejected_until_edited() {
    run(async |mut checks, dir, _| {
        let runs = || std::fs::read_to_string(dir.join("log")).unwrap().lines().count();
        let new =
            |name: &str, text: &str| Candidate { wanted: Some(texts(name, text)), ..Candidate::default() };
        let mut candidates = Candidates::from([(key("a"), new("a", "CRASH")), (key("b"), new("b", "x"))]);
        let outcome = checks.settle(&candidates).await;
        assert_eq!(outcome.accepted, BTreeMap::from([(key("b"), texts("b", "x"))]));
        assert_eq!(outcome.faults[&key("a")][0].code, CHECK_FAILED);
        // Edits of other ConfigMaps do not check the rejected one again.
        assert_eq!(outcome.costly().collect::<Vec<_>>(), [&key("a")]);
        candidates.get_mut(&key("a")).unwrap().refused = Some(Rejection::Costly);
        for text in ["y", "z"] {
            let before = runs();
            candidates.insert(key("b"), new("b", text));
            let outcome = checks.settle(&candidates).await;
            assert_eq!(outcome.accepted, BTreeMap::from([(key("b"), texts("b", text))]));
            assert_eq!(runs(), before + 1);
        }
        candidates.insert(key("a"), new("a", "mended"));
        let outcome = checks.settle(&candidates).await;
        assert_eq!(outcome.accepted.len(), 2, "{outcome:?}");
    })
    .await;
}

/// A starting hub serves the last good modules while OPA checks a change.
#[tokio::test]
async fn startup_serves_last_good_modules_during_a_check() {
    run(async |mut checks, _, readiness| {
        let (good, wanted) = (Some(texts("a", "old")), Some(texts("a", "HANGS")));
        let candidates = Candidates::from([
            (key("a"), Candidate { good, wanted, refused: None }),
            (key("b"), Candidate { wanted: Some(texts("b", "new")), ..Candidate::default() }),
        ]);
        let outcome = checks.settle(&candidates).await;
        assert_eq!(outcome.progress, Progress::Good);
        assert_eq!(outcome.accepted, BTreeMap::from([(key("a"), texts("a", "old"))]));
        assert_eq!(outcome.untried.iter().collect::<Vec<_>>(), [&key("a"), &key("b")]);
        assert!(outcome.faults.is_empty() && readiness.problems().is_empty());
    })
    .await;
}
