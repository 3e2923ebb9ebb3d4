//! Computes the ledger without a guest, snapshots or page faults: the reference for all guests.

use std::fmt;

use super::ledger::{self, Layout, PAGE, Registers, Verdict, WORD, Words, front};

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

/// A ledger that is computed without a guest.
pub struct Oracle {
    memory: Pages,
    layout: Layout,
    registers: Registers,
}

impl fmt::Debug for Oracle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Oracle")
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}

impl Oracle {
    /// Creates the ledger of a guest whose random numbers begin with `seed`.
    #[must_use]
    pub fn new(layout: Layout, seed: u64) -> Self {
        let mut memory = Pages(vec![None; (layout.ram / PAGE) as usize]);
        ledger::prepare(&mut memory, layout);
        memory.store(front::RANDOM, seed);
        Self {
            memory,
            layout,
            registers: Registers::default(),
        }
    }

    /// Works until `steps` steps are done, and returns the result of a check. No step is undone.
    pub fn verdict_at(&mut self, steps: u64) -> Verdict {
        while self.registers.step < steps {
            ledger::step(&mut self.memory, self.layout, &mut self.registers);
        }
        ledger::check(&mut self.memory, self.layout, self.registers)
    }
}

/// Returns the result of a check after `steps` steps.
pub fn verdict(layout: Layout, steps: u64) -> Verdict {
    Oracle::new(layout, ledger::SEED).verdict_at(steps)
}
