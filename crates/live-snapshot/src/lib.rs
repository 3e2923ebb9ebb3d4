//! Snapshots of a running guest, whose pause does not grow with the guest's RAM.
//!
//! A VMM that writes the RAM while the guest is paused stops the guest for as long as the disk
//! takes: half a minute for 64 GiB. Only the point in time of the snapshot needs a pause. A
//! [`LiveSnapshot`] prepares while the guest runs, sets the point in time in microseconds, and
//! writes the pages while the guest runs on. A page that is about to be overwritten is copied
//! first.
#![cfg_attr(target_os = "linux", doc = "```")]
#![cfg_attr(not(target_os = "linux"), doc = "```ignore")]
//! # if !test_machine::Need::Userfaultfd.met("the example of live-snapshot") { return Ok(()); }
//! use std::sync::Arc;
//! use guest_ram::GuestRam;
//! use live_snapshot::{LiveSnapshot, UffdTracker};
//! use memory_writer::{Layout, MemoryWriter, Seal};
//! use page_reader::RamLayout;
//! # fn pause_vcpus() -> Vec<u8> { Vec::new() }
//! # fn resume_vcpus() {}
//!
//! # let dir = tempfile::tempdir()?;
//! # let (full, diff) = (dir.path().join("full.mem"), dir.path().join("diff.mem"));
//! let ram: Arc<GuestRam> = Arc::new(GuestRam::new(RamLayout::single(0, 16 << 20)?)?);
//! let tracker = Arc::new(UffdTracker::start(&ram)?); // once, when the guest starts
//!
//! let writer = MemoryWriter::options().layout(Layout::Packed).open(&full, 16 << 20, 4096)?;
//! let parent = writer.image_id().ok_or("a packed image has an id")?;
//! let live = LiveSnapshot::options().begin(&tracker, writer)?; // the guest runs
//! let vcpus = pause_vcpus();
//! let frozen = live.freeze(); // the point in time: microseconds
//! resume_vcpus();
//! let mut frozen = frozen?;
//! frozen.set_metadata(vcpus)?;
//! let report = frozen.commit()?; // may run in another thread
//! println!("{:?} of the pause were for the RAM", report.freeze);
//!
//! // Later, only what has changed since:
//! let seal = Seal::new().parent(parent);
//! let writer = MemoryWriter::options().layout(Layout::Packed).seal(seal);
//! let writer = writer.open(&diff, 16 << 20, 4096)?;
//! let live = LiveSnapshot::options().diff(true).begin(&tracker, writer)?;
//! live.freeze()?.commit()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # By task
//! - **Track a guest's writes**: [`UffdTracker`] by userfaultfd (Linux), which sees the writes of
//!   vCPUs, of the VMM and of the kernel. `LiveStage2` (feature `hvf`) for guests of Apple's
//!   Hypervisor framework. [`LiveTracker`] for any other write protection: wrap it in
//!   [`CopyOnWrite`].
//! - **Choose a method**: [`Method`]. Copy-on-write has the shortest pause and writes each page
//!   once. Pre-copy slows the guest down less, and writes more.
//! - **Write a diff**: [`LiveSnapshotOptions::diff`]. Full images and diffs, live or not, form
//!   chains in all layouts.
//! - **Store the state of vCPUs and devices**: [`Frozen::set_metadata`], with what was captured in
//!   the pause.
//! - **Start from an image**: restore the RAM, start the tracker, and call
//!   [`UffdTracker::set_baseline`] with the image.
//! - **Bound the load**: [`rate_limit`](LiveSnapshotOptions::rate_limit),
//!   [`pool`](LiveSnapshotOptions::pool), [`when_pool_full`](LiveSnapshotOptions::when_pool_full).
//! - **Cancel**: [`cancel`](LiveSnapshotOptions::cancel), or drop the value. Nothing is committed,
//!   no dirty page is lost, and the guest runs on.
//! - **See what it cost**: [`Report`].
//!
//! # How it works
//! The tracker write-protects the RAM, and the first write to a page faults. It unprotects the
//! page, marks it in a bitmap, and lets the write continue.
//!
//! [`begin`](LiveSnapshotOptions::begin) protects all of the RAM while the guest runs, and again
//! the pages that are written meanwhile, until few are left.
//! [`freeze`](LiveSnapshot::freeze) protects these: all of the RAM is protected then, which is the
//! point in time. Its time depends on the pages that were written in the last moments, not on the
//! RAM.
//!
//! Then each page of the image is *pending*, *being copied*, *in the pool* or *free*
//! (`page_states.rs`). A write fault of a pending page copies it to the pool, and only then
//! unprotects it. [`write`](Frozen::write) takes the RAM in chunks of 1 MiB: chunks with pages in
//! the pool first, because a vCPU may wait for room, and otherwise in ascending order. The bytes
//! are copied once, into the buffer that is written. Checksums are computed from this copy. A full
//! image does not store zeros of 32 KiB and more.
//!
//! The same fault marks the page for the next diff. A snapshot that fails returns its marks.
//!
//! # Memory
//! In addition to the tracker's bitmap, a snapshot needs two bits for each page, and the pool.
//! Registered memory has page tables for all of the RAM: 8 bytes for each page.
//!
//! # Features
//! - `hvf` (off by default): `LiveStage2`, for `Stage2Tracker` of the crate `hvf-backend`.
//!
//! # Limitations
//! - All writes of devices are complete or stopped when `freeze` is called, as for any snapshot.
//! - Writes that do not fault are not seen: those of other processes to shared memory, and DMA.
//!   See [`UffdTracker`].
//! - Memory is discarded by [`UffdTracker::discard`]. Anonymous memory that is discarded in another
//!   way ends a snapshot with [`LiveError::Discarded`]. In memory of files, memfds included, this
//!   is not noticed.
//! - The thread that calls [`Frozen::write`] must not write the guest's RAM.
//! - A guest has one live snapshot at a time.
//!
//! The loom models in `src/capture/interleavings.rs` check the states of pages.

#[cfg_attr(ramsnap_loom, allow(dead_code, reason = "the models use a part"))]
mod capture;
#[cfg(not(ramsnap_loom))]
mod error;
#[cfg(not(ramsnap_loom))]
mod frozen_ram;
#[cfg(all(feature = "hvf", not(ramsnap_loom)))]
mod hvf;
#[cfg(all(target_os = "linux", not(ramsnap_loom)))]
mod linux;
mod options;
#[cfg(not(ramsnap_loom))]
mod order;
#[cfg(not(ramsnap_loom))]
mod pacer;
mod page_states;
#[cfg_attr(ramsnap_loom, allow(dead_code, reason = "the models use a part"))]
mod pool;
#[cfg(not(ramsnap_loom))]
mod precopy;
#[cfg(not(ramsnap_loom))]
mod report;
#[cfg(not(ramsnap_loom))]
mod settings;
#[cfg(not(ramsnap_loom))]
mod slot;
#[cfg(not(ramsnap_loom))]
mod snapshot;
mod sync;
#[cfg(not(ramsnap_loom))]
mod tracker;

pub use options::{Method, WhenPoolFull};

#[cfg(not(ramsnap_loom))]
pub use dirty_bitmap::ParentImage;
#[cfg(not(ramsnap_loom))]
pub use error::LiveError;
#[cfg(all(feature = "hvf", not(ramsnap_loom)))]
pub use hvf::LiveStage2;
#[cfg(all(target_os = "linux", not(ramsnap_loom)))]
pub use linux::{
    UffdCheckpointError, UffdProtectError, UffdProtection, UffdTracker, UffdTrackerError,
    UffdTrackerOptions,
};
#[cfg(not(ramsnap_loom))]
pub use memory_writer::CancelToken;
#[cfg(not(ramsnap_loom))]
pub use report::{Convergence, PreCopyPass, Report, StopReason};
#[cfg(not(ramsnap_loom))]
pub use settings::LiveSnapshotOptions;
#[cfg(not(ramsnap_loom))]
pub use slot::{CaptureSlot, CopyOnWrite};
#[cfg(not(ramsnap_loom))]
pub use snapshot::{Frozen, LiveSnapshot, Written};
#[cfg(all(target_os = "linux", not(ramsnap_loom)))]
pub use uffd;

#[cfg(not(ramsnap_loom))]
pub use tracker::{CheckpointFailed, LiveTracker};
