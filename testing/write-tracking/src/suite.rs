//! The tests of both suites, as functions over a backend, for [`conformance!`](crate::conformance!)
//! and [`log_conformance!`](crate::log_conformance!).

pub mod faults;
pub mod logs;
pub mod saves;
