//! Derives the states in which a power loss may leave a disk, from the log of its writes.

use std::collections::HashSet;
use std::io;

use random::Random;
use scenarios::write_log::{self, Entry, Fate};

/// The directories in which a scenario runs, one after the other. In the first, only the scenario
/// syncs. In the second, a neighbor syncs all the time, so names can reach the disk at any moment.
pub(super) const PHASES: [&str; 2] = ["alone", "in-company"];

/// Behind the end of the file system, for marks: a block whose bytes are the number of the phase in
/// which a commit returned, or [`STEP`].
pub(super) const MARKS: u64 = 1 << 20;

/// The byte of a mark between two steps of a commit.
pub(super) const STEP: u8 = 0xff;

/// The log of one scenario on one disk.
pub(super) struct Log {
    entries: Vec<Entry>,
    /// How many entries come before each commit that returned, and its phase.
    marks: Vec<(usize, usize)>,
    /// How many come before the end of each step.
    steps: Vec<usize>,
}

/// A crash: after so many entries of the log, with these fates of the writes among them that no
/// flush has followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub entries: usize,
    pub unflushed: Vec<Fate>,
    /// The commits that had returned in each phase.
    pub returned: [usize; PHASES.len()],
}

impl Log {
    /// Takes the marks out of the entries of a disk with a file system of `size` bytes.
    pub(super) fn new(all: Vec<Entry>, size: u64) -> Self {
        let (mut entries, mut marks, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        for entry in all {
            match &entry {
                Entry::Write { offset, bytes } if *offset >= size && bytes[0] == STEP => {
                    steps.push(entries.len());
                }
                Entry::Write { offset, bytes } if *offset >= size => {
                    marks.push((entries.len(), usize::from(bytes[0])));
                }
                _ => entries.push(entry),
            }
        }
        Self {
            entries,
            marks,
            steps,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn flushes(&self) -> usize {
        let flushes = self.entries.iter().filter(|entry| **entry == Entry::Flush);
        flushes.count()
    }

    /// At most `limit` different states, the same for the same seed: first those at the marks,
    /// where a missing sync shows; then every prefix of the log with all its writes, or prefixes at
    /// even distances if there are too many for half the limit; then random prefixes, with
    /// writes that no flush has followed dropped and torn at random.
    pub(super) fn states(&self, seed: u64, limit: usize) -> Vec<State> {
        let mut seen = HashSet::new();
        let mut states = Vec::new();
        let mut add = |state: State| {
            if states.len() < limit && seen.insert(self.essence(&state)) {
                states.push(state);
            }
        };
        let step = self.entries.len().div_ceil(limit.div_ceil(2)).max(1);
        let marked = self.marks.iter().map(|(at, _)| *at);
        let marked = [0]
            .into_iter()
            .chain(marked)
            .chain(self.steps.iter().copied());
        for entries in marked.chain((0..=self.entries.len()).step_by(step)) {
            add(self.state(entries, |_| Fate::Kept));
        }
        let mut random = Random::seeded(seed);
        // The small windows' subsets may all be there before there are enough.
        for _ in 0..limit * 4 {
            let entries = random.below(self.entries.len() as u64 + 1) as usize;
            add(self.state(entries, |blocks| Fate::random(&mut random, blocks)));
        }
        states
    }

    /// Turns a disk with its contents at the start of the log into the disk after a crash.
    pub(super) fn apply(
        &self,
        state: &State,
        write: &dyn Fn(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut fates = state.unflushed.iter().copied();
        let mut next = |_| fates.next().unwrap_or(Fate::Kept);
        write_log::apply(&self.entries[..state.entries], &mut next, write).map(drop)
    }

    /// Describes a state as text.
    pub(super) fn describe(&self, state: &State) -> String {
        let kept = |fate: &&Fate| **fate == Fate::Kept;
        let mut text = format!(
            "power lost after {} of {} writes and flushes; commits that had returned: {:?}; of {} unflushed writes {} were kept",
            state.entries,
            self.len(),
            state.returned,
            state.unflushed.len(),
            state.unflushed.iter().filter(kept).count(),
        );
        for (number, fate) in (self.flushed(state.entries)..).zip(&state.unflushed) {
            if let Entry::Write { offset, bytes } = &self.entries[number] {
                text += &format!("\n  {number}: {} bytes at {offset}: {fate:?}", bytes.len());
            }
        }
        text
    }

    fn state(&self, entries: usize, mut fate: impl FnMut(u64) -> Fate) -> State {
        let unflushed = &self.entries[self.flushed(entries)..entries];
        let returned = |phase| {
            let marks = self.marks.iter();
            marks
                .filter(|mark| mark.0 <= entries && mark.1 == phase)
                .count()
        };
        State {
            entries,
            unflushed: unflushed.iter().map(|entry| fate(entry.blocks())).collect(),
            returned: std::array::from_fn(returned),
        }
    }

    /// How many entries a flush among the first `entries` has made stay.
    fn flushed(&self, entries: usize) -> usize {
        let last = self.entries[..entries]
            .iter()
            .rposition(|entry| *entry == Entry::Flush);
        last.map_or(0, |last| last + 1)
    }

    /// What distinguishes a state from others: dropped writes at its end do not.
    fn essence(&self, state: &State) -> (usize, Vec<(usize, Fate)>, [usize; PHASES.len()]) {
        let flushed = self.flushed(state.entries);
        let there = (flushed..)
            .zip(state.unflushed.iter().copied())
            .filter(|(_, fate)| !matches!(fate, Fate::Dropped | Fate::Torn(0)));
        (flushed, there.collect(), state.returned)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn write(block: u64, blocks: usize) -> Entry {
        Entry::Write {
            offset: block * 4096,
            bytes: vec![block as u8; blocks * 4096],
        }
    }

    fn mark(phase: u8) -> Entry {
        Entry::Write {
            offset: SIZE,
            bytes: vec![phase; 4096],
        }
    }

    /// Two writes, one of them of three blocks, flushed; a commit that returned; two more writes.
    fn log() -> Log {
        let entries = [
            write(1, 1),
            write(2, 3),
            Entry::Flush,
            mark(0),
            write(7, 1),
            write(8, 1),
        ];
        Log::new(entries.into(), SIZE)
    }

    /// The blocks of each write.
    fn applied(log: &Log, state: &State) -> Vec<(u64, usize)> {
        let done = RefCell::new(Vec::new());
        let write = |offset, bytes: &[u8]| {
            done.borrow_mut().push((offset / 4096, bytes.len() / 4096));
            Ok(())
        };
        log.apply(state, &write).expect("applied");
        done.into_inner()
    }

    #[test]
    fn every_prefix_is_a_state() {
        let log = log();
        let states = log.states(1, 1000);
        for entries in 0..=log.len() {
            let whole = |state: &&State| {
                state.entries == entries && state.unflushed.iter().all(|fate| *fate == Fate::Kept)
            };
            // A prefix that ends in a flush has what the one before it has, but not the same that
            // may be lost.
            assert_eq!(states.iter().filter(whole).count(), 1, "{entries}");
        }
    }

    #[test]
    fn each_subset_of_unflushed_writes_is_a_post_crash_state() {
        let log = log();
        let mut found: Vec<_> = log
            .states(1, 1000)
            .iter()
            .map(|state| (applied(&log, state), state.returned[0]))
            .map(|(done, returned)| (done.into_iter().filter(|(_, blocks)| *blocks > 0), returned))
            .map(|(done, returned)| (done.collect::<Vec<_>>(), returned))
            .collect();
        found.sort();
        let mut expected: Vec<(Vec<(u64, usize)>, usize)> = Vec::new();
        for one in [vec![], vec![(1, 1)]] {
            for blocks in 0..=3 {
                let two = (blocks > 0).then_some((2, blocks));
                expected.push((one.iter().copied().chain(two).collect(), 0));
            }
        }
        let flushed = [(1, 1), (2, 3)];
        for rest in [vec![], vec![(7, 1)], vec![(8, 1)], vec![(7, 1), (8, 1)]] {
            expected.push((flushed.iter().copied().chain(rest).collect(), 1));
        }
        expected.sort();
        assert_eq!(found, expected);
    }

    #[test]
    fn what_was_flushed_is_in_every_later_state() {
        let log = log();
        for state in log.states(1, 1000).iter().filter(|state| state.entries > 2) {
            assert_eq!(applied(&log, state)[..2], [(1, 1), (2, 3)], "{state:?}");
        }
    }

    #[test]
    fn commit_has_returned_after_its_mark_which_is_not_a_write() {
        let log = log();
        assert_eq!(log.len(), 5);
        for state in log.states(1, 1000) {
            assert_eq!(state.returned, [usize::from(state.entries >= 3), 0]);
        }
    }

    #[test]
    fn a_seed_gives_the_same_states_and_another_others() {
        let entries = (0..40).map(|block| write(block, 4)).collect();
        let log = Log::new(entries, SIZE);
        assert_eq!(log.states(7, 100), log.states(7, 100));
        assert_ne!(log.states(7, 100), log.states(8, 100));
        assert_eq!(log.states(7, 100).len(), 100);
    }
}
