//! Writes to one OPA.
//!
//! - `client`: OPA's REST API
//! - `marker`: the agent's state in OPA
//! - `apply`: frames, modules and markers as patches
//! - `load`: archives as patches
//! - `modules`: an order in which OPA accepts modules
//! - `layout`: warning about packages that make OPA slow

mod apply;
mod client;
#[cfg(test)]
mod fake_opa;
mod layout;
mod load;
mod marker;
mod modules;

pub(crate) use apply::{Applier, Error};
pub(crate) use client::{Error as ClientError, OpaClient};
pub(crate) use layout::Layout;
pub(crate) use load::ArchiveModules;
pub use marker::Marker;
pub(crate) use modules::ModuleChanges;
