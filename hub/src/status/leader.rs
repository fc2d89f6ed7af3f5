//! Leader election by a Lease (coordination.k8s.io/v1). Serving needs no leader.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::health::Health;
use crate::k8s::{RequestError, report, within};

/// Lease duration, client-go's default.
pub const LEASE: Duration = Duration::from_secs(15);
/// Maximum time of writing without renewal, client-go's default. The margin covers requests in flight.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Interval of acquiring or renewing the Lease, client-go's default.
pub const LEASE_RENEW: Duration = Duration::from_secs(2);
/// Timeout of one Lease attempt. A lost packet must not end leadership.
pub const LEASE_TIMEOUT: Duration = Duration::from_secs(5);
const _: () = assert!(2 * LEASE_RENEW.as_secs() + LEASE_TIMEOUT.as_secs() < RENEW_DEADLINE.as_secs());
const _: () = assert!(RENEW_DEADLINE.as_secs() + LEASE_TIMEOUT.as_secs() <= LEASE.as_secs());

const SUBJECT: &str = "lease";

/// Leader elector for one Lease.
pub struct LeaderElector {
    leases: Api<Lease>,
    name: String,
    identity: String,
    /// Another holder's resourceVersion and when it was first observed: clocks of machines are never compared.
    observed: Option<(String, Instant)>,
}

impl LeaderElector {
    /// Competes for the Lease `name` as `identity`.
    pub fn new(client: Client, namespace: &str, name: String, identity: String) -> Self {
        Self { leases: Api::namespaced(client, namespace), name, identity, observed: None }
    }

    /// Acquires and renews the Lease, and publishes leadership on `leads`. `stop` releases the Lease, so that another
    /// replica can lead at once.
    pub async fn run(
        mut self,
        leads: watch::Sender<bool>,
        readiness: Health,
        stop: impl Future<Output = ()>,
    ) {
        let deadline = watch::Sender::new(Instant::now());
        tokio::select! {
            () = self.elect(&deadline, &readiness) => {}
            () = lead_until(deadline.subscribe(), &leads) => {}
            () = stop => {}
        }
        if publish(&leads, false)
            && let Err(error) = within(LEASE_TIMEOUT, self.release()).await
        {
            tracing::debug!(%error, "releasing the Lease failed");
        }
    }

    async fn elect(&mut self, deadline: &watch::Sender<Instant>, readiness: &Health) {
        loop {
            // Other replicas observe the renewal later, so they expire it later.
            let start = Instant::now();
            match within(LEASE_TIMEOUT, self.try_acquire_or_renew()).await {
                Ok(is_owned) => {
                    deadline.send_replace(if is_owned { start + RENEW_DEADLINE } else { start });
                    readiness.problem(SUBJECT, None);
                }
                Err(error) => self.report(&error, readiness),
            }
            tokio::time::sleep(LEASE_RENEW).await;
        }
    }

    async fn try_acquire_or_renew(&mut self) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.leases.get_opt(&self.name).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.spec(0)) };
            return is_written(self.leases.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.take().unwrap_or_default();
        let holder = spec.holder_identity.unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or_default();
        if holder == self.identity {
            let acquired = spec.acquire_time;
            lease.spec = Some(LeaseSpec { acquire_time: acquired, ..self.spec(transitions) });
        } else {
            let version = lease.metadata.resource_version.clone().unwrap_or_default();
            let since = match &self.observed {
                Some((observed, since)) if *observed == version => *since,
                _ => Instant::now(),
            };
            self.observed = Some((version, since));
            let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
            let duration = seconds.map_or(LEASE, Duration::from_secs);
            if !holder.is_empty() && since.elapsed() < duration {
                return Ok(false);
            }
            lease.spec = Some(self.spec(transitions + 1));
        }
        is_written(self.leases.replace(&self.name, &PostParams::default(), &lease).await)
    }

    async fn release(&self) -> Result<(), kube::Error> {
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

    fn report(&self, error: &RequestError, readiness: &Health) {
        let name = &self.name;
        let message = if error.is_forbidden() {
            format!(
                "renewing Lease {name} failed: forbidden; grant the hub the verbs get, create, update on \
                 leases.coordination.k8s.io; until then the hub writes no verdicts"
            )
        } else {
            format!("renewing Lease {name} failed: {error}")
        };
        report(readiness, SUBJECT, message);
    }
}

/// A timer independent of requests: none can prolong leadership.
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

/// Returns whether leadership changed.
fn publish(leads: &watch::Sender<bool>, leader: bool) -> bool {
    let is_change = leads.send_if_modified(|published| std::mem::replace(published, leader) != leader);
    if is_change {
        tracing::info!(leader, "leadership changed");
    }
    is_change
}

/// `false` after a conflict.
fn is_written(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        other => other.map(|_| true),
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::status::fake_api::{Cluster, LEASES, Link, NAMESPACE, Outage, TICK, eventually};

    #[tokio::test(start_paused = true)]
    async fn leadership_ends_at_the_renew_deadline() {
        for outage in Outage::ALL {
            let link = Link::default();
            let leads = link.elect("a");
            eventually("a leads", || *leads.borrow()).await;
            link.fail(LEASES, outage);
            eventually("a no longer leads", || !*leads.borrow()).await;
            let age = link.renewed().unwrap().elapsed();
            assert!((RENEW_DEADLINE..=RENEW_DEADLINE + 2 * TICK).contains(&age), "{outage:?}: {age:?}");
            link.heal();
            eventually("a leads again", || *leads.borrow()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_lost_renewal_does_not_end_leadership() {
        let link = Link::default();
        let mut leads = link.elect("a");
        eventually("a leads", || *leads.borrow()).await;
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
            let elector = LeaderElector::new(link.client(), NAMESPACE, "opa-hub-main".into(), "a".into());
            let run = tokio::spawn(elector.run(leads, Health::default(), stop.clone().cancelled_owned()));
            eventually("a leads", || *leading.borrow()).await;
            if let Some(outage) = outage {
                link.fail(LEASES, outage);
            }
            let stopped = Instant::now();
            stop.cancel();
            eventually("the elector ends", || run.is_finished()).await;
            assert!(!*leading.borrow() && stopped.elapsed() <= LEASE_TIMEOUT + 2 * TICK, "{outage:?}");
            let next = Link::to(&cluster).elect("b");
            eventually("another replica leads", || *next.borrow()).await;
            assert_eq!(outage.is_none(), stopped.elapsed() < LEASE, "{outage:?}");
        }
    }
}
