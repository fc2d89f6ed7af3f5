//! Pending items, problems and notices of the hub.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::model::{Problem, WatchId};

/// Handle to the state behind `/readyz`.
#[derive(Clone, Default)]
pub struct Health {
    state: Arc<Mutex<State>>,
    prefix: Arc<str>,
    /// Distinguishes watches of one name.
    watch: Option<WatchId>,
}

type Name = (String, Option<WatchId>);

#[derive(Default)]
struct State {
    pending: BTreeMap<Name, String>,
    problems: BTreeMap<Name, String>,
    notices: BTreeMap<Name, String>,
}

impl Health {
    /// Returns a handle that prepends `prefix` to each name.
    #[must_use]
    pub fn of(&self, prefix: &str) -> Self {
        Self { prefix: format!("{}{prefix}", self.prefix).into(), ..self.clone() }
    }

    /// Returns a handle for one watch.
    #[must_use]
    pub fn for_watch(&self, watch: WatchId) -> Self {
        Self { watch: Some(watch), ..self.clone() }
    }

    /// Clears everything below the handle's prefix.
    pub fn forget(&self) {
        self.with_state(|state| {
            for messages in [&mut state.pending, &mut state.problems, &mut state.notices] {
                messages.retain(|(name, _), _| !name.starts_with(&*self.prefix));
            }
        });
    }

    fn name(&self, name: &str) -> Name {
        (format!("{}{name}", self.prefix), self.watch)
    }

    /// Reports that `name` is not ready.
    pub fn pending(&self, name: &str, reason: &str) {
        self.with_state(|state| state.pending.insert(self.name(name), reason.to_owned()));
    }

    /// Marks `name` as ready for good.
    pub fn ready(&self, name: &str) {
        self.with_state(|state| state.pending.remove(&self.name(name)));
    }

    /// Sets the problem of `subject`, or clears it if `None`.
    pub fn problem(&self, subject: &str, message: Option<String>) {
        self.with_state(|state| match message {
            Some(message) => state.problems.insert(self.name(subject), message),
            None => state.problems.remove(&self.name(subject)),
        });
    }

    /// Reports a limitation of `subject` that is no failure.
    pub fn notice(&self, subject: &str, message: String) {
        self.with_state(|state| state.notices.insert(self.name(subject), message));
    }

    /// Whether `message` differs from the problem of `subject`.
    pub fn is_news(&self, subject: &str, message: &str) -> bool {
        self.with_state(|state| {
            state.problems.get(&self.name(subject)).is_none_or(|current| current != message)
        })
    }

    /// Reports a failure: a pending reason, or a problem once ready.
    pub fn failing(&self, name: &str, reason: &str) {
        self.with_state(|state| match state.pending.get_mut(&self.name(name)) {
            Some(current) => reason.clone_into(current),
            None => _ = state.problems.insert(self.name(name), reason.to_owned()),
        });
    }

    /// Pending items with reasons.
    pub fn pendings(&self) -> BTreeMap<String, String> {
        let mut pendings = BTreeMap::<String, String>::new();
        self.with_state(|state| {
            for ((name, _), reason) in &state.pending {
                let reasons = pendings.entry(name.clone()).or_default();
                if !reasons.contains(reason.as_str()) {
                    let separator = if reasons.is_empty() { "" } else { "; " };
                    reasons.push_str(separator);
                    reasons.push_str(reason);
                }
            }
        });
        pendings
    }

    /// All problems.
    pub fn problems(&self) -> Vec<Problem> {
        self.with_state(|state| to_problems(&state.problems))
    }

    /// All notices.
    pub fn notices(&self) -> Vec<Problem> {
        self.with_state(|state| to_problems(&state.notices))
    }

    fn with_state<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn to_problems(messages: &BTreeMap<Name, String>) -> Vec<Problem> {
    let problem = |((subject, _), message): (&Name, &String)| Problem {
        subject: subject.clone(),
        message: message.clone(),
    };
    messages.iter().map(problem).collect()
}
