//! The guest's program, assembled into this binary: position-independent code that is copied into
//! the guest.

#![allow(unsafe_code)]

use std::arch::global_asm;

use super::{ARRIVED, CHECKED, PORT};
use crate::ledger::{self, Layout, front};

/// Returns the offset of a word in the front page, from its offset in the RAM.
const fn in_front(word: u64) -> u64 {
    word - Layout::FRONT
}

global_asm!(
    ".pushsection .rodata.ledger_program, \"a\"",
    include_str!("ledger.s"),
    ".popsection",
    PORT = const PORT,
    ARRIVED = const ARRIVED,
    CHECKED = const CHECKED,
    UNTIL = const in_front(front::UNTIL),
    ORDER = const in_front(front::ORDER),
    GAP_START = const in_front(front::GAP_START),
    GAP_SIZE = const in_front(front::GAP_SIZE),
    PAGES = const in_front(front::PAGES),
    PLACE = const in_front(front::PLACE),
    RANDOM = const in_front(front::RANDOM),
    CURSOR = const in_front(front::CURSOR),
    ROAMER = const in_front(front::ROAMER),
    STEPS = const in_front(front::STEPS),
    FAULTS = const in_front(front::FAULTS),
    FIRST_FAULT = const in_front(front::FIRST_FAULT),
    DIGEST = const in_front(front::DIGEST),
    NUMBER = const ledger::NUMBER,
    VERSION = const ledger::VERSION,
    ENTRY = const ledger::ENTRY,
    ENTRIES = const ledger::ENTRIES,
    CHECKSUM = const ledger::CHECKSUM,
    HOT = const ledger::HOT,
    JUMP = const ledger::JUMP,
    GOLDEN = const ledger::GOLDEN,
    NO_PAGE = const ledger::NO_PAGE,
);

unsafe extern "C" {
    #[link_name = "ledger_program"]
    static START: u8;
    #[link_name = "ledger_program_end"]
    static END: u8;
}

/// Returns the program's bytes. The first one is its entry.
pub(super) fn bytes() -> &'static [u8] {
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: both labels are in one section, the second after the first, and only the read-only
    // program is between them.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}
