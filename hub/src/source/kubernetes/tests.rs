//! Watches of a scripted API server, in paused time.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::http::{Request, Response, Uri};
use futures::{StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::*;
use crate::model::{Content, InputId};
use crate::source::EVENT_QUEUE_MAX;
use crate::source::kubernetes::watcher::{LIST_PAGE, LIST_PAGE_MIN};
use crate::store::{Counters, STALE_AFTER, Store, Subscription};

const POLL_INTERVAL: Duration = Duration::from_millis(100);
const MINUTE: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, Debug)]
enum Call {
    Discovery,
    StreamingList,
    Page { limit: u64, from: Option<String> },
    Newest,
    Watch { seconds: u64 },
}

impl Call {
    fn parse(uri: &Uri) -> Self {
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        let query: BTreeMap<_, _> = pairs.collect();
        let number = |name: &str| -> u64 {
            query.get(name).and_then(|number| number.parse().ok()).unwrap_or_default()
        };
        if uri.path() == "/api/v1" {
            Self::Discovery
        } else if query.contains_key("sendInitialEvents") {
            Self::StreamingList
        } else if query.contains_key("watch") {
            Self::Watch { seconds: number("timeoutSeconds") }
        } else if number("limit") == 1 {
            Self::Newest
        } else {
            Self::Page { limit: number("limit"), from: query.get("continue").map(|from| (*from).to_owned()) }
        }
    }

    fn is_page(&self) -> bool {
        matches!(self, Self::Page { .. })
    }
}

enum Answer {
    Json(u16, String),
    /// Lines, then the end after a delay in seconds.
    Watch(Vec<String>, u64),
    /// Breaks after a delay in seconds.
    Broken(u64),
    Never,
}

impl Answer {
    async fn response(self) -> Response<Body> {
        let (status, body) = match self {
            Self::Json(status, text) => (status, Body::from(text)),
            Self::Watch(lines, seconds) => {
                let lines = lines.into_iter().map(|line| Ok::<_, Infallible>(Bytes::from(line + "\n")));
                let end = stream::once(sleep(Duration::from_secs(seconds)));
                let end = end.filter_map(|()| std::future::ready(None));
                (200, Body::from_stream(stream::iter(lines).chain(end)))
            }
            Self::Broken(seconds) => {
                let end = stream::once(sleep(Duration::from_secs(seconds)));
                (200, Body::from_stream(end.map(|()| Err::<Bytes, _>(std::io::Error::other("broken")))))
            }
            Self::Never => std::future::pending().await,
        };
        Response::builder().status(status).body(body).unwrap()
    }
}

fn rejection(code: u16) -> Answer {
    let status =
        r#""kind":"Status","apiVersion":"v1","status":"Failure","reason":"Scripted","message":"refused""#;
    Answer::Json(code, format!(r#"{{{status},"code":{code}}}"#))
}

fn resources(names: &[&str]) -> Answer {
    let resource = |name: &&str| {
        format!(
            r#"{{"name":"{name}","singularName":"","namespaced":true,"kind":"ConfigMap","verbs":["list"]}}"#
        )
    };
    let all: Vec<_> = names.iter().map(resource).collect();
    Answer::Json(200, format!(r#"{{"groupVersion":"v1","resources":[{}]}}"#, all.join(",")))
}

fn page(version: u64, next: &str) -> Answer {
    let item = format!(r#"{{"metadata":{{"name":"a","resourceVersion":"{version}"}}}}"#);
    let metadata = format!(r#"{{"resourceVersion":"{version}","continue":"{next}"}}"#);
    let kind = r#""kind":"ConfigMapList","apiVersion":"v1""#;
    Answer::Json(200, format!(r#"{{{kind},"metadata":{metadata},"items":[{item}]}}"#))
}

fn bookmark(version: u64) -> String {
    let object =
        format!(r#"{{"kind":"ConfigMap","apiVersion":"v1","metadata":{{"resourceVersion":"{version}"}}}}"#);
    format!(r#"{{"type":"BOOKMARK","object":{object}}}"#)
}

/// Answers of an unchanging server without streaming lists.
fn quiet(call: &Call, version: u64) -> Answer {
    match call {
        Call::Discovery => resources(&["configmaps"]),
        Call::StreamingList => rejection(422),
        Call::Newest | Call::Page { .. } => page(version, ""),
        Call::Watch { seconds } => Answer::Watch(Vec::new(), *seconds),
    }
}

type Script = Box<dyn FnMut(&Call) -> Answer + Send>;

/// A store fed by the server.
struct World {
    script: Arc<Mutex<Script>>,
    calls: Arc<Mutex<Vec<Call>>>,
    readiness: Health,
    subscription: Subscription,
    counters: Arc<Counters>,
}

impl World {
    /// Delays each answer by `latency`.
    fn start(latency: Duration, script: impl FnMut(&Call) -> Answer + Send + 'static) -> Self {
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(script)));
        let calls = Arc::new(Mutex::new(Vec::new()));
        let (scripted, called) = (Arc::clone(&script), Arc::clone(&calls));
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let call = Call::parse(request.uri());
            let answer = (*scripted.lock().unwrap())(&call);
            called.lock().unwrap().push(call);
            async move {
                sleep(latency).await;
                Ok::<_, Infallible>(answer.response().await)
            }
        });
        let client = Client::new(service, "default");
        let readiness = Health::default();
        let store = Arc::new(Store::new(readiness.clone()));
        let subscription = store.subscribe();
        let feed = WatchSpec {
            resource: Resource::configmaps(),
            scope: NamespaceSelector::AllExcept { ignored: Vec::new() },
            labels: Vec::new(),
            content: Content::Data,
        };
        let counters = subscription.open(InputId(0), &feed);
        let (events, mut queue) = mpsc::channel(EVENT_QUEUE_MAX);
        tokio::spawn(run(client, store.wanted(), events, readiness.clone()));
        tokio::spawn(async move {
            while let Some(event) = queue.recv().await {
                store.apply(event);
            }
        });
        Self { script, calls, readiness, subscription, counters }
    }

    /// Starts with a complete list at version 100.
    async fn listed(latency: Duration) -> Self {
        let world = Self::start(latency, |call| quiet(call, 100));
        world.until("the list", MINUTE, |world| world.version() == Some(100)).await;
        world
    }

    fn answer_with(&self, script: impl FnMut(&Call) -> Answer + Send + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
    }

    fn version(&self) -> Option<u64> {
        self.subscription.newest().get(&InputId(0)).map(|version| version.0)
    }

    fn is_stale(&self) -> bool {
        self.counters.stale().is_some()
    }

    fn has_problems(&self) -> bool {
        !self.readiness.problems().is_empty()
    }

    fn count(&self, predicate: impl Fn(&Call) -> bool) -> usize {
        self.calls.lock().unwrap().iter().filter(|call| predicate(call)).count()
    }

    async fn until(&self, what: &str, within: Duration, condition: impl Fn(&Self) -> bool) {
        let end = Instant::now() + within;
        while !condition(self) {
            assert!(Instant::now() < end, "{what}: not within {within:?}, after {:?}", self.calls);
            sleep(POLL_INTERVAL).await;
        }
    }

    async fn never(&self, what: &str, within: Duration, condition: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while started.elapsed() < within {
            assert!(!condition(self), "{what} after {:?} and {:?}", started.elapsed(), self.calls);
            sleep(POLL_INTERVAL).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn quiet_source_stays_fresh_and_is_verified_once_a_minute() {
    let world = World::listed(Duration::from_secs(4)).await;
    world.never("stale", 10 * MINUTE, World::is_stale).await;
    let newest = world.count(|call| *call == Call::Newest);
    assert!((5..=10).contains(&newest), "{newest}");
    assert_eq!((world.count(Call::is_page), world.has_problems()), (1, false));
}

#[tokio::test(start_paused = true)]
async fn source_with_advancing_bookmarks_is_not_verified() {
    let world = World::listed(Duration::ZERO).await;
    let mut version = 100;
    world.answer_with(move |call| match call {
        Call::Watch { seconds } => {
            version += 1;
            Answer::Watch(vec![bookmark(version)], *seconds)
        }
        call => quiet(call, version),
    });
    world.never("stale", 10 * MINUTE, World::is_stale).await;
    assert_eq!(world.count(|call| *call == Call::Newest), 0);
}

/// Answers watches by `watch` and rejects lists after the first one, then recovers at version 200.
async fn check(what: &str, watch: fn(u64) -> Answer, is_fresh: bool, lists_again: bool) {
    let world = World::listed(Duration::ZERO).await;
    world.answer_with(move |call| match call {
        Call::Watch { seconds } => watch(*seconds),
        Call::Page { .. } => rejection(500),
        call => quiet(call, 100),
    });
    if is_fresh {
        world
            .never(&format!("{what}: stale"), 3 * MINUTE, |world| world.is_stale() || world.has_problems())
            .await;
    } else {
        world.until(&format!("{what}: a problem"), MINUTE, World::has_problems).await;
        world.never(&format!("{what}: no problem"), 2 * MINUTE, |world| !world.has_problems()).await;
    }
    assert_eq!((!world.is_stale(), world.count(Call::is_page) > 1), (is_fresh, lists_again), "{what}");
    world.answer_with(|call| quiet(call, 200));
    let is_recovered = |world: &World| {
        !world.is_stale() && !world.has_problems() && (!lists_again || world.version() == Some(200))
    };
    world.until(&format!("{what}: recovery"), MINUTE, is_recovered).await;
}

#[tokio::test(start_paused = true)]
async fn only_served_watches_prove_contact() {
    let (fresh, stale) = (true, false);
    let (lists_again, resumes) = (true, false);
    check("an orderly end", |seconds| Answer::Watch(Vec::new(), seconds), fresh, resumes).await;
    check("a bookmark", |seconds| Answer::Watch(vec![bookmark(100)], seconds), fresh, resumes).await;
    let error = |_: u64| {
        let status =
            r#"{"kind":"Status","status":"Failure","reason":"InternalError","message":"m","code":500}"#;
        Answer::Watch(vec![format!(r#"{{"type":"ERROR","object":{status}}}"#)], 20)
    };
    check("an error event", error, stale, lists_again).await;
    let undecodable =
        |_: u64| Answer::Watch(vec![r#"{"type":"MODIFIED","object":{"metadata":7}}"#.into()], 20);
    check("an event that does not decode", undecodable, stale, lists_again).await;
    let unversioned =
        |_: u64| Answer::Watch(vec![r#"{"type":"MODIFIED","object":{"metadata":{"name":"a"}}}"#.into()], 20);
    check("an object without a version", unversioned, stale, lists_again).await;
    check("a rejection", |_| rejection(500), stale, resumes).await;
    check("a connection that breaks", |_| Answer::Broken(5), stale, resumes).await;
    check("no answer", |_| Answer::Never, stale, resumes).await;
}

#[tokio::test(start_paused = true)]
async fn server_failing_at_one_version_is_listed_again_after_three_errors() {
    let world = World::listed(Duration::ZERO).await;
    let mut errors = 0;
    world.answer_with(move |call| match call {
        Call::Watch { .. } if errors < 3 => {
            errors += 1;
            let status = r#"{"kind":"Status","status":"Failure","reason":"InternalError","code":500}"#;
            Answer::Watch(vec![format!(r#"{{"type":"ERROR","object":{status}}}"#)], 20)
        }
        call => quiet(call, 200),
    });
    world.until("the second list", MINUTE, |world| world.version() == Some(200)).await;
    world.until("no problem", MINUTE, |world| !world.has_problems()).await;
    world
        .never("stale, or listed again", 5 * MINUTE, |world| {
            world.is_stale() || world.count(Call::is_page) > 2
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn outage_of_15_s_leaves_no_quiet_watch_stale() {
    let world = World::listed(Duration::ZERO).await;
    world.answer_with(|_| rejection(500));
    // The first watch ends after 20 s.
    world.never("stale", Duration::from_secs(35), World::is_stale).await;
    assert!(world.has_problems());
    world.answer_with(|call| quiet(call, 100));
    world.never("stale", 5 * MINUTE, World::is_stale).await;
    assert_eq!((world.count(Call::is_page), world.has_problems()), (1, false));
}

#[tokio::test(start_paused = true)]
async fn server_without_etcd_is_stale_within_two_minutes() {
    let world = World::listed(Duration::ZERO).await;
    world.answer_with(|call| match call {
        Call::Watch { seconds } => Answer::Watch(vec![bookmark(100)], *seconds),
        _ => rejection(500),
    });
    world.until("stale", 2 * MINUTE, World::is_stale).await;
    world.never("fresh", 3 * MINUTE, |world| !world.is_stale()).await;
    world.answer_with(|call| quiet(call, 100));
    world.until("fresh", MINUTE, |world| !world.is_stale()).await;
}

#[tokio::test(start_paused = true)]
async fn removed_resource_is_stale_and_denied_until_listed_again() {
    let world = World::listed(Duration::ZERO).await;
    world.answer_with(|call| match call {
        Call::Discovery => resources(&["pods"]),
        _ => rejection(404),
    });
    world.until("stale", 2 * MINUTE, World::is_stale).await;
    world
        .never("fresh, or silent", 3 * MINUTE, |world| !world.is_stale() || !world.counters.is_refused())
        .await;
    let problems = world.readiness.problems();
    assert!(problems[0].message.contains("does not serve v1/configmaps"), "{problems:?}");
    world.answer_with(|call| quiet(call, 300));
    world.until("the new list", MINUTE, |world| world.version() == Some(300) && !world.is_stale()).await;
    assert!(!world.has_problems() && !world.counters.is_refused());
}

#[tokio::test(start_paused = true)]
async fn unserved_resource_is_not_stale() {
    let world = World::start(Duration::ZERO, |_| resources(&["pods"]));
    world.never("stale", STALE_AFTER * 10, World::is_stale).await;
    world.answer_with(|call| quiet(call, 100));
    world.until("the list", MINUTE, |world| world.version() == Some(100)).await;
}

#[tokio::test(start_paused = true)]
async fn timed_out_page_is_requested_at_half_the_size() {
    let world = World::start(Duration::ZERO, |call| match call {
        Call::Page { limit, from } => match (*limit, from.as_deref()) {
            (500, None) => page(100, "first"),
            // The continue token has expired.
            (250, Some("first")) => rejection(410),
            (250, None) => page(101, "second"),
            (250, Some("second")) => page(101, ""),
            _ => Answer::Never,
        },
        call => quiet(call, 101),
    });
    world.until("the list", 2 * MINUTE, |world| world.version() == Some(101)).await;
    let page = |limit, from: Option<&str>| Call::Page { limit, from: from.map(Into::into) };
    let mut calls = world.calls.lock().unwrap().clone();
    calls.retain(Call::is_page);
    let expected = [
        page(500, None),
        page(500, Some("first")),
        page(250, Some("first")),
        page(250, None),
        page(250, Some("second")),
    ];
    assert_eq!(calls, expected);
}

#[tokio::test(start_paused = true)]
async fn pages_have_a_minimum_size() {
    let world = World::start(Duration::ZERO, |call| match call {
        Call::Page { .. } => Answer::Never,
        call => quiet(call, 100),
    });
    world.until("eight tries", 10 * MINUTE, |world| world.count(Call::is_page) == 8).await;
    let calls = world.calls.lock().unwrap().clone();
    let limits = calls.iter().filter_map(|call| match call {
        Call::Page { limit, .. } => Some(*limit),
        _ => None,
    });
    let (first, least) = (u64::from(LIST_PAGE), u64::from(LIST_PAGE_MIN));
    assert_eq!(
        limits.collect::<Vec<_>>(),
        [first, first / 2, first / 4, first / 8, first / 16, least, least, least]
    );
}
