//! The translations of a vCPU that were walked for and are not forgotten yet: its TLB.
//!
//! Each is mapped into the engine at its virtual address. The engine's own translation stays off.

use std::ops::Range;

use crate::memory::{EXEC, Mapped, Memory, READ};
use crate::page_tables::{Access, Fault, Leaf, Regime};

/// The number of translations at which all are forgotten.
const CAPACITY: usize = 1024;

/// A translation, as far as the guest-physical memory is readable.
#[derive(Clone, Copy, Debug)]
struct Translation {
    mapped: Mapped,
    physical_start: u64,
    /// The permissions at level 0 and at level 1.
    permissions: [u64; 2],
}

/// The translations of a vCPU.
#[derive(Debug)]
pub(crate) struct Translations {
    regime: Regime,
    /// The exception level whose translations are mapped.
    level: usize,
    /// The exception level at which Unicorn makes accesses: the one that it reached last by an
    /// instruction. Writing PSTATE does not change it.
    engine_level: usize,
    known: Vec<Translation>,
    /// Incremented when other memory is to be mapped.
    version: u64,
}

impl Default for Translations {
    fn default() -> Self {
        Self {
            regime: Regime::default(),
            level: 1,
            engine_level: 1,
            known: Vec::new(),
            version: 0,
        }
    }
}

impl Translation {
    fn range(&self) -> Range<u64> {
        let Mapped {
            guest_start, size, ..
        } = self.mapped;
        // Compared with the last byte, because the last address has no end.
        guest_start..guest_start + (size - 1)
    }

    fn contains(&self, address: u64) -> bool {
        let range = self.range();
        range.start <= address && address <= range.end
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (one, other) = (self.range(), other.range());
        one.start <= other.end && other.start <= one.end
    }

    fn physical(&self, address: u64) -> u64 {
        self.physical_start + (address - self.mapped.guest_start)
    }
}

impl Translations {
    /// Returns whether the guest's addresses are translated.
    pub(crate) fn are_enabled(&self) -> bool {
        self.regime.is_enabled()
    }

    pub(crate) fn control(&self) -> u64 {
        self.regime.tcr
    }

    pub(crate) fn level(&self) -> usize {
        self.level
    }

    pub(crate) fn engine_level(&self) -> usize {
        self.engine_level
    }

    /// Records at which level the engine stopped, which an instruction may have changed.
    pub(crate) fn leave_engine_at(&mut self, level: usize) {
        if level != self.level {
            self.engine_level = level;
            self.version += 1;
        }
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Makes these registers and this level those of the following accesses.
    pub(crate) fn follow(&mut self, regime: Regime, level: usize) {
        if self.regime != regime {
            self.forget();
            self.regime = regime;
        }
        if self.level != level {
            self.level = level;
            self.version += 1;
        }
    }

    /// Forgets all translations.
    pub(crate) fn forget(&mut self) {
        self.known.clear();
        self.version += 1;
    }

    /// Returns what is mapped into the engine at the present level.
    pub(crate) fn mapped(&self) -> Vec<Mapped> {
        let accessible = |it: &&Translation| it.permissions[self.level] & (READ | EXEC) != 0;
        let mapped = self.known.iter().filter(accessible);
        mapped.map(|translation| translation.mapped).collect()
    }

    /// Returns the guest-physical address of an address whose translation is known.
    pub(crate) fn known(&self, address: u64) -> Option<u64> {
        if !self.are_enabled() {
            return Some(address);
        }
        let mut known = self.known.iter();
        let found = known.find(|translation| translation.contains(address))?;
        Some(found.physical(address))
    }

    /// Returns the guest-physical address that an access at the present level is to.
    ///
    /// A known translation that permits the access is used without a walk.
    pub(crate) fn physical(
        &mut self,
        memory: &Memory,
        address: u64,
        permission: u64,
    ) -> Result<u64, Fault> {
        if !self.are_enabled() {
            return Ok(address);
        }
        let permits = |it: &&Translation| {
            it.contains(address) && it.permissions[self.level] & permission != 0
        };
        if let Some(known) = self.known.iter().find(permits) {
            return Ok(known.physical(address));
        }
        let access = Access {
            address,
            permission,
            level: self.level,
        };
        let leaf = self.regime.walk(memory, access)?;
        let physical = leaf.physical_start + (address - leaf.virtual_start);
        // What stage 2 refuses is not mapped.
        if let Some(new) = readable_part(memory, &leaf, physical) {
            self.add(new);
        }
        Ok(physical)
    }

    fn add(&mut self, new: Translation) {
        let same = |old: &&mut Translation| old.mapped == new.mapped;
        if let Some(old) = self.known.iter_mut().find(same) {
            let was_mapped = old.permissions[self.level] & (READ | EXEC) != 0;
            *old = new;
            self.version += u64::from(!was_mapped);
            return;
        }
        if self.known.len() == CAPACITY {
            self.known.clear();
        }
        self.known.retain(|old| !old.overlaps(&new));
        self.known.push(new);
        self.version += 1;
    }
}

/// Returns the part of a page or block around a guest-physical address that the guest may read.
fn readable_part(memory: &Memory, leaf: &Leaf, physical: u64) -> Option<Translation> {
    let readable = memory.readable_around(physical)?;
    let start = readable.guest_start.max(leaf.physical_start);
    let end = (readable.guest_start + readable.size).min(leaf.physical_start + leaf.size);
    Some(Translation {
        mapped: Mapped {
            guest_start: leaf.virtual_start + (start - leaf.physical_start),
            host_start: readable.host_start + (start - readable.guest_start) as usize,
            size: end - start,
        },
        physical_start: start,
        permissions: leaf.permissions,
    })
}
