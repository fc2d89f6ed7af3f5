//! What the hub still waits for, by name, what is wrong, and what an operator should know although nothing is wrong.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::model::{Problem, WatchId};

/// Shared by the sources, which write, and `/readyz` and `/v1/bundles`, which read.
#[derive(Clone, Default)]
pub struct Readiness {
    state: Arc<Mutex<State>>,
    /// Before every name.
    of: Arc<str>,
    /// Which of the watches that share a name is meant.
    watch: Option<WatchId>,
}

type Name = (String, Option<WatchId>);

#[derive(Default)]
struct State {
    pending: BTreeMap<Name, String>,
    problems: BTreeMap<Name, String>,
    notices: BTreeMap<Name, String>,
}

impl Readiness {
    /// The same, for somebody whose names begin with `prefix`.
    #[must_use]
    pub fn of(&self, prefix: &str) -> Self {
        Self { of: format!("{}{prefix}", self.of).into(), ..self.clone() }
    }

    /// The readiness of one watch: watches that are displayed by the same name are ready, and fail, separately.
    #[must_use]
    pub fn for_watch(&self, watch: WatchId) -> Self {
        Self { watch: Some(watch), ..self.clone() }
    }

    /// Whatever begins like this is not waited for, and nothing is wrong with it.
    pub fn forget(&self) {
        self.with(|state| {
            state.pending.retain(|(name, _), _| !name.starts_with(&*self.of));
            state.problems.retain(|(subject, _), _| !subject.starts_with(&*self.of));
            state.notices.retain(|(subject, _), _| !subject.starts_with(&*self.of));
        });
    }

    fn name(&self, name: &str) -> Name {
        (format!("{}{name}", self.of), self.watch)
    }

    /// `name` is not ready, because.
    pub fn pending(&self, name: &str, because: &str) {
        self.with(|state| state.pending.insert(self.name(name), because.to_owned()));
    }

    /// `name` is ready, for good: what happens to it later is a [`problem`](Self::problem), not unreadiness.
    pub fn ready(&self, name: &str) {
        self.with(|state| state.pending.remove(&self.name(name)));
    }

    /// Something about `subject` is wrong (`Some`) or no longer is (`None`).
    pub fn problem(&self, subject: &str, message: Option<String>) {
        self.with(|state| match message {
            Some(message) => state.problems.insert(self.name(subject), message),
            None => state.problems.remove(&self.name(subject)),
        });
    }

    /// Notes about `subject` that it works with less than it could. Nothing is rejected and nothing fails.
    pub fn notice(&self, subject: &str, message: String) {
        self.with(|state| state.notices.insert(self.name(subject), message));
    }

    /// Whether `message` is not already what is wrong about `subject`.
    pub fn is_news(&self, subject: &str, message: &str) -> bool {
        self.with(|state| state.problems.get(&self.name(subject)).is_none_or(|held| held != message))
    }

    /// The source of `name` fails: the reason it is not ready, or, once it was, a problem.
    pub fn failing(&self, name: &str, because: &str) {
        self.with(|state| match state.pending.get_mut(&self.name(name)) {
            Some(reason) => because.clone_into(reason),
            None => _ = state.problems.insert(self.name(name), because.to_owned()),
        });
    }

    /// What is not ready, and why; where several watches of one name are not, all their reasons.
    pub fn pendings(&self) -> BTreeMap<String, String> {
        let mut pendings = BTreeMap::<String, String>::new();
        self.with(|state| {
            for ((name, _), because) in &state.pending {
                let reasons = pendings.entry(name.clone()).or_default();
                if !reasons.contains(because.as_str()) {
                    let separator = if reasons.is_empty() { "" } else { "; " };
                    reasons.push_str(separator);
                    reasons.push_str(because);
                }
            }
        });
        pendings
    }

    /// What the sources could not read.
    pub fn problems(&self) -> Vec<Problem> {
        self.with(|state| listed(&state.problems))
    }

    /// All [notices](Self::notice).
    pub fn notices(&self) -> Vec<Problem> {
        self.with(|state| listed(&state.notices))
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn listed(messages: &BTreeMap<Name, String>) -> Vec<Problem> {
    let problem = |((subject, _), message): (&Name, &String)| Problem {
        subject: subject.clone(),
        message: message.clone(),
    };
    messages.iter().map(problem).collect()
}
