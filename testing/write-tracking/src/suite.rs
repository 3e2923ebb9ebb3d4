//! The tests of the suite, as functions over a backend. [`conformance!`](crate::conformance) calls
//! them.

pub mod faults;
pub mod saves;
