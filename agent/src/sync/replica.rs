//! State between and during sessions.

use super::applied::{AppliedState, MarkerTrust};
use super::freshness::Freshness;
use super::last_good::LastGood;
use super::opa_watch::{ExpectedMarker, OpaWatch};
use crate::config::{Config, Delivery};
use crate::hub::HubClient;
use crate::opa::{Applier, Layout, OpaClient};
use crate::server::LocalServer;
use crate::status::Status;

/// One OPA that follows a hub.
pub struct Replica {
    pub(super) applier: Applier,
    pub(super) hub: HubClient,
    pub(super) policies: Policies,
    pub(super) status: Status,
    pub(super) last_good: LastGood,
    pub(super) repair: Repair,
    pub(super) freshness: Freshness,
    pub(super) expected: ExpectedMarker,
}

pub(super) struct Policies {
    pub(super) delivery: Delivery,
    pub(super) server: LocalServer,
    pub(super) layout: Layout,
}

/// Consequences of earlier sessions.
pub(super) struct Repair {
    pub(super) trust: MarkerTrust,
    /// New data may need the path of an old package.
    pub(super) modules_first: bool,
    /// OPA does not activate the latest policies.
    pub(super) awaits_activation: bool,
    pub(super) rejections: u32,
}

impl Replica {
    /// Creates a disconnected replica.
    pub fn new(config: &Config, server: LocalServer, status: Status) -> anyhow::Result<Self> {
        let opa = OpaClient::new(config.opa.clone())?;
        let hub = HubClient::new(
            config.hubs.clone(),
            config.hub_ca_file.as_deref(),
            config.bundle.clone(),
            config.namespace.clone(),
        )?;
        Ok(Self {
            applier: Applier::new(opa, config.bundle.clone()),
            hub,
            policies: Policies { delivery: config.delivery, server, layout: Layout::default() },
            status,
            last_good: LastGood::open(config),
            repair: Repair {
                trust: MarkerTrust::Full,
                modules_first: false,
                awaits_activation: false,
                rejections: 0,
            },
            freshness: Freshness::new(),
            expected: ExpectedMarker::Unwritten,
        })
    }

    pub(super) fn watch_opa(&self) -> OpaWatch<'_> {
        OpaWatch::new(&self.applier, &self.policies.server, self.expected)
    }

    /// Ends early if OPA restarts.
    pub(super) async fn back_off(&mut self) {
        let watch = OpaWatch::new(&self.applier, &self.policies.server, self.expected);
        // The next session reports errors.
        _ = watch.guard(self.hub.back_off()).await;
    }

    pub(super) async fn save(&mut self, applied: &AppliedState) {
        self.last_good.save(applied, self.policies.delivery).await;
    }

    pub(super) fn report_applied(&self, applied: &AppliedState) {
        self.status.with(|state| {
            state.target = Some(applied.revision());
            state.applied = applied.marker.revision;
        });
    }
}
