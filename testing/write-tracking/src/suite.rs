//! The tests of the suite, as functions over a backend, for [`conformance!`](crate::conformance!).

pub mod faults;
pub mod saves;
