//! What was said about one ConfigMap: its faults, in the shape in which OPA tells errors, and warnings.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::model::ObjectKey;

/// The annotation that holds a [`Verdict::status`]. kube-mgmt's name.
pub const STATUS: &str = "openpolicyagent.org/kube-mgmt-status";
/// The annotation in which kube-mgmt counts its tries; the hub needs none.
pub const RETRIES: &str = "openpolicyagent.org/kube-mgmt-retries";
/// What [`RETRIES`] then says.
pub const NO_RETRIES: &str = "0";

/// Faults that a verdict tells: the first of them are enough to know what is wrong, and annotations are bounded.
const FAULTS_MAX: usize = 10;
/// Bytes of one message. A status is then far below the 256 KiB that all annotations of an object may have.
const MESSAGE_BYTES_MAX: usize = 2048;

/// One thing that is wrong, as OPA writes it (OPA v1/ast/errors.go).
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// What kind, e.g. `rego_parse_error`.
    pub code: String,
    /// In words.
    pub message: String,
    /// Where, when that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub location: Option<Location>,
}

/// A place in a module.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub struct Location {
    /// The module's id.
    pub file: String,
    /// From 1.
    pub row: u64,
    /// From 1; 0 when it is not known.
    pub col: u64,
}

/// What was said about one ConfigMap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Why it is refused; empty: it is accepted.
    pub faults: Vec<Fault>,
    /// What its author should know though it is accepted.
    pub warnings: Vec<String>,
}

/// What a ConfigMap itself says of its verdict.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Observed {
    /// Its resourceVersion; none in a folder.
    pub version: Option<String>,
    /// What is written at [`STATUS`].
    pub status: Option<String>,
    /// What is written at [`RETRIES`].
    pub retries: Option<String>,
}

/// A verdict and the ConfigMap for which it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Told {
    /// How the ConfigMap looked.
    pub observed: Observed,
    /// What was said.
    pub verdict: Verdict,
}

/// All verdicts as they are now, and a bell for whoever writes them down.
#[derive(Default)]
pub struct Verdicts {
    told: Mutex<BTreeMap<ObjectKey, Told>>,
    news: Arc<Notify>,
}

impl Verdicts {
    /// None yet; `news` is rung when there are.
    pub fn telling(news: Arc<Notify>) -> Self {
        Self { told: Mutex::default(), news }
    }

    /// Takes what is new: none where there is no verdict any more.
    pub fn take(&self, news: Vec<(ObjectKey, Option<Told>)>) {
        if news.is_empty() {
            return;
        }
        self.with(|told| {
            for (key, news) in news {
                match news {
                    Some(news) => told.insert(key, news),
                    None => told.remove(&key),
                };
            }
        });
        self.news.notify_one();
    }

    /// Reads all of them.
    pub fn with<T>(&self, f: impl FnOnce(&mut BTreeMap<ObjectKey, Told>) -> T) -> T {
        f(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Fault {
    /// A fault at no place.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if message.len() > MESSAGE_BYTES_MAX {
            message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
            message.push('…');
        }
        Self { code: code.to_owned(), message, location: None }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(Location { file, row, col }) = &self.location {
            write!(f, "{file}:{row}:{col}: ")?;
        }
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl Verdict {
    /// The faults in one line.
    pub fn message(&self) -> String {
        let mut told: Vec<_> = self.faults.iter().take(FAULTS_MAX).map(ToString::to_string).collect();
        if self.faults.len() > FAULTS_MAX {
            told.push(format!("and {} more", self.faults.len() - FAULTS_MAX));
        }
        told.join("; ")
    }

    /// The verdict as kube-mgmt annotates it: `{"status":"ok"}`, or `error` with what OPA would have answered.
    pub fn status(&self) -> Value {
        let mut status = if self.faults.is_empty() {
            json!({ "status": "ok" })
        } else {
            let faults = &self.faults[..self.faults.len().min(FAULTS_MAX)];
            let compiling = faults.iter().any(|fault| fault.code.starts_with("rego_"));
            let message = if compiling {
                "error(s) occurred while compiling module(s)"
            } else {
                "the ConfigMap is refused"
            };
            json!({
                "status": "error",
                "error": { "code": "invalid_parameter", "message": message, "errors": faults },
            })
        };
        if !self.warnings.is_empty() {
            status["warnings"] = json!(self.warnings);
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_kube_mgmts() {
        assert_eq!(Verdict::default().status().to_string(), r#"{"status":"ok"}"#);
        let location = Location { file: "opa/authz/a.rego".into(), row: 3, col: 1 };
        let fault =
            Fault { location: Some(location), ..Fault::new("rego_parse_error", "unexpected eof token") };
        let verdict = Verdict { faults: vec![fault; 12], warnings: vec!["w".into()] };
        let status = verdict.status();
        assert_eq!((&status["status"], &status["warnings"]), (&json!("error"), &json!(["w"])));
        let error = json!({
            "code": "rego_parse_error", "message": "unexpected eof token",
            "location": { "file": "opa/authz/a.rego", "row": 3, "col": 1 },
        });
        assert_eq!(status["error"]["errors"], json!(vec![error; 10]));
        let first = "opa/authz/a.rego:3:1: rego_parse_error: unexpected eof token; ";
        assert!(verdict.message().starts_with(first) && verdict.message().ends_with("; and 2 more"));
        let long = Fault::new("x", "é".repeat(5000));
        assert!(long.message.len() < 2100 && long.message.ends_with('…'));
    }
}
