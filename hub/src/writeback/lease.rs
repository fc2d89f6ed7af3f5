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

use super::{is_forbidden, words};
use crate::config::{LEASE, LEASE_RENEW};
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

    /// Takes the Lease when it is free and renews it while it is ours; `leads` says whether it is. Once `stop` is
    /// ready the Lease is given back, so that another replica need not wait for it to run out.
    pub async fn run(
        mut self,
        leads: watch::Sender<bool>,
        readiness: Readiness,
        stop: impl Future<Output = ()>,
    ) {
        let strive = async {
            let mut held_until = Instant::now();
            loop {
                let asked = Instant::now();
                match self.strive().await {
                    Ok(held) => {
                        held_until = if held { asked + LEASE } else { asked };
                        readiness.problem(SUBJECT, None);
                    }
                    Err(error) => self.complain(&error, &readiness),
                }
                // A margin for whoever is in the middle of a write when it runs out.
                let leading = Instant::now() + LEASE_RENEW < held_until;
                leads.send_if_modified(|led| std::mem::replace(led, leading) != leading);
                tokio::time::sleep(LEASE_RENEW).await;
            }
        };
        tokio::select! {
            never = strive => never,
            () = stop => {}
        }
        if leads.send_replace(false)
            && let Err(error) = self.give_back().await
        {
            tracing::debug!(%error, "the Lease was not given back");
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
            tracing::info!(lease = self.name, "writing for all replicas from now on");
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

    fn complain(&self, error: &kube::Error, readiness: &Readiness) {
        let because = if is_forbidden(error) {
            format!(
                "forbidden: grant the hub the verbs get, create, update on leases.coordination.k8s.io {}; until then \
                 it writes no verdicts",
                self.name
            )
        } else {
            format!("cannot renew the Lease {}: {}", self.name, words(error))
        };
        if readiness.is_news(SUBJECT, &because) {
            tracing::warn!("{because}");
        }
        readiness.problem(SUBJECT, Some(because));
    }
}

/// Whether a write went through; somebody else's came first when not.
fn settled(result: Result<Lease, kube::Error>) -> Result<bool, kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        other => other.map(|_| true),
    }
}
