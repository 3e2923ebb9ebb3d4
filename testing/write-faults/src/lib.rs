//! Memory whose writes are tracked by real page faults: a guest's RAM where there is no hypervisor.
//!
//! A [`Memory`] is mapped in this process, and threads that write it are the vCPUs. [`Userfaultfd`]
//! or [`Mprotect`] protects it, as a [`WriteProtection`], and calls back for each write that hits
//! the protection.

mod memory;
mod mprotect;
#[cfg(target_os = "linux")]
mod userfaultfd;

use std::io;

use dirty_bitmap::WriteProtection;

pub use memory::{Memory, page_size};
pub use mprotect::Mprotect;
#[cfg(target_os = "linux")]
pub use userfaultfd::{Userfaultfd, open_userfaultfd};

/// A write protection whose faults this process answers itself. Ranges are offsets in the memory,
/// of whole pages of the machine.
pub trait PageFaults: WriteProtection<Error = io::Error> + Clone + Send + Sync + 'static {
    /// Calls `on_write` with the offset of each write that hits the protection, from several
    /// threads at once. The write waits until that has returned, and is tried again: `on_write` is
    /// to lift the protection.
    ///
    /// It may be called from a signal handler ([`Mprotect`]), so as long as all goes well it must
    /// neither allocate nor wait for a lock. Its error is fatal to the process: the write can
    /// neither go on nor fail.
    ///
    /// # Errors
    /// Fails where the system refuses a handler.
    fn answer(
        &self,
        on_write: impl Fn(u64) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<FaultHandler>;

    /// Waits until `on_write` has returned for every write that went on before.
    ///
    /// A page that `on_write` opens may be written before it returns, or before it is called for
    /// another write to that page.
    fn wait_until_answered(&self);
}

/// Answers write faults. Dropped, it first makes all of the memory writable.
#[must_use = "faults are answered as long as this lives"]
pub struct FaultHandler {
    _dropped: Box<dyn Send + Sync>,
}

impl FaultHandler {
    fn new(dropped: impl Send + Sync + 'static) -> Self {
        Self {
            _dropped: Box::new(dropped),
        }
    }
}

type OnWrite = Box<dyn Fn(u64) -> io::Result<()> + Send + Sync>;
