//! The layout of the guest's RAM, and the state of its processor at the first instruction.

use hvf_backend::{VcpuState, el1};
use page_reader::{LayoutError, RamLayout};

use crate::ledger::{Layout, PAGE};

const GIB: u64 = 1 << 30;

/// The start of the low RAM and its maximum size. The rest of the RAM starts at 8 GiB.
pub(super) const LOW: u64 = 2 * GIB;
const LOW_SIZE: u64 = 2 * GIB;
const HIGH: u64 = 8 * GIB;

/// Offsets into the RAM: the page table, and the program below the front page.
pub(super) const PAGE_TABLE: u64 = PAGE;
pub(super) const PROGRAM: u64 = Layout::FRONT - (64 << 10);

/// Returns the layout of `size` bytes of RAM, with a hole in its addresses if it is large.
pub(super) fn regions(size: u64) -> Result<RamLayout, LayoutError> {
    let low = size.min(LOW_SIZE);
    let high = (HIGH, size - low);
    RamLayout::new(std::iter::once((LOW, low)).chain((high.1 > 0).then_some(high)))
}

/// Returns the number of bits of the guest's addresses: the default of the framework, or more if
/// the RAM needs them.
pub(super) fn address_bits(regions: &RamLayout) -> u32 {
    match regions.regions().last() {
        Some(last) if last.guest_end() > 1 << 36 => 40,
        _ => 36,
    }
}

/// Returns the state of the processor at the first instruction.
pub(super) fn state(regions: &RamLayout) -> VcpuState {
    let start = el1::Start {
        entry: LOW + PROGRAM,
        page_table: LOW + PAGE_TABLE,
        address_bits: address_bits(regions),
    };
    let mut state = start.state();
    state.x[19] = LOW + Layout::FRONT;
    state
}
