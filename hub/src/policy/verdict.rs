//! VerdictBoard on policy ConfigMaps.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::model::ObjectKey;

/// kube-mgmt's annotation for [`Verdict::status`].
pub const STATUS: &str = "openpolicyagent.org/kube-mgmt-status";
/// kube-mgmt's retry counter, unused by the hub.
pub const RETRIES: &str = "openpolicyagent.org/kube-mgmt-retries";
/// Value of [`RETRIES`].
pub const NO_RETRIES: &str = "0";

/// Maximum number of faults in a verdict.
const FAULTS_MAX: usize = 10;
/// Maximum message size, in bytes. Annotations share 256 KiB.
const MESSAGE_BYTES_MAX: usize = 2048;

/// A diagnostic in OPA's format (OPA v1/ast/errors.go).
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub struct Diagnostic {
    /// Code, e.g. `rego_parse_error`.
    pub code: String,
    /// Description.
    pub message: String,
    /// Location, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub location: Option<Location>,
}

/// Location in a module.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub struct Location {
    /// Module id.
    pub file: String,
    /// Row, from 1.
    pub row: u64,
    /// Column, from 1. 0 if unknown.
    pub col: u64,
}

/// Verdict on a ConfigMap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Reasons for rejection. Empty if accepted.
    pub faults: Vec<Diagnostic>,
    /// Warnings for accepted modules.
    pub warnings: Vec<String>,
}

/// Annotations of a ConfigMap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Observed {
    /// `resourceVersion`. `None` in a folder.
    pub version: Option<String>,
    /// Value of [`STATUS`].
    pub status: Option<String>,
    /// Value of [`RETRIES`].
    pub retries: Option<String>,
}

/// Verdict with the checked ConfigMap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Told {
    /// Annotations at the time of the check.
    pub observed: Observed,
    /// Verdict.
    pub verdict: Verdict,
}

/// Current verdicts.
#[derive(Default)]
pub struct VerdictBoard {
    verdicts: Mutex<BTreeMap<ObjectKey, Told>>,
    notify: Arc<Notify>,
}

impl VerdictBoard {
    /// Creates an empty set that notifies `notify`.
    pub fn telling(notify: Arc<Notify>) -> Self {
        Self { verdicts: Mutex::default(), notify }
    }

    /// Applies changes. `None` removes a verdict.
    pub fn take(&self, changes: Vec<(ObjectKey, Option<Told>)>) {
        if changes.is_empty() {
            return;
        }
        self.with(|verdicts| {
            for (key, verdict) in changes {
                match verdict {
                    Some(verdict) => verdicts.insert(key, verdict),
                    None => verdicts.remove(&key),
                };
            }
        });
        self.notify.notify_one();
    }

    /// Accesses all verdicts.
    pub fn with<T>(&self, f: impl FnOnce(&mut BTreeMap<ObjectKey, Told>) -> T) -> T {
        f(&mut self.verdicts.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Diagnostic {
    /// Creates a fault without location.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if message.len() > MESSAGE_BYTES_MAX {
            message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
            message.push('…');
        }
        Self { code: code.to_owned(), message, location: None }
    }
}

impl std::fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(Location { file, row, col }) = &self.location {
            write!(f, "{file}:{row}:{col}: ")?;
        }
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl Verdict {
    /// Formats the faults as one line.
    pub fn message(&self) -> String {
        let mut messages: Vec<_> = self.faults.iter().take(FAULTS_MAX).map(ToString::to_string).collect();
        if self.faults.len() > FAULTS_MAX {
            messages.push(format!("and {} more", self.faults.len() - FAULTS_MAX));
        }
        messages.join("; ")
    }

    /// Returns kube-mgmt's status: `{"status":"ok"}`, or `error` with OPA's response.
    pub fn status(&self) -> Value {
        let mut status = if self.faults.is_empty() {
            json!({ "status": "ok" })
        } else {
            let faults = &self.faults[..self.faults.len().min(FAULTS_MAX)];
            let is_compile_error = faults.iter().any(|fault| fault.code.starts_with("rego_"));
            let message = if is_compile_error {
                "error(s) occurred while compiling module(s)"
            } else {
                "ConfigMap rejected"
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
        let fault = Diagnostic {
            location: Some(location),
            ..Diagnostic::new("rego_parse_error", "unexpected eof token")
        };
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
        let long = Diagnostic::new("x", "é".repeat(5000));
        assert!(long.message.len() < 2100 && long.message.ends_with('…'));
    }
}
