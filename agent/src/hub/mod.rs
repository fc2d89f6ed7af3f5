//! Client of opa-hub.
//!
//! - `client`: requests for archives, policies, reconcile answers and streams
//! - `failover`: selection of the hub
//! - `stream`: reader of an event stream
//! - `body`: reader of a response body with a minimum rate
//! - `error`: failed requests and streams

mod body;
mod client;
mod error;
mod failover;
mod stream;

pub(crate) use client::{Download, HubClient};
pub(crate) use error::Error;
pub(crate) use stream::Stream;
