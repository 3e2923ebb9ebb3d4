//! Walks of the guest's page tables: stage 1 of address translation (Arm ARM, D8).

use crate::memory::{EXEC, Memory, READ, Refusal, WRITE};

/// Bits of SCTLR_EL1.
const ENABLED: u64 = 1;
const WRITABLE_IS_NOT_EXECUTABLE: u64 = 1 << 19;

/// Bits of a descriptor.
const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
const FOR_LEVEL_0: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 10;
const DIRTY_MODIFIER: u64 = 1 << 51;
const NOT_EXECUTABLE: u64 = 1 << 53;
const NOT_EXECUTABLE_AT_LEVEL_0: u64 = 1 << 54;
/// Bits of a descriptor of a table, which limit all entries of the table.
const TABLE_NOT_EXECUTABLE: u64 = 1 << 59;
const TABLE_NOT_EXECUTABLE_AT_LEVEL_0: u64 = 1 << 60;
const TABLE_NOT_FOR_LEVEL_0: u64 = 1 << 61;
const TABLE_READ_ONLY: u64 = 1 << 62;

/// The address in a descriptor of 48-bit addresses.
const ADDRESS: u64 = (1 << 48) - 1;

/// Kinds of faults, to which the level is added.
const TRANSLATION: u64 = 0b00_0100;
const ACCESS_FLAG: u64 = 0b00_1000;
const PERMISSION: u64 = 0b00_1100;

/// The registers that decide how the guest's addresses are translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Regime {
    pub sctlr: u64,
    pub tcr: u64,
    pub ttbr: [u64; 2],
    /// ID_AA64MMFR1_EL1: whether the processor updates access flags and dirty states.
    pub features: u64,
}

/// An access whose address is translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub address: u64,
    /// `READ`, `WRITE` or `EXEC`.
    pub permission: u64,
    /// The exception level: 0 or 1.
    pub level: usize,
}

/// A page or block to which a walk leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub virtual_start: u64,
    pub physical_start: u64,
    pub size: u64,
    /// The permissions at level 0 and at level 1.
    pub permissions: [u64; 2],
}

/// Why a walk led to no permitted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The guest takes an abort with this fault status code.
    Guest(u64),
    /// Stage 2 refused an access to the descriptor at this guest-physical address.
    Walk { refusal: Refusal, descriptor: u64 },
}

/// What TCR_EL1 states about half of the addresses.
struct Half {
    /// 1 for the upper half.
    number: usize,
    /// The number of bits of an address that are translated.
    bits: u32,
    /// The size of a page, as a number of bits.
    page_bits: u32,
    disabled: bool,
    ignores_top_byte: bool,
    ignores_limits_of_tables: bool,
}

impl Half {
    fn of(tcr: u64, address: u64) -> Option<Self> {
        let number = (address >> 55 & 1) as usize;
        let from = 16 * number as u32;
        let page_bits = match (number, tcr >> (14 + from) & 0b11) {
            (0, 0) | (1, 2) => 12,
            (0, 2) | (1, 1) => 14,
            (0, 1) | (1, 3) => 16,
            _ => return None,
        };
        Some(Self {
            number,
            bits: 64 - (tcr >> from & 0x3f).clamp(16, 39) as u32,
            page_bits,
            disabled: tcr >> (7 + from) & 1 != 0,
            ignores_top_byte: tcr >> (37 + number) & 1 != 0,
            ignores_limits_of_tables: tcr >> (41 + number) & 1 != 0,
        })
    }

    /// Returns whether all bits that are not translated are those of this half.
    fn contains(&self, address: u64) -> bool {
        let ignored = if self.ignores_top_byte { 8 } else { 0 };
        let above = (address << ignored).cast_signed() >> (self.bits + ignored);
        above == -(self.number as i64)
    }
}

impl Regime {
    pub(crate) fn is_enabled(&self) -> bool {
        self.sctlr & ENABLED != 0
    }

    /// Returns whether the processor updates access flags (TCR_EL1.HA) and dirty states (HD).
    fn updates(&self) -> (bool, bool) {
        let kind = self.features & 0xf;
        let (flags, dirty) = (self.tcr >> 39 & 1 != 0, self.tcr >> 40 & 1 != 0);
        (flags && kind >= 1, flags && dirty && kind >= 2)
    }

    /// Walks the tables for an access, and updates descriptors as the processor does.
    pub(crate) fn walk(&self, memory: &Memory, access: Access) -> Result<Leaf, Fault> {
        let Access { address, .. } = access;
        let half = Half::of(self.tcr, address).ok_or(Fault::Guest(TRANSLATION))?;
        if half.disabled || !half.contains(address) {
            return Err(Fault::Guest(TRANSLATION));
        }
        let stride = half.page_bits - 3;
        let translated = half.bits - half.page_bits;
        let first = 4 - translated.div_ceil(stride);
        let mut index_bits = translated - stride * (3 - first);
        let first_size = 8_u64 << index_bits;
        let mut table = self.ttbr[half.number] & ADDRESS & !(first_size - 1);
        let mut limits = 0;
        for level in first..=3 {
            let below = half.page_bits + stride * (3 - level);
            let index = address >> below & ((1 << index_bits) - 1);
            index_bits = stride;
            let at = table + size_of::<u64>() as u64 * index;
            let denied = |refusal| Fault::Walk {
                refusal,
                descriptor: at,
            };
            memory.check(at, READ).map_err(denied)?;
            let descriptor = memory.word(at);
            let fault = |kind| Fault::Guest(kind | u64::from(level));
            if descriptor & VALID == 0 {
                return Err(fault(TRANSLATION));
            }
            let is_table_or_page = descriptor & TABLE_OR_PAGE != 0;
            if level < 3 && is_table_or_page {
                table = descriptor & ADDRESS & !((1 << half.page_bits) - 1);
                if !half.ignores_limits_of_tables {
                    limits |= descriptor;
                }
                continue;
            }
            let is_leaf = match level {
                3 => is_table_or_page,
                2 => true,
                1 => half.page_bits == 12,
                _ => false,
            };
            if !is_leaf {
                return Err(fault(TRANSLATION));
            }
            let descriptor = self.update(memory, at, descriptor, access.permission, fault)?;
            let within = (1_u64 << below) - 1;
            let leaf = Leaf {
                virtual_start: address & !within,
                physical_start: descriptor & ADDRESS & !within,
                size: within + 1,
                permissions: self.permissions(descriptor, limits),
            };
            return match leaf.permissions[access.level] & access.permission {
                0 => Err(fault(PERMISSION)),
                _ => Ok(leaf),
            };
        }
        unreachable!("level 3 has no tables")
    }

    /// Updates the access flag and the dirty state of the descriptor at `at`. Returns its value.
    fn update(
        &self,
        memory: &Memory,
        at: u64,
        descriptor: u64,
        permission: u64,
        fault: impl Fn(u64) -> Fault,
    ) -> Result<u64, Fault> {
        let (flags, dirty) = self.updates();
        let mut updated = descriptor;
        if descriptor & ACCESSED == 0 {
            if !flags {
                return Err(fault(ACCESS_FLAG));
            }
            updated |= ACCESSED;
        }
        if dirty && permission == WRITE && descriptor & DIRTY_MODIFIER != 0 {
            updated &= !READ_ONLY;
        }
        if updated != descriptor {
            let denied = |refusal| Fault::Walk {
                refusal,
                descriptor: at,
            };
            memory.check(at, WRITE).map_err(denied)?;
            memory.update_word(at, descriptor, updated);
        }
        Ok(updated)
    }

    /// Returns the permissions at level 0 and at level 1.
    fn permissions(&self, descriptor: u64, limits: u64) -> [u64; 2] {
        let has = |bit| descriptor & bit != 0;
        let limited = |bit| limits & bit != 0;
        let for_level_0 = has(FOR_LEVEL_0) && !limited(TABLE_NOT_FOR_LEVEL_0);
        let writable = !has(READ_ONLY) && !limited(TABLE_READ_ONLY);
        let data = READ | if writable { WRITE } else { 0 };
        let never = self.sctlr & WRITABLE_IS_NOT_EXECUTABLE != 0 && writable;
        let level_0 = if for_level_0 { data } else { 0 };
        let no_level_0 = has(NOT_EXECUTABLE_AT_LEVEL_0) || limited(TABLE_NOT_EXECUTABLE_AT_LEVEL_0);
        // What level 0 may write, level 1 never executes.
        let no_level_1 =
            has(NOT_EXECUTABLE) || limited(TABLE_NOT_EXECUTABLE) || level_0 & WRITE != 0 || never;
        let executable = |not: bool| if not { 0 } else { EXEC };
        [
            level_0 | executable(no_level_0 || never && for_level_0),
            data | executable(no_level_1),
        ]
    }
}
