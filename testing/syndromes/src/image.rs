//! The memory of the emulated machine: its program, its cases, and the tables of both stages.

use std::fmt::Write as _;

use crate::cases::{Case, Entry, FETCH, Page, Walk};
use crate::recording::Permission;

/// The address of the image.
pub(crate) const BASE: u64 = RAM + (4 << 20);

/// The start of the RAM of QEMU's `virt`.
const RAM: u64 = 1 << 30;

/// The number of faults of a case that are recorded.
pub(crate) const FAULTS: usize = 3;

/// The pages of stage 2, as on a Mac.
const PAGE_BITS: u32 = 14;
pub(crate) const PAGE_SIZE: u64 = 1 << PAGE_BITS;

/// What is where in the image, in pages.
const PROGRAM_PAGES: u64 = 4;
const STAGE_2: u64 = 4;
const STAGE_2_PAGES: u64 = 5;
const GUEST_TABLE: u64 = 6;
const TESTED: u64 = 8;
const COPIES: u64 = 16;
const ENTRY_COPIES: u64 = 24;
const PAGES: u64 = 25;

/// The contents of data, in words.
const PATTERN: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// The place in a page of data of the instruction that ends a fetch, `hvc #0`.
const LANDING: u64 = 0x100;
const HVC: u32 = 0xd400_0002;

/// HCR_EL2: stage 2 (VM), and the guest is AArch64 (RW).
const HCR: u64 = 1 << 31 | 1;
/// VTCR_EL2: 36 address bits in pages of 16 KiB, from level 2 on, in cached memory.
const VTCR: u64 = 28 | 1 << 6 | 1 << 8 | 1 << 10 | 3 << 12 | 2 << 14 | 1 << 16 | 1 << 31;
/// MAIR_EL1: attribute 0 is write-back memory.
const MAIR: u64 = 0xff;
/// SCTLR_EL1: translation, caches, and the bits that are always 1.
const SCTLR: u64 = 1 | 1 << 2 | 1 << 12 | 0x30d0_0800;
/// TCR_EL1: 39 address bits in pages of 4 KiB in both halves, in cached memory. The processor
/// updates access flags (HA) and dirty states (HD).
const TCR: u64 = {
    let half = 25 | 1 << 8 | 1 << 10 | 3 << 12;
    half | half << 16 | 0b10 << 30 | 1 << 32 | 1 << 39 | 1 << 40
};
/// The first address of the upper half, which the tested tables translate.
const UPPER_HALF: u64 = 0xffff_ff80_0000_0000;

/// A descriptor of a page of stage 2 without its address: valid, accessed, shareable write-back
/// memory with no permission but to execute.
const STAGE_2_PAGE: u64 = 0b11 | 0b1111 << 2 | 3 << 8 | 1 << 10;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 54;

/// A block of stage 1: valid, attribute 0 of MAIR_EL1, shareable.
const BLOCK: u64 = 0b01 | 3 << 8;
const ACCESS_FLAG: u64 = 1 << 10;
const READ_ONLY: u64 = 1 << 7;
const DIRTY_BIT_MODIFIER: u64 = 1 << 51;

/// Returns the address of a page of the image.
const fn address(page: u64) -> u64 {
    BASE + page * PAGE_SIZE
}

impl Page {
    pub(crate) fn address(self) -> u64 {
        address(TESTED) + self as u64 * PAGE_SIZE
    }

    /// Returns the page at a guest-physical address.
    pub(crate) fn at(address: u64) -> Option<Self> {
        let found = |page: &Self| page.address() == address & !(PAGE_SIZE - 1);
        Self::ALL.into_iter().find(found)
    }

    /// Returns the page's first descriptor in stage 2.
    fn descriptor(self) -> u64 {
        let page = self.address() | STAGE_2_PAGE;
        match self {
            Self::ProtectedData | Self::ProtectedTable => page | READ,
            Self::UnmappedData | Self::UnmappedTable => 0,
            Self::NoExecuteData => page | READ | WRITE | NO_EXECUTE,
            Self::WritableData | Self::WritableTable => page | READ | WRITE,
        }
    }

    fn contents(self) -> Vec<u8> {
        if self.is_table() {
            return table();
        }
        let mut contents = PATTERN.to_le_bytes().repeat(PAGE_SIZE as usize / 8);
        contents[LANDING as usize..][..4].copy_from_slice(&HVC.to_le_bytes());
        contents
    }
}

impl Entry {
    fn descriptor(self) -> u64 {
        let clean = READ_ONLY | DIRTY_BIT_MODIFIER;
        RAM | BLOCK
            | match self {
                Self::Accessed => ACCESS_FLAG,
                Self::NotAccessed => 0,
                Self::Clean => ACCESS_FLAG | clean,
                Self::NotAccessedClean => clean,
            }
    }
}

impl Permission {
    /// Returns what a descriptor of stage 2 does not permit.
    pub(crate) fn lacking(descriptor: u64) -> Option<Self> {
        if descriptor == 0 {
            Some(Self::All)
        } else if descriptor & WRITE == 0 {
            Some(Self::Write)
        } else if descriptor & NO_EXECUTE != 0 {
            Some(Self::Execute)
        } else {
            None
        }
    }
}

/// Returns a table of stage 1 with each kind of entry. In the lower half, the accessed entry maps
/// RAM to itself.
fn table() -> Vec<u8> {
    let mut entries = vec![0; PAGE_SIZE as usize / 8];
    for entry in Entry::ALL {
        entries[entry as usize] = entry.descriptor();
    }
    words(&entries)
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Case {
    /// Returns the virtual address in x0.
    fn address(&self) -> u64 {
        let offset = if self.instruction == FETCH {
            LANDING
        } else {
            0
        };
        let address = self.page.address() + offset;
        match self.walk {
            None => address,
            Some(Walk { entry, .. }) => UPPER_HALF + ((entry as u64) << 30) + (address - RAM),
        }
    }

    /// Returns the address of the table of the upper half.
    fn table(&self) -> u64 {
        self.walk
            .map_or(Page::WritableTable, |walk| walk.table)
            .address()
    }
}

/// Returns the source of the program, with `cases`.
pub(crate) fn source(cases: &[Case]) -> String {
    let mut source = include_str!("host.s").to_owned();
    let tested = Page::ALL.len() as u64;
    let first = (address(TESTED) - RAM) >> PAGE_BITS;
    for (name, value) in [
        ("HCR", HCR),
        ("VTCR", VTCR),
        ("MAIR", MAIR),
        ("TCR", TCR),
        ("SCTLR", SCTLR),
        ("RAM", RAM),
        ("STAGE_2", address(STAGE_2)),
        ("STAGE_2_PAGES", address(STAGE_2_PAGES)),
        ("GUEST_TABLE", address(GUEST_TABLE)),
        ("TESTED", address(TESTED)),
        ("COPIES", address(COPIES)),
        ("TESTED_SIZE", tested * PAGE_SIZE),
        ("TESTED_ENTRIES", address(STAGE_2_PAGES) + first * 8),
        ("ENTRY_COPIES", address(ENTRY_COPIES)),
        ("PAGES", tested),
        ("PAGE_BITS", PAGE_BITS.into()),
        ("PROTECTED", STAGE_2_PAGE | READ),
        ("PERMITTED", STAGE_2_PAGE | READ | WRITE),
        ("PATTERN", PATTERN),
        ("FAULTS", FAULTS as u64),
    ] {
        source = source.replace(&format!("{{{name}}}"), &format!("{value:#x}"));
    }
    let mut table = String::from("        .p2align 3\ncases:\n");
    let mut code = String::from("cases_end:\n");
    for (number, case) in cases.iter().enumerate() {
        let (address, tables) = (case.address(), case.table());
        let _ = writeln!(
            table,
            ".quad case{number} - cases, {address:#x}, {tables:#x}"
        );
        let instructions = case.instruction.replace("; ", "\n");
        let _ = writeln!(code, "case{number}: {instructions}\nhvc #0");
    }
    source + &table + &code
}

/// Returns the image with an assembled `program`, or `None` if the program is too large.
pub(crate) fn image(program: &[u8]) -> Option<Vec<u8>> {
    let mut image = vec![0; (PAGES * PAGE_SIZE) as usize];
    let mut put = |address: u64, bytes: &[u8]| {
        image[(address - BASE) as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    if program.len() as u64 > PROGRAM_PAGES * PAGE_SIZE {
        return None;
    }
    put(BASE, program);
    // Stage 2 maps 32 MiB of RAM to itself.
    let entry = address(STAGE_2) + (RAM >> 25) * 8;
    put(entry, &(address(STAGE_2_PAGES) | 0b11).to_le_bytes());
    let pages = (0..PAGE_SIZE / 8).map(|page| (RAM + page * PAGE_SIZE) | STAGE_2_PAGE);
    let pages: Vec<_> = pages.map(|page| page | READ | WRITE).collect();
    put(address(STAGE_2_PAGES), &words(&pages));
    // The entries of the lower half are those from 0 on. Entry 1 maps the RAM.
    let accessed = Entry::Accessed.descriptor().to_le_bytes();
    put(address(GUEST_TABLE) + (RAM >> 30) * 8, &accessed);
    for page in Page::ALL {
        let number = page as u64;
        put(address(COPIES + number), &page.contents());
        put(
            address(ENTRY_COPIES) + number * 8,
            &page.descriptor().to_le_bytes(),
        );
    }
    Some(image)
}
