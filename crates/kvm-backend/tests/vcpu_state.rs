//! vCPU state: captured, written down, put into another virtual machine, whose guest goes on.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::error::Error;

use kvm_backend::{Msr, RestoreError, VcpuState, VmState, VmStateError};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_mp_state, kvm_msr_entry, kvm_pit_config,
};
use kvm_ioctls::{Cap, VcpuExit, VmFd};
use rstest::rstest;
use support::{CODE, DONE, Guest, HIGH, INPUT, LOW_SIZE, Program, run};
use test_machine::Need;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Registers that a guest's kernel sets, and values they take.
const MSRS: [(u32, u64); 6] = [
    (0x174, 0x10),                        // IA32_SYSENTER_CS
    (0x176, 0xffff_8000_0000_1230),       // IA32_SYSENTER_EIP
    (0x277, 0x0007_0106_0007_0106),       // IA32_PAT
    (0xc000_0081, 0x0023_0010_0000_0000), // IA32_STAR
    (0xc000_0082, 0xffff_8000_0000_4560), // IA32_LSTAR
    (0xc000_0102, 0x7fff_1234_5670),      // IA32_KERNEL_GS_BASE
];

fn with_devices(vm: &VmFd) {
    vm.create_irq_chip().unwrap();
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    };
    vm.create_pit2(pit).unwrap();
}

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

fn capture(guest: &mut Guest) -> VcpuState {
    guest.vcpu.complete_io(|exit| panic!("{exit:?}")).unwrap();
    let paused = guest.vcpus.pause().unwrap();
    VcpuState::capture(&guest.kvm, &paused, &guest.vcpu).unwrap()
}

/// A new guest with the RAM of another.
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

/// The state without what goes on by itself: the time-stamp counter.
fn at_rest(mut state: VcpuState) -> VcpuState {
    for msr in &mut state.msrs {
        if msr.index == IA32_TSC {
            msr.value = 0;
        }
    }
    state
}

/// A guest whose vector registers, x87 stack and MSRs hold what no new vCPU has.
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

/// Stops a guest at a bad moment: a general protection fault on its way, in an NMI handler, and, where that can be, halted.
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
fn a_state_restored_into_a_new_machine_is_captured_there_unchanged(
    #[case] through: fn(&VcpuState) -> VcpuState,
    #[values(|_: &VmFd| (), with_devices)] prepare: fn(&VmFd),
) {
    if !Need::Kvm.met("a_state_restored_into_a_new_machine_is_captured_there_unchanged") {
        return;
    }
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
fn vector_registers_come_back_in_a_new_machine() {
    if !Need::Kvm.met("vector_registers_come_back_in_a_new_machine") {
        return;
    }
    let mut old = full_of_state(|_| ());
    let state = through_postcard(&capture(&mut old));
    let mut new = with_ram_of(&old, |_| ());
    restore(&state, &new);
    new.run(); // stores them
    let mut stored = [0; 88];
    new.ram.read(HIGH, &mut stored).unwrap();
    // Two halves of YMM registers, one XMM, and a double that went through the x87 stack.
    let expected: Vec<u8> = (1..=88).collect();
    assert_eq!(stored[..80], expected[..80]);
    assert_eq!(stored[80..], expected[80..88]);
}

#[test]
fn the_time_stamp_counter_goes_on_from_where_it_was_captured_or_is_reported() {
    if !Need::Kvm.met("the_time_stamp_counter_goes_on_from_where_it_was_captured_or_is_reported") {
        return;
    }
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
fn a_guest_restored_elsewhere_reaches_what_the_first_one_reaches() {
    if !Need::Kvm.met("a_guest_restored_elsewhere_reaches_what_the_first_one_reaches") {
        return;
    }
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
fn an_instruction_that_left_the_guest_is_not_done_twice() {
    if !Need::Kvm.met("an_instruction_that_left_the_guest_is_not_done_twice") {
        return;
    }
    let mut old = Guest::booted(Program::TwoOuts);
    old.set_regs(|regs| regs.rax = 1);
    assert_eq!(old.run(), 1);
    let state = capture(&mut old); // completes the I/O
    let mut new = with_ram_of(&old, |_| ());
    restore(&state, &new);
    assert_eq!(new.run(), 2);
}

#[test]
fn the_answer_to_an_in_instruction_is_in_the_state() {
    if !Need::Kvm.met("the_answer_to_an_in_instruction_is_in_the_state") {
        return;
    }
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
fn completing_an_instruction_of_two_exits_hands_over_the_second() {
    if !Need::Kvm.met("completing_an_instruction_of_two_exits_hands_over_the_second") {
        return;
    }
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
fn msrs_that_kvm_refuses_are_named_and_the_others_are_written() {
    if !Need::Kvm.met("msrs_that_kvm_refuses_are_named_and_the_others_are_written") {
        return;
    }
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
fn an_expired_deadline_is_armed_again_and_fires() {
    if !Need::Kvm.met("an_expired_deadline_is_armed_again_and_fires") {
        return;
    }
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
    // The interrupt request register: 32 bits every 16 bytes. The guest has interrupts off, so it stays there.
    let irr = 0x200 + usize::from(VECTOR / 32) * 16 + usize::from(VECTOR % 32) / 8;
    assert_ne!(
        new.vcpu.get_lapic().unwrap().regs[irr] as u8 & 1 << (VECTOR % 8),
        0
    );
}

#[test]
fn a_machine_without_the_captured_devices_is_refused_with_what_to_create() {
    if !Need::Kvm.met("a_machine_without_the_captured_devices_is_refused_with_what_to_create") {
        return;
    }
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
fn a_counter_of_another_rate_is_scaled_or_refused() {
    if !Need::Kvm.met("a_counter_of_another_rate_is_scaled_or_refused") {
        return;
    }
    let mut guest = Guest::booted(Program::Mix);
    let mut state = capture(&mut guest);
    let here = state.tsc_khz.unwrap();
    let new = Guest::new();
    state.tsc_khz = Some(here + here / 10_000); // 100 ppm: calibrated on another day
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

#[test]
fn interrupt_controllers_timer_and_clock_come_back_in_a_new_machine() {
    if !Need::Kvm.met("interrupt_controllers_timer_and_clock_come_back_in_a_new_machine") {
        return;
    }
    let old = Guest::with(with_devices);
    let mut pit = old.vm.get_pit2().unwrap();
    // Not the first, which raises interrupts by itself.
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
fn a_machine_without_devices_has_a_clock_only() {
    if !Need::Kvm.met("a_machine_without_devices_has_a_clock_only") {
        return;
    }
    let guest = Guest::new();
    let state = VmState::capture(&guest.vm).unwrap();
    assert!(state.irqchips.is_empty() && state.pit.is_none());
    state.restore(&Guest::new().vm).unwrap();
}

#[test]
fn state_that_is_damaged_or_of_another_format_is_an_error() {
    let json = include_str!("formats/vcpu-state-1.json");
    let good: serde_json::Value = serde_json::from_str(json).unwrap();
    let read = |change: fn(&mut serde_json::Value)| {
        let mut changed = good.clone();
        change(&mut changed);
        serde_json::from_str::<VcpuState>(&changed.to_string())
    };
    assert!(read(|_| ()).is_ok());
    for (change, says) in [
        (
            (|state| state["format"] = 2.into()) as fn(&mut serde_json::Value),
            "format 2: this version of kvm-backend reads format 1",
        ),
        (
            |state| cut(&mut state["regs"], 2),
            "expected exactly 144 bytes",
        ),
        (|state| cut(&mut state["regs"], 1), "hexadecimal digits"),
        (
            |state| cut(&mut state["cpuid"], 2),
            "expected a multiple of 40 bytes",
        ),
        (|state| state["regs"] = "zz".into(), "hexadecimal digits"),
    ] {
        let error = read(change).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    let mut binary = include_bytes!("formats/vcpu-state-1.postcard").to_vec();
    assert!(postcard::from_bytes::<VcpuState>(&binary[..binary.len() - 1]).is_err());
    binary[0] = 2; // The format is the first number.
    assert!(postcard::from_bytes::<VcpuState>(&binary).is_err());
}

fn cut(digits: &mut serde_json::Value, count: usize) {
    let text = digits.as_str().unwrap();
    *digits = text[..text.len() - count].into();
}

/// Written by format 1, when it was the newest: captured from `full_of_state`, with devices.
#[test]
fn format_1_stays_readable() {
    let json: VcpuState = serde_json::from_str(include_str!("formats/vcpu-state-1.json")).unwrap();
    let binary: VcpuState =
        postcard::from_bytes(include_bytes!("formats/vcpu-state-1.postcard")).unwrap();
    assert_eq!(json, binary);
    assert_eq!(json.regs.r15, 0x0123_4567_89ab_cdef);
    assert!((CODE..CODE + 0x100).contains(&json.regs.rip));
    assert_eq!(json.debug_regs.db[1], 0x5000);
    assert_eq!(json.xsave[160..176], (1..=16).collect::<Vec<u8>>()); // XMM0
    assert!(json.lapic.is_some() && json.cpuid.len() > 10);
    for (index, value) in MSRS {
        assert!(json.msrs.contains(&Msr { index, value }));
    }
}
