//! Progress reports and cancellation of writes.

mod support;

use std::ops::ControlFlow;
use std::sync::mpsc;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{CancelToken, MemoryWriter, Pass, Progress, SnapshotError};
use support::{Place, pattern};

const SIZE: u64 = 4 << 20;
const PAGE: u64 = 16384;
const START: u64 = 0x8000_0000;

fn ram(seed: u8) -> Vec<u8> {
    pattern(SIZE as usize, seed)
}

fn bitmap(page_size: u64) -> DirtyBitmap {
    DirtyBitmap::new(START, SIZE, page_size).unwrap()
}

fn reporting_progress(place: &Place) -> (MemoryWriter, mpsc::Receiver<Progress>) {
    let (send, receive) = mpsc::channel();
    let writer = MemoryWriter::options()
        .progress(move |progress| {
            send.send(progress).unwrap();
            ControlFlow::Continue(())
        })
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    (writer, receive)
}

#[test]
fn progress_counts_bytes_up_to_the_total() {
    let (place, dirty) = (Place::new(), bitmap(4096));
    dirty.mark_range(START, 2 << 20).unwrap();
    let (mut writer, receive) = reporting_progress(&place);
    writer.write_diff(&ram(1), &dirty).unwrap();
    let seen: Vec<_> = receive.try_iter().collect();
    assert!(seen.is_sorted_by(|a, b| a.done < b.done) && seen.len() >= 3);
    assert_eq!((seen[0].done, seen[0].total), (0, 2 << 20));
    let last = seen.last().unwrap();
    assert_eq!((last.done, last.total), (2 << 20, 2 << 20));
    writer.write_full(&ram(1)).unwrap();
    assert_eq!(
        receive.try_iter().last().unwrap().done,
        SIZE,
        "each write counts from zero"
    );
}

#[test]
fn progress_names_the_pass_of_each_write() {
    let (place, dirty) = (Place::new(), bitmap(PAGE));
    dirty.mark(START).unwrap();
    let (mut writer, receive) = reporting_progress(&place);
    let passes = || {
        let mut passes: Vec<_> = receive.try_iter().map(|progress| progress.pass).collect();
        passes.dedup();
        passes
    };
    writer.write_full(&ram(1)).unwrap();
    assert_eq!(passes(), [Pass::Full]);
    writer.write_diff(&ram(1), &dirty).unwrap();
    assert_eq!(passes(), [Pass::Pages]);
    drop(writer);
    let (mut writer, receive) = reporting_progress(&place);
    writer.write_diff(&ram(1), &dirty).unwrap();
    writer.write_zeros(|| std::iter::once(0..PAGE)).unwrap();
    let last = receive.try_iter().last().map(|progress| progress.pass);
    // A raw diff holds zeros as pages.
    assert_eq!(last, Some(Pass::Zeros));
}

#[test]
fn progress_of_a_diff_counts_the_dirty_pages() {
    let (place, dirty) = (Place::new(), bitmap(PAGE));
    dirty.mark_range(START + 3 * PAGE, 2 * PAGE).unwrap();
    dirty.mark(START + 100 * PAGE).unwrap();
    let (mut writer, receive) = reporting_progress(&place);
    writer.write_diff(&ram(1), &dirty).unwrap();
    let seen: Vec<_> = receive.try_iter().collect();
    assert!(seen.iter().all(|progress| progress.total == 3 * PAGE));
    assert_eq!(seen.last().unwrap().done, 3 * PAGE);
}

#[test]
fn pages_marked_during_a_write_are_not_part_of_it() {
    let (place, dirty) = (Place::new(), std::sync::Arc::new(bitmap(PAGE)));
    dirty.mark_page(0).unwrap();
    let (send, receive) = mpsc::channel();
    let marked = std::sync::Arc::clone(&dirty);
    let mut writer = MemoryWriter::options()
        .progress(move |progress| {
            marked.mark_page(200).unwrap();
            send.send(progress).unwrap();
            ControlFlow::Continue(())
        })
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    assert_eq!(writer.write_diff(&ram(1), &dirty).unwrap(), 1);
    let seen: Vec<_> = receive.try_iter().collect();
    assert!(
        seen.iter().all(|progress| progress.total == PAGE),
        "{seen:?}"
    );
    assert!(dirty.is_dirty(START + 200 * PAGE).unwrap());
}

#[test]
fn a_progress_function_can_cancel_the_write() {
    let place = Place::new();
    let mut writer = MemoryWriter::options()
        .progress(|progress| match progress.done {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        })
        .chunk_size(4096)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    let error = writer.write_full(&ram(1)).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Cancelled { written, .. } if written < SIZE),
        "{error}"
    );
    drop(writer);
    place.assert_untouched();
}

#[test]
fn options_open_several_writers() {
    let (place, other) = (Place::new(), Place::new());
    let (send, receive) = mpsc::channel();
    let options = MemoryWriter::options().progress(move |progress| {
        send.send(progress).unwrap();
        ControlFlow::Continue(())
    });
    for place in [&place, &other] {
        let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
        writer.write_full(&ram(1)).unwrap();
        writer.commit().unwrap();
        assert_eq!(receive.try_iter().last().unwrap().done, SIZE);
    }
}

#[test]
fn another_thread_cancels_a_running_write() {
    let place = Place::new();
    let (cancel, (send, receive)) = (CancelToken::new(), mpsc::sync_channel(0));
    let mut writer = MemoryWriter::options()
        .cancel(cancel.clone())
        .progress(move |progress| {
            send.send(progress).unwrap_or_default();
            ControlFlow::Continue(())
        })
        // Many more chunks than are ever in flight at once.
        .chunk_size(4096)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    let canceller = std::thread::spawn(move || {
        // The write waits for each of its reports to be received, so it is still under way here.
        while receive.recv().unwrap().done == 0 {}
        cancel.cancel();
        // Receives until the writer is dropped.
        while receive.recv().is_ok() {}
    });
    let error = writer.write_full(&ram(1)).unwrap_err();
    let SnapshotError::Cancelled { written, .. } = error else {
        panic!("{error}")
    };
    assert!(0 < written && written < SIZE);
    assert!(matches!(
        writer.commit().unwrap_err(),
        SnapshotError::Incomplete { .. }
    ));
    canceller.join().unwrap();
    place.assert_untouched();
}

#[test]
fn cancelled_token_stops_a_write_before_its_first_byte() {
    let (place, cancel) = (Place::new(), CancelToken::new());
    cancel.cancel();
    let mut writer = MemoryWriter::options()
        .cancel(cancel)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    let error = writer.write_full(&ram(1)).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Cancelled { written: 0, .. }),
        "{error}"
    );
    drop(writer);
    place.assert_untouched();
}
