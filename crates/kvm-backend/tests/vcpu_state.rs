//! The state of vCPUs: captured, serialized, and restored into another virtual machine, which
//! continues the guest.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::error::Error;

use kvm_backend::{Msr, RestoreError, VcpuState};
use kvm_bindings::{KVM_MP_STATE_HALTED, Msrs, kvm_mp_state, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuExit, VmFd};
use rstest::rstest;
use support::state::{MSRS, capture, with_devices};
use support::{DONE, Guest, HIGH, INPUT, LOW_SIZE, Program, run};
use test_machine::needs;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

fn set_msrs(guest: &Guest, msrs: &[(u32, u64)]) {
    let entries: Vec<_> = msrs
        .iter()
        .map(|(index, data)| kvm_msr_entry {
            index: *index,
            data: *data,
            ..kvm_msr_entry::default()
        })
        .collect();
    let written = guest.vcpu.set_msrs(&Msrs::from_entries(&entries).unwrap());
    assert_eq!(written.unwrap(), msrs.len());
}

/// Creates a guest with the RAM of another.
fn with_ram_of(other: &Guest, prepare: impl FnOnce(&VmFd)) -> Guest {
    let guest = Guest::with(prepare);
    guest.ram.write_at(0, &other.image()).unwrap();
    guest
}

fn restore(state: &VcpuState, guest: &Guest) {
    let restored = state.restore(&guest.vm, &guest.vcpu).unwrap();
    assert_eq!(restored.differing_msrs, []);
    assert!(!restored.timer_rearmed);
}

fn through_postcard(state: &VcpuState) -> VcpuState {
    postcard::from_bytes(&postcard::to_stdvec(state).unwrap()).unwrap()
}

fn through_json(state: &VcpuState) -> VcpuState {
    serde_json::from_str(&serde_json::to_string_pretty(state).unwrap()).unwrap()
}

/// Returns the state without the time-stamp counter, which runs on.
fn at_rest(mut state: VcpuState) -> VcpuState {
    for msr in &mut state.msrs {
        if msr.index == IA32_TSC {
            msr.value = 0;
        }
    }
    state
}

/// Creates a guest whose vector registers, x87 stack and MSRs have values that no new vCPU has.
fn full_of_state(prepare: impl FnOnce(&VmFd)) -> Guest {
    let mut guest = Guest::with(prepare);
    guest.boot(Program::Vectors);
    let input: Vec<u8> = (1..=96).collect();
    guest.ram.write(INPUT, &input).unwrap();
    guest.set_regs(|regs| {
        regs.rsi = INPUT;
        regs.rdi = HIGH;
        regs.r15 = 0x0123_4567_89ab_cdef;
    });
    guest.run();
    set_msrs(&guest, &MSRS);
    let mut debug = guest.vcpu.get_debug_regs().unwrap();
    debug.db[1] = 0x5000;
    guest.vcpu.set_debug_regs(&debug).unwrap();
    guest
}

/// Puts a guest into a difficult state: a pending general protection fault, in an NMI handler, and,
/// if it has a local APIC, halted.
fn interrupt(guest: &Guest) {
    let mut events = guest.vcpu.get_vcpu_events().unwrap();
    events.exception.injected = 1;
    events.exception.nr = 13;
    events.exception.has_error_code = 1;
    events.nmi.masked = 1;
    guest.vcpu.set_vcpu_events(&events).unwrap();
    if guest.vcpu.get_lapic().is_ok() {
        let mp_state = KVM_MP_STATE_HALTED;
        guest.vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
    }
}

#[rstest]
#[case::postcard(through_postcard)]
#[case::json(through_json)]
fn restored_state_is_captured_unchanged(
    #[case] through: fn(&VcpuState) -> VcpuState,
    #[values(|_: &VmFd| (), with_devices)] prepare: fn(&VmFd),
) {
    needs!(Kvm);
    let mut old = full_of_state(prepare);
    old.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    interrupt(&old);
    let state = capture(&mut old);
    assert_eq!(
        (state.events.exception.nr, state.events.nmi.masked),
        (13, 1)
    );
    for (index, value) in MSRS {
        assert!(state.msrs.contains(&Msr { index, value }), "{index:#x}");
    }
    let written = through(&state);
    assert_eq!(written, state);

    let mut new = with_ram_of(&old, prepare);
    restore(&written, &new);
    assert_eq!(at_rest(capture(&mut new)), at_rest(state));
}

#[test]
fn vector_registers_are_restored() {
    needs!(Kvm);
    let mut old = full_of_state(|_| ());
    let state = through_postcard(&capture(&mut old));
    let mut new = with_ram_of(&old, |_| ());
    restore(&state, &new);
    new.run(); // stores them
    let mut stored = [0; 88];
    new.ram.read(HIGH, &mut stored).unwrap();
    // Two YMM registers, one XMM register, and a double that passed through the x87 stack.
    let expected: Vec<u8> = (1..=88).collect();
    assert_eq!(stored[..80], expected[..80]);
    assert_eq!(stored[80..], expected[80..88]);
}

#[test]
fn time_stamp_counter_continues_or_is_reported() {
    needs!(Kvm);
    let mut old = Guest::booted(Program::TwoOuts);
    let mut state = capture(&mut old);
    for msr in &mut state.msrs {
        if msr.index == IA32_TSC {
            msr.value += 1 << 50; // A guest that has been up for days.
        }
    }
    let mut new = with_ram_of(&old, |_| ());
    let restored = state.restore(&new.vm, &new.vcpu).unwrap();
    let counter = |state: VcpuState| {
        let msr = state.msrs.iter().find(|msr| msr.index == IA32_TSC).unwrap();
        msr.value
    };
    let (then, now) = (counter(state), counter(capture(&mut new)));
    let two_seconds = 2_000 * u64::from(new.vcpu.get_tsc_khz().unwrap());
    let goes_on = now.abs_diff(then) < 5 * two_seconds;
    let reported = restored
        .differing_msrs
        .iter()
        .any(|msr| msr.index == IA32_TSC);
    assert!(
        goes_on != reported,
        "{then} became {now}, reported: {reported}"
    );
}

#[test]
fn restored_guest_reaches_the_same_result() {
    needs!(Kvm);
    let mut old = Guest::booted(Program::Mix);
    old.set_regs(|regs| {
        regs.rdi = HIGH;
        regs.rax = 1;
        regs.r13 = 100_000;
    });
    for _ in 0..3 {
        old.run();
    }
    let state = through_postcard(&capture(&mut old));
    let mut new = with_ram_of(&old, |_| ());
    restore(&state, &new);
    let midway = new.image();
    for _ in 0..3 {
        old.run();
        new.run();
    }
    assert!(new.image() == old.image() && new.image() != midway);
    assert_eq!(new.vcpu.get_regs().unwrap(), old.vcpu.get_regs().unwrap());
}

#[test]
fn completed_instruction_is_not_executed_twice() {
    needs!(Kvm);
    let mut old = Guest::booted(Program::TwoOuts);
    old.set_regs(|regs| regs.rax = 1);
    assert_eq!(old.run(), 1);
    let state = capture(&mut old); // completes the I/O
    let mut new = with_ram_of(&old, |_| ());
    restore(&state, &new);
    assert_eq!(new.run(), 2);
}

#[test]
fn result_of_an_in_instruction_is_in_the_state() {
    needs!(Kvm);
    let mut old = Guest::booted(Program::In);
    match old.vcpu.run().unwrap() {
        VcpuExit::IoIn(DONE, answer) => answer[0] = 42,
        other => panic!("{other:?}"),
    }
    let state = capture(&mut old);
    let mut new = with_ram_of(&old, |_| ());
    restore(&state, &new);
    assert_eq!(new.run(), 42); // and not an `in` again
}

#[test]
fn complete_io_passes_the_second_exit_to_the_handler() {
    needs!(Kvm);
    let guest = Guest::booted(Program::WideStore);
    guest.map_devices_up_to(2 * LOW_SIZE);
    let device = LOW_SIZE + 0x1000;
    guest.set_regs(|regs| regs.rdi = device);
    let Guest {
        mut vcpu,
        slots: _slots,
        ..
    } = guest;
    let exit = vcpu.run().unwrap();
    assert!(
        matches!(exit, VcpuExit::MmioWrite(at, [0, 0, 0, 0, 0, 0, 0, 0]) if at == device),
        "{exit:?}"
    );
    let mut second = Vec::new();
    vcpu.complete_io(|exit| match exit {
        VcpuExit::MmioWrite(at, bytes) => second.push((at, bytes.len())),
        other => panic!("{other:?}"),
    })
    .unwrap();
    assert_eq!(second, [(device + 8, 8)]);
    run(&mut vcpu);
}

#[test]
fn refused_msrs_are_reported_and_the_others_written() {
    needs!(Kvm);
    let mut old = full_of_state(|_| ());
    let mut state = capture(&mut old);
    let refused = [0x4b56_4dff, 0x4b56_4dfe].map(|index| Msr { index, value: 7 });
    state.msrs.insert(0, refused[0]);
    state.msrs.push(refused[1]);
    let mut new = with_ram_of(&old, |_| ());
    let restored = state.restore(&new.vm, &new.vcpu).unwrap();
    assert_eq!(restored.differing_msrs, refused);
    let now = capture(&mut new);
    for (index, value) in MSRS {
        assert!(now.msrs.contains(&Msr { index, value }), "{index:#x}");
    }
}

#[test]
fn expired_deadline_is_rearmed_and_fires() {
    needs!(Kvm);
    const VECTOR: u8 = 0x40;
    let mut old = Guest::with(with_devices);
    old.boot(Program::TwoOuts);
    let mut lapic = old.vcpu.get_lapic().unwrap();
    let mut set = |offset: usize, value: u32| {
        for (to, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
            *to = byte as i8;
        }
    };
    set(0xf0, 0x1ff); // spurious-interrupt vector register: the APIC is on
    set(0x320, 0b10 << 17 | u32::from(VECTOR)); // timer: TSC-deadline, unmasked
    old.vcpu.set_lapic(&lapic).unwrap();
    let state = capture(&mut old);
    assert!(state.msrs.contains(&Msr {
        index: IA32_TSC_DEADLINE,
        value: 0
    }));

    let mut new = with_ram_of(&old, with_devices);
    let restored = state.restore(&new.vm, &new.vcpu).unwrap();
    assert!(restored.timer_rearmed);
    run(&mut new.vcpu);
    new.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    // The interrupt request register has 32 bits every 16 bytes. Interrupts are disabled in the
    // guest, so the request stays there.
    let irr = 0x200 + usize::from(VECTOR / 32) * 16 + usize::from(VECTOR % 32) / 8;
    assert_ne!(
        new.vcpu.get_lapic().unwrap().regs[irr] as u8 & 1 << (VECTOR % 8),
        0
    );
}

#[test]
fn counter_with_another_rate_is_scaled_or_refused() {
    needs!(Kvm);
    let mut guest = Guest::booted(Program::Mix);
    let mut state = capture(&mut guest);
    let here = state.tsc_khz.unwrap();
    let new = Guest::new();
    state.tsc_khz = Some(here + here / 10_000); // 100 ppm: another calibration
    state.restore(&new.vm, &new.vcpu).map(drop).unwrap();
    assert_eq!(new.vcpu.get_tsc_khz().unwrap(), here);

    let new = Guest::new();
    state.tsc_khz = Some(here / 2);
    match state.restore(&new.vm, &new.vcpu) {
        Ok(_) => assert_eq!(new.vcpu.get_tsc_khz().unwrap(), here / 2),
        Err(error @ RestoreError::TscRate { .. }) => {
            assert!(!new.vm.check_extension(Cap::TscControl));
            assert!(error.source().is_some() && error.to_string().contains("kHz"));
        }
        Err(other) => panic!("{other}"),
    }
}
