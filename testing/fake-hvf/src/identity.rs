//! Tables by which Unicorn translates each address to its lower 48 bits.
//!
//! Unicorn refuses addresses above those of guest-physical memory while its translation is off, as
//! a processor does. It looks up memory by the virtual address before it translates (version
//! 2.0.1), so the guest's own tables cannot be used. With these tables, memory that is mapped into
//! the engine at a virtual address, and again at its lower 48 bits, is accessible.

use std::sync::OnceLock;

use crate::memory::Mapped;
use crate::system_registers::{SCTLR_EL1, TCR_EL1, TTBR0_EL1, TTBR1_EL1};
use crate::unicorn::{Engine, UnicornError};

/// Where the tables of the levels are in the engine: at the lowest address of the upper half.
const TABLES: u64 = 1 << 47;
/// The lower 48 bits of an address.
const LOWER: u64 = (1 << 48) - 1;

const ENTRIES: usize = 512;
const TABLE_SIZE: u64 = 4 << 10;
/// Tables of one exception level: the first, of which each half of the addresses uses half, and one
/// for each of its entries.
const COUNT: usize = 1 + ENTRIES;
const SIZE: u64 = COUNT as u64 * TABLE_SIZE;

/// Bits of descriptors: a table, a block, and who accesses it.
const TABLE: u64 = 0b11;
const ACCESSED_BLOCK: u64 = 1 << 10 | 0b01;
const FOR_LEVEL_0: u64 = 1 << 6;

/// Halves of 47 bits, pages of 4 KiB, and guest-physical addresses of 48 bits.
const CONTROL: u64 = 17 | 17 << 16 | 2 << 30 | 5 << 32;
/// The bits of TCR_EL1 with which the top byte is ignored.
const TOP_BYTES: u64 = 0b11 << 37;
/// The bit of SCTLR_EL1 that enables translation.
const ENABLED: u64 = 1;
const ASID: u32 = 48;

#[repr(C, align(4096))]
struct Table([u64; ENTRIES]);

/// Returns the tables of an exception level. Level 1 does not execute what level 0 may write, so
/// each has its own.
fn tables(level: usize) -> &'static [Table] {
    static BY_LEVEL: [OnceLock<Vec<Table>>; 2] = [const { OnceLock::new() }; 2];
    BY_LEVEL[level].get_or_init(|| {
        let start = start(level);
        let attributes = if level == 0 { FOR_LEVEL_0 } else { 0 } | ACCESSED_BLOCK;
        let table = |number| start + TABLE_SIZE * (1 + number as u64);
        let first = Table(std::array::from_fn(|number| table(number) | TABLE));
        let blocks = (0..ENTRIES as u64).map(|number| {
            let block = |index| number << 39 | (index as u64) << 30 | attributes;
            Table(std::array::from_fn(block))
        });
        std::iter::once(first).chain(blocks).collect()
    })
}

fn start(level: usize) -> u64 {
    TABLES + SIZE * level as u64
}

/// Returns what else is mapped into the engine with memory at virtual addresses.
pub(crate) fn beside(mapped: &[Mapped]) -> Vec<Mapped> {
    let tables = [0, 1].map(|level| Mapped {
        guest_start: start(level),
        host_start: tables(level).as_ptr().expose_provenance(),
        size: SIZE,
    });
    let again = mapped.iter().map(|mapped| Mapped {
        guest_start: mapped.guest_start & LOWER,
        ..*mapped
    });
    tables.into_iter().chain(again).collect()
}

/// Makes an engine translate by the tables of `level`, or not at all.
///
/// `control` is the guest's TCR_EL1. `count` differs from call to call, so that the engine forgets
/// its own translations.
pub(crate) fn set(
    engine: &Engine,
    level: Option<usize>,
    control: u64,
    count: u64,
) -> Result<(), UnicornError> {
    let sctlr = engine.read_system(SCTLR_EL1)? & !ENABLED;
    if let Some(level) = level {
        engine.write_system(TCR_EL1, CONTROL | control & TOP_BYTES)?;
        let halves = [start(level), start(level) + TABLE_SIZE / 2];
        engine.write_system(TTBR1_EL1, halves[1])?;
        engine.write_system(SCTLR_EL1, sctlr | ENABLED)?;
        return engine.write_system(TTBR0_EL1, halves[0] | count << ASID);
    }
    engine.write_system(SCTLR_EL1, sctlr)?;
    engine.write_system(TCR_EL1, 0)?;
    engine.write_system(TTBR0_EL1, count << ASID)
}
