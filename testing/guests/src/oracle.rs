//! Computes the ledger without a guest, snapshots or page faults: the reference for all guests.

use super::ledger::{self, Layout, PAGE, Registers, Verdict, WORD, Words};

/// The number of words of a page.
const WORDS: usize = (PAGE / WORD) as usize;

/// RAM in which only written pages exist.
struct Pages(Vec<Option<Box<[u64; WORDS]>>>);

impl Words for Pages {
    fn load(&self, offset: u64) -> u64 {
        let (page, word) = page_and_word(offset);
        self.0[page].as_ref().map_or(0, |words| words[word])
    }

    fn store(&mut self, offset: u64, value: u64) {
        let (page, word) = page_and_word(offset);
        self.0[page].get_or_insert_with(|| Box::new([0; WORDS]))[word] = value;
    }
}

fn page_and_word(offset: u64) -> (usize, usize) {
    ((offset / PAGE) as usize, (offset % PAGE / WORD) as usize)
}

/// Returns the result of a check after `steps` steps.
pub fn verdict(layout: Layout, steps: u64) -> Verdict {
    let mut memory = Pages(vec![None; (layout.ram / PAGE) as usize]);
    let mut registers = Registers::default();
    ledger::prepare(&mut memory, layout);
    while registers.step < steps {
        ledger::step(&mut memory, layout, &mut registers);
    }
    ledger::check(&mut memory, layout, registers)
}
