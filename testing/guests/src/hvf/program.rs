//! The guest's program: position-independent code that is copied into the guest.

use super::{ARRIVED, CHECKED};
use crate::ledger::{self, Layout, front};

/// Returns the offset of a word in the front page, from its offset in the RAM.
const fn in_front(word: u64) -> u64 {
    word - Layout::FRONT
}

/// Passes the constants that `ledger_aarch64.s` names to `$macro`, after `$first`.
macro_rules! with_numbers {
    ($macro:ident!($($first:tt)*)) => {
        $macro! {
            $($first)*
            ARRIVED = ARRIVED,
            CHECKED = CHECKED,
            FRONT = Layout::FRONT,
            LEDGER = Layout::LEDGER,
            UNTIL = in_front(front::UNTIL),
            ORDER = in_front(front::ORDER),
            GAP_START = in_front(front::GAP_START),
            GAP_SIZE = in_front(front::GAP_SIZE),
            PAGES = in_front(front::PAGES),
            RANDOM = in_front(front::RANDOM),
            CURSOR = in_front(front::CURSOR),
            ROAMER = in_front(front::ROAMER),
            STEPS = in_front(front::STEPS),
            FAULTS = in_front(front::FAULTS),
            FIRST_FAULT = in_front(front::FIRST_FAULT),
            DIGEST = in_front(front::DIGEST),
            NUMBER = ledger::NUMBER,
            VERSION = ledger::VERSION,
            ENTRY = ledger::ENTRY,
            ENTRIES = ledger::ENTRIES,
            CHECKSUM = ledger::CHECKSUM,
            HOT = ledger::HOT,
            JUMP = ledger::JUMP,
            GOLDEN = ledger::GOLDEN,
            NO_PAGE = ledger::NO_PAGE,
        }
    };
}

#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
pub(super) use assembled::bytes;

/// Returns the program's bytes, assembled when first called: this binary is for another processor.
#[cfg(hvf_fake)]
pub(super) fn bytes() -> &'static [u8] {
    static BYTES: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    BYTES.get_or_init(|| super::assembler::assemble(&source()))
}

/// The program, assembled into this binary.
#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod assembled {
    #![allow(unsafe_code)]

    use super::*;

    macro_rules! assemble {
        ($($name:ident = $value:expr,)*) => {
            std::arch::global_asm!(
                ".pushsection __TEXT,__const",
                ".p2align 3",
                ".globl _ledger_program",
                ".private_extern _ledger_program",
                "_ledger_program:",
                // One label for all of it: the linker may move code after another label.
                ".quad Lledger_end - Lledger_start",
                "Lledger_start:",
                include_str!("ledger_aarch64.s"),
                "Lledger_end:",
                ".popsection",
                $($name = const $value,)*
            );
        };
    }
    with_numbers!(assemble!());

    unsafe extern "C" {
        /// The length of the program in bytes, followed by the program.
        #[link_name = "ledger_program"]
        static LENGTH: u64;
    }

    /// Returns the program's bytes. The first one is its entry.
    pub(in super::super) fn bytes() -> &'static [u8] {
        let length = &raw const LENGTH;
        // SAFETY: the word is aligned and read-only, and is followed by that number of read-only
        // bytes.
        unsafe { std::slice::from_raw_parts(length.add(1).cast(), length.read() as usize) }
    }
}

/// Returns the source with the constants inserted, for an assembler.
#[cfg(any(test, hvf_fake))]
pub(super) fn source() -> String {
    let mut source = include_str!("ledger_aarch64.s").to_owned();
    macro_rules! replace {
        ($($name:ident = $value:expr,)*) => {
            $(
                let placeholder = concat!("{", stringify!($name), "}");
                source = source.replace(placeholder, &($value).to_string());
            )*
        };
    }
    with_numbers!(replace!());
    source
}
