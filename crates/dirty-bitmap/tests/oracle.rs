//! The bitmap compared with a naive oracle, which has a flag for each byte of RAM.

use std::ops::Range;

use dirty_bitmap::DirtyBitmap;
use proptest::prelude::*;

const START: u64 = 0x1_0000;

/// The marked bytes and the granule of the marks.
struct Oracle {
    marked: Vec<bool>,
    granule: u64,
}

impl Oracle {
    fn mark(&mut self, bytes: Range<u64>) {
        let bytes = bytes.start.min(self.size())..bytes.end.min(self.size());
        if bytes.is_empty() {
            return;
        }
        let from = bytes.start / self.granule * self.granule;
        let to = (bytes.end.div_ceil(self.granule) * self.granule).min(self.size());
        self.marked[from as usize..to as usize].fill(true);
    }

    fn rebuild(&mut self, granule: u64) {
        self.granule = granule;
        self.runs().into_iter().for_each(|run| self.mark(run));
    }

    fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (at, _) in self
            .marked
            .iter()
            .enumerate()
            .filter(|(_, marked)| **marked)
        {
            match runs.last_mut() {
                Some(run) if run.end == at as u64 => run.end += 1,
                _ => runs.push(at as u64..at as u64 + 1),
            }
        }
        runs
    }

    fn size(&self) -> u64 {
        self.marked.len() as u64
    }
}

#[derive(Clone, Debug)]
enum Step {
    Mark {
        at: u64,
        len: u64,
    },
    MarkIndex(u64),
    Log {
        at: u64,
        shift: u32,
        words: Vec<u64>,
    },
    Rebuild {
        shift: u32,
    },
    Drain,
    FailedSave,
    Save,
}

fn step(size: u64) -> impl Strategy<Value = Step> {
    let at = 0..size + 100;
    prop_oneof![
        4 => (at.clone(), 0..size).prop_map(|(at, len)| Step::Mark { at, len }),
        4 => (0..size / 64 + 2).prop_map(Step::MarkIndex),
        2 => (at, 0..8u32, prop::collection::vec(any::<u64>(), 0..3)).prop_map(|(at, shift, words)| Step::Log { at, shift, words }),
        2 => (0..13u32).prop_map(|shift| Step::Rebuild { shift }),
        1 => Just(Step::Drain),
        1 => Just(Step::FailedSave),
        1 => Just(Step::Save),
    ]
}

fn case() -> impl Strategy<Value = (u64, Vec<Step>)> {
    (64..20_000u64).prop_flat_map(|size| (Just(size), prop::collection::vec(step(size), 1..24)))
}

proptest! {
    #[test]
    fn every_sequence_of_steps_matches_the_oracle((size, steps) in case()) {
        let page_size = 64;
        let bitmap = DirtyBitmap::new(START, size, page_size).unwrap();
        let mut oracle = Oracle { marked: vec![false; size as usize], granule: page_size };
        for step in steps {
            match step {
                Step::Mark { at, len } => {
                    let inside = if len == 0 { at <= size } else { at + len <= size };
                    let was_clean = oracle.runs();
                    oracle.mark(at..at + len);
                    match bitmap.mark_range(START + at, len) {
                        Ok(edge) => prop_assert!(inside && edge == (was_clean != oracle.runs())),
                        Err(_) => prop_assert!(!inside),
                    }
                }
                Step::MarkIndex(index) => {
                    let start = index * page_size;
                    prop_assert_eq!(bitmap.mark_page(index).is_ok(), start < size);
                    oracle.mark(start..start + page_size);
                }
                Step::Log { at, shift, words } => {
                    let page = 1u64 << shift;
                    let set = (0..words.len() as u64 * 64).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1);
                    let pages: Vec<_> = set.map(|bit| at + bit * page..at + (bit + 1) * page).collect();
                    pages.iter().for_each(|page| oracle.mark(page.clone()));
                    let log: Vec<u64> = words.iter().map(|word| word.to_le()).collect();
                    match bitmap.mark_dirty_log(START + at, page, &log) {
                        Ok(reported) => prop_assert_eq!(reported, pages.len() as u64),
                        Err(_) => prop_assert!(pages.iter().any(|page| page.end > size)),
                    }
                }
                Step::Rebuild { shift } => match bitmap.rebuild(1 << shift) {
                    Ok(()) => oracle.rebuild(1 << shift),
                    Err(_) => prop_assert!(1 << shift > size),
                },
                Step::Drain => {
                    prop_assert_eq!(bitmap.drain().unwrap().runs().collect::<Vec<_>>(), oracle.runs());
                    oracle.marked.fill(false);
                }
                Step::FailedSave => drop(bitmap.begin_epoch().unwrap()),
                Step::Save => {
                    bitmap.begin_epoch().unwrap().release().unwrap();
                    oracle.marked.fill(false);
                }
            }
            let runs = oracle.runs();
            prop_assert_eq!(bitmap.dirty_bytes(), runs.iter().map(|run| run.end - run.start).sum::<u64>());
            prop_assert_eq!(bitmap.is_clean(), runs.is_empty());
            let set = bitmap.page_set();
            let again = DirtyBitmap::new(START, size, set.page_size()).unwrap();
            again.mark_pages(&set).unwrap();
            prop_assert_eq!(again.runs().collect::<Vec<_>>(), runs.clone());
            prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), runs);
        }
    }
}
