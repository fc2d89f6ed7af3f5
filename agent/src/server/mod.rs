//! HTTP server of the agent.
//!
//! - `local`: handlers for the policy bundle, health and metrics
//! - `listener`: bounded HTTP/1.1 listener

mod listener;
mod local;

pub(crate) use listener::serve;
pub use local::LocalServer;
