//! Guest memory whose every word shows which version of the RAM it is of. Optimised in the crate `guests`.

#[cfg(target_os = "linux")]
pub use guests::ram::content_of;
pub use guests::ram::{Content, Stamped, Zeros, content, first_difference};
