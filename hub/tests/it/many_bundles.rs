//! The maximum number of bundles, some of them being replaced.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Request, StatusCode};
use opa_hub::bundle::registry::BundleRegistry;
use opa_hub::health::Health;
use opa_hub::manager::BUNDLES_MAX;
use opa_hub::manager::last_good::Place;
use opa_hub::manager::runner::BundleFactory;
use opa_hub::model::{Content, Event, NamespaceSelector, Resource, WatchSpec};
use opa_hub::policy::check::{Compiler, Dialect};
use opa_hub::policy::registry::LastGood;
use opa_hub::serve::{Hub, router};
use opa_hub::snapshot::bundle_archive::ArchiveKind;
use opa_hub::spec::BundleSpec;
use opa_hub::store::Store;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// Number of pending replacements. Two threads per bundle exceed the runtime's blocking threads.
const WAITING: usize = 60;
/// Test failure timeout.
const PATIENCE: Duration = Duration::from_secs(60);

fn feed(plural: &str, content: Content) -> WatchSpec {
    let resource = Resource { group: String::new(), version: "v1".into(), plural: plural.into() };
    WatchSpec {
        resource,
        scope: NamespaceSelector::AllExcept { ignored: Vec::new() },
        labels: Vec::new(),
        content,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn archives_are_served_while_replacements_are_pending() {
    let store = Arc::new(Store::new(Health::default()));
    let bundles = Arc::new(BundleRegistry::default());
    let leads = watch::Sender::new(false);
    let stages = BundleFactory {
        store: Arc::clone(&store),
        compiler: Compiler::Syntax(Dialect::Default),
        place: Box::new(|_| Place::Nowhere),
        leads: leads.subscribe(),
        readiness: Health::default(),
        bundles: Arc::clone(&bundles),
    };
    let (mut tasks, mut running) = (JoinSet::new(), Vec::new());
    let policies = feed("configmaps", Content::PolicyRegistry);
    for index in 0..BUNDLES_MAX {
        let spec = Arc::new(BundleSpec::of_feeds(&format!("b{index}"), vec![policies.clone()]));
        let bundle = stages.start(spec, None, false, false, &mut tasks).await;
        bundles.serve(Arc::clone(&bundle.bundle));
        running.push(bundle);
    }
    let watches: Vec<_> = store.wanted().borrow().keys().copied().collect();
    for id in watches {
        store.apply((id, Event::Init, None));
        store.apply((id, Event::InitDone, None));
    }
    let widgets = feed("widgets", Content::Resource("/kubernetes/widgets".parse().unwrap()));
    for index in 0..WAITING {
        running[index].bundle.archived(ArchiveKind::Full).wait_for(Option::is_some).await.unwrap();
        let spec = BundleSpec::of_feeds(&format!("b{index}"), vec![policies.clone(), widgets.clone()]);
        running.push(stages.start(Arc::new(spec), Some(LastGood::new()), false, false, &mut tasks).await);
    }
    let hub = Hub::new(bundles, String::new(), Health::default(), Vec::new(), CancellationToken::new());
    let router = router(hub);
    for index in [0, BUNDLES_MAX - 1] {
        running[index].bundle.archived(ArchiveKind::Full).wait_for(Option::is_some).await.unwrap();
        let peer: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let request = Request::get(format!("/bundles/b{index}")).extension(ConnectInfo(peer));
        let answer = router.clone().oneshot(request.body(Body::empty()).unwrap());
        let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
    }
    assert!(running[BUNDLES_MAX..].iter().all(|waiting| !waiting.is_live()));
}
