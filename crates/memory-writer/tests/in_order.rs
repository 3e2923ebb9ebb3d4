//! Writes in the order of the caller: what is refused, recycled files, marks and progress.

mod support;

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};

use memory_writer::{
    Durability, Layout, MemoryWriter, MemoryWriterOptions, PageRun, Progress, SnapshotError,
};
use rstest::rstest;
use support::images::{PAGE, applied};
use support::{Place, Until};

const SIZE: u64 = 16 * PAGE;

fn ram() -> Vec<u8> {
    support::pattern(SIZE as usize, 3)
}

fn pages(range: Range<u64>) -> Range<u64> {
    range.start * PAGE..range.end * PAGE
}

fn options(layout: Layout) -> MemoryWriterOptions {
    MemoryWriter::options()
        .layout(layout)
        .durability(Durability::None)
        .allow_ambiguous_diff(true)
}

fn writer(place: &Place, layout: Layout) -> MemoryWriter {
    options(layout).open(&place.dest, SIZE, PAGE).unwrap()
}

#[track_caller]
fn assert_not_committable(place: &Place, writer: MemoryWriter) {
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(error, SnapshotError::Incomplete { .. }),
        "{error:?}"
    );
    place.assert_untouched();
}

#[rstest]
#[case::empty([pages(0..8), pages(8..8)])]
#[case::reversed([pages(0..8), Range { start: 9 * PAGE, end: 8 * PAGE }])]
#[case::begins_in_a_page([pages(0..8), 8 * PAGE + 1..16 * PAGE])]
#[case::ends_in_a_page([pages(0..8), 8 * PAGE..16 * PAGE - 1])]
#[case::past_the_end([pages(0..8), pages(8..17)])]
#[case::again([pages(0..8), pages(0..8)])]
#[case::overlaps([pages(0..8), pages(7..16)])]
#[case::around([pages(4..8), pages(0..16)])]
fn invalid_run_is_refused(
    #[case] runs: [Range<u64>; 2],
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(false, true)] zeros: bool,
) {
    let place = Place::new();
    let mut writer = writer(&place, layout);
    let bad = runs[1].clone();
    let run = match zeros {
        true => PageRun::Zeros,
        false => PageRun::Data,
    };
    let error = writer
        .write_full_in_order(&ram(), runs.map(run))
        .unwrap_err();
    let is_run = matches!(
        error,
        SnapshotError::Run { start, end, page_size: PAGE, ram_size: SIZE }
            if (start..end) == bad
    );
    assert!(is_run, "{error:?}");
    assert_not_committable(&place, writer);
}

#[rstest]
fn missing_pages_are_refused(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    for (runs, first, bytes) in [
        (vec![], 0, SIZE),
        (vec![pages(0..8), pages(9..16)], 8 * PAGE, PAGE),
        (vec![pages(3..16)], 0, 3 * PAGE),
        (vec![pages(0..15)], 15 * PAGE, PAGE),
    ] {
        let place = Place::new();
        let mut writer = writer(&place, layout);
        let error = writer.write_full_in_order(&ram(), runs.into_iter().map(PageRun::Data));
        let error = error.unwrap_err();
        let SnapshotError::MissingPages {
            first: found,
            bytes: lacks,
            ..
        } = &error
        else {
            panic!("{error:?}");
        };
        assert_eq!((*found, *lacks), (first, bytes));
        assert_not_committable(&place, writer);
    }
}

#[rstest]
#[case::not_marked(&[2..4, 4..5], true)]
#[case::twice(&[2..4, 2..4], true)]
#[case::missing(&[2..4], false)]
fn diff_must_have_the_marked_pages(#[case] runs: &[Range<u64>], #[case] is_run: bool) {
    let place = Place::new();
    let dirty = support::images::dirty(SIZE, &[2, 3, 9]);
    let mut writer = writer(&place, Layout::Raw);
    let runs = runs.iter().cloned().map(pages);
    let error = writer
        .write_diff_in_order(&ram(), &dirty, runs)
        .unwrap_err();
    let expected = match &error {
        SnapshotError::Run { .. } => is_run,
        SnapshotError::MissingPages { first, bytes, .. } => {
            !is_run && (*first, *bytes) == (9 * PAGE, PAGE)
        }
        _ => false,
    };
    assert!(expected, "{error:?}");
    assert_not_committable(&place, writer);
}

#[test]
fn diff_in_order_is_the_first_write_of_its_writer() {
    let place = Place::new();
    let dirty = support::images::dirty(SIZE, &[2]);
    let mut writer = writer(&place, Layout::Raw);
    writer.write_full(&ram()).unwrap();
    let refused = writer.write_diff_in_order(&ram(), &dirty, [pages(2..3)]);
    let refused = refused.unwrap_err();
    assert!(
        matches!(refused, SnapshotError::WrittenBefore { .. }),
        "{refused:?}"
    );
    assert!(
        refused
            .to_string()
            .contains("open a new writer for a diff in order")
    );
    // The writer is unchanged.
    writer.commit().unwrap();
    assert!(place.read() == ram());
}

#[rstest]
fn full_image_in_order_replaces_an_earlier_write(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let place = Place::new();
    let mut writer = writer(&place, layout);
    writer.write_full(&vec![0xff; SIZE as usize]).unwrap();
    let mut ram = ram();
    ram[3 * PAGE as usize..9 * PAGE as usize].fill(0);
    let runs = [
        PageRun::Data(pages(9..16)),
        PageRun::Zeros(pages(5..9)),
        PageRun::Data(pages(0..5)),
    ];
    writer.write_full_in_order(&ram, runs).unwrap();
    writer.commit().unwrap();
    match layout {
        Layout::Raw => assert!(place.read() == ram),
        Layout::Sealed | Layout::Packed => {
            assert!(applied(&place.dest, vec![0xee; SIZE as usize]).1 == ram);
        }
    }
}

#[cfg(target_os = "linux")]
#[rstest]
fn recycled_file_has_no_stale_bytes(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let place = Place::recycling();
    let options = options(layout)
        .durability(Durability::Full)
        .recycle(1 << 30);
    let mut ram = ram();
    ram[3 * PAGE as usize..9 * PAGE as usize].fill(0);
    for round in 0..3 {
        let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
        if round < 2 {
            writer.write_full(&vec![0xff; SIZE as usize]).unwrap();
        } else {
            assert!(writer.recycled());
            let runs = [
                PageRun::Data(pages(9..16)),
                PageRun::Zeros(pages(5..9)),
                PageRun::Data(pages(0..5)),
            ];
            writer.write_full_in_order(&ram, runs).unwrap();
        }
        writer.commit().unwrap();
    }
    match layout {
        Layout::Raw => assert!(place.read() == ram),
        Layout::Sealed | Layout::Packed => {
            assert!(applied(&place.dest, vec![0xee; SIZE as usize]).1 == ram);
        }
    }
}

/// A writer that counts the pages of an epoch, of which it wrote some by runs.
#[test]
fn pages_that_are_counted_as_written_release_their_epoch() {
    for counts in [false, true] {
        let place = Place::new();
        let dirty = support::images::dirty(SIZE, &[2]);
        let mut epoch = dirty.begin_epoch().unwrap();
        let mut writer = writer(&place, Layout::Raw);
        writer.write_full(&ram()).unwrap();
        dirty.mark_page(5).unwrap();
        assert_eq!(epoch.extend().unwrap().dirty_pages(), 1);
        writer
            .write_runs(&ram(), || [pages(5..6)].into_iter())
            .unwrap();
        if counts {
            writer.count_as_written(epoch.bitmap()).unwrap();
        }
        let released = writer.commit_and_release(epoch);
        match counts {
            true => released.unwrap(),
            false => {
                let error = released.unwrap_err();
                let not_written = matches!(error, SnapshotError::EpochNotWritten { .. });
                assert!(not_written, "{error:?}");
            }
        }
        assert_eq!(dirty.is_clean(), counts);
    }
}

#[test]
fn only_complete_writes_of_this_ram_are_counted() {
    let place = Place::new();
    let dirty = support::images::dirty(SIZE, &[2]);
    let mut writer = writer(&place, Layout::Raw);
    let error = writer.count_as_written(&dirty).unwrap_err();
    assert!(
        matches!(error, SnapshotError::NothingWritten { .. }),
        "{error:?}"
    );
    let other = support::images::dirty(SIZE * 2, &[2]);
    let error = writer.count_as_written(&other).unwrap_err();
    assert!(
        matches!(error, SnapshotError::BitmapSize { .. }),
        "{error:?}"
    );
    writer.write_full_in_order(&ram(), []).unwrap_err();
    let error = writer.count_as_written(&dirty).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Incomplete { .. }),
        "{error:?}"
    );
}

#[rstest]
fn progress_counts_listed_zeros_and_can_cancel(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(false, true)] cancels: bool,
) {
    let place = Place::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let callback = {
        let seen = Arc::clone(&seen);
        move |progress: Progress| {
            seen.lock().unwrap().push(progress);
            match cancels && progress.done >= 4 * PAGE {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        }
    };
    let options = options(layout).chunk_size(PAGE as usize).progress(callback);
    let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
    let runs = [
        PageRun::Data(pages(9..16)),
        PageRun::Zeros(pages(5..9)),
        PageRun::Data(pages(0..5)),
    ];
    let written = writer.write_full_in_order(&ram(), runs);
    let seen = seen.lock().unwrap().clone();
    assert!(seen.iter().all(|progress| progress.total == SIZE));
    assert!(seen.is_sorted_by(|a, b| a.done <= b.done));
    if cancels {
        let error = written.unwrap_err();
        assert!(
            matches!(error, SnapshotError::Cancelled { .. }),
            "{error:?}"
        );
        return assert_not_committable(&place, writer);
    }
    written.unwrap();
    assert_eq!(seen.last().unwrap().done, SIZE);
}

#[rstest]
fn failed_reader_leaves_the_destination(
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let place = Place::new();
    let mut writer = writer(&place, layout);
    let reader = Until {
        ram: ram(),
        offset: 12 * PAGE,
        then: || io::Error::other("a broken page"),
    };
    let error = writer.write_full_in_order(&reader, [PageRun::Data(pages(0..16))]);
    let error = error.unwrap_err();
    assert!(error.to_string().contains("a broken page"), "{error}");
    assert_not_committable(&place, writer);
}
