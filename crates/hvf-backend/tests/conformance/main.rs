//! A conformance suite for the tracker, with real write faults, over every write protection that
//! this system offers.
#![cfg(unix)]

mod faults;
mod images;
mod machine;
mod saves;

use std::io;
use std::sync::Barrier;
use std::thread;

use dirty_bitmap::{TakenBitmap, TrackedEpoch};
use hvf_backend::ArmError;
use machine::Machine;

/// Repeats a checkpoint until no vCPU is running. With userfaultfd, a thread may still handle a
/// fault whose write was already resumed by the handling of another fault.
fn once_stopped<T>(
    mut checkpoint: impl FnMut() -> Result<T, ArmError<io::Error>>,
) -> Result<T, ArmError<io::Error>> {
    loop {
        match checkpoint() {
            Err(ArmError::VcpuRunning { .. }) => thread::yield_now(),
            end => return end,
        }
    }
}

/// Makes a checkpoint of a stopped guest.
fn arm(machine: &Machine) -> Result<TrackedEpoch, ArmError<io::Error>> {
    once_stopped(|| machine.tracker.arm())
}

/// Makes the last checkpoint of a save.
fn arm_last<'e>(
    machine: &Machine,
    epoch: &'e mut TrackedEpoch,
) -> Result<&'e TakenBitmap, ArmError<io::Error>> {
    // Once the vCPUs have stopped, this is refused because a save is in progress.
    once_stopped(|| machine.tracker.arm()).unwrap_err();
    machine.tracker.arm_last(epoch)
}

/// Makes all vCPUs write concurrently, each to its own pages.
fn all_write(machine: &Machine, pages_of: impl Fn(usize) -> Vec<u64> + Sync) {
    let start = Barrier::new(machine.vcpus());
    thread::scope(|scope| {
        for vcpu in 0..machine.vcpus() {
            let (start, pages_of) = (&start, &pages_of);
            scope.spawn(move || {
                start.wait();
                machine.write_pages(vcpu, pages_of(vcpu));
            });
        }
    });
    machine.wait_until_marked();
}
