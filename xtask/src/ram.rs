//! Guest memory whose every word shows which version of the RAM it is of. Optimised in the crate
//! `guests`.

pub use guests::ram::{Content, Stamped, Zeros, content, content_of, first_difference};
