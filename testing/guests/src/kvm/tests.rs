//! Properties of virtual machines: pauses in the middle of a step, vector registers, a hole in the
//! addresses.

use test_machine::needs;

use super::*;
use crate::oracle;

const LAYOUT: Layout = Layout::of(8 << 20);

fn machine() -> Machine {
    let mut machine = Machine::new(LAYOUT).unwrap();
    machine.boot().unwrap();
    machine
}

/// Creates a machine with the memory of another, and its vCPU's state after `change`.
fn successor(old: &mut Machine, change: impl FnOnce(&mut VcpuState)) -> Machine {
    let mut ram = vec![0; LAYOUT.ram as usize];
    old.ram.read_at(0, &mut ram).unwrap();
    let mut state: VcpuState = VcpuState::from_bytes(&old.processor().unwrap()).unwrap();
    change(&mut state);
    let mut new = Machine::new(LAYOUT).unwrap();
    new.write(0, &ram).unwrap();
    let state = state.to_bytes();
    new.set_processor(&state).unwrap();
    new
}

#[test]
fn vm_paused_in_a_step_continues_as_another() {
    needs!(Kvm);
    let mut machine = machine();
    let mut inside = 0;
    // On a busy host every pause may come at the end of the last step: only a thorough run waits
    // for others.
    let mut round = 0;
    while round < test_machine::rounds(10, 40) || (test_machine::thorough() && inside == 0) {
        round += 1;
        machine.work_until(round * 200).unwrap();
        machine.pause().unwrap();
        let registers = machine.vcpu.get_regs().unwrap();
        // The register counts a step at its start, the front page at its end.
        inside += u32::from(registers.r14 != machine.steps());
        machine = successor(&mut machine, |_| ());
    }
    let goal = machine.steps() + 1000;
    machine.work_until(goal).unwrap();
    assert_eq!(machine.check().unwrap(), oracle::verdict(LAYOUT, goal));
}

#[test]
fn vm_without_its_vector_registers_is_detected() {
    needs!(Kvm);
    // XMM0 in an XSAVE area: Intel SDM vol. 1, table 13-1.
    const XMM0: std::ops::Range<usize> = 160..176;
    let mut machine = machine();
    machine.work_until(1000).unwrap();
    machine.pause().unwrap();
    let goal = machine.steps() + 1000;
    let mut new = successor(&mut machine, |state| state.xsave[XMM0].fill(0));
    new.work_until(goal).unwrap();
    let (found, expected) = (new.check().unwrap(), oracle::verdict(LAYOUT, goal));
    assert_eq!(found.faults, 0);
    assert_ne!(found.digest, expected.digest);
}

#[test]
fn ledger_continues_above_a_hole_in_the_addresses() {
    needs!(Kvm);
    // The hole is in the middle of a small ledger, instead of at 3 GiB of a large one.
    let regions = [(0, 5 << 20), (64 << 20, 3 << 20)];
    let mut machine = Machine::with_regions(RamLayout::new(regions).unwrap(), LAYOUT).unwrap();
    assert_eq!(machine.gap(), Some(5 << 20));
    machine.boot().unwrap();
    machine.work_until(10_000).unwrap();
    assert_eq!(machine.check().unwrap(), oracle::verdict(LAYOUT, 10_000));
    let mut above = vec![0; 3 << 20];
    machine.ram.read(64 << 20, &mut above).unwrap();
    assert!(above.iter().any(|byte| *byte != 0));
}

#[test]
fn guest_that_leaves_its_ram_is_an_error() {
    needs!(Kvm);
    let mut machine = machine();
    machine.front().store(front::CURSOR, 1 << 40);
    let error = machine.work_until(1000).unwrap_err().to_string();
    assert!(error.contains("Shutdown"), "{error}");
}
