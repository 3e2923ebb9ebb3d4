//! The footers of sealed and packed snapshots match the pages and bytes that were written.

mod support;

use std::io;

use dirty_bitmap::DirtyBitmap;
use image_format::ImageKind;
use memory_writer::{Durability, ImageId, Layout, MemoryWriter, Seal, SnapshotError};
use proptest::prelude::*;
use support::images::{PAGE, applied, dirty, options};
use support::{Place, Until, pattern};

/// Returns the layouts whose images record their pages.
fn with_footer() -> impl Iterator<Item = Layout> {
    Layout::ALL.into_iter().filter(|layout| layout.has_footer())
}

#[test]
fn footer_of_a_full_snapshot_lists_every_page() {
    with_footer().for_each(full_lists_every_page);
}

fn full_lists_every_page(layout: Layout) {
    let place = Place::new();
    let ram = pattern(3 << 20, 1);
    let mut writer = options(layout, Seal::new())
        .open(&place.dest, 3 << 20, PAGE)
        .unwrap();
    let id = writer.image_id().expect("it is sealed");
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();

    let (footer, restored) = applied(&place.dest, vec![0xaa; 3 << 20]);
    assert_eq!(
        (footer.id, footer.kind, footer.layout),
        (id, ImageKind::Full, layout)
    );
    assert_eq!(footer.regions, [0..3 << 20]);
    assert!(restored == ram);
    let start = footer.data_start() as usize;
    assert!(
        place.read()[start..start + (3 << 20)] == ram,
        "the pages map as those of a raw file"
    );
    place.assert_nothing_else();
}

#[test]
fn footer_has_the_start_of_the_bitmap_or_the_given_regions() {
    const START: u64 = 0x4000_0000;
    const SIZE: u64 = 1 << 20;
    let given = [0..SIZE / 2, 1 << 32..(1 << 32) + SIZE / 2];
    for layout in with_footer() {
        for regions in [None, Some(given.clone())] {
            let place = Place::new();
            let bitmap = DirtyBitmap::new(START, SIZE, PAGE).unwrap();
            bitmap.mark(START).unwrap();
            let mut seal = Seal::new().on_raw_image();
            if let Some(regions) = regions.clone() {
                seal = seal.regions(regions);
            }
            let mut writer = options(layout, seal).open(&place.dest, SIZE, PAGE).unwrap();
            writer
                .write_diff(&pattern(SIZE as usize, 1), &bitmap)
                .unwrap();
            writer.commit().unwrap();
            let (footer, _) = applied(&place.dest, vec![0; SIZE as usize]);
            match regions {
                None => assert_eq!(footer.regions, [START..START + SIZE]),
                Some(regions) => assert_eq!(footer.regions, regions),
            }
        }
    }
}

#[test]
fn footer_of_a_diff_separates_zeros_from_clean_pages() {
    with_footer().for_each(diff_separates_zeros);
}

fn diff_separates_zeros(layout: Layout) {
    let place = Place::new();
    let size = 4 << 20;
    let mut ram = pattern(size as usize, 2);
    let before = ram.clone();
    ram[8192..12288].fill(0);
    ram[1 << 20..(1 << 20) + 4096].fill(7);
    let [id, parent] = [3, 4].map(|byte| ImageId::from_bytes([byte; 16]));
    let seal = Seal::new()
        .id(id)
        .parent(parent)
        .regions([0..1 << 20, 1 << 32..(1 << 32) + (3 << 20)])
        .metadata(b"vcpu".to_vec());
    let mut writer = options(layout, seal).open(&place.dest, size, PAGE).unwrap();
    assert_eq!(writer.write_diff(&ram, &dirty(size, &[2, 256])).unwrap(), 2);
    writer.commit().unwrap();

    let (footer, restored) = applied(&place.dest, before);
    assert_eq!((footer.id, footer.parent()), (id, Some(parent)));
    assert_eq!(footer.metadata, b"vcpu");
    assert_eq!(footer.regions[1].start, 1 << 32);
    assert_eq!(footer.present_bytes(), 2 * PAGE);
    assert!(restored == ram);
    if footer.layout == Layout::Packed {
        assert_eq!(footer.data_end(), 3 * PAGE);
        assert!(
            place.read().len() < 4 * PAGE as usize,
            "a header, two pages and a footer"
        );
    }
}

#[test]
fn diff_without_pages_is_a_footer() {
    with_footer().for_each(empty_diff);
}

fn empty_diff(layout: Layout) {
    let place = Place::new();
    let mut writer = options(layout, Seal::new().on_raw_image())
        .open(&place.dest, 1 << 20, PAGE)
        .unwrap();
    writer
        .write_diff(&vec![0; 1 << 20], &dirty(1 << 20, &[]))
        .unwrap();
    writer.commit().unwrap();
    let (footer, _) = applied(&place.dest, Vec::new());
    assert_eq!((footer.runs.len(), footer.checksums.len()), (0, 0));
}

#[test]
fn pages_that_a_full_dump_skips_are_zeros_in_the_footer() {
    with_footer().for_each(skipped_pages_are_zeros);
}

fn skipped_pages_are_zeros(layout: Layout) {
    let place = Place::new();
    let size = 4 << 20;
    let mut ram = vec![0; size as usize];
    ram[1 << 20..(1 << 20) + 100].fill(5);
    let mut writer = options(layout, Seal::new().on_raw_image())
        .skip_zeros(true)
        .open(&place.dest, size, PAGE)
        .unwrap();
    // Pages that were written before and are zero at the time of the full dump become zeros.
    writer
        .write_diff(&pattern(size as usize, 9), &dirty(size, &[900]))
        .unwrap();
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    let (footer, restored) = applied(&place.dest, vec![0xaa; size as usize]);
    assert_eq!(footer.kind, ImageKind::Full);
    assert!(
        footer.zero_bytes() > size - (64 << 10),
        "{} are zero",
        footer.zero_bytes()
    );
    assert!(restored == ram);
}

#[test]
fn recycled_packed_file_contains_no_old_bytes() {
    let place = Place::recycling();
    let size = 4 << 20;
    let save = |ram: &Vec<u8>, pages: &[u64]| {
        let mut writer = options(Layout::Packed, Seal::new().on_raw_image())
            .recycle(1 << 30)
            .open(&place.dest, size, PAGE)
            .unwrap();
        writer.write_diff(ram, &dirty(size, pages)).unwrap();
        writer.commit().unwrap();
    };
    let secret = vec![0x55; size as usize];
    save(&secret, &(0..1000).collect::<Vec<_>>());
    save(&secret, &(0..1000).collect::<Vec<_>>());
    let ram = pattern(size as usize, 3);
    save(&ram, &[1, 500]);
    let bytes = place.read();
    assert!(bytes.len() < 4 * PAGE as usize);
    assert!(!bytes.windows(16).any(|window| window == [0x55; 16]));
    let (_, restored) = applied(&place.dest, vec![0; size as usize]);
    assert!(restored[PAGE as usize..2 * PAGE as usize] == ram[PAGE as usize..2 * PAGE as usize]);
}

#[test]
fn checksums_match_the_file_while_the_guest_writes() {
    /// RAM that changes with every read.
    struct Running(std::cell::Cell<u8>);
    impl page_reader::PageReader for Running {
        fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
            self.0.set(self.0.get().wrapping_add(1));
            buf.fill(self.0.get());
            Ok(())
        }
    }
    let place = Place::new();
    let mut writer = options(Layout::Sealed, Seal::new())
        .open(&place.dest, 8 << 20, PAGE)
        .unwrap();
    let running = Running(std::cell::Cell::new(0));
    writer.write_full(&running).unwrap();
    writer
        .write_diff(&running, &dirty(8 << 20, &[0, 3, 700]))
        .unwrap();
    writer.commit().unwrap();
    applied(&place.dest, vec![0; 8 << 20]);
}

#[test]
fn recycled_file_is_wiped_between_header_and_first_page() {
    let place = Place::recycling();
    let (size, page) = (4 << 20, 64 << 10);
    let save = |pages: &[u64]| {
        let mut writer = options(Layout::Packed, Seal::new().on_raw_image())
            .recycle(1 << 30)
            .open(&place.dest, size, page)
            .unwrap();
        let ram = vec![0x55; size as usize];
        writer.write_diff(&ram, &dirty(size, pages)).unwrap();
        assert!(writer.recycled());
        writer.commit().unwrap();
    };
    // The second writer recycles a raw file of secrets.
    for _ in 0..2 {
        let mut writer = MemoryWriter::options()
            .recycle(1 << 30)
            .open(&place.dest, size, page)
            .unwrap();
        writer.write_full(&vec![0x77; size as usize]).unwrap();
        writer.commit().unwrap();
    }
    save(&[1, 500]);
    let bytes = place.read();
    assert!(bytes[4096..page as usize].iter().all(|byte| *byte == 0));
    assert!(!bytes.windows(16).any(|window| window == [0x77; 16]));
    applied(&place.dest, vec![0; size as usize]);
}

/// Runs that are adjacent in the file and longer than one write.
#[test]
fn long_packed_runs_match_and_report_the_failed_offset() {
    let place = Place::new();
    let size = 8 << 20;
    let ram = pattern(size as usize, 4);
    let pages: Vec<_> = (0..200).chain(256..1280).chain(1400..1500).collect();
    let open = || {
        let packed = options(Layout::Packed, Seal::new().on_raw_image());
        packed.open(&place.dest, size, PAGE).unwrap()
    };
    let until = |offset| Until {
        ram: ram.clone(),
        offset,
        then: || io::Error::other("planted"),
    };
    let mut writer = open();
    writer
        .write_diff(&until(size), &dirty(size, &pages))
        .unwrap();
    writer.commit().unwrap();
    let (footer, restored) = applied(&place.dest, vec![0; size as usize]);
    assert_eq!(footer.runs.len(), 3);
    for page in pages.iter().map(|page| (page * PAGE) as usize) {
        assert!(restored[page..][..4096] == ram[page..][..4096], "{page}");
    }

    let error = open()
        .write_diff(&until(900 * PAGE), &dirty(size, &pages))
        .unwrap_err();
    let SnapshotError::MemoryIo { offset, .. } = error else {
        panic!("{error:?}");
    };
    assert!(
        offset <= 900 * PAGE && offset + (2 << 20) > 900 * PAGE,
        "{offset}"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: u64, value: u8 },
    Full,
    Diff,
}

fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..size, 1..30_000u64, any::<u8>()).prop_map(|(at, len, value)| Step::Write { at, len, value }),
        1 => Just(Step::Full),
        3 => Just(Step::Diff),
    ];
    prop::collection::vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(24, 96)))]

    #[test]
    fn any_sequence_of_writes_restores_the_last_write(
        (size, steps) in (1..800u64).prop_flat_map(|pages| (Just(pages * PAGE), steps(pages * PAGE))),
        layout in prop::sample::select(with_footer().collect::<Vec<_>>()),
        skip in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("mem");
        let mut writer = options(layout, Seal::new().on_raw_image())
            .durability(Durability::None)
            .skip_zeros(skip)
            .open(&dest, size, PAGE)
            .unwrap();
        let (mut ram, base) = (vec![0_u8; size as usize], vec![0x77_u8; size as usize]);
        let mut expected = base.clone();
        let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
        let (mut saved, mut full) = (false, false);
        for step in steps {
            match step {
                Step::Write { at, len, value } => {
                    let end = (at + len).min(size);
                    ram[at as usize..end as usize].fill(value);
                    dirty.mark_range(at, end - at).unwrap();
                }
                Step::Full => {
                    writer.write_full(&ram).unwrap();
                    expected.clone_from(&ram);
                    (saved, full) = (true, true);
                }
                Step::Diff => {
                    let taken = dirty.drain().unwrap();
                    writer.write_diff(&ram, &taken).unwrap();
                    for run in taken.runs() {
                        let run = run.start as usize..run.end as usize;
                        expected[run.clone()].copy_from_slice(&ram[run]);
                    }
                    saved = true;
                }
            }
        }
        if !saved {
            prop_assert!(writer.commit().is_err());
            return Ok(());
        }
        writer.commit().unwrap();
        let (footer, restored) = applied(&dest, base);
        prop_assert_eq!(footer.kind == ImageKind::Full, full);
        prop_assert!(restored == expected);
    }
}
