//! A conformance suite for backends that track a guest's writes by write faults.
//!
//! A tracker that misses one write loses a page of a snapshot, and nothing reports it. The suite
//! runs guests with real write faults under [`Stage2Tracker`](hvf_backend::Stage2Tracker), makes
//! saves in every way that the tracker offers, and compares the images with the RAM.
//!
//! # What a backend is
//! A backend is what a hypervisor has to provide so that the tracker can work. It implements one
//! trait, [`Backend`]:
//!
//! 1. **RAM** of several regions, which the host can read while the guest runs
//!    ([`Backend::ram`]). `guest_ram::GuestRam` is such RAM.
//! 2. **A write protection** of ranges of the memory file ([`Backend::protection`], a
//!    [`WriteProtection`](dirty_bitmap::WriteProtection)). After `protect` returns, the next write
//!    to each page faults. After `unprotect` returns, writes pass.
//! 3. **Write faults**, each passed to the tracker before the write continues. Either a vCPU leaves
//!    the guest with each fault, and [`Backend::increment`] handles it, or other threads handle the
//!    faults of waiting vCPUs ([`Backend::serve_faults`]).
//! 4. **Host writes** that do not fault ([`Backend::host_write`]). The host marks them.
//! 5. **vCPUs** that write ([`Backend::increment`]), each counted by
//!    [`enter`](hvf_backend::Stage2Tracker::enter) while it is in the guest.
//!
//! # Adding a backend
//! Implement [`Backend`] in a test of your crate or in `tests/conformance` of this one, and add one
//! line:
//! ```text
//! write_tracking::conformance!(my_hypervisor, MyGuest);
//! ```
//! The line makes a module with all tests of the suite. A backend whose protection can't change
//! while a vCPU runs passes those of a stopped guest:
//! ```text
//! write_tracking::conformance!(my_hypervisor, MyGuest, stopped);
//! ```
//! A test whose [needs](Backend::NEEDS) the machine does not meet prints `NOT RUN`.
//!
//! The suite finds a lost page with any backend whose faults are real. It can't find a protection
//! that works by luck: run it with `RAMSNAP_THOROUGH=1` as well, which takes more rounds and yields
//! between the steps of the tracker.

mod backend;
mod conformance;
mod images;
mod machine;
mod protection;
pub mod suite;

pub use backend::{Backend, HIGH, HIGH_SIZE, LOW_SIZE, Tracker, handle_fault};
pub use machine::Machine;
pub use protection::Protection;
