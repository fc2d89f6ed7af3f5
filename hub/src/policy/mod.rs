//! Rego policies: compilation, acceptance and field analysis.

pub mod modules;

pub mod verdict;

pub mod settle;

pub mod check;

pub mod candidates;

pub mod plan;

pub mod analyze;

pub mod divide;

pub mod reads;
