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
mod tests {
    use super::*;
    use crate::fake_opa::FakeOpa;

    type Texts<'a> = &'a [(&'a str, &'a str)];

    fn put(texts: Texts) -> Changes {
        texts.iter().map(|(id, text)| ((*id).to_owned(), Some((*text).to_owned()))).collect()
    }

    fn ids(texts: &BTreeMap<String, String>) -> Vec<&str> {
        texts.keys().map(String::as_str).collect()
    }

    /// An OPA that holds these modules.
    async fn opa_with(texts: Texts<'_>) -> (FakeOpa, Opa) {
        let (fake, opa) = FakeOpa::start().await;
        let modules = texts.iter().map(|(id, text)| ((*id).to_owned(), (*text).to_owned()));
        fake.with(|world| world.modules = modules.collect());
        (fake, opa)
    }

    async fn check(held: Texts<'_>, wanted: Texts<'_>, refused: &[&str], removals: &[&str]) {
        let (fake, opa) = opa_with(held).await;
        let turned = Rounds::default().turn(&opa, &put(wanted)).await.unwrap();
        assert_eq!(ids(&turned.refused), refused, "{held:?} {wanted:?}");
        assert_eq!(turned.absent, BTreeSet::new(), "{held:?} {wanted:?}");
        let mut expected: BTreeMap<&str, &str> = held.iter().copied().collect();
        expected.extend(wanted.iter().copied().filter(|(id, _)| !refused.contains(id)));
        fake.with(|world| {
            let texts = world.modules.iter().map(|(id, text)| (id.as_str(), text.as_str()));
            assert!(texts.eq(expected), "{held:?} {wanted:?}: {:?}", world.modules);
            let removed = world.log.iter().filter_map(|request| request.strip_prefix("DELETE policies/"));
            let removed: Vec<_> = removed.filter_map(|request| request.strip_suffix(" 200")).collect();
            assert_eq!(removed, removals, "{held:?} {wanted:?}");
        });
    }

    #[tokio::test]
    async fn modules_go_in_and_refused_ones_take_no_others_out() {
        let pair: Texts = &[("a", "has x"), ("b", "has y")];
        // One needs the other, which comes later.
        check(&[], &[("a", "calls y"), ("b", "has y")], &[], &[]).await;
        check(&[("a", "has x")], &[("a", "calls y"), ("b", "has y")], &[], &[]).await;
        // Both are refused for themselves.
        check(pair, &[("a", "has x\nodd"), ("b", "has y\nodd")], &["a", "b"], &[]).await;
        check(pair, &[("a", "has x\ncalls z"), ("b", "has y\nodd"), ("c", "has q")], &["a", "b"], &[]).await;
        // A module that does not change has the rule.
        check(pair, &[("c", "has x"), ("d", "has y")], &["c", "d"], &[]).await;
        // They exchange rules.
        check(pair, &[("a", "has y"), ("b", "has x")], &[], &["a"]).await;
        check(
            &[("a", "has x"), ("b", "has y"), ("c", "has z")],
            &[("a", "has z"), ("b", "has x"), ("c", "has y")],
            &[],
            &["a"],
        )
        .await;
        // A function and its caller get another name.
        check(&[("a", "calls f"), ("b", "has f")], &[("a", "calls g"), ("b", "has g")], &[], &["a"]).await;
        let held: Texts = &[("a", "calls f"), ("b", "calls f"), ("c", "has f")];
        check(held, &[("a", "calls g"), ("b", "calls g"), ("c", "has g")], &[], &["a", "b"]).await;
        // One of the callers is refused for itself: to put all back, the new texts are removed.
        let wanted: Texts = &[("a", "calls g"), ("b", "calls g\nodd"), ("c", "has g")];
        check(held, wanted, &["a", "b", "c"], &["a", "b", "a", "c"]).await;
        // Another pair goes in all the same.
        let pairs: Texts = &[("a", "has x"), ("b", "has y"), ("c", "has z"), ("d", "has q")];
        let wanted: Texts = &[("a", "odd"), ("b", "has y\nhas x"), ("c", "has q"), ("d", "has z")];
        check(pairs, wanted, &["a", "b"], &["a", "c"]).await;
        // One takes over a rule of another one, which is refused for itself: both stay as they were.
        let wanted: Texts = &[("a", "has z\nodd"), ("b", "has y\nhas x")];
        check(&[("a", "has x\nhas z"), ("b", "has y")], wanted, &["a", "b"], &["a"]).await;
    }

    #[tokio::test]
    async fn refused_changes_are_tried_again_only_where_that_may_help() {
        let (fake, opa) = opa_with(&[("a", "has x"), ("b", "has y")]).await;
        let mut rounds = Rounds::default();
        let mut changes = put(&[("a", "broken"), ("b", "calls z")]);
        for _ in 0..2 {
            let turned = rounds.turn(&opa, &changes).await.unwrap();
            assert_eq!(ids(&turned.refused), ["a", "b"]);
        }
        assert_eq!(fake.log(), ["PUT policies/a 400", "PUT policies/b 400"]);
        changes.extend(put(&[("c", "has q")]));
        rounds.turn(&opa, &changes).await.unwrap();
        let log = fake.log();
        assert!(log.iter().all(|request| !request.contains("policies/a")), "{log:?}");
        assert!(log.contains(&"PUT policies/b 400".to_owned()), "{log:?}");
        changes.extend(put(&[("c", "has z")]));
        assert_eq!(ids(&rounds.turn(&opa, &changes).await.unwrap().refused), ["a"]);
        changes.extend(put(&[("a", "has x\ncalls y")]));
        assert_eq!(ids(&rounds.turn(&opa, &changes).await.unwrap().refused), ["a"]);
        fake.log();
        rounds.forget();
        rounds.turn(&opa, &changes).await.unwrap();
        assert!(fake.log().contains(&"PUT policies/a 400".to_owned()));
    }

    #[tokio::test]
    async fn an_error_leaves_nothing_removed() {
        let held: Texts = &[("a", "has x\nhas q"), ("b", "has y"), ("c", "has z")];
        for wanted in [&[("a", "has y"), ("b", "has x")][..], &[("a", "has q\nodd"), ("b", "has y\nhas x")]] {
            let mut errors = 0;
            loop {
                let (fake, opa) = opa_with(held).await;
                fake.with(|world| world.fails_after = Some(errors));
                let mut rounds = Rounds::default();
                let result = rounds.turn(&opa, &put(wanted)).await;
                if result.is_ok() {
                    break;
                }
                fake.with(|world| world.fails_after = None);
                assert_eq!(rounds.put_back(&opa).await.unwrap(), BTreeSet::new());
                let texts = fake.with(|world| world.modules.clone());
                let texts = texts.iter().map(|(id, text)| (id.as_str(), text.as_str()));
                assert!(texts.eq(held.iter().copied()), "after {errors} requests");
                errors += 1;
            }
            assert!(errors > 5, "{wanted:?}: {errors} requests are no trial");
        }
    }
}
