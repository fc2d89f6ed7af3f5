//! A bundle as clients read it: the latest snapshot with everything encoded from it.

pub mod cache;
pub mod namespaces;
pub mod registry;
pub mod watches;

pub use self::cache::{Bundle, Counters, Edition, IsWidened, Newest, Next, Objects, Reading};
