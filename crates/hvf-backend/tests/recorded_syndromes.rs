//! The decoder and the tracker at the exits of an emulated processor.
//!
//! The golden file describes itself. Its host permits only what a page lacks, so it shows which
//! exits need write permission.
#![cfg(unix)]

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use dirty_bitmap::{Policy, TrackedBitmap, WriteProtection};
use hvf_backend::{Access, Exception, Exit, ExitAction, Stage2Tracker};
use page_reader::RamLayout;
use serde::{Deserialize, Deserializer, de::Error as _};

const PAGE_SIZE: u64 = 16 << 10;

/// The RAM that the recorded guest uses.
const RAM: Range<u64> = 0x4000_0000..0x4200_0000;

#[derive(Deserialize)]
struct Recording {
    records: Vec<Record>,
}

#[derive(Debug, Deserialize)]
struct Record {
    instruction: String,
    exits: Vec<RecordedExit>,
    changed: BTreeSet<String>,
}

#[derive(Debug, Deserialize)]
struct RecordedExit {
    #[serde(deserialize_with = "hexadecimal")]
    syndrome: u64,
    #[serde(deserialize_with = "hexadecimal")]
    virtual_address: u64,
    #[serde(deserialize_with = "hexadecimal")]
    guest_physical_page: u64,
    page: String,
    lacks: Lacks,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Lacks {
    Write,
    Execute,
    All,
}

fn hexadecimal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let digits = text.strip_prefix("0x").unwrap_or(&text);
    u64::from_str_radix(digits, 16).map_err(D::Error::custom)
}

fn records() -> Vec<Record> {
    let recording = include_str!("golden/syndromes.json");
    let recording: Recording = serde_json::from_str(recording).unwrap();
    assert!(recording.records.len() > 100);
    recording.records
}

fn may_write(exit: &RecordedExit) -> bool {
    Access::of(exit.syndrome).is_some_and(Access::may_write)
}

#[test]
fn exits_that_write_permission_resolves_are_writes() {
    let records = records();
    let mut resolved = 0;
    for record in &records {
        for exit in &record.exits {
            match exit.lacks {
                Lacks::Write => {
                    assert!(may_write(exit), "{exit:x?} of {record:?}");
                    resolved += 1;
                }
                Lacks::Execute => assert!(!may_write(exit), "{exit:x?} of {record:?}"),
                // A store exits once, so it must be handled here. A walk may write.
                Lacks::All => {
                    let access = Access::of(exit.syndrome).unwrap();
                    let is_write = exit.syndrome & 1 << 6 != 0;
                    let expected = is_write || access == Access::PageTableWalk;
                    assert_eq!(access.may_write(), expected, "{exit:x?} of {record:?}");
                }
            }
        }
    }
    assert!(resolved > 50, "{resolved}");
}

#[test]
fn each_changed_page_had_an_exit_that_is_a_write() {
    for record in records() {
        for page in &record.changed {
            if page.starts_with("writable") {
                continue; // tracked writes exit first
            }
            let mut exits = record.exits.iter().filter(|exit| exit.page == *page);
            assert!(exits.any(may_write), "{page} of {record:?}");
        }
    }
}

#[test]
fn few_updates_without_a_change_are_marked() {
    let mut unneeded = BTreeSet::new();
    for record in records() {
        for exit in &record.exits {
            if exit.lacks == Lacks::Write && !record.changed.contains(&exit.page) {
                unneeded.insert(record.instruction.clone());
            }
        }
    }
    // The comparison fails, and the sum is the same.
    assert_eq!(
        unneeded,
        ["cas x4, x5, [x0]", "ldadd xzr, x6, [x0]"]
            .map(str::to_owned)
            .into()
    );
}

#[test]
fn accesses_are_named_by_what_the_guest_executed() {
    let mut accesses = BTreeMap::<_, BTreeSet<_>>::new();
    for record in records() {
        for exit in record.exits {
            let access = Access::of(exit.syndrome).unwrap();
            let walk = exit.page.ends_with("-table");
            assert_eq!(access == Access::PageTableWalk, walk, "{exit:x?}");
            if !walk && exit.lacks != Lacks::All {
                let names = accesses.entry(format!("{access:?}")).or_default();
                names.insert(record.instruction.clone());
            }
        }
    }
    let fetches = ["br x0".to_owned()].into();
    assert_eq!(accesses.remove("Fetch"), Some(fetches));
    let writes = accesses.remove("Write").unwrap();
    assert!(accesses.is_empty(), "{accesses:?}");
    for store in [
        "str x4, [x0]",
        "stp x4, x5, [x0]",
        "str q0, [x0]",
        "dc zva, x0",
    ] {
        assert!(writes.contains(store), "{store}");
    }
}

/// A write protection that permits everything.
struct NoProtection;

impl WriteProtection for NoProtection {
    type Error = Infallible;

    fn protect(&self, _: Range<u64>) -> Result<(), Infallible> {
        Ok(())
    }

    fn unprotect(&self, _: Range<u64>) -> Result<(), Infallible> {
        Ok(())
    }
}

#[test]
fn the_tracker_marks_the_page_of_each_recorded_write() {
    let size = RAM.end - RAM.start;
    let bitmap = Arc::new(TrackedBitmap::tracked(0, size, PAGE_SIZE).unwrap());
    let layout = RamLayout::single(RAM.start, size).unwrap();
    let tracker = Stage2Tracker::new(layout, &bitmap, Policy::Pages, NoProtection).unwrap();
    for record in records() {
        for recorded in &record.exits {
            tracker.checkpoint().unwrap().release().unwrap();
            let page = recorded.guest_physical_page;
            let exit = Exit::Exception(Exception {
                syndrome: recorded.syndrome,
                virtual_address: recorded.virtual_address,
                physical_address: page | recorded.virtual_address & 0xfff,
            });
            let action = tracker.handle_exit(&tracker.enter(), &exit).unwrap();
            let marked: Vec<_> = bitmap.runs().collect();
            if may_write(recorded) {
                assert_eq!(action, ExitAction::Resume, "{recorded:x?}");
                let page = page - RAM.start;
                assert_eq!(marked, [page..page + PAGE_SIZE], "{recorded:x?}");
            } else {
                assert_eq!(action, ExitAction::Forward, "{recorded:x?}");
                assert!(marked.is_empty(), "{recorded:x?}");
            }
        }
    }
}
