//! Packed streams that fail, and calls that a stream refuses.

mod support;

use std::io::{self, Write};
use std::ops::ControlFlow;

use memory_writer::{CancelToken, MemoryIoStep, PackedStream, Seal, SnapshotError};
use page_reader::{HostMemory, MappedMemory, RamLayout};
use rstest::rstest;
use support::images::{PAGE, dirty};
use support::{Until, pattern};

const SIZE: u64 = 4 << 20;

/// A stream that fails once it has `left` bytes, or when it is flushed.
struct Broken {
    left: usize,
}

impl Write for Broken {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.left);
        self.left -= len;
        match len {
            0 => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Ok(len),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

/// The pages of an epoch whose stream failed are in the next diff.
#[rstest]
#[case::in_the_header(100)]
#[case::in_the_pages(4096 + 8192 + 1)]
#[case::in_the_footer(4096 + 3 * 4096 + 10)]
#[case::at_the_flush(1 << 20)]
fn marks_are_restored_if_the_stream_fails(#[case] left: usize) {
    let (ram, marks) = (pattern(SIZE as usize, 1), dirty(SIZE, &[1, 5, 900]));
    let epoch = marks.begin_epoch().unwrap();
    let options = PackedStream::options().seal(Seal::new().on_raw_image());
    let mut stream = options.open(Broken { left }, SIZE, PAGE).unwrap();
    let written = stream.write_diff(&ram, epoch.bitmap());
    let (written, finished) = (written.err(), stream.finish_and_release(epoch).err());
    let error = written.or(finished).expect("the stream is broken");
    assert!(
        matches!(
            error,
            SnapshotError::MemoryIo { .. } | SnapshotError::Seal { .. }
        ),
        "{error:?}"
    );
    assert_eq!(marks.dirty_pages(), 3);
}

#[test]
fn failed_stream_is_not_finished() {
    let ram = pattern(SIZE as usize, 1);
    let mut stream = PackedStream::new(Broken { left: 5000 }, SIZE, PAGE).unwrap();
    let error = stream.write_full(&ram).unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::MemoryIo {
                step: MemoryIoStep::Write,
                ..
            }
        ),
        "{error:?}"
    );
    let error = stream.write_full(&ram).unwrap_err();
    assert!(
        matches!(error, SnapshotError::StreamBegun { .. }),
        "{error:?}"
    );
    let error = stream.finish().map(drop).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Incomplete { .. }),
        "{error:?}"
    );
}

#[test]
fn unreadable_page_is_named_by_its_offset() {
    let reader = Until {
        ram: pattern(SIZE as usize, 1),
        offset: 7 * PAGE,
        then: || io::ErrorKind::PermissionDenied.into(),
    };
    let options = PackedStream::options().seal(Seal::new().on_raw_image());
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    let error = stream
        .write_diff(&reader, &dirty(SIZE, &[2, 9]))
        .unwrap_err();
    let SnapshotError::MemoryIo { step, offset, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!((step, offset), (MemoryIoStep::Read, 9 * PAGE));
}

#[test]
fn stream_takes_one_write() {
    let ram = pattern(SIZE as usize, 1);
    let mut stream = PackedStream::options()
        .seal(Seal::new().on_raw_image())
        .open(Vec::new(), SIZE, PAGE)
        .unwrap();
    stream.write_full(&ram).unwrap();
    for error in [
        stream.write_full(&ram).unwrap_err(),
        stream.write_diff(&ram, &dirty(SIZE, &[1])).unwrap_err(),
        stream.set_metadata(b"late").unwrap_err(),
    ] {
        assert!(
            matches!(error, SnapshotError::StreamBegun { .. }),
            "{error:?}"
        );
    }
    stream.finish().unwrap();
}

#[test]
fn refused_diff_writes_nothing_and_may_be_repeated() {
    let ram = pattern(SIZE as usize, 1);
    let layout = RamLayout::single(PAGE, SIZE).unwrap();
    let elsewhere = MappedMemory::new(layout, [HostMemory::from(&ram[..])]).unwrap();
    let seal = Seal::new().regions([0..SIZE]).on_raw_image();
    let options = PackedStream::options().seal(seal);
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    let marks = dirty(SIZE, &[1]);
    let error = stream.write_diff(&elsewhere, &marks).unwrap_err();
    assert!(matches!(error, SnapshotError::Regions { .. }), "{error:?}");
    let error = stream.write_diff(&ram, &dirty(PAGE, &[0])).unwrap_err();
    assert!(
        matches!(error, SnapshotError::BitmapSize { .. }),
        "{error:?}"
    );
    let error = stream
        .write_runs(&ram, || std::iter::once(SIZE..SIZE + 1))
        .unwrap_err();
    assert!(matches!(error, SnapshotError::Run { .. }), "{error:?}");
    stream.write_diff(&ram, &marks).unwrap();
    stream.finish().unwrap();
}

#[test]
fn diff_without_a_parent_and_empty_stream_are_refused() {
    let ram = pattern(SIZE as usize, 1);
    let mut stream = PackedStream::new(Vec::new(), SIZE, PAGE).unwrap();
    let error = stream.write_diff(&ram, &dirty(SIZE, &[1])).unwrap_err();
    assert!(
        matches!(error, SnapshotError::DiffWithoutParent { .. }),
        "{error:?}"
    );
    let error = stream.finish().unwrap_err();
    assert!(
        matches!(error, SnapshotError::NothingWritten { .. }),
        "{error:?}"
    );
}

#[test]
fn epoch_of_other_marks_is_not_released() {
    let (ram, marks) = (pattern(SIZE as usize, 1), dirty(SIZE, &[1]));
    let epoch = marks.begin_epoch().unwrap();
    let options = PackedStream::options().seal(Seal::new().on_raw_image());
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    stream.write_diff(&ram, &dirty(SIZE, &[2])).unwrap();
    let error = stream.finish_and_release(epoch).unwrap_err();
    assert!(
        matches!(error, SnapshotError::EpochNotWritten { .. }),
        "{error:?}"
    );
    assert_eq!(marks.dirty_pages(), 1);
}

#[rstest]
fn cancelled_stream_is_incomplete(#[values(false, true)] skip_zeros: bool) {
    let ram = pattern(SIZE as usize, 1);
    let token = CancelToken::new();
    let of_progress = token.clone();
    let options = PackedStream::options()
        .skip_zeros(skip_zeros)
        .cancel(token)
        .progress(move |progress| {
            if progress.done >= SIZE / 2 {
                of_progress.cancel();
            }
            ControlFlow::Continue(())
        });
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    let error = stream.write_full(&ram).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Cancelled { written, .. } if written == SIZE / 2),
        "{error:?}"
    );
    let error = stream.finish().unwrap_err();
    assert!(
        matches!(error, SnapshotError::Incomplete { .. }),
        "{error:?}"
    );
}

/// A full pipe with O_NONBLOCK, in the header, the pages and the footer.
#[rstest]
#[case::in_the_header(100)]
#[case::in_the_pages(4096 + 8192 + 1)]
#[case::in_the_footer(4096 + 3 * 4096 + 10)]
fn nonblocking_stream_is_named_and_keeps_the_marks(#[case] left: usize) {
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let len = bytes.len().min(self.0);
            self.0 -= len;
            match len {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                _ => Ok(len),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let (ram, marks) = (pattern(SIZE as usize, 1), dirty(SIZE, &[1, 5, 900]));
    let epoch = marks.begin_epoch().unwrap();
    let options = PackedStream::options().seal(Seal::new().on_raw_image());
    let mut stream = options.open(Full(left), SIZE, PAGE).unwrap();
    let written = stream.write_diff(&ram, epoch.bitmap());
    let (written, finished) = (written.err(), stream.finish_and_release(epoch).err());
    let error = written.or(finished).expect("the stream is full");
    assert!(error.to_string().contains("clear O_NONBLOCK"), "{error}");
    assert_eq!(marks.dirty_pages(), 3);
}
