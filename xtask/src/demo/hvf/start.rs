//! Where the guest's RAM lies, and what its processor holds at its first instruction.

use hvf_backend::{Encoding, SystemRegister, VcpuState};
use page_reader::{LayoutError, RamLayout};

use crate::demo::ledger::{Layout, PAGE};

const GIB: u64 = 1 << 30;

/// Where the RAM begins, and how much of it lies there; what doesn't fit lies from 8 GiB on.
pub const LOW: u64 = 2 * GIB;
const LOW_SIZE: u64 = 2 * GIB;
const HIGH: u64 = 8 * GIB;

/// Offsets into the RAM: the page table, and the program below the front page.
pub const PAGE_TABLE: u64 = PAGE;
pub const PROGRAM: u64 = Layout::FRONT - (64 << 10);

/// RAM of `size` bytes, with a hole in its addresses if it is large.
pub fn regions(size: u64) -> Result<RamLayout, LayoutError> {
    let low = size.min(LOW_SIZE);
    let high = (HIGH, size - low);
    RamLayout::new([(LOW, low)].into_iter().chain((high.1 > 0).then_some(high)))
}

/// Translates every address to itself, as ordinary cached memory: without translation all memory would be a device's. 512 blocks of 1 GiB, which
/// need no walk further than this page.
pub fn page_table() -> Vec<u8> {
    // Arm ARM, VMSAv8-64 block descriptors: valid, a block, attributes 0 of MAIR_EL1, EL1 may read and write, inner shareable, accessed.
    const BLOCK: u64 = 0b01 | 0b11 << 8 | 1 << 10;
    let entries = (0..512).map(|number| number * GIB | BLOCK);
    entries.flat_map(u64::to_le_bytes).collect()
}

/// The processor at the first instruction: at exception level 1, interrupts masked, with translation, caches and vector registers on.
pub fn state(regions: &RamLayout) -> VcpuState {
    let end = regions.regions().last().map_or(0, |last| last.guest_end());
    // TCR_EL1: tables of 4 KiB for 39 bits of address, walked through inner-shareable write-back caches; none for the upper half. What they
    // translate to has 36 bits, or 40 where the RAM needs them.
    let output_bits = if end <= 1 << 36 { 0b001 } else { 0b010 };
    let tcr = 25 | 0b01 << 8 | 0b01 << 10 | 0b11 << 12 | 1 << 23 | output_bits << 32;
    // SCTLR_EL1: translation (M), data (C) and instruction caches (I), and the bits that are always 1.
    let sctlr = 1 | 1 << 2 | 1 << 12 | 0x30d0_0800;
    let mut state = VcpuState::default();
    let registers = [
        (0xc510, 0xff),             // MAIR_EL1: attributes 0 are write-back memory
        (0xc102, tcr),              // TCR_EL1
        (0xc100, LOW + PAGE_TABLE), // TTBR0_EL1
        (0xc082, 0b11 << 20),       // CPACR_EL1.FPEN: vector registers don't trap
        (0xc080, sctlr),            // SCTLR_EL1
    ];
    state.system = registers
        .map(|(register, value)| SystemRegister {
            register: Encoding(register),
            value,
        })
        .to_vec();
    state.x[19] = LOW + Layout::FRONT;
    state.pc = LOW + PROGRAM;
    // EL1 with its own stack pointer; D, A, I and F masked.
    state.cpsr = 0b1111 << 6 | 0b0101;
    state
}
