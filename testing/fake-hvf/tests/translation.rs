//! Guests that translate their addresses.
#![cfg(all(hvf_fake, target_os = "linux", target_arch = "x86_64"))]
#![allow(
    unsafe_code,
    reason = "the framework's functions, by the support of these tests"
)]

mod support;

use std::sync::mpsc;
use std::thread;

use fake_hvf::control::set_identification;
use fake_hvf::tables::*;
use support::translated::*;
use support::*;

#[test]
fn a_store_faults_with_its_virtual_and_physical_address() {
    // Aligned to the largest page.
    let data = RAM + 4 * PAGE;
    let high = u64::MAX << 39 | 0x10_0000;
    for page_bits in [12, 14, 16] {
        let _turn = turn();
        let mut guest = Guest::new(page_bits);
        for (value, base) in [(1, DATA_AT), (2, high)] {
            guest.map(base, data, ACCESSED);
            guest.ram.protect(data, PAGE, READ_AND_EXECUTE);
            let address = base + 0x128;
            let set = 0xd280_0000 | value << 5; // mov x0, #value
            let fault = guest.execute(address, &[set, STORE, LOAD, hvc(1)]);
            let kind = fault.syndrome & !0x3f;
            assert_eq!(kind, DATA_ABORT << 26 | IL | WRITE, "{page_bits}");
            assert_eq!(fault.virtual_address, address);
            assert_eq!(fault.physical_address, data + 0x128);
            assert_eq!(guest.vcpu.get(PC), CODE_AT + 4);
            guest.ram.protect(data, PAGE, ALL);
            assert_eq!(hypercall(guest.vcpu.run()), 1, "{page_bits}");
            assert_eq!(guest.ram.word(data + 0x128), value.into());
            assert_eq!(guest.vcpu.get(X0), value.into());
        }
    }
}

#[test]
fn a_store_across_pages_reports_the_page_that_is_refused() {
    let _turn = turn();
    let mut guest = Guest::new(14);
    // The two pages are not neighbors in physical memory.
    guest.map(DATA_AT + PAGE, RAM + 5 * PAGE, ACCESSED);
    guest.ram.protect(RAM + 5 * PAGE, PAGE, READ_AND_EXECUTE);
    let fault = guest.execute(DATA_AT + PAGE - 4, &[STORE, hvc(1)]);
    let addresses = (fault.virtual_address, fault.physical_address);
    assert_eq!(addresses, (DATA_AT + PAGE + 3, RAM + 5 * PAGE + 3));
    guest.ram.protect(RAM + 5 * PAGE, PAGE, ALL);
    assert_eq!(hypercall(guest.vcpu.run()), 1);
    assert_eq!(guest.ram.word(DATA + PAGE - 8), 0x4242 << 32);
    assert_eq!(guest.ram.word(RAM + 5 * PAGE), 0);
}

#[test]
fn a_guest_enables_translation_itself() {
    let _turn = turn();
    let mut guest = Guest::new(12);
    guest.map(RAM, RAM, ACCESSED);
    guest.vcpu.set_system(SCTLR_EL1, 0).unwrap();
    // msr sctlr_el1, x2; isb; the store; msr sctlr_el1, xzr; isb; a load of the physical address
    let code = [0xd518_1002, 0xd503_3fdf, STORE, 0xd518_101f, 0xd503_3fdf];
    guest.ram.write(RAM, &code);
    guest.ram.write(RAM + 20, &[0xf940_0064, hvc(1)]); // ldr x4, [x3]
    guest.vcpu.set(PC, RAM);
    guest.vcpu.set(X0, 0x4242);
    guest.vcpu.set(X1, DATA_AT);
    guest.vcpu.set(2, 1);
    guest.vcpu.set(3, DATA);
    assert_eq!(hypercall(guest.vcpu.run()), 1);
    assert_eq!(guest.vcpu.get(4), 0x4242);
    assert_eq!(guest.vcpu.system(SCTLR_EL1), Ok(0));
}

#[test]
fn a_guest_takes_the_aborts_of_its_own_tables() {
    let _turn = turn();
    let mut guest = Guest::new(12);
    guest.handle_exceptions();
    guest.map(DATA_AT + 0x1000, DATA, ACCESSED | READ_ONLY);
    guest.map(DATA_AT + 0x2000, DATA, 0);
    guest.map(DATA_AT + 0x3000, DATA, ACCESSED | NO_EXECUTION);
    let own = DATA_ABORT | 1;
    let branch = 0xd61f_0020; // br x1
    for (address, instruction, class, status) in [
        (DATA_AT + 0x4000, LOAD, own, 0x07),
        (0x5000_0000, LOAD, own, 0x05),
        (0x5000_0000, STORE, own, WRITE | 0x05),
        (1 << 40, LOAD, own, 0x04), // in neither half
        (DATA_AT + 0x1000, STORE, own, WRITE | 0x0f),
        (DATA_AT + 0x2000, LOAD, own, 0x0b),
        (DATA_AT + 0x2000, STORE, own, WRITE | 0x0b),
        (DATA_AT + 0x3000, branch, INSTRUCTION_ABORT | 1, 0x0f),
        (0x5000_0000, branch, INSTRUCTION_ABORT | 1, 0x05),
    ] {
        let exit = guest.execute(address, &[instruction, hvc(1)]);
        let exception = guest.exception(exit);
        assert_eq!(exception, (class << 26 | IL | status, address));
        let at = if instruction == branch {
            address
        } else {
            CODE_AT
        };
        assert_eq!(guest.vcpu.system(ELR_EL1), Ok(at));
    }
    // What is permitted is done.
    let exit = guest.execute(DATA_AT + 0x1000, &[LOAD, hvc(1)]);
    assert_eq!(hypercall(exit), 1);
}

#[test]
fn level_0_has_permissions_of_its_own() {
    let (user_code, user_data) = (DATA_AT + 0x1000, DATA_AT + 0x2000);
    let refused = |address, status| ((DATA_ABORT << 26 | IL | status), address);
    for (instruction, address, expected) in [
        (STORE, user_data, (0x15 << 26 | IL | 5, 0)),
        (STORE, user_code, refused(user_code, WRITE | 0x0f)),
        (STORE, DATA_AT, refused(DATA_AT, WRITE | 0x0f)),
        (LOAD, DATA_AT, refused(DATA_AT, 0x0f)),
        (LOAD, user_code, (0x15 << 26 | IL | 5, 0)),
    ] {
        let _turn = turn();
        let mut guest = Guest::new(12);
        guest.handle_exceptions();
        guest.map(DATA_AT, DATA, ACCESSED | NO_USER_EXECUTION);
        guest.map(user_code, RAM + 2 * PAGE, ACCESSED | USER | READ_ONLY);
        guest.map(user_data, RAM + 3 * PAGE, ACCESSED | USER);
        let code = [instruction, 0xd400_0001 | 5 << 5]; // svc #5
        guest.ram.write(RAM + 2 * PAGE, &code);
        guest.vcpu.set_system(ELR_EL1, user_code).unwrap();
        guest.vcpu.set_system(SPSR_EL1, 0).unwrap();
        // Level 1 loads first, so the translation is known: ldr x4, [x1]; eret
        let exit = guest.execute(address, &[0xf940_0024, 0xd69f_03e0]);
        assert_eq!(guest.exception(exit), expected);
    }
}

#[test]
fn level_1_does_not_execute_what_level_0_writes() {
    let _turn = turn();
    let mut guest = Guest::new(12);
    guest.handle_exceptions();
    guest.map(DATA_AT, DATA, ACCESSED | USER);
    let exit = guest.execute(DATA_AT, &[0xd61f_0020]); // br x1
    let (syndrome, _) = guest.exception(exit);
    assert_eq!(syndrome, (INSTRUCTION_ABORT | 1) << 26 | IL | 0x0f);
}

#[test]
fn a_known_translation_is_used_until_it_is_invalidated() {
    let _turn = turn();
    let mut guest = Guest::new(14);
    let other = RAM + 5 * PAGE;
    assert_eq!(hypercall(guest.execute(DATA_AT, &[STORE, hvc(1)])), 1);
    guest.map(DATA_AT, other, ACCESSED);
    guest.ram.write_word(DATA, 0);
    assert_eq!(hypercall(guest.execute(DATA_AT, &[STORE, hvc(1)])), 1);
    assert_eq!((guest.ram.word(DATA), guest.ram.word(other)), (0x4242, 0));
    guest.ram.write_word(DATA, 0);
    let exit = guest.execute(DATA_AT, &[INVALIDATE, STORE, hvc(1)]);
    assert_eq!(hypercall(exit), 1);
    assert_eq!((guest.ram.word(DATA), guest.ram.word(other)), (0, 0x4242));
}

#[test]
fn code_at_an_address_is_that_of_its_page() {
    let _turn = turn();
    let mut guest = Guest::new(14);
    let pages = [(DATA, 5), (RAM + 5 * PAGE, 6), (DATA, 5)];
    for (page, number) in pages {
        guest.ram.write(page, &[hvc(number)]);
    }
    guest.ram.write(RAM, &[INVALIDATE, 0xd61f_0020]); // br x1
    guest.vcpu.set(X1, DATA_AT);
    for (page, number) in pages {
        guest.map(DATA_AT, page, ACCESSED);
        guest.vcpu.set(PC, CODE_AT);
        assert_eq!(hypercall(guest.vcpu.run()), u64::from(number));
    }
}

#[test]
fn one_vcpu_invalidates_the_translations_of_another() {
    let _turn = turn();
    let mut guest = Guest::new(14);
    let other = RAM + 5 * PAGE;
    let (ready, started) = mpsc::channel();
    // A loop on the second vCPU: str x0, [x1]; add x0, x0, #1; b, back
    let second_code = CODE_AT + 0x100;
    let code = [STORE, 0x9100_0400, 0x17ff_fffe];
    guest.ram.write(RAM + 0x100, &code);
    let tcr = guest.lower.0.control();
    thread::scope(|scope| {
        let second = scope.spawn(move || {
            let vcpu = Vcpu::new();
            vcpu.set_system(TCR_EL1, tcr).unwrap();
            vcpu.set_system(TTBR0_EL1, LOWER).unwrap();
            vcpu.set_system(SCTLR_EL1, 1).unwrap();
            vcpu.set(PC, second_code);
            vcpu.set(X1, DATA_AT);
            ready.send(vcpu.id).unwrap();
            vcpu.run_any().reason
        });
        let id = started.recv().unwrap();
        while guest.ram.word(DATA) == 0 {
            thread::yield_now();
        }
        guest.map(DATA_AT, other, ACCESSED);
        assert_eq!(hypercall(guest.execute(0, &[INVALIDATE, hvc(1)])), 1);
        let last = guest.ram.word(DATA);
        while guest.ram.word(other) == 0 {
            thread::yield_now();
        }
        assert_eq!(guest.ram.word(DATA), last);
        cancel(id);
        assert_eq!(second.join().unwrap(), 0);
    });
}

#[test]
fn a_walk_that_stage_2_refuses_exits() {
    let _turn = turn();
    let mut guest = Guest::new(12);
    // A table that is not mapped into the guest.
    guest.vcpu.set_system(TTBR1_EL1, 0xa000_0000).unwrap();
    let high = u64::MAX << 39;
    let fault = guest.execute(high + 0x128, &[LOAD, hvc(1)]);
    let syndrome = DATA_ABORT << 26 | IL | STAGE_1_WALK | TRANSLATION;
    assert_eq!(fault.syndrome, syndrome);
    assert_eq!(fault.virtual_address, high + 0x128);
    assert_eq!(fault.physical_address, 0xa000_0128);
    guest.map(high, DATA, ACCESSED);
    guest.vcpu.set_system(TTBR1_EL1, UPPER).unwrap();
    assert_eq!(hypercall(guest.vcpu.run()), 1);
}

#[test]
fn a_processor_that_updates_descriptors_writes_tables() {
    let _turn = turn();
    set_identification(ID_AA64MMFR1_EL1, 0x1121_2002);
    let mut guest = Guest::new(14);
    let updates = 0b11 << 39;
    let control = guest.lower.0.control() | updates;
    guest.vcpu.set_system(TCR_EL1, control).unwrap();
    guest.map(DATA_AT, DATA, READ_ONLY | DIRTY_MODIFIER);
    let entry = guest.lower.0.entry(DATA_AT);
    let flags = |guest: &Guest| guest.lower.1.word(entry) & (ACCESSED | READ_ONLY);
    let protect = |guest: &Guest, flags| {
        let table = entry & !(PAGE - 1);
        guest.lower.1.protect(table, PAGE, flags);
    };
    for (instruction, write, after) in [(LOAD, 0, ACCESSED | READ_ONLY), (STORE, WRITE, ACCESSED)] {
        protect(&guest, READ_AND_EXECUTE);
        let before = flags(&guest);
        let fault = guest.execute(DATA_AT + 0x10, &[INVALIDATE, instruction, hvc(1)]);
        let kind = DATA_ABORT << 26 | IL | STAGE_1_WALK | write;
        assert_eq!(fault.syndrome & !0x3f, kind);
        assert_eq!(fault.virtual_address, DATA_AT + 0x10);
        assert_eq!(fault.physical_address & !0xfff, entry & !0xfff);
        assert_eq!(flags(&guest), before);
        protect(&guest, ALL);
        assert_eq!(hypercall(guest.vcpu.run()), 1);
        assert_eq!(flags(&guest), after);
    }
    assert_eq!(guest.ram.word(DATA + 0x10), 0x4242);
}

#[test]
fn a_block_is_accessible_where_memory_is_mapped() {
    let _turn = turn();
    let mut guest = Guest::new(12);
    guest.handle_exceptions();
    // A block of 1 GiB in the first table, with a gap before the RAM.
    let block = 0x40_0000_0000 - (1 << 30);
    let first = LOWER + 8 * (block >> 30);
    guest.lower.1.write_word(first, RAM | ACCESSED | 0b01);
    let exit = guest.execute(block + PAGE, &[STORE, hvc(1)]);
    assert_eq!(hypercall(exit), 1);
    assert_eq!(guest.ram.word(DATA), 0x4242);
    let fault = guest.execute(block + SIZE, &[STORE, hvc(1)]);
    assert_eq!(fault.syndrome, DATA_ABORT << 26 | IL | WRITE | TRANSLATION);
    assert_eq!(fault.virtual_address, block + SIZE);
    assert_eq!(fault.physical_address, RAM + SIZE);
    // No descriptor of level 0 or 3 is a block.
    let entry = guest.lower.0.entry(DATA_AT);
    guest.lower.1.write_word(entry, DATA | ACCESSED | 0b01);
    let exit = guest.execute(DATA_AT, &[LOAD, hvc(1)]);
    let translation = (DATA_ABORT | 1) << 26 | IL | TRANSLATION;
    assert_eq!(guest.exception(exit), (translation, DATA_AT));
}

#[test]
fn a_fetch_faults_with_its_virtual_and_physical_address() {
    let _turn = turn();
    let guest = Guest::new(14);
    guest.ram.write(DATA, &[hvc(2)]);
    guest.ram.protect(DATA, PAGE, 0b011);
    let fault = guest.execute(DATA_AT, &[0xd61f_0020]); // br x1
    assert_eq!(class(fault), INSTRUCTION_ABORT);
    assert_eq!(fault.virtual_address, DATA_AT);
    assert_eq!(fault.physical_address, DATA);
    assert_eq!(guest.vcpu.get(PC), DATA_AT);
    guest.ram.protect(DATA, PAGE, ALL);
    assert_eq!(hypercall(guest.vcpu.run()), 2);
}

#[test]
fn a_top_byte_is_ignored_where_the_guest_asks_for_it() {
    let _turn = turn();
    let guest = Guest::new(12);
    guest.handle_exceptions();
    let tagged = 0x5a << 56 | DATA_AT;
    let exit = guest.execute(tagged, &[STORE, hvc(1)]);
    let (syndrome, address) = guest.exception(exit);
    assert_eq!(syndrome & 0x3f, 0x04);
    assert_eq!(address, tagged);
    let control = guest.lower.0.control() | 1 << 37;
    guest.vcpu.set_system(TCR_EL1, control).unwrap();
    let exit = guest.execute(tagged, &[STORE, hvc(1)]);
    assert_eq!(hypercall(exit), 1);
    assert_eq!(guest.ram.word(DATA), 0x4242);
}
