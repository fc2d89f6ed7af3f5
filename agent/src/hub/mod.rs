//! Client of opa-hub.
//!
//! - `client`: requests
//! - `failover`: selection of the hub
//! - `stream`: events
//! - `body`: minimum rate
//! - `error`: failures

mod body;
mod client;
mod error;
mod failover;
mod stream;

pub(crate) use client::{Download, HubClient};
pub(crate) use error::Error;
pub(crate) use stream::Stream;
