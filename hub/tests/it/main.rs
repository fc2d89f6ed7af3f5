//! The hub's library from outside: event scripts in, frames, archives and answers out.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod checks;
mod connections;
mod edits;
mod faults;
mod fields;
mod fold;
mod http;
mod idioms;
mod invariants;
mod lived_in;
mod many_bundles;
mod program;
mod writer;
