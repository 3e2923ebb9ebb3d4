//! Compares any sequence of guest writes, rebuilds, failing and successful saves with a naive copy
//! of the RAM.

mod support;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Durability, MemoryWriter};
use proptest::prelude::*;
use support::Until;

const PAGE: u64 = 1024;

#[derive(Clone, Debug)]
enum Step {
    GuestWrites { at: u64, len: u64, value: u8 },
    Rebuild { shift: u32 },
    Full,
    Diff,
    PreCopy { at: u64, value: u8 },
    FailedDiff { from: u64 },
    FailedCommit,
}

fn step(size: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..size, 1..3000u64, any::<u8>()).prop_map(|(at, len, value)| Step::GuestWrites { at, len, value }),
        1 => (6..14u32).prop_map(|shift| Step::Rebuild { shift }),
        1 => Just(Step::Full),
        3 => Just(Step::Diff),
        1 => (0..size, any::<u8>()).prop_map(|(at, value)| Step::PreCopy { at, value }),
        1 => (0..size).prop_map(|from| Step::FailedDiff { from }),
        1 => Just(Step::FailedCommit),
    ]
}

fn case() -> impl Strategy<Value = (u64, Vec<Step>)> {
    (1..40u64).prop_flat_map(|pages| {
        (
            Just(pages * PAGE),
            prop::collection::vec(step(pages * PAGE), 1..24),
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(32, 128)))]

    #[test]
    fn chain_restores_the_guests_memory((size, steps) in case()) {
        let dir = tempfile::tempdir().unwrap();
        let mut ram = vec![0_u8; size as usize];
        let dirty = DirtyBitmap::new(0, size, PAGE.min(size)).unwrap();
        // The memory that the snapshots restore to, and the naive copy of the RAM at the last of
        // them.
        let mut restored = vec![0_u8; size as usize];
        let open = |name: &str| {
            let options = MemoryWriter::options().allow_ambiguous_diff(true).durability(Durability::None).chunk_size(4096);
            options.open(dir.path().join(name), size, PAGE).unwrap()
        };
        let write = |ram: &mut Vec<u8>, at: u64, len: u64, value: u8| {
            let end = (at + len).min(size);
            ram[at as usize..end as usize].fill(value);
            dirty.mark_range(at, end - at).unwrap();
        };
        for step in steps {
            match step {
                Step::GuestWrites { at, len, value } => {
                    write(&mut ram, at, len, value);
                    continue;
                }
                Step::Rebuild { shift } => {
                    let _ = dirty.rebuild(1 << shift);
                    continue;
                }
                Step::FailedDiff { from } => {
                    let epoch = dirty.begin_epoch().unwrap();
                    let reader = Until { ram: ram.clone(), offset: from, then: || std::io::Error::other("planted") };
                    let mut writer = open("mem");
                    if writer.write_diff(&reader, epoch.bitmap()).is_err() {
                        prop_assert!(writer.commit().is_err());
                    }
                    continue;
                }
                Step::FailedCommit => {
                    let epoch = dirty.begin_epoch().unwrap();
                    let mut writer = open("taken");
                    writer.write_diff(&ram, epoch.bitmap()).unwrap();
                    let taken = dir.path().join("taken");
                    std::fs::create_dir(&taken).unwrap();
                    prop_assert!(writer.commit().is_err());
                    std::fs::remove_dir(&taken).unwrap();
                    continue;
                }
                Step::Full => {
                    let epoch = dirty.begin_epoch().unwrap();
                    let mut writer = open("mem");
                    writer.write_full(&ram).unwrap();
                    writer.commit().unwrap();
                    epoch.release().unwrap();
                    restored = std::fs::read(dir.path().join("mem")).unwrap();
                }
                Step::PreCopy { at, value } => {
                    let mut epoch = dirty.begin_epoch().unwrap();
                    let mut writer = open("mem");
                    writer.write_full(&ram).unwrap();
                    write(&mut ram, at, 1, value);
                    writer.write_diff(&ram, &epoch.extend().unwrap()).unwrap();
                    writer.commit().unwrap();
                    epoch.release().unwrap();
                    restored = std::fs::read(dir.path().join("mem")).unwrap();
                }
                Step::Diff => {
                    let epoch = dirty.begin_epoch().unwrap();
                    let mut writer = open("mem");
                    let pages = writer.write_diff(&ram, epoch.bitmap()).unwrap();
                    writer.commit().unwrap();
                    let diff = std::fs::read(dir.path().join("mem")).unwrap();
                    prop_assert_eq!(diff.len() as u64, size);
                    let marked = epoch.bitmap().page_set();
                    let is_dirty = |page: &u64| {
                        let page = marked.range().start + page * PAGE;
                        marked.runs_in(page..page + PAGE).next().is_some()
                    };
                    let written: Vec<u64> = (0..size / PAGE).filter(is_dirty).collect();
                    prop_assert_eq!(pages, written.len() as u64);
                    for page in 0..size / PAGE {
                        let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
                        if written.contains(&page) {
                            restored[bytes.clone()].copy_from_slice(&diff[bytes]);
                        } else {
                            prop_assert!(diff[bytes].iter().all(|byte| *byte == 0), "a clean page was written");
                        }
                    }
                    epoch.release().unwrap();
                }
            }
            prop_assert!(restored == ram);
        }
    }
}
