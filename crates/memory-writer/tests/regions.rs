//! The regions of RAM that sealed and packed snapshots record.

mod support;

use std::fs::File;
use std::ops::Range;

use dirty_bitmap::DirtyBitmap;
use image_format::Footer;
use memory_writer::{Layout, MemoryWriter, Seal, SnapshotError};
use page_reader::{HostMemory, MappedMemory, PageReader, RamLayout};
use proptest::prelude::*;
use rstest::rstest;
use support::images::{PAGE, dirty, options};
use support::{Place, pattern};

const LOW: Range<u64> = 0..2 * PAGE;
const HIGH: Range<u64> = 1 << 32..(1 << 32) + PAGE;
const OTHER: Range<u64> = 1 << 33..(1 << 33) + PAGE;
const SIZE: u64 = 3 * PAGE;

fn layout(regions: &[Range<u64>]) -> RamLayout {
    RamLayout::new(regions.iter().map(|it| (it.start, it.end - it.start))).unwrap()
}

/// Returns a reader that knows that `ram` is at these regions.
fn reader<'r>(ram: &'r [u8], regions: &[Range<u64>]) -> MappedMemory<'r> {
    let layout = layout(regions);
    let parts = layout.regions().iter().map(|region| {
        let range = region.offset as usize..region.offset_end() as usize;
        HostMemory::from(&ram[range])
    });
    MappedMemory::new(layout.clone(), parts).unwrap()
}

fn recorded(place: &Place) -> Vec<Range<u64>> {
    Footer::read(&File::open(&place.dest).unwrap())
        .unwrap()
        .regions
}

#[rstest]
#[case::of_the_reader(Seal::new())]
#[case::of_the_seal(Seal::new().ram_layout(&layout(&[LOW, HIGH])))]
fn regions_with_a_gap_are_recorded(
    #[case] seal: Seal,
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let mut writer = options(layout, seal).open(&place.dest, SIZE, PAGE).unwrap();
    writer.write_full(&reader(&ram, &[LOW, HIGH])).unwrap();
    writer.commit().unwrap();
    assert_eq!(recorded(&place), [LOW, HIGH]);
}

/// A bitmap that starts at 0 covers the memory file, and states no address.
#[test]
fn diff_records_the_regions_of_its_reader() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let seal = Seal::new().on_raw_image();
    let mut writer = options(Layout::Packed, seal)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    // A wrapper forwards the layout.
    let reader: Box<dyn PageReader + '_> = Box::new(reader(&ram, &[LOW, HIGH]));
    writer.write_diff(&reader, &dirty(SIZE, &[2])).unwrap();
    writer.commit().unwrap();
    assert_eq!(recorded(&place), [LOW, HIGH]);
}

#[test]
fn regions_other_than_the_reader_s_are_refused_before_a_write() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let with_gap = reader(&ram, &[LOW, HIGH]);
    let seal = Seal::new().regions([0..SIZE]).on_raw_image();
    let mut writer = options(Layout::Sealed, seal)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    for error in [
        writer.write_full(&with_gap).unwrap_err(),
        writer
            .write_diff(&with_gap, &dirty(SIZE, &[2]))
            .unwrap_err(),
        writer
            .write_runs(&with_gap, || std::iter::once(0..PAGE))
            .unwrap_err(),
    ] {
        assert!(matches!(error, SnapshotError::Regions { .. }), "{error:?}");
        let text = error.to_string();
        for named in ["0x0..0x3000", "0x0..0x2000 and 0x100000000..0x100001000"] {
            assert!(text.contains(named), "{text}");
        }
    }
    // Nothing was written, so the writer can still be used.
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    assert_eq!(recorded(&place), [0..SIZE]);
}

#[rstest]
#[case::start_of_the_options(MemoryWriter::options().ram_start(PAGE), &[LOW, HIGH])]
#[case::size_of_the_file(MemoryWriter::options(), &[LOW])]
fn reader_of_other_ram_is_refused(
    #[case] options: memory_writer::MemoryWriterOptions,
    #[case] regions: &[Range<u64>],
) {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let options = options.layout(Layout::Sealed);
    let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
    let error = writer.write_full(&reader(&ram, regions)).unwrap_err();
    assert!(matches!(error, SnapshotError::Regions { .. }), "{error:?}");
    drop(writer);
    place.assert_untouched();
}

#[test]
fn two_readers_of_different_ram_are_refused() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let options = options(Layout::Sealed, Seal::new());
    let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
    writer.write_full(&reader(&ram, &[LOW, HIGH])).unwrap();
    let other = reader(&ram, &[0..SIZE]);
    let error = writer.write_diff(&other, &dirty(SIZE, &[0])).unwrap_err();
    assert!(matches!(error, SnapshotError::Regions { .. }), "{error:?}");
}

proptest! {
    /// The oracle: the guest-physical address of every page, by the seal and by the reader.
    #[test]
    fn seal_is_accepted_if_every_page_has_the_same_address(
        seal in prop::collection::vec((0_u64..3, 1_u64..3), 1..4),
        reader_gaps in prop::collection::vec((0_u64..3, 1_u64..3), 1..4),
    ) {
        let regions = |parts: &[(u64, u64)]| {
            let mut at = 0;
            let regions = parts.iter().map(|(gap, pages)| {
                let start = at + gap * PAGE;
                at = start + pages * PAGE;
                start..at
            });
            regions.collect::<Vec<_>>()
        };
        let addresses = |regions: &[Range<u64>]| {
            let pages = regions.iter().flat_map(|it| it.clone().step_by(PAGE as usize));
            pages.collect::<Vec<_>>()
        };
        let (seal, of_reader) = (regions(&seal), regions(&reader_gaps));
        let size = addresses(&seal).len() as u64 * PAGE;
        let place = Place::new();
        let ram = vec![1; addresses(&of_reader).len() * PAGE as usize];
        let mut writer = options(Layout::Packed, Seal::new().regions(seal.clone()))
            .open(&place.dest, size, PAGE)
            .unwrap();
        let written = writer.write_full(&reader(&ram, &of_reader));
        prop_assert_eq!(written.is_ok(), addresses(&seal) == addresses(&of_reader));
    }
}

/// A bitmap starts at the memory file's start or at that of the reader's RAM.
#[rstest]
#[case::of_the_memory_file(&[HIGH], 0, true)]
#[case::of_the_reader(&[HIGH], HIGH.start, true)]
#[case::of_other_ram(&[HIGH], 1 << 40, false)]
#[case::of_one_of_two_regions(&[HIGH, OTHER], HIGH.start, false)]
fn epoch_of_other_ram_is_not_released(
    #[case] regions: &[Range<u64>],
    #[case] start: u64,
    #[case] is_released: bool,
    #[values(false, true)] is_diff: bool,
    #[values(Layout::Raw, Layout::Sealed)] layout: Layout,
) {
    let size = regions.iter().map(|it| it.end - it.start).sum();
    let (place, ram) = (Place::new(), pattern(size as usize, 1));
    let marks = DirtyBitmap::new(start, size, PAGE).unwrap();
    marks.mark(start).unwrap();
    let reader = reader(&ram, regions);
    let epoch = marks.begin_epoch().unwrap();
    let options = options(layout, Seal::new().on_raw_image()).allow_ambiguous_diff(true);
    let mut writer = options.open(&place.dest, size, PAGE).unwrap();
    let result = match is_diff {
        true => writer.write_diff(&reader, epoch.bitmap()).map(drop),
        false => MemoryWriter::options()
            .open(&place.dest, size, PAGE)
            .and_then(|full| {
                writer = full;
                writer.write_full(&reader)
            }),
    };
    let result = result.and_then(|()| writer.commit_and_release(epoch));
    let is_other = matches!(result, Err(SnapshotError::BitmapStart { .. }));
    assert_eq!((result.is_ok(), is_other), (is_released, !is_released));
    assert_eq!(marks.is_clean(), is_released);
}
