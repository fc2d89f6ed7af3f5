//! Modules one by one into an OPA that takes each only if it compiles with all that it has then.
//!
//! A module may need one that comes later, so it goes round while there is progress. Two that take over each other's
//! rules go in no order: then the old one of a pair is taken out first, and for that moment its rules are undefined.

use std::collections::{BTreeMap, BTreeSet};

use crate::opa::{Error, Opa};

/// What is to be: texts to put (`Some`) and ids to remove (`None`).
pub type Changes = BTreeMap<String, Option<String>>;

/// What came of it.
#[derive(Default)]
pub struct Turned {
    /// What OPA refuses to the end, and why. It keeps what it had.
    pub refused: BTreeMap<String, String>,
    /// Of these, what it does not have any more: it refused to take the old one back.
    pub absent: BTreeSet<String>,
}

/// Makes `changes` in an order that OPA takes.
pub async fn turn(opa: &Opa, changes: &Changes) -> Result<Turned, Error> {
    let mut open: BTreeMap<&String, &Option<String>> = changes.iter().collect();
    let mut refused = round_and_round(opa, &mut open).await?;
    let mut aside: BTreeMap<String, String> = BTreeMap::new();
    let stuck: Vec<_> = open.iter().filter(|(_, text)| text.is_some()).map(|(id, _)| (*id).clone()).collect();
    for id in stuck.iter().filter(|_| stuck.len() > 1) {
        if !open.contains_key(id) {
            continue;
        }
        let Some(old) = opa.module(id).await? else { continue };
        match opa.delete_module(id).await {
            Ok(()) => _ = aside.insert(id.clone(), old),
            Err(error) if error.is_verdict() => continue,
            Err(error) => return Err(error),
        }
        tracing::warn!(module = id, "no order lets the new modules in: taken out for a moment");
        refused = round_and_round(opa, &mut open).await?;
    }
    aside.retain(|id, _| open.contains_key(id));
    let back: Changes = aside.into_iter().map(|(id, text)| (id, Some(text))).collect();
    let mut absent = back.iter().collect();
    round_and_round(opa, &mut absent).await?;
    Ok(Turned { refused, absent: absent.into_keys().cloned().collect() })
}

/// Goes round until nothing is open or nothing moves. What stays open is what OPA refuses, with its words.
async fn round_and_round(
    opa: &Opa,
    open: &mut BTreeMap<&String, &Option<String>>,
) -> Result<BTreeMap<String, String>, Error> {
    loop {
        let before = open.len();
        let mut refused = BTreeMap::new();
        // First what is put, then what is removed: the other way round only when nothing else helps.
        for removing in [false, true] {
            let turn: Vec<_> =
                open.iter().filter(|(_, text)| text.is_none() == removing).map(|(id, _)| *id).collect();
            for id in turn {
                let result = match open[id] {
                    Some(text) => opa.put_module(id, text.clone()).await,
                    None => opa.delete_module(id).await,
                };
                match result {
                    Ok(()) => _ = open.remove(id),
                    Err(error) if !error.is_verdict() => return Err(error),
                    Err(error) => _ = refused.insert(id.clone(), error.words()),
                }
            }
        }
        if open.is_empty() || open.len() == before {
            return Ok(refused);
        }
    }
}
