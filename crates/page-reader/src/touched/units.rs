//! A set of units of RAM as a compressed bitmap: equal words that follow each other are kept once.

use std::ops::Range;

use super::UNIT;

const BITS: u64 = u64::BITS as u64;

/// Units of [`UNIT`] bytes, by their number.
///
/// A range takes at most three entries, and 64 units at most one: the memory grows with what is in the set, and not with
/// the RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Units {
    /// Ascending. No two that follow each other have the same bits. Behind the last, no unit is in the set.
    words: Vec<Words>,
}

/// Words of 64 units each that have the same bits, from the end of the entry before on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Words {
    end: u64,
    bits: u64,
}

impl Units {
    /// Returns the units that any of the byte ranges touches. A list of ranges is made only where they do not ascend.
    pub(super) fn of(ranges: impl Iterator<Item = Range<u64>>) -> Self {
        let mut units = Self::default();
        // Where the last range started, in bytes, and where the units end that are in the set.
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

    /// Adds units that follow all those in the set.
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

    /// Adds these bits to words of which the first may be the last that has any.
    fn set(&mut self, words: Range<u64>, bits: u64) {
        let shared = self.words.pop_if(|last| last.end > words.start);
        let before = shared.map_or(0, |shared| shared.bits);
        self.extend(words.start, before);
        if shared.is_some() {
            self.extend(words.start + 1, before | bits);
        }
        self.extend(words.end, bits);
    }

    /// The words from the last entry to `end` have these bits.
    fn extend(&mut self, end: u64, bits: u64) {
        match self.words.last_mut() {
            Some(last) if last.end >= end => {}
            Some(last) if last.bits == bits => last.end = end,
            _ if end == 0 => {}
            _ => self.words.push(Words { end, bits }),
        }
    }

    /// Returns whether a unit is in the set, and the next one of which the opposite is true.
    pub(super) fn run(&self, unit: u64) -> (bool, u64) {
        let word = unit / BITS;
        let entry = self.words.partition_point(|entry| entry.end <= word);
        let mut rest = self.words[entry..].iter().copied().peekable();
        let here = rest.peek().map_or(0, |entry| entry.bits);
        let present = here >> (unit % BITS) & 1 == 1;
        let ends = |bits: u64| if present { !bits } else { bits };
        // What is before the unit in its word does not count.
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

    fn runs(units: &Units) -> Vec<Range<u64>> {
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
        fn every_unit_is_in_the_set_as_in_a_list_of_flags(
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
            let units = Units::of(ranges.into_iter());
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
    fn memory_is_for_what_is_in_the_set_and_not_for_the_ram() {
        const RAM: u64 = 1 << 52;
        assert!(Units::of(std::iter::empty()).words.is_empty());
        let far = [0..RAM / 2, RAM - 1..RAM];
        let units = Units::of(far.into_iter());
        assert!(units.words.len() <= 6, "{units:?}");
        assert_eq!(units.run(0), (true, RAM / 2 / UNIT));
        assert_eq!(units.run(RAM / 2 / UNIT), (false, RAM / UNIT - 1));
        // Every other page, of so much RAM.
        let pages = 64 << 10;
        let scattered = (0..pages).map(|page| 2 * page * UNIT..(2 * page + 1) * UNIT);
        let units = Units::of(scattered);
        assert!(units.words.len() as u64 <= 2 * pages / BITS + 1);
    }
}
