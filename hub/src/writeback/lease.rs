//! Which replica writes: the holder of a Lease (coordination.k8s.io/v1). Serving needs no leader; a hub that may not
//! have the Lease serves as well as any.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{RequestError, within};
use crate::config::{LEASE, LEASE_RENEW, LEASE_TIMEOUT, RENEW_DEADLINE};
use crate::readiness::Readiness;

/// What [`Readiness`] calls it.
const SUBJECT: &str = "lease";

/// Strives for one Lease.
pub struct Striving {
    leases: Api<Lease>,
    name: String,
    identity: String,
    /// The resourceVersion of another's Lease, and since when it was not renewed. Clocks are not compared.
    seen: Option<(String, Instant)>,
}

impl Striving {
    /// For the Lease `name` in `namespace`, as `identity`.
    pub fn new(client: Client, namespace: &str, name: String, identity: String) -> Self {
        Self { leases: Api::namespaced(client, namespace), name, identity, seen: None }
    }

    /// Acquires the Lease when it is free and renews it while held. Publishes on `leads` whether this replica is the
    /// leader. On `stop` the Lease is released, so that another replica need not wait until it expires.
    pub async fn run(
        mut self,
        leads: watch::Sender<bool>,
        readiness: Readiness,
        stop: impl Future<Output = ()>,
    ) {
        let deadline = watch::Sender::new(Instant::now());
        tokio::select! {
            () = self.elect(&deadline, &readiness) => {}
            () = lead_until(deadline.subscribe(), &leads) => {}
            () = stop => {}
        }
        if publish(&leads, false)
            && let Err(error) = within(LEASE_TIMEOUT, self.give_back()).await
        {
            tracing::debug!(%error, "release of the Lease failed");
        }
    }

    /// Tries to acquire or renew the Lease until it is dropped, and moves the renew `deadline`.
    async fn elect(&mut self, deadline: &watch::Sender<Instant>, readiness: &Readiness) {
        loop {
            // Other replicas see a renewal after this moment: their clock for it starts later.
            let start = Instant::now();
            match within(LEASE_TIMEOUT, self.strive()).await {
                Ok(held) => {
                    deadline.send_replace(if held { start + RENEW_DEADLINE } else { start });
                    readiness.problem(SUBJECT, None);
                }
                Err(error) => self.complain(&error, readiness),
            }
            tokio::time::sleep(LEASE_RENEW).await;
        }
    }

    async fn strive(&mut self) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.leases.get_opt(&self.name).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.spec(0)) };
            return settled(self.leases.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.take().unwrap_or_default();
        let holder = spec.holder_identity.unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or_default();
        if holder == self.identity {
            let acquired = spec.acquire_time;
            lease.spec = Some(LeaseSpec { acquire_time: acquired, ..self.spec(transitions) });
        } else {
            let version = lease.metadata.resource_version.clone().unwrap_or_default();
            let since = match &self.seen {
                Some((seen, since)) if *seen == version => *since,
                _ => Instant::now(),
            };
            self.seen = Some((version, since));
            let lasts = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
            let lasts = lasts.map_or(LEASE, Duration::from_secs);
            if !holder.is_empty() && since.elapsed() < lasts {
                return Ok(false);
            }
            lease.spec = Some(self.spec(transitions + 1));
        }
        settled(self.leases.replace(&self.name, &PostParams::default(), &lease).await)
    }

    async fn give_back(&self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.leases.get_opt(&self.name).await? else { return Ok(()) };
        let Some(spec) =
            lease.spec.as_mut().filter(|spec| spec.holder_identity.as_ref() == Some(&self.identity))
        else {
            return Ok(());
        };
        spec.holder_identity = None;
        self.leases.replace(&self.name, &PostParams::default(), &lease).await.map(drop)
    }

    fn spec(&self, transitions: i32) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }

    fn complain(&self, error: &RequestError, readiness: &Readiness) {
        let because = if error.is_forbidden() {
            format!(
                "forbidden: grant the hub the verbs get, create, update on leases.coordination.k8s.io {}; until then \
                 it writes no verdicts",
                self.name
            )
        } else {
            format!("cannot renew the Lease {}: {error}", self.name)
        };
        if readiness.is_news(SUBJECT, &because) {
            tracing::warn!("{because}");
        }
        readiness.problem(SUBJECT, Some(because));
    }
}

/// Publishes leadership until the renew `deadline`. A timer beside the requests: none of them can prolong leadership.
async fn lead_until(mut deadline: watch::Receiver<Instant>, leads: &watch::Sender<bool>) {
    loop {
        let until = *deadline.borrow_and_update();
        let leader = Instant::now() < until;
        publish(leads, leader);
        tokio::select! {
            _ = deadline.changed() => {}
            () = tokio::time::sleep_until(until), if leader => {}
        }
    }
}

/// Publishes whether this replica is the `leader`. Returns whether that is a change.
fn publish(leads: &watch::Sender<bool>, leader: bool) -> bool {
    let is_change = leads.send_if_modified(|led| std::mem::replace(led, leader) != leader);
    if is_change {
        tracing::info!(leader, "leadership changed");
    }
    is_change
}

/// Whether a write went through; somebody else's came first when not.
fn settled(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        other => other.map(|_| true),
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::writeback::fake_api::{Cluster, LEASES, Link, NAMESPACE, Outage, TICK, eventually};

    #[tokio::test(start_paused = true)]
    async fn leadership_ends_at_the_renew_deadline() {
        for outage in Outage::ALL {
            let link = Link::default();
            let leads = link.elect("a");
            eventually("it leads", || *leads.borrow()).await;
            link.fail(LEASES, outage);
            eventually("it no longer leads", || !*leads.borrow()).await;
            let age = link.renewed().unwrap().elapsed();
            assert!((RENEW_DEADLINE..=RENEW_DEADLINE + 2 * TICK).contains(&age), "{outage:?}: {age:?}");
            link.heal();
            eventually("it leads again", || *leads.borrow()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_lost_renewal_does_not_end_leadership() {
        let link = Link::default();
        let mut leads = link.elect("a");
        eventually("it leads", || *leads.borrow()).await;
        leads.mark_unchanged();
        let renewed = link.renewed();
        link.fail(LEASES, Outage::Hang);
        eventually("a renewal hangs", || link.calls().iter().any(|call| call.ended.is_none())).await;
        link.heal();
        eventually("the Lease is renewed", || link.renewed() > renewed).await;
        assert!(!leads.has_changed().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn release_lets_another_replica_lead_and_has_a_time_limit() {
        for outage in [None, Some(Outage::Hang), Some(Outage::Throttle)] {
            let cluster = Cluster::default();
            let link = Link::to(&cluster);
            let (leads, leading) = watch::channel(false);
            let stop = CancellationToken::new();
            let elector = Striving::new(link.client(), NAMESPACE, "opa-hub-main".into(), "a".into());
            let run = tokio::spawn(elector.run(leads, Readiness::default(), stop.clone().cancelled_owned()));
            eventually("it leads", || *leading.borrow()).await;
            if let Some(outage) = outage {
                link.fail(LEASES, outage);
            }
            let stopped = Instant::now();
            stop.cancel();
            eventually("it ends", || run.is_finished()).await;
            assert!(!*leading.borrow() && stopped.elapsed() <= LEASE_TIMEOUT + 2 * TICK, "{outage:?}");
            let next = Link::to(&cluster).elect("b");
            eventually("another replica leads", || *next.borrow()).await;
            assert_eq!(outage.is_none(), stopped.elapsed() < LEASE, "{outage:?}");
        }
    }
}
