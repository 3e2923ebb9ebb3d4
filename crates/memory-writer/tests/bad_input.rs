//! Every invalid input returns a typed error, leaves the old file unchanged and no file behind.

mod support;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Layout, MemoryIoStep, MemoryWriter, RamError, Seal, SnapshotError};
use page_reader::{HostMemory, PageReader};
use rstest::rstest;
use support::{Place, Until, pattern};

const SIZE: u64 = 4 << 20;
const PAGE: u64 = 16384;

fn ram() -> Vec<u8> {
    pattern(SIZE as usize, 0)
}

#[rstest]
#[case::zero_ram_size(0, PAGE, RamError::NoRam)]
#[case::ram_size_not_a_multiple_of_the_page_size(SIZE + 4096, PAGE, RamError::NotWholePages { ram_size: SIZE + 4096, page_size: PAGE })]
#[case::ram_of_2_63(1 << 63, PAGE, RamError::TooLarge { ram_size: 1 << 63 })]
#[case::maximum_u64(u64::MAX, 1, RamError::TooLarge { ram_size: u64::MAX })]
#[case::zero_page_size(SIZE, 0, RamError::PageSizeNotPowerOfTwo { page_size: 0 })]
#[case::beyond_the_address_space(1 << 56, PAGE, RamError::TooLarge { ram_size: 1 << 56 })]
#[case::page_below_512(SIZE, 256, RamError::PageTooSmall { page_size: 256 })]
#[case::page_size_not_a_power_of_two(SIZE, 12288, RamError::PageSizeNotPowerOfTwo { page_size: 12288 })]
#[case::page_larger_than_ram(SIZE, 2 * SIZE, RamError::PageLargerThanRam { page_size: 2 * SIZE, ram_size: SIZE })]
fn invalid_size_is_refused(
    #[case] ram_size: u64,
    #[case] page_size: u64,
    #[case] expected: RamError,
) {
    let place = Place::new();
    let error = MemoryWriter::open(&place.dest, ram_size, page_size).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Ram(found) if found == expected),
        "{error:?}"
    );
    place.assert_untouched();
}

#[cfg(target_os = "linux")]
#[test]
fn size_beyond_the_file_system_limit_is_refused() {
    use test_machine::{FileSystem, LoopMount, needs};

    needs!(Mount(FileSystem::EXT4));
    // The maximum file size is 16 TiB here; tmpfs accepts any size.
    let ext4 = LoopMount::new(FileSystem::EXT4).unwrap();
    let place = Place::on(ext4.path());
    let error = MemoryWriter::open(&place.dest, 1 << 52, PAGE).unwrap_err();
    assert!(
        matches!(
            &error,
            SnapshotError::MemoryIo {
                step: MemoryIoStep::SetSize,
                ..
            }
        ),
        "{error:?}"
    );
    place.assert_untouched();
}

#[test]
fn bitmap_of_another_size_leaves_the_writer_usable() {
    let place = Place::new();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    let error = writer
        .write_diff(&ram(), &DirtyBitmap::new(0, SIZE / 2, PAGE).unwrap())
        .unwrap_err();
    assert!(
        matches!(error, SnapshotError::BitmapSize { bitmap, file } if (bitmap, file) == (SIZE / 2, SIZE)),
        "{error}"
    );
    writer.write_full(&ram()).unwrap();
    writer.commit().unwrap();
    assert!(place.read() == ram());
}

#[test]
fn bitmap_with_another_ram_start_is_refused() {
    let place = Place::new();
    let at = |start| DirtyBitmap::new(start, SIZE, PAGE).unwrap();
    let refused = |error: SnapshotError, expected: (u64, u64)| {
        assert!(
            matches!(error, SnapshotError::BitmapStart { bitmap, ram } if (bitmap, ram) == expected),
            "{error}"
        );
    };
    let mut writer = MemoryWriter::options()
        .ram_start(0x8000_0000)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    refused(
        writer.write_diff(&ram(), &at(0)).unwrap_err(),
        (0, 0x8000_0000),
    );
    writer.write_diff(&ram(), &at(0x8000_0000)).unwrap();

    drop(writer);
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    writer.write_diff(&ram(), &at(0x4000_0000)).unwrap();
    refused(
        writer.write_diff(&ram(), &at(0)).unwrap_err(),
        (0, 0x4000_0000),
    );
    drop(writer);
    place.assert_untouched();
}

#[test]
fn commit_without_a_write_is_refused() {
    let place = Place::new();
    let writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    assert!(matches!(
        writer.commit().unwrap_err(),
        SnapshotError::NothingWritten { .. }
    ));
    place.assert_untouched();
}

type Failure = fn() -> io::Error;

#[rstest]
#[case::fails(SIZE / 2 + (512 << 10), || io::Error::other("the guest is gone"), io::ErrorKind::Other)]
#[case::ends_early(SIZE - 1, || io::ErrorKind::UnexpectedEof.into(), io::ErrorKind::UnexpectedEof)]
fn failing_reader_leaves_the_old_file(
    #[case] offset: u64,
    #[case] then: Failure,
    #[case] expected: io::ErrorKind,
    #[values(Layout::Raw, Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    /// At least a page of the host.
    const PRECISION: u64 = 64 << 10;
    let reader = Until {
        ram: ram(),
        offset,
        then,
    };
    let place = Place::new();
    let options = MemoryWriter::options().layout(layout);
    let mut writer = options.open(&place.dest, SIZE, PAGE).unwrap();
    let error = writer.write_full(&reader).unwrap_err();
    let SnapshotError::MemoryIo {
        dest,
        step,
        offset,
        source,
    } = &error
    else {
        panic!("{error:?}")
    };
    assert_eq!(
        (dest, *step, source.kind()),
        (&place.dest, MemoryIoStep::Read, expected)
    );
    assert!(
        *offset <= reader.offset && reader.offset < offset + PRECISION,
        "{offset:#x}"
    );
    place.assert_commit_refused(writer);
}

#[test]
fn reader_whose_host_memory_ends_early_is_short() {
    let place = Place::new();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    let error = writer.write_full(&Short(pattern(SIZE as usize - 1, 0)));
    let error = error.unwrap_err();
    assert!(
        matches!(
            &error,
            SnapshotError::MemoryIo {
                step: MemoryIoStep::Read,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("must cover all of the RAM"),
        "{error}"
    );
    place.assert_commit_refused(writer);
}

#[test]
fn writer_refuses_to_commit_after_a_reader_panics() {
    let place = Place::new();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    let reader = Until {
        ram: ram(),
        offset: SIZE / 2,
        then: || panic!("a bug in the reader"),
    };
    catch_unwind(AssertUnwindSafe(|| writer.write_full(&reader))).unwrap_err();
    place.assert_commit_refused(writer);
}

#[test]
fn panic_that_drops_the_writer_leaves_no_file() {
    let place = Place::new();
    let save = || {
        let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
        writer.write_full(&ram()).unwrap();
        panic!("between write and commit");
    };
    catch_unwind(AssertUnwindSafe(save)).unwrap_err();
    place.assert_untouched();
}

/// A later write that would succeed does not help.
#[test]
fn commit_after_a_failed_write_is_refused() {
    let place = Place::new();
    let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap();
    let failing = Until {
        ram: ram(),
        offset: 0,
        then: || io::Error::other("not now"),
    };
    writer.write_full(&failing).unwrap_err();
    assert!(matches!(
        writer.write_full(&ram()).unwrap_err(),
        SnapshotError::Incomplete { .. }
    ));
    place.assert_commit_refused(writer);
}

#[test]
fn page_dirty_at_a_failed_save_is_in_the_next_diff() {
    let place = Place::new();
    let dirty = DirtyBitmap::new(0, SIZE, 4096).unwrap();
    dirty.mark(5 * PAGE).unwrap();
    let save = |reader: &dyn page_reader::PageReader| -> Result<u64, SnapshotError> {
        let epoch = dirty.begin_epoch().unwrap();
        let mut writer = MemoryWriter::open(&place.dest, SIZE, PAGE)?;
        let pages = writer.write_diff(reader, epoch.bitmap())?;
        writer.commit()?;
        epoch.release().unwrap();
        Ok(pages)
    };
    save(&Until {
        ram: ram(),
        offset: 0,
        then: || io::Error::other("not now"),
    })
    .unwrap_err();
    dirty.mark(9 * PAGE).unwrap();
    assert_eq!(save(&ram()).unwrap(), 2);
    assert!(dirty.is_clean());
}

#[cfg(target_os = "linux")]
#[test]
fn full_disk_is_reported_and_keeps_the_old_snapshot() {
    use test_machine::{TinyTmpfs, needs};

    needs!(Root);
    let tiny = TinyTmpfs::new(SIZE / 2).unwrap();
    let dest = tiny.path().join("guest.mem");
    std::fs::write(&dest, support::OLD).unwrap();
    let mut writer = MemoryWriter::open(&dest, SIZE, PAGE).unwrap();
    let error = writer.write_full(&ram()).unwrap_err();
    let SnapshotError::MemoryIo {
        step: MemoryIoStep::Write,
        offset,
        source,
        ..
    } = &error
    else {
        panic!("{error:?}")
    };
    assert!(
        source.kind() == io::ErrorKind::StorageFull && (1..SIZE / 2).contains(offset),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("make room on the file system"),
        "{error}"
    );
    writer.commit().unwrap_err();
    assert_eq!(std::fs::read(&dest).unwrap(), support::OLD);
    support::assert_nothing_but(tiny.path(), &["guest.mem"]);
}

/// RAM that no test may read.
struct Unreadable;

impl PageReader for Unreadable {
    fn read_at(&self, offset: u64, _: &mut [u8]) -> io::Result<()> {
        panic!("read at {offset:#x}")
    }
}

/// Runs in a child process, because the limit applies to the whole process.
#[test]
fn file_size_limit_is_an_error_and_no_signal() {
    const DEST: &str = "RAMSNAP_TEST_DEST";
    if let Some(dest) = std::env::var_os(DEST) {
        use nix::sys::resource::{Resource, setrlimit};
        setrlimit(Resource::RLIMIT_FSIZE, SIZE / 2, SIZE / 2).unwrap();
        let error = MemoryWriter::open(dest, SIZE, PAGE).unwrap_err();
        let SnapshotError::MemoryIo { source, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(source.kind(), io::ErrorKind::FileTooLarge);
        assert!(error.to_string().contains("RLIMIT_FSIZE"), "{error}");

        // A packed file reaches the limit while it grows, a sealed one when its footer is written.
        let dest = std::env::var_os(DEST).unwrap();
        let ram = vec![1; SIZE as usize];
        let full = |layout, size| {
            let options = MemoryWriter::options().layout(layout);
            let mut writer = options.open(&dest, size, PAGE)?;
            writer.write_full(&ram[..size as usize])?;
            writer.commit()
        };
        // Where the pages end is known before the first one is read.
        let dest = std::env::var_os(DEST).unwrap();
        let options = MemoryWriter::options().layout(Layout::Packed);
        let mut writer = options.open(&dest, SIZE, PAGE).unwrap();
        let error = writer.write_full(&Unreadable).unwrap_err();
        assert!(
            matches!(
                &error,
                SnapshotError::MemoryIo {
                    step: MemoryIoStep::SetSize,
                    ..
                }
            ),
            "{error:?}"
        );
        let diff = || std::iter::once(0..SIZE);
        let options = MemoryWriter::options()
            .layout(Layout::Packed)
            .seal(Seal::new().on_raw_image());
        let mut writer = options.open(&dest, SIZE, PAGE).unwrap();
        let error = writer.write_runs(&Unreadable, diff).unwrap_err();
        assert!(error.to_string().contains("RLIMIT_FSIZE"), "{error}");
        // The writer is unchanged.
        let part = || std::iter::once(0..SIZE / 4);
        writer
            .write_runs(&vec![7; SIZE as usize][..], part)
            .unwrap();
        drop(writer);

        for (layout, size) in [
            (Layout::Packed, SIZE),
            (Layout::Packed, SIZE / 2),
            (Layout::Sealed, SIZE / 2),
        ] {
            let error = full(layout, size).unwrap_err();
            assert!(error.to_string().contains("RLIMIT_FSIZE"), "{error}");
        }
        return;
    }
    let place = Place::new();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "file_size_limit_is_an_error_and_no_signal"])
        .env(DEST, &place.dest)
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
    assert!(
        String::from_utf8_lossy(&child.stdout).contains("1 passed"),
        "{child:?}"
    );
    place.assert_untouched();
}

impl Place {
    fn assert_commit_refused(&self, writer: MemoryWriter) {
        assert!(matches!(
            writer.commit().unwrap_err(),
            SnapshotError::Incomplete { .. }
        ));
        self.assert_untouched();
    }
}

/// A reader that does not know its size.
struct Short(Vec<u8>);

impl PageReader for Short {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.0.host_memory(offset, len)
    }
}
