//! Writes verdicts and statuses to the cluster. Only the leader writes.

pub mod bundles;
pub mod configmaps;
#[cfg(test)]
pub(crate) mod fake_api;
pub mod leader;
