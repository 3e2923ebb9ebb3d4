//! Memory for tests: mappings of every kind, swap, registrations with a userfaultfd, copies of the
//! test program, and its peak memory use.

#![allow(unsafe_code)]
#![allow(
    clippy::missing_panics_doc,
    reason = "a preparation that fails is a failed test"
)]

mod mapping;
#[cfg(target_os = "linux")]
mod peak;
#[cfg(target_os = "linux")]
mod program;
#[cfg(target_os = "linux")]
mod registered;
#[cfg(target_os = "linux")]
mod swap;

pub use mapping::{Mapping, PAGE, pattern};
#[cfg(target_os = "linux")]
pub use peak::{peak_memory, reset_peak_memory};
#[cfg(target_os = "linux")]
pub use program::{Program, world_executable};
#[cfg(target_os = "linux")]
pub use registered::{Registered, register_minor, register_missing};
#[cfg(target_os = "linux")]
pub use swap::{Swap, stay_on_this_processor};
