//! Tests of the limit of runs in the footer, which is lower here than in programs.

use std::{fs, io};

use dirty_bitmap::DirtyBitmap;
use image_format::{FooterError, Layout};
use page_reader::PageReader;
use rstest::rstest;

use crate::error::SnapshotError;
use crate::seal::Seal;
use crate::writer::MemoryWriter;

const PAGE: u64 = 4096;
/// The minimum length in bytes of a run of zeros that a full dump skips. Shorter runs are written
/// as data.
const BLOCK: u64 = 32 << 10;

/// RAM in which every other block has data.
struct EveryOtherBlock;

impl PageReader for EveryOtherBlock {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (at, byte) in (offset..).zip(buf) {
            *byte = u8::from((at / BLOCK).is_multiple_of(2));
        }
        Ok(())
    }
}

/// A full image has a run of zeros after each of data, so a footer of 1000 runs has 500 of data.
#[rstest]
fn full_dump_over_the_limit_of_runs_is_refused(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values((500, true), (501, false))] (runs, fits): (u64, bool),
) {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    fs::write(&dest, "old").unwrap();
    let options = MemoryWriter::options().layout(layout).skip_zeros(true);
    let mut writer = options.open(&dest, runs * 2 * BLOCK, PAGE).unwrap();
    let written = writer.write_full(&EveryOtherBlock);
    if fits {
        written.unwrap();
        return writer.commit().unwrap();
    }
    let error = written.unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::Seal {
                source: FooterError::TooLarge { .. },
                ..
            }
        ),
        "{error:?}"
    );
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(error, SnapshotError::Incomplete { .. }),
        "{error:?}"
    );
    assert_eq!(fs::read(&dest).unwrap(), b"old");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// The limit is checked before a page is read.
#[rstest]
fn diff_over_the_limit_of_runs_is_refused_before_writes(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values((1000, true), (1001, false))] (runs, fits): (u64, bool),
) {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    let seal = Seal::new().on_raw_image();
    let options = MemoryWriter::options().layout(layout).seal(seal);
    let size = runs * 2 * PAGE;
    let mut writer = options.open(&dest, size, PAGE).unwrap();
    let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
    for run in 0..runs {
        dirty.mark(run * 2 * PAGE).unwrap();
    }
    let written = writer.write_diff(&EveryOtherBlock, &dirty);
    if fits {
        assert_eq!(written.unwrap(), runs);
        return writer.commit().unwrap();
    }
    let error = written.unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::Seal {
                source: FooterError::TooLarge { len },
                ..
            } if len == 24 * 1001
        ),
        "{error:?}"
    );
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(error, SnapshotError::NothingWritten { .. }),
        "{error:?}"
    );
}
