//! A fake API server with outages, and checks that every writer must pass. Time is paused.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::health::Health;
use crate::status::leader::{LEASE, LeaderElector, RENEW_DEADLINE};

pub(crate) const NAMESPACE: &str = "opa-hub";
pub(crate) const LEASES: &str = "/leases";
/// Poll interval of [`eventually`], and precision of all times.
pub(crate) const TICK: Duration = Duration::from_millis(10);
/// Virtual time: longer than any retry.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outage {
    Hang,
    /// 429 with `Retry-After: 1`; kube retries within one call.
    Throttle,
    Status(u16),
}

impl Outage {
    pub(crate) const ALL: [Self; 5] =
        [Self::Hang, Self::Throttle, Self::Status(403), Self::Status(429), Self::Status(503)];
}

#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) started: Instant,
    /// Answered, or dropped by the client.
    pub(crate) ended: Option<Instant>,
    /// `None` until answered.
    pub(crate) status: Option<u16>,
}

impl Call {
    pub(crate) fn is_of(&self, resource: &str) -> bool {
        self.path.contains(resource)
    }

    pub(crate) fn is_write(&self) -> bool {
        self.method != Method::GET
    }
}

/// The newest resource version, and objects by path.
#[derive(Clone, Default)]
pub(crate) struct Cluster(Arc<Mutex<(u64, BTreeMap<String, Value>)>>);

impl Cluster {
    pub(crate) fn delete(&self, resource: &str) {
        self.0.lock().unwrap().1.retain(|path, _| !path.contains(resource));
    }

    fn apply(&self, method: &Method, path: &str, body: &Value) -> (u16, Value) {
        let (newest, objects) = &mut *self.0.lock().unwrap();
        let mut path = path.to_owned();
        if *method == Method::POST {
            path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
        }
        let found = objects.get(&path);
        let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
        let mut next = match (method, found) {
            (&Method::GET, found) => {
                return found.map_or_else(|| failure(404), |found| (200, found.clone()));
            }
            (&Method::POST, Some(_)) => return failure(409),
            (&Method::PUT, found) if found.map(version) != Some(version(body)) => return failure(409),
            (&Method::PATCH, Some(found)) => found.clone(),
            _ => json!({}),
        };
        json_patch::merge(&mut next, body);
        *newest += 1;
        next["metadata"]["resourceVersion"] = json!(newest.to_string());
        objects.insert(path, next.clone());
        (200, next)
    }
}

fn failure(code: u16) -> (u16, Value) {
    // kube recognises a missing object by this reason.
    let reason = if code == 404 { "NotFound" } else { "" };
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "message": "fails on demand", "reason": reason,
        "code": code,
    });
    (code, status)
}

/// A replica's connection to the cluster.
#[derive(Clone, Default)]
pub(crate) struct Link {
    cluster: Cluster,
    outages: Arc<Mutex<BTreeMap<&'static str, Outage>>>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Link {
    pub(crate) fn to(cluster: &Cluster) -> Self {
        Self { cluster: cluster.clone(), ..Self::default() }
    }

    pub(crate) fn fail(&self, resource: &'static str, outage: Outage) {
        self.outages.lock().unwrap().insert(resource, outage);
    }

    pub(crate) fn heal(&self) {
        self.outages.lock().unwrap().clear();
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    pub(crate) fn count(&self, resource: &str, since: Instant) -> usize {
        self.calls().iter().filter(|call| call.is_of(resource) && call.started > since).count()
    }

    /// Start of the last successful renewal.
    pub(crate) fn renewed(&self) -> Option<Instant> {
        let calls = self.calls();
        let renewal = |call: &&Call| call.is_of(LEASES) && call.is_write() && call.status == Some(200);
        calls.iter().rfind(renewal).map(|call| call.started)
    }

    pub(crate) fn client(&self) -> Client {
        let link = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let link = link.clone();
            async move { Ok::<_, Infallible>(link.answer(request).await) }
        });
        Client::new(service, NAMESPACE)
    }

    /// The receiver has not seen the first change.
    pub(crate) fn elect(&self, identity: &str) -> watch::Receiver<bool> {
        let (leads, follower) = watch::channel(false);
        let elector = LeaderElector::new(self.client(), NAMESPACE, "opa-hub-main".into(), identity.into());
        tokio::spawn(elector.run(leads, Health::default(), pending::<()>()));
        follower
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body: Value = serde_json::from_slice(&body.collect_bytes().await.unwrap()).unwrap_or_default();
        loop {
            let call = self.begin(&parts.method, parts.uri.path());
            let (code, answer) = match self.outage(parts.uri.path()) {
                None => self.cluster.apply(&parts.method, parts.uri.path(), &body),
                Some(Outage::Hang) => pending().await,
                Some(Outage::Status(code)) => failure(code),
                Some(Outage::Throttle) => {
                    call.end(429);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            call.end(code);
            let answer = Body::from(serde_json::to_vec(&answer).unwrap());
            return Response::builder().status(code).header("retry-after", "1").body(answer).unwrap();
        }
    }

    fn outage(&self, path: &str) -> Option<Outage> {
        let outages = self.outages.lock().unwrap();
        outages.iter().find(|(resource, _)| path.contains(**resource)).map(|(_, outage)| *outage)
    }

    fn begin(&self, method: &Method, path: &str) -> RunningBundle {
        let mut calls = self.calls.lock().unwrap();
        let started = Instant::now();
        calls.push(Call {
            method: method.clone(),
            path: path.to_owned(),
            started,
            ended: None,
            status: None,
        });
        RunningBundle { calls: Arc::clone(&self.calls), index: calls.len() - 1 }
    }
}

struct RunningBundle {
    calls: Arc<Mutex<Vec<Call>>>,
    index: usize,
}

impl RunningBundle {
    fn end(self, status: u16) {
        self.calls.lock().unwrap()[self.index].status = Some(status);
    }
}

impl Drop for RunningBundle {
    fn drop(&mut self) {
        self.calls.lock().unwrap()[self.index].ended = Some(Instant::now());
    }
}

pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "never: {what}");
        tokio::time::sleep(TICK).await;
    }
}

/// Checks that a writer sends nothing for `resource` after its replica's Lease expired.
pub(crate) async fn check_ends_with_leadership(
    resource: &'static str,
    write: impl Fn(Client, watch::Receiver<bool>, Health),
) {
    for outage in Outage::ALL {
        let cluster = Cluster::default();
        let (old, new) = (Link::to(&cluster), Link::to(&cluster));
        let leads = old.elect("old");
        eventually("the old replica leads", || *leads.borrow()).await;
        old.fail(LEASES, outage);
        old.fail(resource, outage);
        let renewed = old.renewed().unwrap();
        eventually("a renewal fails", || old.count(LEASES, renewed) > 0).await;
        write(old.client(), leads.clone(), Health::default());
        eventually("a write is under way", || old.count(resource, renewed) > 0).await;
        let takes_over = new.elect("new");
        eventually("the new replica leads", || *takes_over.borrow()).await;
        assert!(!*leads.borrow(), "{outage:?}: two leaders");
        assert!(renewed.elapsed() >= LEASE, "{outage:?}: the Lease had not expired");
        old.heal();
        let healed = Instant::now();
        eventually("the old replica sees the new leader", || old.count(LEASES, healed) > 1).await;
        assert_eq!(old.renewed(), Some(renewed), "{outage:?}");
        let deadline = renewed + RENEW_DEADLINE + TICK;
        for call in old.calls().iter().filter(|call| call.is_write() && !call.is_of(LEASES)) {
            let ended = call.ended.is_some_and(|ended| ended <= deadline);
            assert!(ended, "{outage:?}: {call:?} outlives the renew deadline {deadline:?}");
        }
    }
}

/// Checks that a leader's writer reports and retries failed requests for `resource`.
pub(crate) async fn check_reports_and_retries(
    resource: &'static str,
    write: impl Fn(Client, watch::Receiver<bool>, Health),
) {
    let cases = [
        (Outage::Hang, "no answer within 10 s"),
        (Outage::Throttle, "no answer within 10 s"),
        (Outage::Status(503), "fails on demand"),
    ];
    for (outage, text) in cases {
        let (link, readiness) = (Link::default(), Health::default());
        let (_leader, leads) = watch::channel(true);
        link.fail(resource, outage);
        write(link.client(), leads, readiness.clone());
        let is_reported = || readiness.problems().iter().any(|problem| problem.message.contains(text));
        eventually(&format!("{outage:?} is reported as {text:?}"), is_reported).await;
        link.heal();
        eventually("the problem is over", || readiness.problems().is_empty()).await;
        let is_done = |call: &Call| call.is_of(resource) && matches!(call.status, Some(200 | 404));
        assert!(link.calls().iter().any(is_done), "{outage:?}: the request was not retried");
    }
}
