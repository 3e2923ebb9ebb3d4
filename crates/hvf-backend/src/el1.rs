//! Initial state for a program on a bare vCPU at exception level 1, without firmware or kernel. For
//! demonstrations and tests.

use crate::state::{Encoding, SystemRegister, VcpuState};

const GIB: u64 = 1 << 30;

/// The parameters of the initial state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The guest-physical address of the first instruction.
    pub entry: u64,
    /// The guest-physical address of the [`page_table`], a multiple of 4096.
    pub page_table: u64,
    /// The number of bits of the machine's guest-physical addresses, by default 36.
    pub address_bits: u32,
}

impl Start {
    /// Returns the state of the vCPU at the first instruction.
    ///
    /// Interrupts are masked. Address translation, caches and vector registers are enabled. All
    /// general registers are 0.
    ///
    /// # Examples
    /// ```
    /// use hvf_backend::el1::{self, Start};
    ///
    /// let start = Start { entry: 0x8000_4000, page_table: 0x8000_0000, address_bits: 36 };
    /// let mut state = start.state();
    /// state.x[0] = 0x8010_0000; // an argument of the program
    /// # assert_eq!(state.pc, 0x8000_4000);
    /// // ram.write(start.page_table, &el1::page_table())?; ... state.restore(&vcpu, 0)?;
    /// ```
    pub fn state(&self) -> VcpuState {
        // TCR_EL1: tables of 4 KiB for 39 address bits, walked through inner-shareable write-back
        // caches, and no table for the upper half.
        let output_size = match self.address_bits {
            ..=32 => 0b000,
            33..=36 => 0b001,
            37..=40 => 0b010,
            41..=42 => 0b011,
            43..=44 => 0b100,
            _ => 0b101,
        };
        let tcr = 25 | 0b01 << 8 | 0b01 << 10 | 0b11 << 12 | 1 << 23 | output_size << 32;
        // SCTLR_EL1: translation (M), data caches (C), instruction caches (I), and the bits that
        // are always 1.
        let sctlr = 1 | 1 << 2 | 1 << 12 | 0x30d0_0800;
        let registers = [
            (0xc510, 0xff),            // MAIR_EL1: attribute 0 is write-back memory
            (0xc102, tcr),             // TCR_EL1
            (0xc100, self.page_table), // TTBR0_EL1
            (0xc082, 0b11 << 20),      // CPACR_EL1.FPEN: no trap of vector registers
            (0xc080, sctlr),           // SCTLR_EL1
        ];
        let system = registers.map(|(register, value)| SystemRegister {
            register: Encoding(register),
            value,
        });
        VcpuState {
            system: system.to_vec(),
            pc: self.entry,
            // EL1 with SP_EL1; D, A, I and F masked.
            cpsr: 0b1111 << 6 | 0b0101,
            ..VcpuState::default()
        }
    }
}

/// Returns the page table, 4096 bytes, which maps every address up to 512 GiB to itself as normal
/// cached memory.
///
/// Without translation, all memory would be device memory, which is not coherent with the caches of
/// the host. The table maps blocks of 1 GiB, so that a walk reads only this page.
#[must_use]
pub fn page_table() -> Vec<u8> {
    // Arm ARM, VMSAv8-64 block descriptors: valid, block, attribute 0 of MAIR_EL1, read and write
    // at EL1, inner shareable, accessed.
    const BLOCK: u64 = 0b01 | 0b11 << 8 | 1 << 10;
    let entries = (0..512).map(|number| (number * GIB) | BLOCK);
    entries.flat_map(u64::to_le_bytes).collect()
}
