//! Integration tests of the hub's library: event scripts in, frames and responses out.

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
mod layout;
mod lived_in;
mod many_bundles;
mod program;
mod writer;
