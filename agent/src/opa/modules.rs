//! Applies modules in an order that OPA accepts: each must compile with all others.
//!
//! Passes repeat while there is progress. Modules that exchange rules have no order, nor does a function whose arguments
//! change with its callers. Then a trial removes the old versions that OPA's error names, and rolls back on failure.

use std::collections::{BTreeMap, BTreeSet};

use opa_hub_proto::revision::Digest;
use serde::Deserialize;

use super::client::{Error, OpaClient};

/// Modules to put and to delete (`None`).
pub(crate) type ModuleChanges = BTreeMap<String, Option<String>>;

type Pending<'a> = BTreeMap<&'a str, Option<&'a str>>;

/// OPA's messages by module id.
pub(crate) type Rejections = BTreeMap<String, String>;

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ModuleResults {
    pub(super) rejected: Rejections,
    /// Modules whose old version OPA rejected too.
    pub(super) absent: BTreeSet<String>,
}

#[derive(Default)]
pub(super) struct ModuleApplier {
    rejections: BTreeMap<String, Rejection>,
    /// Modules before an unfinished trial.
    rollback: ModuleChanges,
}

struct Rejection {
    /// `None` for a deletion.
    digest: Option<Digest>,
    message: String,
}

fn digest(text: Option<&str>) -> Option<Digest> {
    text.map(|text| Digest::of(text.as_bytes()))
}

fn all_pending(changes: &ModuleChanges) -> Pending<'_> {
    changes.iter().map(|(id, text)| (id.as_str(), text.as_deref())).collect()
}

impl ModuleApplier {
    /// Retries a rejected change only if other changed modules, or data, may matter.
    pub(super) async fn apply(
        &mut self,
        opa: &OpaClient,
        changes: &ModuleChanges,
    ) -> Result<ModuleResults, Error> {
        self.rollback.retain(|id, _| !changes.contains_key(id));
        let mut rejected = BTreeMap::new();
        let mut pending = all_pending(changes);
        let has_new = pending.iter().any(|(id, text)| self.rejection(id, *text).is_none());
        pending.retain(|id, text| match self.rejection(id, *text) {
            Some(rejection)
                if is_permanent(&rejection.message) || !has_new && !depends_on_data(&rejection.message) =>
            {
                rejected.insert((*id).to_owned(), rejection.message.clone());
                false
            }
            _ => true,
        });
        let (stuck, absent) = self.apply_pending(opa, &mut pending).await?;
        rejected.extend(stuck);
        let rejection = |(id, message): (&String, &String)| {
            (id.clone(), Rejection { digest: digest(changes[id].as_deref()), message: message.clone() })
        };
        self.rejections = rejected.iter().map(rejection).collect();
        Ok(ModuleResults { rejected, absent })
    }

    /// Undoes a trial. Returns the modules that OPA rejects.
    pub(super) async fn roll_back(&mut self, opa: &OpaClient) -> Result<BTreeSet<String>, Error> {
        let mut pending = all_pending(&self.rollback);
        apply_until_stuck(opa, &mut pending).await?;
        if !pending.is_empty() {
            for id in pending.keys() {
                match opa.delete_module(id).await {
                    Err(error) if !error.is_permanent() => return Err(error),
                    _ => {}
                }
            }
            apply_until_stuck(opa, &mut pending).await?;
        }
        let absent =
            pending.into_iter().filter(|(_, text)| text.is_some()).map(|(id, _)| id.to_owned()).collect();
        self.rollback.clear();
        Ok(absent)
    }

    pub(super) fn is_interrupted(&self) -> bool {
        !self.rollback.is_empty()
    }

    /// Retries changes that may depend on something new in OPA, e.g. another bundle.
    pub(super) fn allow_retries(&mut self) {
        self.rejections.retain(|_, rejection| is_permanent(&rejection.message));
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn rejection(&self, id: &str, text: Option<&str>) -> Option<&Rejection> {
        self.rejections.get(id).filter(|rejection| rejection.digest == digest(text))
    }

    /// Returns rejected changes and lost modules.
    async fn apply_pending<'a>(
        &mut self,
        opa: &OpaClient,
        pending: &mut Pending<'a>,
    ) -> Result<(Rejections, BTreeSet<String>), Error> {
        let mut absent: BTreeSet<String> = BTreeSet::new();
        let mut tried: BTreeSet<&'a str> = BTreeSet::new();
        let mut stuck = apply_until_stuck(opa, pending).await?;
        let is_named =
            |id: &str, stuck: &Rejections| stuck.iter().any(|(other, message)| names(other, message, id));
        while let Some(id) = first_put(pending, |id| !tried.contains(id) && is_named(id, &stuck)) {
            if let Some(rejected) = self.remove_and_retry(opa, id, pending, &stuck, &mut tried).await? {
                self.rollback.clear();
                pending.retain(|id, _| rejected.contains_key(*id));
                stuck = rejected;
            } else {
                absent.extend(self.roll_back(opa).await?);
            }
        }
        absent.retain(|id| stuck.contains_key(id));
        Ok((stuck, absent))
    }

    /// Removes `id` and modules that related errors name, until OPA accepts their new versions. Returns the remaining
    /// rejections, `None` after a failure.
    async fn remove_and_retry<'a>(
        &mut self,
        opa: &OpaClient,
        id: &'a str,
        pending: &Pending<'a>,
        rejected: &Rejections,
        tried: &mut BTreeSet<&'a str>,
    ) -> Result<Option<Rejections>, Error> {
        let mut before = ModuleChanges::new();
        for id in pending.keys() {
            before.insert((*id).to_owned(), opa.module(id).await?);
        }
        self.rollback = before;
        let mut pending = pending.clone();
        let waiting = rejected.iter().filter(|(other, message)| names(other, message, id));
        let mut group: BTreeSet<&str> = waiting.map(|(other, _)| other.as_str()).collect();
        let mut removed = BTreeSet::new();
        let mut next = id;
        loop {
            tried.insert(next);
            group.insert(next);
            removed.insert(next);
            match opa.delete_module(next).await {
                Err(error) if error.is_permanent() => return Ok(None),
                other => other?,
            }
            tracing::warn!(
                module = next,
                reason = "another module needs its new version",
                "module removed temporarily"
            );
            let stuck = apply_until_stuck(opa, &mut pending).await?;
            if removed.iter().all(|id| !pending.contains_key(id)) {
                return Ok(Some(stuck));
            }
            let is_named = |id: &str| {
                stuck
                    .iter()
                    .any(|(other, message)| group.contains(other.as_str()) && names(other, message, id))
            };
            match first_put(&pending, |id| !removed.contains(id) && is_named(id)) {
                Some(id) => next = id,
                None => return Ok(None),
            }
        }
    }
}

fn names(other: &str, message: &str, id: &str) -> bool {
    other != id && message.contains(&format!("\"{id}\""))
}

fn first_put<'a>(pending: &Pending<'a>, matches: impl Fn(&str) -> bool) -> Option<&'a str> {
    pending.iter().filter(|(_, text)| text.is_some()).map(|(id, _)| *id).find(|id| matches(id))
}

/// Whether a text does not parse. Undefined functions may exist later: OPA's error is the same for built-in functions.
fn is_permanent(message: &str) -> bool {
    #[derive(Deserialize)]
    struct Response {
        errors: Vec<Cause>,
    }
    #[derive(Deserialize)]
    struct Cause {
        code: String,
    }
    let is_syntax = |cause: &Cause| cause.code == "rego_parse_error";
    let parsed = serde_json::from_str::<Response>(message);
    parsed.is_ok_and(|response| !response.errors.is_empty() && response.errors.iter().all(is_syntax))
}

/// Data may change too (OPA v1/ast/conflicts.go).
fn depends_on_data(message: &str) -> bool {
    message.contains("conflicting rule for data path")
}

/// Returns the rejections of the last pass.
async fn apply_until_stuck(opa: &OpaClient, pending: &mut Pending<'_>) -> Result<Rejections, Error> {
    loop {
        let before = pending.len();
        let mut rejected = BTreeMap::new();
        // Deleting first would undefine more rules.
        for is_delete in [false, true] {
            let ids: Vec<_> =
                pending.iter().filter(|(_, text)| text.is_none() == is_delete).map(|(id, _)| *id).collect();
            for id in ids {
                let result = match pending[id] {
                    Some(text) => opa.put_module(id, text.to_owned()).await,
                    None => opa.delete_module(id).await,
                };
                match result {
                    Ok(()) => _ = pending.remove(id),
                    Err(error) if !error.is_permanent() => return Err(error),
                    Err(error) => _ = rejected.insert(id.to_owned(), error.message()),
                }
            }
        }
        if pending.is_empty() || pending.len() == before {
            return Ok(rejected);
        }
    }
}

#[cfg(test)]
mod tests;
