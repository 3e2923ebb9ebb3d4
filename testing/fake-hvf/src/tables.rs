//! Page tables for the guests of tests.

use std::collections::BTreeMap;

/// Attributes of a page.
pub const ACCESSED: u64 = 1 << 10;
pub const READ_ONLY: u64 = 1 << 7;
/// The page is accessible to level 0 too.
pub const USER: u64 = 1 << 6;
/// The processor clears [`READ_ONLY`] at a store.
pub const DIRTY_MODIFIER: u64 = 1 << 51;
/// Not executable at level 1.
pub const NO_EXECUTION: u64 = 1 << 53;
/// Not executable at level 0.
pub const NO_USER_EXECUTION: u64 = 1 << 54;

/// The bits that make a descriptor one of a table, or of a page.
const TABLE_OR_PAGE: u64 = 0b11;

/// Tables for half of the addresses, the lower or the upper one.
#[derive(Debug)]
pub struct Tables {
    page_bits: u32,
    address_bits: u32,
    root: u64,
    next: u64,
    descriptors: BTreeMap<u64, u64>,
}

impl Tables {
    /// Begins empty tables at a guest-physical address.
    ///
    /// Pages have `1 << page_bits` bytes: 4, 16 or 64 KiB. Addresses have `address_bits` bits below
    /// those that are all 0, or all 1 in the upper half.
    #[must_use]
    pub fn new(page_bits: u32, address_bits: u32, at: u64) -> Self {
        Self {
            page_bits,
            address_bits,
            root: at,
            next: at + (1 << page_bits),
            descriptors: BTreeMap::new(),
        }
    }

    /// Returns the value of TTBR0_EL1 or TTBR1_EL1.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Returns the value of TCR_EL1 for tables of this kind in both halves.
    #[must_use]
    pub fn control(&self) -> u64 {
        let (lower, upper) = match self.page_bits {
            12 => (0, 2),
            14 => (2, 1),
            16 => (1, 3),
            other => panic!("no pages have 2^{other} bytes"),
        };
        let unused = u64::from(64 - self.address_bits);
        unused | unused << 16 | lower << 14 | upper << 30
    }

    /// Maps a page. `attributes` are those of the constants here.
    pub fn map(&mut self, address: u64, physical: u64, attributes: u64) {
        let at = self.entry(address);
        let descriptor = physical | attributes | TABLE_OR_PAGE;
        self.descriptors.insert(at, descriptor);
    }

    /// Returns the guest-physical address of the descriptor of a page. Adds the tables above it.
    pub fn entry(&mut self, address: u64) -> u64 {
        let stride = self.page_bits - 3;
        let mut from = self.address_bits;
        let mut table = self.root;
        loop {
            // The last bit that selects an entry of this table.
            let below = (from - self.page_bits - 1) / stride * stride + self.page_bits;
            let index = address >> below & ((1 << (from - below)) - 1);
            let at = table + 8 * index;
            if below == self.page_bits {
                return at;
            }
            let descriptor = *self.descriptors.entry(at).or_insert_with(|| {
                let next = self.next;
                self.next += 1 << self.page_bits;
                next | TABLE_OR_PAGE
            });
            table = descriptor & !TABLE_OR_PAGE;
            from = below;
        }
    }

    /// Returns the descriptors with their guest-physical addresses. All others are 0.
    pub fn descriptors(&self) -> impl Iterator<Item = (u64, u64)> {
        self.descriptors.iter().map(|(at, value)| (*at, *value))
    }
}
