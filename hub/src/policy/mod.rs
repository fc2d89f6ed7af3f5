//! Rego texts: what their packages own, whether they compile together, which are accepted, and what is told of the
//! others.

pub mod modules;

pub mod verdict;

pub mod settle;

pub mod check;

pub mod candidates;

pub mod plan;

pub mod analyze;

pub mod divide;

pub mod reads;
