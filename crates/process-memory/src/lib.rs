//! Reads the memory of another process on Linux: the RAM of a guest in a VMM that does not
//! cooperate.
//!
//! A VMM without a snapshot command still has the guest's RAM mapped. This crate finds it among the
//! mappings of the process ([`ProcessMaps`]), stops the process ([`StoppedProcess`]), and reads the
//! RAM ([`ProcessMemory`], a [`PageReader`](page_reader::PageReader)).
//!
//! ```no_run
//! # #[cfg(target_os = "linux")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use page_reader::PageReader;
//! use process_memory::{ProcessMaps, ProcessMemory, StoppedProcess};
//! use std::time::Duration;
//!
//! let pid = 4711;
//! let stopped = StoppedProcess::stop(pid, Duration::from_secs(5))?;
//! let maps = ProcessMaps::of(pid)?;
//! let ram = maps.named("/memfd:ram")?;
//! let memory = ProcessMemory::open(pid, [(ram.addresses.start, ram.size())])?;
//! let mut page = [0; 4096];
//! memory.read_at(0, &mut page)?;
//! drop(stopped); // resumes the process
//! # Ok(())
//! # }
//! # #[cfg(not(target_os = "linux"))]
//! # fn main() {}
//! ```
//!
//! # How it works
//!
//! - Mappings are those of `/proc/<pid>/maps`. Adjacent lines with consecutive parts of one file
//!   are joined; [`ProcessMaps::lines_in`] returns them as listed.
//! - Memory is read with `pread` of `/proc/<pid>/mem`. The file is opened once and stays bound to
//!   that process even if its id is reused.
//! - The process is stopped by `PTRACE_SEIZE` and `PTRACE_INTERRUPT` of every thread, from a
//!   dedicated thread. When that thread ends, or is killed with its process, the kernel resumes all
//!   of them.
//! - Shared memory that a userfaultfd fills is found in the `smaps` of all processes
//!   ([`check_lazy_fill`]).
//!
//! # Limitations
//!
//! - This process must be permitted to trace the other one: the same user and no Yama restriction,
//!   or `CAP_SYS_PTRACE`.
//! - Stopping a process does not stop other writers of its memory: a process that shares it,
//!   requests in the kernel, devices.
//! - `/proc` does not list the processes outside of the PID namespace of a container, nor those
//!   that its mount option `hidepid` hides. A userfaultfd of such a process is not found; the
//!   result of [`check_lazy_fill`] states this.
//!
//! Linux only; on other systems the crate is empty. There are no cargo features.

// Elsewhere the links above have no targets.
#![cfg_attr(not(target_os = "linux"), allow(rustdoc::broken_intra_doc_links))]

#[cfg(all(test, target_os = "linux"))]
mod auto_traits;
#[cfg(target_os = "linux")]
mod lazy_fill;
#[cfg(target_os = "linux")]
mod maps;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(target_os = "linux")]
mod proc_error;
#[cfg(target_os = "linux")]
mod stop;
#[cfg(target_os = "linux")]
mod sys;

// The crates whose types are in public signatures.
#[cfg(target_os = "linux")]
pub use page_reader;

#[cfg(target_os = "linux")]
pub use lazy_fill::{
    HiddenProcesses, LazyFillError, Unexamined, UnexaminedProcess, check_lazy_fill,
    check_lazy_fill_of_memory, check_lazy_fill_of_region, hidden_processes,
};
#[cfg(target_os = "linux")]
pub use maps::{FindRegionError, ProcessMaps};
#[cfg(target_os = "linux")]
pub use memory::{ProcessMemory, ProcessMemoryError};
#[cfg(target_os = "linux")]
pub use page_reader::{MappingsError, Permissions, ProcessRegion};
#[cfg(target_os = "linux")]
pub use sparse_file::{CancelGuard, CancelToken};
#[cfg(target_os = "linux")]
pub use stop::{ProcessStopError, StoppedProcess, Unresponsive};

/// Compiles the README's example as a test.
#[cfg(all(doctest, target_os = "linux"))]
#[doc = include_str!("../README.md")]
struct Readme;
