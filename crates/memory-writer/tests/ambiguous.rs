//! A raw diff that could not be read back is refused before anything is written.
#![cfg(target_os = "linux")]

use std::cell::Cell;
use std::io;
use std::path::Path;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{ImageId, Layout, MemoryWriter, Seal, SnapshotError, WriteAmbiguity};
use page_reader::PageReader;
use rstest::rstest;
use sparse_file::{HolesUnknown, PagesUnknown};
use test_machine::{FileSystem, LoopMount, needs};

const RAM: u64 = 1 << 20;

/// RAM of ones that counts how often it is read.
#[derive(Default)]
struct Ones(Cell<u32>);

impl PageReader for Ones {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.set(self.0.get() + 1);
        buf.fill(1);
        Ok(())
    }
}

fn dirty(addresses: impl IntoIterator<Item = u64>) -> DirtyBitmap {
    let dirty = DirtyBitmap::new(0, RAM, 1024).unwrap();
    for address in addresses {
        dirty.mark(address).unwrap();
    }
    dirty
}

/// Returns the seal of a diff on top of an arbitrary image.
fn seal() -> Seal {
    Seal::new().parent(ImageId::from_bytes([7; 16]))
}

/// Returns the reason why a raw diff of `marks` is refused in `dir`.
fn refused(dir: &Path, page_size: u64, marks: &DirtyBitmap) -> WriteAmbiguity {
    let before = marks.dirty_bytes();
    let (dest, ram) = (dir.join("diff.mem"), Ones::default());
    let epoch = marks.begin_epoch().unwrap();
    let mut writer = MemoryWriter::open(&dest, RAM, page_size).unwrap();
    let error = writer.write_diff(&ram, epoch.bitmap()).unwrap_err();
    assert_eq!(ram.0.get(), 0, "no RAM was read");
    assert!(matches!(
        writer.commit(),
        Err(SnapshotError::NothingWritten { .. })
    ));
    drop(epoch);
    assert_eq!(marks.dirty_bytes(), before);
    assert!(!dest.exists());
    let SnapshotError::AmbiguousDiff { source, .. } = error else {
        panic!("{error:?}");
    };
    source
}

/// Asserts that the same diff is accepted in a layout that lists its pages.
fn accepted(dir: &Path, page_size: u64, layout: Layout, seal: Seal, marks: &DirtyBitmap) {
    let dest = dir.join("diff.mem");
    let options = MemoryWriter::options().layout(layout).seal(seal);
    let mut writer = options.open(&dest, RAM, page_size).unwrap();
    writer.write_diff(&Ones::default(), marks).unwrap();
    writer.commit().unwrap();
    std::fs::remove_file(dest).unwrap();
}

#[rstest]
#[case::ext4(FileSystem::EXT4, 1024, 4096)]
#[case::xfs(FileSystem::XFS_16K, 4096, 16384)]
fn raw_diff_in_pages_smaller_than_a_block_is_refused(
    #[case] fs: &'static FileSystem,
    #[case] page_size: u64,
    #[case] block: u64,
) {
    needs!(Mount(fs));
    let mount = LoopMount::new(fs).unwrap();
    let dir = mount.path();
    let why = refused(dir, page_size, &dirty([5 * page_size]));
    assert!(
        matches!(
            why,
            WriteAmbiguity::Holes(PagesUnknown::Coarse { granularity, .. }) if granularity == block
        ),
        "{why:?}"
    );
    accepted(dir, page_size, Layout::Sealed, seal(), &dirty([0]));
    accepted(dir, page_size, Layout::Packed, seal(), &dirty([0]));
    accepted(dir, block, Layout::Raw, seal(), &dirty([5 * page_size]));
}

#[test]
fn raw_diff_in_a_file_without_extents_is_refused() {
    needs!(Mount(FileSystem::EXT4_NO_EXTENTS));
    let mount = LoopMount::new(FileSystem::EXT4_NO_EXTENTS).unwrap();
    let why = refused(mount.path(), 4096, &dirty([5 * 4096]));
    assert!(
        matches!(
            why,
            WriteAmbiguity::Holes(PagesUnknown::Holes(HolesUnknown::NoExtents))
        ),
        "{why:?}"
    );
    accepted(mount.path(), 4096, Layout::Packed, seal(), &dirty([0]));
}

#[test]
fn raw_diff_of_every_page_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let all = dirty((0..RAM).step_by(1024));
    let why = refused(dir.path(), 4096, &all);
    assert!(matches!(why, WriteAmbiguity::EveryPage), "{why:?}");
    // A mark in each page is enough.
    let why = refused(dir.path(), 65536, &dirty((0..RAM).step_by(65536)));
    assert!(matches!(why, WriteAmbiguity::EveryPage), "{why:?}");
    accepted(dir.path(), 4096, Layout::Packed, seal(), &all);
    accepted(dir.path(), 4096, Layout::Sealed, seal(), &all);
}

#[test]
fn second_raw_diff_that_leaves_no_hole_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("diff.mem");
    let (ram, half) = (Ones::default(), RAM / 2);
    let mut writer = MemoryWriter::open(&dest, RAM, 4096).unwrap();
    let first = dirty((0..half).step_by(4096));
    writer.write_diff(&ram, &first).unwrap();
    let read = ram.0.get();
    let error = writer
        .write_diff(&ram, &dirty((half..RAM).step_by(4096)))
        .unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::AmbiguousDiff {
                source: WriteAmbiguity::EveryPage,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(ram.0.get(), read);
    // The writer is unchanged.
    writer.write_diff(&ram, &first).unwrap();
    writer.commit().unwrap();
}

/// The file holds every page, so its holes are not needed.
#[test]
fn diff_after_a_full_dump_needs_no_holes() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("live.mem");
    let mut writer = MemoryWriter::open(&dest, RAM, 1024).unwrap();
    writer.write_full(&Ones::default()).unwrap();
    writer
        .write_diff(&Ones::default(), &dirty((0..RAM).step_by(1024)))
        .unwrap();
    writer.commit().unwrap();
    assert!(std::fs::read(dest).unwrap() == vec![1; RAM as usize]);
}
