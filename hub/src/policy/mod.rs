//! Rego policies: compilation, acceptance and field analysis.

pub mod candidate;
pub mod check;
pub mod dataflow;
pub mod divide;
pub mod modules;
pub mod plan;
pub mod reads;
pub mod registry;
pub mod resolve;
pub mod verdict;
