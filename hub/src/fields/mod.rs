//! Fields of replicated objects that are served, and their cost.

pub(crate) mod cost;
pub mod mask;
pub mod masks;
