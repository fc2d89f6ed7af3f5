//! Modules one by one into an OPA that takes each only if it compiles with all that it has then.
//!
//! A module may need one that comes later, so rounds go on while there is progress. Two modules that exchange rules go in
//! no order, nor does a function with its callers when its arguments change. OPA's refusal of one then names the others:
//! their old texts are removed first, and for that moment their rules are undefined. Unless their new texts go in then,
//! everything is put back.

use std::collections::{BTreeMap, BTreeSet};

use opa_hub_proto::revision::Digest;
use serde::Deserialize;

use crate::opa::{Error, Opa};

/// Texts to put (`Some`) and ids to remove (`None`).
pub type Changes = BTreeMap<String, Option<String>>;

/// Changes that OPA has not taken yet.
type Open<'a> = BTreeMap<&'a str, Option<&'a str>>;

/// OPA's words by the ids of the modules that it refuses.
pub type Refusals = BTreeMap<String, String>;

/// Result of a change of modules.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Turned {
    /// Modules that OPA refuses, and its words. It keeps the old ones.
    pub refused: Refusals,
    /// Modules of these that OPA has lost: it refused to take the old one back.
    pub absent: BTreeSet<String>,
}

/// State of the modules of one OPA between changes.
#[derive(Default)]
pub struct Rounds {
    /// Changes that OPA refused last.
    refused: BTreeMap<String, Refusal>,
    /// Modules as they were before the trial that is under way or that an error ended.
    aside: Changes,
}

/// A change that OPA refuses.
struct Refusal {
    /// Digest of the text; `None`: OPA refuses to remove the module.
    text: Option<Digest>,
    words: String,
}

fn digest(text: Option<&str>) -> Option<Digest> {
    text.map(|text| Digest::of(text.as_bytes()))
}

fn open_of(changes: &Changes) -> Open<'_> {
    changes.iter().map(|(id, text)| (id.as_str(), text.as_deref())).collect()
}

impl Rounds {
    /// Makes `changes` in an order that OPA takes. A change that OPA refused before is tried again only where other modules
    /// may be the reason and some change with it, or where data may be.
    pub async fn turn(&mut self, opa: &Opa, changes: &Changes) -> Result<Turned, Error> {
        self.aside.retain(|id, _| !changes.contains_key(id));
        let mut refused = BTreeMap::new();
        let mut open = open_of(changes);
        let is_news = open.iter().any(|(id, text)| self.known(id, *text).is_none());
        open.retain(|id, text| match self.known(id, *text) {
            Some(refusal) if is_final(&refusal.words) || !is_news && !is_for_data(&refusal.words) => {
                refused.insert((*id).to_owned(), refusal.words.clone());
                false
            }
            _ => true,
        });
        let (stuck, absent) = self.apply(opa, &mut open).await?;
        refused.extend(stuck);
        let refusal = |(id, words): (&String, &String)| {
            (id.clone(), Refusal { text: digest(changes[id].as_deref()), words: words.clone() })
        };
        self.refused = refused.iter().map(refusal).collect();
        Ok(Turned { refused, absent })
    }

    /// Puts back what a trial changed, also one that an error ended. Returns the modules that OPA refuses to take back.
    pub async fn put_back(&mut self, opa: &Opa) -> Result<BTreeSet<String>, Error> {
        let mut open = open_of(&self.aside);
        go_round(opa, &mut open).await?;
        if !open.is_empty() {
            // New texts of the trial may keep the old ones out.
            for id in open.keys() {
                match opa.delete_module(id).await {
                    Err(error) if !error.is_verdict() => return Err(error),
                    _ => {}
                }
            }
            go_round(opa, &mut open).await?;
        }
        let absent =
            open.into_iter().filter(|(_, text)| text.is_some()).map(|(id, _)| id.to_owned()).collect();
        self.aside.clear();
        Ok(absent)
    }

    /// Whether a trial was cut off.
    pub fn is_cut_off(&self) -> bool {
        !self.aside.is_empty()
    }

    /// Lets modules be tried again that OPA refused for what may be there now, e.g. a function of a bundle from elsewhere.
    pub fn retry(&mut self) {
        self.refused.retain(|_, refusal| is_final(&refusal.words));
    }

    /// Forgets all: OPA restarted.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// The refusal of this change; `None` where OPA was never given it.
    fn known(&self, id: &str, text: Option<&str>) -> Option<&Refusal> {
        self.refused.get(id).filter(|refusal| refusal.text == digest(text))
    }

    /// Makes the changes in `open`. Returns the changes that OPA refuses, and modules that it has lost.
    async fn apply<'a>(
        &mut self,
        opa: &Opa,
        open: &mut Open<'a>,
    ) -> Result<(Refusals, BTreeSet<String>), Error> {
        let mut absent: BTreeSet<String> = BTreeSet::new();
        let mut tried: BTreeSet<&'a str> = BTreeSet::new();
        let mut stuck = go_round(opa, open).await?;
        let is_named =
            |id: &str, stuck: &Refusals| stuck.iter().any(|(other, words)| names(other, words, id));
        while let Some(id) = first(open, |id| !tried.contains(id) && is_named(id, &stuck)) {
            if let Some(words) = self.make_way(opa, id, open, &stuck, &mut tried).await? {
                self.aside.clear();
                open.retain(|id, _| words.contains_key(*id));
                stuck = words;
            } else {
                absent.extend(self.put_back(opa).await?);
            }
        }
        absent.retain(|id| stuck.contains_key(id));
        Ok((stuck, absent))
    }

    /// Removes the module `id`, then others that the same refusals name, until what was removed is in with its new text.
    /// Returns what OPA still refuses; `None` where that is one of the removed, so that all is to be put back.
    async fn make_way<'a>(
        &mut self,
        opa: &Opa,
        id: &'a str,
        open: &Open<'a>,
        refused: &Refusals,
        tried: &mut BTreeSet<&'a str>,
    ) -> Result<Option<Refusals>, Error> {
        let mut before = Changes::new();
        for id in open.keys() {
            before.insert((*id).to_owned(), opa.module(id).await?);
        }
        self.aside = before;
        let mut open = open.clone();
        let waiting = refused.iter().filter(|(other, words)| names(other, words, id));
        let mut group: BTreeSet<&str> = waiting.map(|(other, _)| other.as_str()).collect();
        let mut removed = BTreeSet::new();
        let mut next = id;
        loop {
            tried.insert(next);
            group.insert(next);
            removed.insert(next);
            match opa.delete_module(next).await {
                // Modules that stay need it.
                Err(error) if error.is_verdict() => return Ok(None),
                other => other?,
            }
            tracing::warn!(module = next, "module removed for a moment: another one waits for its new text");
            let stuck = go_round(opa, &mut open).await?;
            if removed.iter().all(|id| !open.contains_key(id)) {
                return Ok(Some(stuck));
            }
            let is_named = |id: &str| {
                stuck.iter().any(|(other, words)| group.contains(other.as_str()) && names(other, words, id))
            };
            match first(&open, |id| !removed.contains(id) && is_named(id)) {
                Some(id) => next = id,
                None => return Ok(None),
            }
        }
    }
}

/// Whether the refusal of the module `other` names the module `id`.
fn names(other: &str, words: &str, id: &str) -> bool {
    other != id && words.contains(&format!("\"{id}\""))
}

/// The first module to put that `is_wanted`.
fn first<'a>(open: &Open<'a>, is_wanted: impl Fn(&str) -> bool) -> Option<&'a str> {
    open.iter().filter(|(_, text)| text.is_some()).map(|(id, _)| *id).find(|id| is_wanted(id))
}

/// Whether OPA refuses a text for itself alone: one that does not parse. A function that is undefined may be a built-in one
/// that this OPA lacks, or one of the same package in a module that comes later: OPA's words are the same.
fn is_final(words: &str) -> bool {
    #[derive(Deserialize)]
    struct Refused {
        errors: Vec<Cause>,
    }
    #[derive(Deserialize)]
    struct Cause {
        code: String,
    }
    let is_alone = |cause: &Cause| cause.code == "rego_parse_error";
    let parsed = serde_json::from_str::<Refused>(words);
    parsed.is_ok_and(|refused| !refused.errors.is_empty() && refused.errors.iter().all(is_alone))
}

/// Whether OPA refuses a module for data that lies in its place: data changes too (OPA v1/ast/conflicts.go).
fn is_for_data(words: &str) -> bool {
    words.contains("conflicting rule for data path")
}

/// Goes round until nothing is open or nothing moves. What stays open is what OPA refuses, with its words.
async fn go_round(opa: &Opa, open: &mut Open<'_>) -> Result<Refusals, Error> {
    loop {
        let before = open.len();
        let mut refused = BTreeMap::new();
        // First what is put, then what is removed: the other way round only when nothing else helps.
        for removing in [false, true] {
            let turn: Vec<_> =
                open.iter().filter(|(_, text)| text.is_none() == removing).map(|(id, _)| *id).collect();
            for id in turn {
                let result = match open[id] {
                    Some(text) => opa.put_module(id, text.to_owned()).await,
                    None => opa.delete_module(id).await,
                };
                match result {
                    Ok(()) => _ = open.remove(id),
                    Err(error) if !error.is_verdict() => return Err(error),
                    Err(error) => _ = refused.insert(id.to_owned(), error.words()),
                }
            }
        }
        if open.is_empty() || open.len() == before {
            return Ok(refused);
        }
    }
}

#[cfg(test)]
mod tests;
