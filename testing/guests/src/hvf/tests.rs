//! Assembles the guest's program and runs it in an emulator of the same processor: with a real MMU,
//! the same initial state and the same memory.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use page_reader::RamLayout;
use rstest::rstest;
use test_machine::needs;

use super::assembler::assemble;
use super::*;
use crate::ledger::{self, Layout, PAGE, Registers, WORD, Words, front};
use crate::oracle;

const LAYOUT: Layout = Layout::of(8 << 20);

/// The start of the RAM of QEMU's `virt`, where it places the device tree. The guest's RAM is
/// higher.
const QEMU_RAM: u64 = 1 << 30;

/// The address of the program that replaces the host, above the guest.
const HOST: u64 = start::LOW + (256 << 20);
/// The size of QEMU's RAM in bytes. Its file is sparse.
const QEMU_RAM_SIZE: u64 = HOST + (1 << 20) - QEMU_RAM;

/// The address of the results of that program: the syndromes of the exits, in order.
const SYNDROMES: u64 = HOST + 0x8000;

/// Returns a program for the emulated machine's higher exception level, which replaces the host: it
/// sets the processor's initial state, handles the guest's doorbell, commands a check of the
/// ledger, and switches the machine off at the second doorbell or at any other exit.
fn host_program(state: &hvf_backend::VcpuState) -> String {
    let mut text = String::from(
        "        mov     x0, #(1 << 31)          // HCR_EL2.RW: the guest is AArch64
        msr     hcr_el2, x0
        mov     x0, #0x33ff             // CPTR_EL2: vector registers don't trap
        msr     cptr_el2, x0
        adr     x0, vectors
        msr     vbar_el2, x0
",
    );
    // Loads from a literal pool, since `mov` takes 16 bits at a time.
    let load = |text: &mut String, register: &str, value: u64| {
        writeln!(text, "ldr {register}, ={value:#x}").unwrap();
    };
    for register in &state.system {
        load(&mut text, "x0", register.value);
        writeln!(text, "msr {}, x0", register.register).unwrap();
    }
    load(&mut text, "x0", state.cpsr);
    text.push_str("msr spsr_el2, x0\n");
    load(&mut text, "x0", state.pc);
    text.push_str("msr elr_el2, x0\n");
    load(&mut text, "x15", SYNDROMES);
    for (number, value) in state
        .x
        .iter()
        .enumerate()
        .filter(|(number, _)| *number != 15)
    {
        load(&mut text, &format!("x{number}"), *value);
    }
    let (command, front) = (front::ORDER - Layout::FRONT, start::LOW + Layout::FRONT);
    write!(
        text,
        "       eret
        .p2align 11
vectors:
        .org    vectors + 0x400         // From AArch64 at a lower level.
        mrs     x0, esr_el2
        str     x0, [x15], #8
        ldr     x1, ={arrived:#x}
        cmp     x0, x1
        b.ne    off
        mov     x1, #1
        ldr     x2, ={front:#x}
        str     x1, [x2, #{command}]
        eret
        .org    vectors + 0x480         // An interrupt: there is none.
off:    ldr     x0, =0x84000008         // PSCI SYSTEM_OFF
        smc     #0
        b       off
",
        arrived = doorbell_syndrome(ARRIVED),
    )
    .unwrap();
    text
}

/// Returns the syndrome of an `hvc`: class 0x16, a 32-bit instruction, the operand.
fn doorbell_syndrome(number: u16) -> u64 {
    0x16 << 26 | 1 << 25 | u64::from(number)
}

/// The guest's RAM in the file of QEMU's RAM.
struct Ram<'a> {
    file: &'a File,
    regions: &'a RamLayout,
}

impl Ram<'_> {
    fn file_offset(&self, offset: u64) -> u64 {
        self.regions.guest_address_of(offset).unwrap() - QEMU_RAM
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.file
            .write_all_at(bytes, self.file_offset(offset))
            .unwrap();
    }

    fn page(&self, offset: u64) -> Vec<u8> {
        let mut page = vec![0; PAGE as usize];
        self.file
            .read_exact_at(&mut page, self.file_offset(offset))
            .unwrap();
        page
    }
}

impl Words for Ram<'_> {
    fn load(&self, offset: u64) -> u64 {
        let mut word = [0; 8];
        self.file
            .read_exact_at(&mut word, self.file_offset(offset))
            .unwrap();
        u64::from_le_bytes(word)
    }

    fn store(&mut self, offset: u64, word: u64) {
        self.write(offset, &word.to_le_bytes());
    }
}

/// The memory of a ledger without a guest.
struct PlainMemory(Vec<u8>);

impl Words for PlainMemory {
    fn load(&self, offset: u64) -> u64 {
        let at = offset as usize;
        u64::from_le_bytes(self.0[at..at + WORD as usize].try_into().unwrap())
    }

    fn store(&mut self, offset: u64, word: u64) {
        let at = offset as usize;
        self.0[at..at + WORD as usize].copy_from_slice(&word.to_le_bytes());
    }
}

/// Runs the guest's program for `steps` steps and a check, after `corrupt`, and calls `inspect`
/// with its RAM. Returns the syndromes of its exits.
fn emulate(
    regions: &RamLayout,
    steps: u64,
    corrupt: impl FnOnce(&mut Ram<'_>),
    inspect: impl FnOnce(&Ram<'_>),
) -> [u64; 2] {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ram");
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.set_len(QEMU_RAM_SIZE).unwrap();

    let mut ram = Ram {
        file: &file,
        regions,
    };
    ledger::prepare(&mut ram, LAYOUT);
    ram.store(front::UNTIL, steps);
    if let [low, high] = regions.regions() {
        ram.store(front::GAP_START, low.offset_end());
        ram.store(front::GAP_SIZE, high.guest_start - low.guest_end());
    }
    let program = assemble(&program::source());
    ram.write(start::PROGRAM, &program);
    ram.write(start::PAGE_TABLE, &hvf_backend::el1::page_table());
    let host = assemble(&host_program(&start::state(regions)));
    file.write_all_at(&host, HOST - QEMU_RAM).unwrap();
    corrupt(&mut ram);

    let mut qemu = Command::new("qemu-system-aarch64")
        .args(["-M", "virt,virtualization=on,memory-backend=ram"])
        .args(["-cpu", "cortex-a57", "-accel", "tcg", "-nodefaults"])
        .args(["-display", "none"])
        .arg("-m")
        .arg(format!("{}M", QEMU_RAM_SIZE >> 20))
        .arg("-object")
        .arg(format!(
            "memory-backend-file,id=ram,size={QEMU_RAM_SIZE},share=on,mem-path={}",
            path.display()
        ))
        .arg("-device")
        .arg(format!("loader,addr={HOST:#x},cpu-num=0"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(600);
    let status = loop {
        match qemu.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => {
                qemu.kill().unwrap();
                qemu.wait().unwrap();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    assert!(
        status.is_some_and(|status| status.success()),
        "the machine did not switch itself off: {status:?}"
    );
    inspect(&ram);
    let mut syndromes = [0; 2];
    for (number, syndrome) in syndromes.iter_mut().enumerate() {
        let mut word = [0; 8];
        let at = SYNDROMES - QEMU_RAM + number as u64 * WORD;
        file.read_exact_at(&mut word, at).unwrap();
        *syndrome = u64::from_le_bytes(word);
    }
    syndromes
}

#[rstest]
#[case::in_one_piece(&[(start::LOW, 8 << 20)], 20_000)]
#[case::on_both_sides_of_a_hole(
    &[(start::LOW, 5 << 20), (start::LOW + (64 << 20), 3 << 20)],
    20_000
)]
#[case::that_is_empty(&[(start::LOW, 8 << 20)], 0)]
fn arm64_program_keeps_the_same_ledger(#[case] ram: &[(u64, u64)], #[case] steps: u64) {
    needs!(Aarch64);
    let regions = RamLayout::new(ram.iter().copied()).unwrap();
    let mut model = PlainMemory(vec![0; LAYOUT.ram as usize]);
    let mut registers = Registers::default();
    ledger::prepare(&mut model, LAYOUT);
    while registers.step < steps {
        ledger::step(&mut model, LAYOUT, &mut registers);
    }
    let verdict = ledger::check(&mut model, LAYOUT, registers);
    assert_eq!(verdict, oracle::verdict(LAYOUT, steps));

    let inspect = |ram: &Ram<'_>| {
        assert_eq!(ledger::verdict(ram), verdict);
        for word in [front::RANDOM, front::CURSOR, front::ROAMER, front::STEPS] {
            assert_eq!(ram.load(word), model.load(word), "{word:#x}");
        }
        for offset in (Layout::LEDGER..LAYOUT.ram).step_by(PAGE as usize) {
            let at = offset as usize;
            assert!(
                ram.page(offset) == model.0[at..at + PAGE as usize],
                "the page at {offset:#x} differs"
            );
        }
    };
    let syndromes = emulate(&regions, steps, |_| (), inspect);
    assert_eq!(
        syndromes,
        [doorbell_syndrome(ARRIVED), doorbell_syndrome(CHECKED)],
        "{syndromes:#x?}"
    );
}

#[test]
fn arm64_program_detects_a_changed_page() {
    needs!(Aarch64);
    let regions = RamLayout::single(start::LOW, LAYOUT.ram).unwrap();
    // None of these few steps writes this page, so only the check reads it.
    let corrupt = |ram: &mut Ram<'_>| ram.store(LAYOUT.page(LAYOUT.pages - 3) + ledger::ENTRY, 1);
    let inspect = |ram: &Ram<'_>| {
        let verdict = ledger::verdict(ram);
        assert_eq!((verdict.faults, verdict.first_fault), (1, LAYOUT.pages - 3));
    };
    let syndromes = emulate(&regions, 10, corrupt, inspect);
    assert_eq!(
        syndromes,
        [doorbell_syndrome(ARRIVED), doorbell_syndrome(CHECKED)],
        "{syndromes:#x?}"
    );
}

#[rstest]
#[case::small(64 << 20, &[(start::LOW, 64 << 20)])]
#[case::with_a_hole(5 << 30, &[(start::LOW, 2 << 30), (8 << 30, 3 << 30)])]
fn large_ram_has_a_hole_in_its_addresses(#[case] size: u64, #[case] expected: &[(u64, u64)]) {
    let regions = start::regions(size).unwrap();
    assert_eq!(regions, RamLayout::new(expected.iter().copied()).unwrap());
}

#[test]
fn page_table_translates_the_largest_ram() {
    let regions = start::regions(Layout::MAX_RAM).unwrap();
    assert!(regions.regions()[1].guest_end() <= 512 << 30);
}
