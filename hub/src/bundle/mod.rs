//! Immutable views of bundles, their histories and encodings.

pub mod spec;

pub mod feeds;

pub mod limit;

pub mod project;

pub mod fields;

pub mod kept;

pub mod forecast;

pub mod view;

pub mod edit;

pub mod log;

pub mod frame;

pub mod archive;

pub mod snapshot;

pub mod delta;

pub mod scopes;

mod edition;

pub use self::edition::{Bundle, Counters, Edition, IsWidened, Newest, Next, Objects, Part, Reading};
