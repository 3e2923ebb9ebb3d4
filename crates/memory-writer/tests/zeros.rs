//! Pages that are known to be zeros, and pages that are passed as runs.

mod support;

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use image_format::{Footer, Run, Storage};
use memory_writer::{Durability, Layout, MemoryWriter, Seal, SnapshotError};
use proptest::prelude::*;
use rstest::rstest;
use support::{Place, pattern};

const PAGE: u64 = 4096;
const PAGES: u64 = 24;
const SIZE: u64 = PAGES * PAGE;

fn open(dest: &Path, layout: Layout, seal: Seal, ambiguous: bool) -> MemoryWriter {
    let options = MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .allow_ambiguous_diff(ambiguous)
        .durability(Durability::None);
    options.open(dest, SIZE, PAGE).unwrap()
}

/// Applies the sealed or packed image to `ram`.
fn apply(path: &Path, ram: &mut [u8]) {
    let file = File::open(path).unwrap();
    for run in Footer::read(&file).unwrap().runs {
        let bytes = &mut ram[run.start as usize..run.range().end as usize];
        match run.stored {
            Storage::Zeros => bytes.fill(0),
            Storage::At(offset) => file.read_exact_at(bytes, offset).unwrap(),
        }
    }
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn zeros_of_a_diff_take_no_space(#[case] layout: Layout) {
    let place = Place::new();
    let mut writer = open(&place.dest, layout, Seal::new().on_raw_image(), false);
    writer.write_zeros(|| [PAGE..9 * PAGE].into_iter()).unwrap();
    let ram = pattern(SIZE as usize, 3);
    let pages = writer.write_runs(&ram, || {
        [4 * PAGE..4 * PAGE + 1, 11 * PAGE..13 * PAGE].into_iter()
    });
    assert_eq!(pages.unwrap(), 3);
    writer.commit().unwrap();
    let footer = Footer::read(&File::open(&place.dest).unwrap()).unwrap();
    let zeros = footer
        .runs
        .iter()
        .filter(|run| run.stored == Storage::Zeros);
    let zeros: Vec<_> = zeros.map(Run::range).collect();
    assert_eq!(zeros, [PAGE..4 * PAGE, 5 * PAGE..9 * PAGE]);
    assert_eq!(footer.present_bytes(), 3 * PAGE);
    place.assert_nothing_else();
}

#[test]
fn zeros_of_a_full_raw_file_take_no_space() {
    let place = Place::new();
    let mut writer = open(&place.dest, Layout::Raw, Seal::new(), false);
    let mut ram = pattern(SIZE as usize, 3);
    writer.write_full(&ram).unwrap();
    writer.write_zeros(|| [0..20 * PAGE].into_iter()).unwrap();
    writer.commit().unwrap();
    ram[..20 * PAGE as usize].fill(0);
    assert!(place.read() == ram);
    let allocated = fs::metadata(&place.dest).unwrap().blocks() * 512;
    assert!(allocated < 20 * PAGE, "{allocated} bytes are allocated");
}

#[rstest]
#[case::empty(&[PAGE..PAGE])]
#[case::backwards(&[Range { start: 2 * PAGE, end: PAGE }])]
#[case::past_the_ram(&[SIZE - PAGE..SIZE + PAGE])]
#[case::descending(&[4 * PAGE..5 * PAGE, PAGE..2 * PAGE])]
#[case::overlapping(&[0..2 * PAGE, PAGE..3 * PAGE])]
fn invalid_runs_are_refused(
    #[case] runs: &[Range<u64>],
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let place = Place::new();
    let mut writer = open(&place.dest, layout, Seal::new().on_raw_image(), false);
    let ram = pattern(SIZE as usize, 1);
    let written = writer.write_runs(&ram, || runs.iter().cloned());
    assert!(matches!(written, Err(SnapshotError::Run { .. })));
    let zeroed = writer.write_zeros(|| runs.iter().cloned());
    assert!(matches!(zeroed, Err(SnapshotError::Run { .. })));
    // Zeros in a part of a page are refused: the rest of the page is unknown.
    let part = writer.write_zeros(|| std::iter::once(0..512));
    assert!(matches!(part, Err(SnapshotError::Run { .. })));
    // The writer is unchanged.
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
}

#[rstest]
#[case::sealed(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn diff_of_zeros_has_a_parent(#[case] layout: Layout) {
    let place = Place::new();
    let mut writer = open(&place.dest, layout, Seal::new(), false);
    let error = writer.write_zeros(|| std::iter::once(0..PAGE)).unwrap_err();
    assert!(
        matches!(error, SnapshotError::DiffWithoutParent { .. }),
        "{error:?}"
    );
    drop(writer);
    place.assert_untouched();
}

#[derive(Clone, Debug)]
enum Step {
    Full(u8),
    Runs(u8, Vec<Range<u64>>),
    Zeros(Vec<Range<u64>>),
}

/// Generates ascending runs of pages, in bytes.
fn runs() -> impl Strategy<Value = Vec<Range<u64>>> {
    prop::collection::btree_set(0..=PAGES, 0..7).prop_map(|bounds| {
        let bounds: Vec<_> = bounds.into_iter().collect();
        let pairs = bounds.chunks_exact(2);
        pairs.map(|pair| pair[0] * PAGE..pair[1] * PAGE).collect()
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => any::<u8>().prop_map(Step::Full),
        3 => (any::<u8>(), runs()).prop_map(|(seed, runs)| Step::Runs(seed, runs)),
        4 => runs().prop_map(Step::Zeros),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(48, 256)))]

    /// Compares with copies of the bytes, page by page.
    #[test]
    fn last_write_of_a_page_counts(
        steps in prop::collection::vec(step(), 1..6),
        recycle in any::<bool>(),
    ) {
        let before = vec![0xee; SIZE as usize];
        for layout in Layout::ALL {
            let place = Place::new();
            if recycle {
                for seed in 0..2 {
                    let mut writer = MemoryWriter::options().recycle(1 << 30).open(&place.dest, SIZE, PAGE).unwrap();
                    writer.write_full(&pattern(SIZE as usize, seed)).unwrap();
                    writer.commit().unwrap();
                }
            }
            let options = MemoryWriter::options()
                .layout(layout).seal(Seal::new().on_raw_image())
                .allow_ambiguous_diff(true)
                .recycle(1 << 30);
            let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
            let is_raw = writer.image_id().is_none();
            let mut expected = before.clone();
            let mut known = vec![false; PAGES as usize];
            for step in &steps {
                let written = match step {
                    Step::Full(seed) => {
                        let ram = pattern(SIZE as usize, *seed);
                        writer.write_full(&ram).unwrap();
                        expected.copy_from_slice(&ram);
                        std::slice::from_ref(&(0..SIZE))
                    }
                    Step::Runs(seed, runs) => {
                        let ram = pattern(SIZE as usize, *seed);
                        let pages = writer.write_runs(&ram, || runs.iter().cloned()).unwrap();
                        prop_assert_eq!(pages * PAGE, runs.iter().map(|run| run.end - run.start).sum::<u64>());
                        for run in runs {
                            let bytes = run.start as usize..run.end as usize;
                            expected[bytes.clone()].copy_from_slice(&ram[bytes]);
                        }
                        &runs[..]
                    }
                    Step::Zeros(runs) => {
                        writer.write_zeros(|| runs.iter().cloned()).unwrap();
                        runs.iter().for_each(|run| expected[run.start as usize..run.end as usize].fill(0));
                        &runs[..]
                    }
                };
                written.iter().for_each(|run| known[(run.start / PAGE) as usize..(run.end / PAGE) as usize].fill(true));
            }
            writer.commit().unwrap();
            let mut restored = before.clone();
            if is_raw {
                restored = place.read();
                for page in (0..PAGES as usize).filter(|page| !known[*page]) {
                    expected[page * PAGE as usize..(page + 1) * PAGE as usize].fill(0);
                }
            } else {
                apply(&place.dest, &mut restored);
            }
            prop_assert!(restored == expected);
        }
    }
}
