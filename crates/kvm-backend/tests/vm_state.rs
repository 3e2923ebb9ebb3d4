//! The state of a virtual machine: interrupt controllers, timer and clock.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use kvm_backend::{RestoreError, VmState, VmStateError};
use support::state::{capture, with_devices};
use support::{Guest, Program};
use test_machine::needs;

#[test]
fn vm_without_the_captured_devices_is_refused() {
    needs!(Kvm);
    let (mut bare, mut full) = (Guest::booted(Program::Mix), Guest::with(with_devices));
    full.boot(Program::Mix);
    let (bare_state, full_state) = (capture(&mut bare), capture(&mut full));

    let error = full_state
        .restore(&bare.vm, &Guest::new().vcpu)
        .unwrap_err();
    assert!(matches!(error, RestoreError::NoLapic));
    assert!(error.to_string().contains("create_irq_chip"));
    let error = bare_state
        .restore(&full.vm, &Guest::with(with_devices).vcpu)
        .unwrap_err();
    assert!(matches!(error, RestoreError::LapicNotCaptured));

    let devices = VmState::capture(&full.vm).unwrap();
    let error = devices.restore(&bare.vm).unwrap_err();
    assert!(matches!(error, VmStateError::NoPit));
    let no_pit = Guest::with(|vm| vm.create_irq_chip().unwrap());
    assert!(matches!(
        devices.restore(&no_pit.vm),
        Err(VmStateError::NoPit)
    ));
    let mut without_pit = devices.clone();
    without_pit.pit = None;
    let error = without_pit.restore(&bare.vm).unwrap_err();
    assert!(matches!(error, VmStateError::NoIrqChip));
}

#[test]
fn interrupt_controllers_timer_and_clock_are_restored() {
    needs!(Kvm);
    let old = Guest::with(with_devices);
    let mut pit = old.vm.get_pit2().unwrap();
    // Not the first channel, which raises interrupts by itself.
    pit.channels[1].count = 1234;
    pit.channels[1].mode = 2;
    old.vm.set_pit2(&pit).unwrap();
    old.vm.set_irq_line(5, true).unwrap();
    let state = VmState::capture(&old.vm).unwrap();
    assert_eq!(state.irqchips.len(), 3);

    let written: VmState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    assert_eq!(written, state);
    let written: VmState = postcard::from_bytes(&postcard::to_stdvec(&state).unwrap()).unwrap();
    assert_eq!(written, state);

    let new = Guest::with(with_devices);
    assert_ne!(VmState::capture(&new.vm).unwrap().irqchips, state.irqchips);
    written.restore(&new.vm).unwrap();
    let now = VmState::capture(&new.vm).unwrap();
    assert_eq!(now.irqchips, state.irqchips);
    let channel = now.pit.unwrap().channels[1];
    assert_eq!((channel.count, channel.mode), (1234, 2));
    let hour = 3_600_000_000_000;
    assert!((state.clock.clock..state.clock.clock + hour).contains(&now.clock.clock));
}

#[test]
fn state_of_a_vm_without_devices_has_only_a_clock() {
    needs!(Kvm);
    let guest = Guest::new();
    let state = VmState::capture(&guest.vm).unwrap();
    assert!(state.irqchips.is_empty() && state.pit.is_none());
    state.restore(&Guest::new().vm).unwrap();
}
