//! Packed streams: the same bytes as the file of a writer.

mod support;

use std::fs;
use std::ops::ControlFlow;

use image_format::{Footer, FooterError};
use memory_writer::{ImageId, Layout, MemoryWriter, PackedStream, Pass, Seal};
use page_reader::{HostMemory, MappedMemory, RamLayout};
use proptest::prelude::*;
use rstest::rstest;
use support::images::{PAGE, dirty, options};
use support::{Place, pattern, without_memory};

/// 3 chunks and a part of one.
const SIZE: u64 = (3 << 20) + 64 * PAGE;

fn seal() -> Seal {
    Seal::new()
        .id(ImageId::from_bytes([7; 16]))
        .metadata(b"vCPU state".to_vec())
}

/// Returns the bytes of the file that a writer makes.
fn file(seal: Seal, skip_zeros: bool, write: impl FnOnce(&mut MemoryWriter)) -> Vec<u8> {
    let place = Place::new();
    let options = options(Layout::Packed, seal).skip_zeros(skip_zeros);
    let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
    write(&mut writer);
    writer.commit().unwrap();
    place.read()
}

/// Returns the bytes of a stream.
fn stream(seal: Seal, skip_zeros: bool, write: impl FnOnce(&mut PackedStream<Vec<u8>>)) -> Vec<u8> {
    let options = PackedStream::options().seal(seal).skip_zeros(skip_zeros);
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    write(&mut stream);
    stream.finish().unwrap()
}

fn read(bytes: &[u8]) -> Result<Footer, FooterError> {
    Footer::read_from(bytes.len() as u64, None, |buf, offset| {
        let from = bytes.get(offset as usize..).unwrap_or_default();
        let from = from.get(..buf.len());
        buf.copy_from_slice(from.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    })
}

#[rstest]
fn full_stream_is_the_file_of_a_writer(#[values(false, true)] skip_zeros: bool) {
    let mut ram = pattern(SIZE as usize, 1);
    ram[100 * PAGE as usize..300 * PAGE as usize].fill(0);
    let expected = file(seal(), skip_zeros, |it| it.write_full(&ram).unwrap());
    let lent = stream(seal(), skip_zeros, |it| it.write_full(&ram).unwrap());
    assert!(lent == expected);
    let copied = without_memory(&ram);
    let copied = stream(seal(), skip_zeros, |it| it.write_full(&copied).unwrap());
    assert!(copied == expected);
}

#[test]
fn stream_records_the_regions_of_its_reader() {
    let ram = pattern(SIZE as usize, 1);
    let layout = RamLayout::new([(0, PAGE), (1 << 32, SIZE - PAGE)]).unwrap();
    let (low, high) = ram.split_at(PAGE as usize);
    let reader = MappedMemory::new(layout, [HostMemory::from(low), high.into()]).unwrap();
    let bytes = stream(seal(), false, |it| it.write_full(&reader).unwrap());
    let regions = read(&bytes).unwrap().regions;
    assert_eq!(regions, [0..PAGE, 1 << 32..(1 << 32) + SIZE - PAGE]);
}

/// A receiver may get only a part of a stream.
#[test]
fn stream_cut_off_anywhere_is_not_an_image() {
    let ram = pattern(SIZE as usize, 1);
    let whole = stream(seal().on_raw_image(), false, |it| {
        it.write_diff(&ram, &dirty(SIZE, &[0, 1, 2, 600])).unwrap();
    });
    read(&whole).expect("the whole stream is an image");
    for len in 0..whole.len() {
        let error = read(&whole[..len]).expect_err("it is cut off");
        match len {
            0..8 => {}
            _ => assert!(
                matches!(error, FooterError::Truncated { .. }),
                "at {len}: {error:?}"
            ),
        }
    }
}

#[test]
fn metadata_may_be_set_until_the_write() {
    let ram = pattern(SIZE as usize, 1);
    let bytes = stream(Seal::new(), false, |it| {
        it.set_metadata(b"paused").unwrap();
        it.write_full(&ram).unwrap();
    });
    assert_eq!(read(&bytes).unwrap().metadata, b"paused");
}

#[test]
fn progress_counts_written_and_skipped_pages() {
    let mut ram = pattern(SIZE as usize, 1);
    ram[100 * PAGE as usize..300 * PAGE as usize].fill(0);
    let (sender, seen) = std::sync::mpsc::channel();
    let options = PackedStream::options().skip_zeros(true);
    let options = options.progress(move |progress| {
        assert_eq!(progress.pass, Pass::Full);
        sender.send((progress.done, progress.total)).unwrap();
        ControlFlow::Continue(())
    });
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    stream.write_full(&ram).unwrap();
    let seen: Vec<_> = seen.try_iter().collect();
    assert!(seen.is_sorted());
    assert_eq!(seen.first(), Some(&(0, SIZE)));
    assert_eq!(seen.last(), Some(&(SIZE, SIZE)));
}

#[test]
fn finished_stream_releases_the_marks_of_its_epoch() {
    let (ram, marks) = (pattern(SIZE as usize, 1), dirty(SIZE, &[3]));
    let epoch = marks.begin_epoch().unwrap();
    let options = PackedStream::options().seal(Seal::new().on_raw_image());
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    assert_eq!(stream.write_diff(&ram, epoch.bitmap()).unwrap(), 1);
    let bytes = stream.finish_and_release(epoch).unwrap();
    assert_eq!(read(&bytes).unwrap().present_bytes(), PAGE);
    assert!(marks.is_clean());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn diff_stream_is_the_file_of_a_writer(
        pages in prop::collection::btree_set(0..SIZE / PAGE, 0..200),
        runs in prop::collection::btree_set(0..SIZE, 0..20),
    ) {
        let ram = without_memory(&pattern(SIZE as usize, 3));
        let marks = dirty(SIZE, &pages.into_iter().collect::<Vec<_>>());
        let seal = || seal().parent(ImageId::from_bytes([9; 16]));
        let expected = file(seal(), false, |it| _ = it.write_diff(&ram, &marks).unwrap());
        let bytes = stream(seal(), false, |it| _ = it.write_diff(&ram, &marks).unwrap());
        prop_assert!(bytes == expected);
        read(&bytes).unwrap();

        let runs: Vec<_> = runs.into_iter().collect();
        let runs = || runs.chunks_exact(2).map(|run| run[0]..run[1]);
        let expected = file(seal(), false, |it| _ = it.write_runs(&ram, runs).unwrap());
        let bytes = stream(seal(), false, |it| _ = it.write_runs(&ram, runs).unwrap());
        prop_assert!(bytes == expected);
    }

    #[test]
    fn full_stream_without_zeros_is_readable(
        zeros in prop::collection::vec((0..SIZE / PAGE, 1_u64..120), 0..8),
    ) {
        let mut ram = pattern(SIZE as usize, 5);
        for (start, len) in zeros {
            let end = SIZE.min((start + len) * PAGE);
            ram[(start * PAGE) as usize..end as usize].fill(0);
        }
        let expected = file(seal(), true, |it| it.write_full(&ram).unwrap());
        let bytes = stream(seal(), true, |it| it.write_full(&ram).unwrap());
        prop_assert!(bytes == expected);
        // The oracle is the RAM itself.
        let place = Place::new();
        fs::write(&place.dest, &bytes).unwrap();
        let (_, applied) = support::images::applied(&place.dest, vec![9; SIZE as usize]);
        prop_assert!(applied == ram);
    }
}
