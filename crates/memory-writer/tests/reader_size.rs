//! RAM of another size than the image is refused before a byte is written.

mod support;

use std::fs::File;

use memory_writer::{Layout, MemoryWriter, PackedStream, Seal, SnapshotError};
use page_reader::{FileReader, HostMemory, MappedMemory, PageReader, RamLayout};
use rstest::rstest;
use support::images::{PAGE, dirty, options};
use support::{Place, pattern};

const SIZE: u64 = 8 * PAGE;

fn assert_size(error: SnapshotError, ram_size: u64) {
    assert!(
        matches!(error, SnapshotError::ReaderSize { file: SIZE, reader, .. } if reader == ram_size),
        "{error:?}"
    );
}

#[rstest]
fn ram_of_another_size_is_refused(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(SIZE - PAGE, SIZE + PAGE)] ram_size: u64,
) {
    let (place, ram) = (Place::new(), pattern(ram_size as usize, 1));
    let mut writer = options(layout, Seal::new().on_raw_image())
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    // A wrapper forwards the size.
    let reader: Box<dyn PageReader> = Box::new(ram);
    assert_size(writer.write_full(&reader).unwrap_err(), ram_size);
    let marks = dirty(SIZE, &[2]);
    assert_size(writer.write_diff(&reader, &marks).unwrap_err(), ram_size);
    let run = || std::iter::once(0..PAGE);
    assert_size(writer.write_runs(&reader, run).unwrap_err(), ram_size);
    // Nothing was written, so the writer can still be used.
    writer.write_full(&pattern(SIZE as usize, 1)).unwrap();
    writer.commit().unwrap();
}

#[test]
fn raw_image_of_a_part_of_mapped_ram_is_refused() {
    let (place, ram) = (Place::new(), pattern(2 * SIZE as usize, 1));
    let layout = RamLayout::single(1 << 32, 2 * SIZE).unwrap();
    let mapped = MappedMemory::new(layout, [HostMemory::from(&ram[..])]).unwrap();
    let mut writer = options(Layout::Raw, Seal::new())
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    assert_size(writer.write_full(&mapped).unwrap_err(), 2 * SIZE);
    drop(writer);
    place.assert_untouched();
}

#[test]
fn stream_of_a_part_of_the_ram_is_refused() {
    let (mut out, ram) = (Vec::new(), pattern(2 * SIZE as usize, 1));
    let stream = PackedStream::options().seal(Seal::new().on_raw_image());
    let mut stream = stream.open(&mut out, SIZE, PAGE).unwrap();
    assert_size(stream.write_full(&ram).unwrap_err(), 2 * SIZE);
    let marks = dirty(SIZE, &[2]);
    assert_size(stream.write_diff(&ram, &marks).unwrap_err(), 2 * SIZE);
    let run = || std::iter::once(0..PAGE);
    assert_size(stream.write_runs(&ram, run).unwrap_err(), 2 * SIZE);
    drop(stream);
    assert!(out.is_empty());
}

/// A sealed image that is passed as RAM has its footer after the RAM.
#[test]
fn part_of_a_file_is_refused_unless_it_is_a_range() {
    let (place, other) = (Place::new(), Place::new());
    let options = options(Layout::Sealed, Seal::new());
    let mut writer = options.open(&other.dest, SIZE, PAGE).unwrap();
    writer.write_full(&pattern(SIZE as usize, 1)).unwrap();
    writer.commit().unwrap();

    let file = File::open(&other.dest).unwrap();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    let error = writer.write_full(&FileReader::new(&file)).unwrap_err();
    assert_size(error, file.metadata().unwrap().len());
    writer
        .write_full(&FileReader::range(&file, 0, SIZE))
        .unwrap();
    writer.commit().unwrap();
    assert!(place.read() == pattern(SIZE as usize, 1));
}
