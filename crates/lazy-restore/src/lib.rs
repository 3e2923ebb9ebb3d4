//! Fills a guest's RAM from a snapshot when the guest touches it.
//!
//! A guest with gigabytes of RAM is ready only after all of it was read, if it is restored before
//! it runs. It touches few of these pages in its first seconds. [`LazyRam`] starts the guest in
//! less than a millisecond, for any size of the RAM: a page of the [chain](memory_image::Chain) is
//! read when it is first touched, and the other pages are read in the background. A
//! [`WorkingSet`] records the pages that a guest touches, so that later starts read these first.
//! [`RamSource`] fills RAM from other sources than a chain, such as a server.
//!
//! ```
//! # #[cfg(target_os = "linux")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use lazy_restore::LazyRam;
//! use memory_image::Chain;
//! use page_reader::PageReader;
//! # if !test_machine::Need::Userfaultfd.met("the example of lazy-restore") { return Ok(()); }
//! # let dir = tempfile::tempdir()?;
//! # let full = dir.path().join("full.mem");
//! # std::fs::write(&full, vec![7; 1 << 20])?;
//!
//! let ram = LazyRam::options().start(Chain::open_raw(&full, 4096)?)?;
//! // The guest runs on `ram.ram_size()` bytes at `ram.as_ptr()`.
//! let mut byte = [0];
//! ram.read_at(70_000, &mut byte)?;
//! assert_eq!(byte, [7]);
//! ram.wait()?; // until all pages are in memory
//! # Ok(())
//! # }
//! # #[cfg(not(target_os = "linux"))]
//! # fn main() {}
//! ```
//!
//! [`LazyRamOptions::adopt`] fills private anonymous memory that the VMM has mapped itself. Shared
//! memory is refused: its other users would find zeros in missing pages. Restore a chain into
//! shared memory ([`Chain::restore`](memory_image::Chain::restore)) before others use it.
//!
//! `GuestRam::from_owner` of the crate `guest-ram` takes a [`LazyRam`] as the RAM of a VMM, without
//! `unsafe`. Pass an `Arc` of it to [`wait`](LazyRam::wait) for it elsewhere:
//! ```
//! # #[cfg(target_os = "linux")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use guest_ram::GuestRam;
//! use lazy_restore::LazyRam;
//! use memory_image::Chain;
//! use page_reader::RamLayout;
//! # if !test_machine::Need::Userfaultfd.met("the RAM example of lazy-restore") { return Ok(()); }
//! # let dir = tempfile::tempdir()?;
//! # let full = dir.path().join("full.mem");
//! # std::fs::write(&full, vec![7; 1 << 20])?;
//!
//! let lazy = Arc::new(LazyRam::options().start(Chain::open_raw(&full, 4096)?)?);
//! let layout = RamLayout::single(0, 1 << 20)?;
//! let ram: GuestRam = GuestRam::from_owner(layout, Arc::clone(&lazy))?;
//! // Register `ram`, and run the guest. No page is marked yet: the chain is the baseline of the
//! // next diff.
//! ram.write(0x1000, b"device")?;
//! lazy.wait()?;
//! # Ok(())
//! # }
//! # #[cfg(not(target_os = "linux"))]
//! # fn main() {}
//! ```
//!
//! # VMs of other processes
//! [`PageServer`] fills the RAM of VMMs in other processes, which connect to a socket and send a
//! userfaultfd, by Firecracker's page-fault protocol. The same code fills the pages.
//!
//! # How it works
//! The page fault handler, a thread, receives each fault and fills the page, with the bytes around
//! it that are adjacent in the same image. The prefetcher, another thread, fills all other pages.
//! Faults have priority.
//!
//! One lock is held while a page is filled, and while a message about discarded or moved memory is
//! recorded. Therefore a discarded page is never filled with its old content, and a missing page is
//! never read as zeros.
//!
//! # Permissions
//! [`available`] returns whether this process may use userfaultfd, and its error names what permits
//! it. To an unprivileged process, a privileged one passes an open `/dev/userfaultfd`
//! ([`LazyRamOptions::userfaultfd`], example `unprivileged`).
//!
//! # System calls
//! `userfaultfd`, or `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`; `MADV_DONTFORK`,
//! `UFFDIO_REGISTER` and `MADV_DONTNEED` of anonymous memory; for each fault `pread` and
//! `UFFDIO_COPY`, or `UFFDIO_ZEROPAGE`, or `UFFDIO_POISON` (Linux 6.6); at the end
//! `UFFDIO_UNREGISTER`, `UFFDIO_WAKE` and `MADV_DOFORK`. A page server uses `pidfd_open` and
//! `pidfd_send_signal` too, and no `madvise`.
//!
//! # Cargo features
//!
//! - `tracing` (off by default): emits events of the crate [`tracing`](https://docs.rs/tracing), or
//!   records of the crate [`log`](https://docs.rs/log) if the program has no subscriber of
//!   `tracing`. The features of the same name of `memory-image` and `atomic-file` are
//!   turned on with it. The totals of a restore are reported: faults, bytes by faults and by the
//!   prefetcher, and the time. No event contains bytes of memory.
//!
//! Linux only; on other systems the crate is empty.

// Elsewhere the links above have no targets.
#![cfg_attr(not(target_os = "linux"), allow(rustdoc::broken_intra_doc_links))]
#![cfg(target_os = "linux")]

#[cfg(test)]
mod auto_traits;
mod counters;
mod error;
mod fault_handler;
mod filling;
mod lazy_ram;
mod ledger;
mod memory;
mod options;
mod page_bits;
mod page_buffer;
mod pages;
mod pause;
mod peer;
mod peer_process;
mod prefetcher;
mod ram_owner;
mod ram_source;
mod read_ahead;
mod region;
mod regions;
mod server;
mod start;
mod status;
mod target;
mod trace;
mod turns;
mod userfaultfd;
mod working_set;

// The crates whose types are in public signatures.
pub use atomic_file;
pub use guest_ram;
pub use memory_image;
pub use page_reader;
pub use uffd;

pub use error::{LazyError, WaitError};
pub use lazy_ram::LazyRam;
pub use memory_image::{CancelGuard, CancelToken, Progress, ProgressFn};
pub use options::LazyRamOptions;
pub use peer::{OnDamage, OnFailure};
pub use ram_source::{RamSegment, RamSource, SizedReader};
pub use server::{
    MessageError, PageServer, PageServerOptions, Reaction, RefusedClient, ServeError, ServedVm,
    ServerMetrics, VmEnd, VmProcess, VmRegions,
};
pub use start::available;
pub use userfaultfd::UserfaultfdError;
pub use working_set::{WorkingSet, WorkingSetError};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
