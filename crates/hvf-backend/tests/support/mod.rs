//! What several test files use.
#![allow(dead_code, reason = "each test file uses a part")]

#[cfg(feature = "macos-15")]
use hvf_backend::GicPlace;
use hvf_backend::el1::{self, Start};
use hvf_backend::{Exit, ExitAction, GuestRam, PAGE_SIZE, Stage2, Stage2Tracker, Vcpu, VcpuState};

/// Where the interrupt controller of a test is: below all RAM.
#[cfg(feature = "macos-15")]
pub(crate) const GIC: GicPlace = GicPlace {
    distributor: 0x800_0000,
    redistributors: 0x1000_0000,
};

/// The start of the RAM, where the page table is.
pub(crate) const RAM: u64 = 0x8000_0000;
/// The first instruction of a guest.
pub(crate) const PROGRAM: u64 = RAM + PAGE_SIZE;

/// Writes the page table and the program of a guest to its RAM.
pub(crate) fn write_guest(ram: &GuestRam, code: &[u32]) {
    ram.write(RAM, &el1::page_table()).unwrap();
    let code: Vec<u8> = code.iter().copied().flat_map(u32::to_le_bytes).collect();
    ram.write(PROGRAM, &code).unwrap();
}

/// Returns the state of a vCPU at the first instruction.
pub(crate) fn start_state() -> VcpuState {
    let start = Start {
        entry: PROGRAM,
        page_table: RAM,
        address_bits: 36,
    };
    start.state()
}

/// Sets a vCPU to the first instruction.
pub(crate) fn start(vcpu: &Vcpu) {
    let restored = start_state().restore(vcpu, 0).unwrap();
    assert_eq!(restored.differing, []);
}

/// Runs a vCPU until an exit that the tracker leaves to the VMM.
pub(crate) fn run_tracked(tracker: &Stage2Tracker<Stage2>, vcpu: &mut Vcpu) -> Exit {
    loop {
        let run_guard = tracker.enter();
        let exit = vcpu.run().unwrap();
        if tracker.handle_exit(&run_guard, &exit).unwrap() == ExitAction::Forward {
            return exit;
        }
    }
}
