//! What a hypervisor, or what stands for one, has to provide.

use std::fs::File;
use std::io;
use std::sync::Arc;

use dirty_bitmap::WriteProtection;
use hvf_backend::{Exception, Exit, ExitAction, Stage2Tracker};
use page_reader::PageReader;
use test_machine::Need;
use write_faults::FaultHandler;

use crate::protection::Protection;

/// The size of the first region, which starts at 0.
pub const LOW_SIZE: u64 = 3 << 20;
/// The guest-physical start of the second region.
pub const HIGH: u64 = 4 << 30;
/// The size of the second region.
pub const HIGH_SIZE: u64 = 2 << 20;

/// The tracker under test. Its protection fails and waits on request.
pub type Tracker = Stage2Tracker<Protection>;

/// A guest that increments words, with real write faults. Each vCPU has its own word in every page.
pub trait Backend: Send + Sync + Sized + 'static {
    /// The write protection of the guest's RAM.
    type Protection: WriteProtection<Error = io::Error> + Send + Sync + 'static;

    /// What the machine must offer.
    const NEEDS: &'static [Need];

    /// The guest-physical start and the size of each region of the RAM. A backend for which the
    /// suite for running guests is used has these: a 2 MiB block of the memory file contains parts
    /// of both regions.
    const REGIONS: [(u64, u64); 2] = [(0, LOW_SIZE), (HIGH, HIGH_SIZE)];

    /// Whether a fault may be handled late: after the handling of another fault has let its write
    /// pass. It then marks its page once more.
    const LATE_FAULTS: bool;

    /// Creates a guest whose writes do not fault yet. Its RAM will be protected in pages of
    /// `page_size` bytes, which are whole pages of the host.
    fn new(page_size: u64) -> Self;

    /// Returns the write protection.
    fn protection(&self) -> Self::Protection;

    /// Starts to pass write faults to the tracker, if other threads than those of the vCPUs do it
    /// or a signal handler does. [`handle_fault`] passes one.
    fn serve_faults(&self, tracker: &Arc<Tracker>) -> Option<FaultHandler> {
        let _ = tracker;
        None
    }

    /// Waits until every fault is handled whose write has continued.
    fn wait_until_handled(&self) {}

    /// Returns the RAM.
    fn ram(&self) -> &(impl PageReader + Send + Sync);

    /// Returns the number of vCPUs: several for the suite for running guests.
    fn vcpus(&self) -> usize;

    /// Makes a vCPU increment the word at each of these guest-physical addresses, on the calling
    /// thread. The vCPU is counted by the tracker while it is in the guest.
    fn increment(&self, tracker: &Tracker, vcpu: usize, addresses: &[u64]);

    /// Writes as the host does, without a fault. The caller marks the pages.
    fn host_write(&self, guest_start: u64, bytes: &[u8]);

    /// Returns the memory file of the RAM, for discards.
    fn file(&self) -> &File;
}

/// Passes a write fault at an offset of the memory file to the tracker, as the exit of a store on
/// Arm. The write may continue after this returns `Ok`.
///
/// # Errors
/// Returns an error if the offset is not RAM, or if the tracker does not handle the fault.
pub fn handle_fault(tracker: &Tracker, offset: u64) -> io::Result<()> {
    let address = tracker.layout().guest_address_of(offset);
    let exit = store_fault(address.ok_or(io::ErrorKind::InvalidInput)?);
    match tracker.handle_exit(&tracker.enter(), &exit) {
        Ok(ExitAction::Resume) => Ok(()),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

/// Returns the exit of a store to a protected page on Arm: a data abort with WnR and without ISV,
/// for a permission fault.
fn store_fault(physical_address: u64) -> Exit {
    Exit::Exception(Exception {
        syndrome: 0x9200_004f,
        physical_address,
        ..Exception::default()
    })
}
