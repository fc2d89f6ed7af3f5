//! Rego texts: which modules a ConfigMap holds, and whether they parse.

pub mod modules;
