//! Memory whose writes are tracked by real page faults: a guest's RAM on a machine without a
//! hypervisor.
//!
//! A [`Memory`] is mapped in this process, and threads that write to it act as vCPUs.
//! [`Userfaultfd`] or [`Mprotect`] protects it, as a [`WriteProtection`], and calls back for each
//! write to a protected page.

mod memory;
mod mprotect;
#[cfg(target_os = "linux")]
mod userfaultfd;

use std::fmt;
use std::io;

use dirty_bitmap::WriteProtection;

pub use memory::{Memory, page_size};
pub use mprotect::Mprotect;
#[cfg(target_os = "linux")]
pub use userfaultfd::{Userfaultfd, open_userfaultfd};

/// A write protection whose faults this process handles itself. Ranges are offsets in the memory,
/// of whole pages of the machine.
pub trait PageFaults: WriteProtection<Error = io::Error> + Clone + Send + Sync + 'static {
    /// Calls `on_write` with the offset of each write to a protected page, concurrently from
    /// several threads. The write waits until the call has returned and is then repeated:
    /// `on_write` must unprotect the page.
    ///
    /// The call may be made from a signal handler ([`Mprotect`]), so it must neither allocate nor
    /// wait for a lock unless it fails. An error aborts the process, because the write can neither
    /// continue nor fail.
    ///
    /// # Errors
    /// The errors of the system when the handler is installed.
    fn answer(
        &self,
        on_write: impl Fn(u64) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<FaultHandler>;

    /// Waits until `on_write` has returned for every write that continued before.
    ///
    /// A page that `on_write` unprotects may be written before it returns, or before it is called
    /// for another write to that page.
    fn wait_until_answered(&self);
}

/// Handles write faults. When it is dropped, it first makes all of the memory writable.
#[must_use = "faults are answered as long as this lives"]
pub struct FaultHandler {
    _dropped: Box<dyn Send + Sync>,
}

impl fmt::Debug for FaultHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultHandler").finish_non_exhaustive()
    }
}

impl FaultHandler {
    fn new(dropped: impl Send + Sync + 'static) -> Self {
        Self {
            _dropped: Box::new(dropped),
        }
    }
}

type OnWrite = Box<dyn Fn(u64) -> io::Result<()> + Send + Sync>;
