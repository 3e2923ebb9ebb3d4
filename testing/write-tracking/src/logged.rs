//! What a hypervisor with a log of dirty pages has to provide.

use dirty_bitmap::{LoggedEpoch, TakenBitmap};
use guest_ram::LoggedRam;
use test_machine::Need;

/// A guest that increments words, whose writes a hypervisor logs. Each vCPU has its own word in
/// every page.
pub trait LoggedBackend: Send + Sync + Sized + 'static {
    /// What the machine must offer.
    const NEEDS: &'static [Need];

    /// Creates a guest whose RAM has these regions (guest-physical start, size), and switches the
    /// log on. No log has what was written before: all of the RAM is marked, now or by the first
    /// harvest.
    fn new(regions: [(u64, u64); 2]) -> Self;

    /// Returns the RAM. Its bitmap receives the log, and its host writes mark pages.
    fn ram(&self) -> &LoggedRam;

    /// Writes bytes at a guest-physical address as a device of the VMM does. The page is marked,
    /// now or by the next harvest.
    fn host_write(&self, guest_start: u64, bytes: &[u8]) {
        self.ram().write(guest_start, bytes).unwrap();
    }

    /// Returns the number of vCPUs: at least two.
    fn vcpus(&self) -> usize;

    /// Makes a vCPU increment the word at each of these guest-physical addresses, on the calling
    /// thread. The addresses are above the first 128 KiB.
    fn increment(&self, vcpu: usize, addresses: &[u64]);

    /// Moves the log into the bitmap while vCPUs may run, and takes all marks. Every page that was
    /// written before the call is in the epoch when it returns.
    fn begin_live(&self) -> LoggedEpoch;

    /// Does the same for the pages since, and calls `copy` with them.
    fn extend_live(&self, epoch: &mut LoggedEpoch, copy: impl FnOnce(&TakenBitmap));

    /// Does what [`begin_live`](Self::begin_live) does while no vCPU runs, and calls `copy` before
    /// one may run again. No vCPU [increments](Self::increment) during the call.
    fn begin_paused(&self, copy: impl FnOnce(LoggedEpoch));

    /// Does what [`extend_live`](Self::extend_live) does while no vCPU runs: the last harvest of a
    /// save.
    fn extend_paused(&self, epoch: &mut LoggedEpoch, copy: impl FnOnce(&TakenBitmap));
}
