//! Conformance suites for backends that track a guest's writes: by write faults, or by a log of
//! dirty pages.
//!
//! A tracker that misses one write loses a page of a snapshot, and nothing reports it. The suites
//! run guests, make saves in every way that the backend offers, and compare the images with the
//! RAM.
//!
//! # Backends with write faults
//! The suite tests the backend's write protection and faults under
//! [`Stage2Tracker`](hvf_backend::Stage2Tracker). A backend that drives a
//! [`WriteTracker`](dirty_bitmap::WriteTracker) itself is tested in the same way. It implements one
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
//! # What a backend with a log is
//! It implements the trait [`LoggedBackend`]: RAM that is a [`GuestRam`](guest_ram::GuestRam),
//! vCPUs that write, a harvest while they run, and a last harvest while they are paused.
//!
//! # Adding a backend
//! Implement [`Backend`] or [`LoggedBackend`] in a test of your crate, or in `tests/conformance` of
//! this one if your crate has no test that runs guests. Add `rstest` and, for [`conformance!`],
//! `dirty-bitmap` to the dependencies of that test, and one line to it:
//! ```text
//! write_tracking::conformance!(my_hypervisor, MyGuest);
//! ```
//! The line makes a module with all tests of the suite. A backend whose protection can't change
//! while a vCPU runs passes those of a stopped guest:
//! ```text
//! write_tracking::conformance!(my_hypervisor, MyGuest, stopped);
//! ```
//! For a log, the line is:
//! ```text
//! write_tracking::log_conformance!(my_hypervisor, MyGuest);
//! ```
//! A test whose [needs](Backend::NEEDS) the machine does not meet prints `NOT RUN`.
//!
//! The suite finds a lost page with any backend whose faults are real. It can't find a protection
//! that works by luck: run it with `RAMSNAP_THOROUGH=1` as well, which takes more rounds and yields
//! between the steps of the tracker.

mod backend;
mod conformance;
mod images;
mod logged;
mod machine;
mod protection;
pub mod suite;

pub use backend::{Backend, HIGH, HIGH_SIZE, LOW_SIZE, Tracker, handle_fault};
pub use logged::LoggedBackend;
pub use machine::Machine;
pub use protection::Protection;
