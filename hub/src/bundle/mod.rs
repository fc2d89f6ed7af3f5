//! Immutable views of bundles, their histories and encodings.

pub mod spec;

pub mod feeds;

pub(crate) mod limit;

pub(crate) mod project;

pub mod fields;

pub mod kept;

pub(crate) mod forecast;

pub mod view;

pub mod edit;

pub mod log;

pub(crate) mod frame;

pub mod archive;

pub(crate) mod snapshot;

pub(crate) mod delta;

pub mod scopes;

mod edition;

pub use self::edition::{Bundle, Counters, Edition, IsWidened, Newest, Next, Objects, Part, Reading};
