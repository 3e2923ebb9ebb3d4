//! A set of units of RAM as a run-length encoded bitmap.

use std::ops::Range;

/// The granularity in bytes at which touched memory is recorded: the smallest page size of a host.
pub(super) const UNIT: u64 = 4 << 10;

const BITS: u64 = u64::BITS as u64;

/// A set of units of [`UNIT`] bytes.
///
/// A range takes at most three entries, and 64 units at most one. The memory depends on the
/// contents of the set, not on the size of the RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct UnitSet {
    /// Ascending. Adjacent entries have different bits. No unit after the last entry is in the set.
    words: Vec<WordRun>,
}

/// Consecutive words of 64 units with the same bits, from the end of the previous entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WordRun {
    end: u64,
    bits: u64,
}

impl UnitSet {
    /// Returns the units that overlap any of the byte ranges. Ranges that are not ascending are
    /// collected and sorted.
    pub(super) fn of(ranges: impl Iterator<Item = Range<u64>>) -> Self {
        let mut units = Self::default();
        // `last` is the start of the previous range in bytes, `end` the first unit after the set.
        let (mut last, mut end) = (0, 0);
        let mut ranges = ranges.filter(|range| !range.is_empty());
        while let Some(range) = ranges.next() {
            if range.start < last {
                let mut all = units.byte_ranges();
                all.push(range);
                all.extend(ranges);
                all.sort_unstable_by_key(|range| range.start);
                return Self::of(all.into_iter());
            }
            last = range.start;
            let new = end.max(range.start / UNIT)..range.end.div_ceil(UNIT);
            if !new.is_empty() {
                end = new.end;
                units.push(&new);
            }
        }
        units
    }

    fn byte_ranges(&self) -> Vec<Range<u64>> {
        let (mut ranges, mut at) = (Vec::new(), 0);
        while at < u64::MAX {
            let (present, end) = self.run(at);
            if present {
                ranges.push(at * UNIT..end.saturating_mul(UNIT));
            }
            at = end;
        }
        ranges
    }

    /// Adds units after all units in the set.
    fn push(&mut self, units: &Range<u64>) {
        let last = units.end - 1;
        let head = u64::MAX << (units.start % BITS);
        let tail = u64::MAX >> (BITS - 1 - last % BITS);
        let (first, last) = (units.start / BITS, last / BITS);
        if first == last {
            self.set(first..first + 1, head & tail);
        } else {
            self.set(first..first + 1, head);
            self.set(first + 1..last, u64::MAX);
            self.set(last..last + 1, tail);
        }
    }

    /// Adds bits to words, the first of which may be the last word in the set.
    fn set(&mut self, words: Range<u64>, bits: u64) {
        let shared = self.words.pop_if(|last| last.end > words.start);
        let before = shared.map_or(0, |shared| shared.bits);
        self.extend(words.start, before);
        if shared.is_some() {
            self.extend(words.start + 1, before | bits);
        }
        self.extend(words.end, bits);
    }

    /// Sets the bits of the words from the last entry to `end`.
    fn extend(&mut self, end: u64, bits: u64) {
        match self.words.last_mut() {
            Some(last) if last.end >= end => {}
            Some(last) if last.bits == bits => last.end = end,
            _ if end == 0 => {}
            _ => self.words.push(WordRun { end, bits }),
        }
    }

    /// Returns whether a unit is in the set, and the next unit for which the opposite holds.
    pub(super) fn run(&self, unit: u64) -> (bool, u64) {
        let word = unit / BITS;
        let entry = self.words.partition_point(|entry| entry.end <= word);
        let mut rest = self.words[entry..].iter().copied().peekable();
        let here = rest.peek().map_or(0, |entry| entry.bits);
        let present = here >> (unit % BITS) & 1 == 1;
        let ends = |bits: u64| if present { !bits } else { bits };
        // Bits before the unit do not count.
        let behind = ends(here) & u64::MAX << (unit % BITS);
        if behind != 0 {
            return (present, word * BITS + u64::from(behind.trailing_zeros()));
        }
        let mut next = word + 1;
        for entry in rest {
            let behind = ends(entry.bits);
            if next < entry.end && behind != 0 {
                return (present, next * BITS + u64::from(behind.trailing_zeros()));
            }
            next = entry.end;
        }
        (present, if present { next * BITS } else { u64::MAX })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNITS: u64 = 1000;

    fn runs(units: &UnitSet) -> Vec<Range<u64>> {
        let (mut runs, mut at) = (Vec::new(), 0);
        while at < UNITS {
            let (present, end) = units.run(at);
            assert!(end > at);
            if present {
                runs.push(at..end.min(UNITS));
            }
            at = end;
        }
        runs
    }

    proptest! {
        #[test]
        fn a_set_agrees_with_a_list_of_flags(
            steps in prop::collection::vec((0..140_u64, 0..200_u64, 0..UNIT), 0..12),
        ) {
            let (mut ranges, mut at) = (Vec::new(), 0);
            for (gap, len, byte) in steps {
                let start = (at + gap) * UNIT + byte;
                let end = start + len * UNIT;
                // The next one may overlap this one.
                at = start / UNIT + len / 2;
                ranges.push(start.min(UNITS * UNIT)..end.min(UNITS * UNIT));
            }
            let mut flags = vec![false; UNITS as usize];
            for range in ranges.iter().filter(|range| !range.is_empty()) {
                for unit in range.start / UNIT..range.end.div_ceil(UNIT) {
                    flags[unit as usize] = true;
                }
            }
            let units = UnitSet::of(ranges.into_iter());
            for unit in 0..UNITS {
                let present = flags[unit as usize];
                let end = (unit..UNITS).find(|at| flags[*at as usize] != present);
                let (found, until) = units.run(unit);
                prop_assert_eq!(found, present);
                prop_assert_eq!(until.min(UNITS), end.unwrap_or(UNITS));
            }
            let total: u64 = runs(&units).iter().map(|run| run.end - run.start).sum();
            prop_assert_eq!(total, flags.iter().filter(|flag| **flag).count() as u64);
        }
    }

    #[test]
    fn memory_depends_on_the_set_not_on_the_ram_size() {
        const RAM: u64 = 1 << 52;
        assert!(UnitSet::of(std::iter::empty()).words.is_empty());
        let far = [0..RAM / 2, RAM - 1..RAM];
        let units = UnitSet::of(far.into_iter());
        assert!(units.words.len() <= 6, "{units:?}");
        assert_eq!(units.run(0), (true, RAM / 2 / UNIT));
        assert_eq!(units.run(RAM / 2 / UNIT), (false, RAM / UNIT - 1));
        // Every other page.
        let pages = 64 << 10;
        let scattered = (0..pages).map(|page| 2 * page * UNIT..(2 * page + 1) * UNIT);
        let units = UnitSet::of(scattered);
        assert!(units.words.len() as u64 <= 2 * pages / BITS + 1);
    }
}
