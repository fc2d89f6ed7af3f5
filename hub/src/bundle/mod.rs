//! A bundle as clients read it: the latest snapshot with everything encoded from it.

pub mod cache;
pub mod namespaces;
pub mod registry;
pub mod watches;

pub use crate::bundle::cache::{
    Bundle, CachedSnapshot, CatchUp, Counters, FieldState, IsWidened, Newest, Objects,
};
