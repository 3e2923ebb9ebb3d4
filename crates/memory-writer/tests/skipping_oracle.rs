//! Compares files written with skipped pages with a model, after random writes.

mod support;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Durability, MemoryWriter};
use proptest::prelude::*;
use support::without_memory;
use test_machine::rounds;
use write_faults::Memory;

const PAGE: u64 = 4096;

#[derive(Clone, Debug)]
enum Step {
    Guest { first: u64, pages: u64, value: u8 },
    Full,
    Diff,
}

fn step(pages: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..pages, 1..40_u64, prop::sample::select(vec![0, 0, 1, 2]))
            .prop_map(|(first, pages, value)| Step::Guest { first, pages, value }),
        2 => Just(Step::Full),
        2 => Just(Step::Diff),
    ]
}

#[derive(Clone, Debug)]
struct Save {
    zeros: bool,
    untouched: bool,
    recycle: bool,
    memory: bool,
    page: u64,
    steps: Vec<Step>,
}

const PAGES: u64 = 320;

fn save() -> impl Strategy<Value = Save> {
    let page = prop::sample::select(vec![512, 4096, 16384, 65536]);
    let steps = prop::collection::vec(step(PAGES), 1..12);
    (any::<[bool; 4]>(), page, steps).prop_map(
        |([zeros, untouched, recycle, memory], page, steps)| Save {
            zeros,
            untouched,
            recycle,
            memory,
            page,
            steps,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(rounds(24, 96)))]

    /// The file equals the oracle's after any writes in any order, in new and in recycled files.
    #[test]
    fn skipped_pages_read_as_zeros(saves in prop::collection::vec(save(), 1..5)) {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("mem");
        let size = PAGES * PAGE;
        for save in saves {
            // A guest that starts untouched, and a copy of its memory.
            let guest = Memory::new(size).unwrap();
            let mut ram = vec![0_u8; size as usize];
            let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
            let mut options = MemoryWriter::options()
                .allow_ambiguous_diff(true)
                .skip_zeros(save.zeros)
                .skip_untouched(save.untouched);
            options = match save.recycle {
                true => options.recycle(1 << 30),
                false => options.durability(Durability::None),
            };
            let mut writer = options.open(&dest, size, save.page).unwrap();
            let mut expected = vec![0_u8; size as usize];
            let mut written = false;
            for step in save.steps {
                match step {
                    Step::Guest { first, pages, value } => {
                        let range = first * PAGE..(first + pages).min(PAGES) * PAGE;
                        let bytes = vec![value; (range.end - range.start) as usize];
                        guest.write(range.start, &bytes);
                        ram[range.start as usize..range.end as usize].copy_from_slice(&bytes);
                        dirty.mark_range(range.start, range.end - range.start).unwrap();
                    }
                    Step::Full => {
                        if save.memory {
                            writer.write_full(&guest).unwrap();
                        } else {
                            writer.write_full(&without_memory(&ram)).unwrap();
                        }
                        written = true;
                        expected.clone_from(&ram);
                    }
                    Step::Diff => {
                        writer.write_diff(&guest, &dirty).unwrap();
                        written = true;
                        for run in dirty.runs() {
                            let page = save.page;
                            let whole = (run.start / page * page) as usize
                                ..(run.end.next_multiple_of(page) as usize).min(ram.len());
                            expected[whole.clone()].copy_from_slice(&ram[whole]);
                        }
                    }
                }
            }
            if written {
                writer.commit().unwrap();
                prop_assert!(std::fs::read(&dest).unwrap() == expected);
            }
        }
    }
}
