//! A commit releases marks only if their pages are in the file.

mod support;

use std::io;

use dirty_bitmap::{DirtyBitmap, Epoch, ReleaseError};
use memory_writer::{Durability, Layout, MemoryWriter, PackedStream, Seal, SnapshotError};
use page_reader::PageReader;
use support::Place;

const SIZE: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn marked(pages: &[u64]) -> DirtyBitmap {
    let bitmap = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    mark(&bitmap, pages);
    bitmap
}

fn mark(bitmap: &DirtyBitmap, pages: &[u64]) {
    for page in pages {
        bitmap.mark_page(*page).unwrap();
    }
}

fn open(place: &Place) -> MemoryWriter {
    MemoryWriter::open(&place.dest, SIZE, PAGE).unwrap()
}

fn ram() -> Vec<u8> {
    vec![1; SIZE as usize]
}

/// Asserts that the epoch has marks of `pages`, and that its release is refused before anything is
/// committed.
fn assert_refused(place: &Place, writer: MemoryWriter, epoch: Epoch<&DirtyBitmap>, pages: &[u64]) {
    let marks = epoch.bitmap().dirty_bytes();
    assert_eq!(marks, pages.len() as u64 * PAGE);
    let error = writer.commit_and_release(epoch).unwrap_err();
    assert!(
        matches!(error, SnapshotError::EpochNotWritten { .. }),
        "{error}"
    );
    place.assert_untouched();
}

fn is_restored(bitmap: &DirtyBitmap, pages: &[u64]) -> bool {
    pages
        .iter()
        .all(|page| bitmap.is_dirty(page * PAGE).unwrap())
}

#[test]
fn marks_taken_after_the_diff_are_not_released() {
    let (place, dirty) = (Place::new(), marked(&[0]));
    let mut epoch = dirty.begin_epoch().unwrap();
    let mut writer = open(&place);
    writer.write_diff(&ram(), epoch.bitmap()).unwrap();
    mark(&dirty, &[2]);
    let _ = epoch.extend().unwrap();
    assert_refused(&place, writer, epoch, &[0, 2]);
    assert!(is_restored(&dirty, &[0, 2]));
}

#[test]
fn page_marked_again_after_its_write_is_not_released() {
    let (place, dirty) = (Place::new(), marked(&[0]));
    let mut epoch = dirty.begin_epoch().unwrap();
    let mut writer = open(&place);
    writer.write_diff(&ram(), epoch.bitmap()).unwrap();
    mark(&dirty, &[0]);
    let _ = epoch.extend().unwrap();
    assert_refused(&place, writer, epoch, &[0]);
    assert!(is_restored(&dirty, &[0]));
}

#[test]
fn epoch_of_another_bitmap_is_not_released() {
    let (place, dirty, other) = (Place::new(), marked(&[0]), marked(&[1]));
    let (written, epoch) = (dirty.begin_epoch().unwrap(), other.begin_epoch().unwrap());
    let mut writer = open(&place);
    writer.write_diff(&ram(), written.bitmap()).unwrap();
    assert_refused(&place, writer, epoch, &[1]);
    assert!(is_restored(&other, &[1]));
}

#[test]
fn epoch_begun_after_the_full_write_is_not_released() {
    let (place, dirty) = (Place::new(), marked(&[]));
    let mut writer = open(&place);
    writer.write_full(&ram()).unwrap();
    mark(&dirty, &[1]);
    let epoch = dirty.begin_epoch().unwrap();
    assert_refused(&place, writer, epoch, &[1]);
    assert!(is_restored(&dirty, &[1]));
}

#[test]
fn epoch_of_other_ram_is_not_released() {
    let (place, ram) = (Place::new(), ram());
    let dirty = DirtyBitmap::new(0, 4 * SIZE, PAGE).unwrap();
    mark(&dirty, &[1]);
    let epoch = dirty.begin_epoch().unwrap();
    let mut writer = open(&place);
    writer.write_full(&ram).unwrap();
    let error = writer.commit_and_release(epoch).unwrap_err();
    let refused = matches!(error, SnapshotError::BitmapSize { .. });
    assert!(refused, "{error}");
    assert!(is_restored(&dirty, &[1]));

    let dirty = marked(&[1]);
    let mut writer = MemoryWriter::options()
        .ram_start(0x8000_0000)
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    let epoch = dirty.begin_epoch().unwrap();
    writer.write_full(&ram).unwrap();
    let error = writer.commit_and_release(epoch).unwrap_err();
    let refused = matches!(error, SnapshotError::BitmapStart { .. });
    assert!(refused, "{error}");
    assert!(is_restored(&dirty, &[1]));
    place.assert_untouched();
}

/// RAM that cannot be read.
struct Unreadable;

impl PageReader for Unreadable {
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("no RAM"))
    }
}

#[test]
fn release_after_a_failed_write_says_that_it_failed() {
    let (place, dirty) = (Place::new(), marked(&[1]));
    let epoch = dirty.begin_epoch().unwrap();
    let mut writer = open(&place);
    writer.write_diff(&Unreadable, epoch.bitmap()).unwrap_err();
    let error = writer.commit_and_release(epoch).unwrap_err();
    assert!(matches!(error, SnapshotError::Incomplete { .. }), "{error}");
    assert!(error.to_string().contains("an earlier write failed"));
    assert!(is_restored(&dirty, &[1]));
    place.assert_untouched();
}

#[test]
fn diff_of_the_bitmap_in_use_releases_no_epoch() {
    let (place, dirty) = (Place::new(), marked(&[1]));
    let mut writer = open(&place);
    writer.write_diff(&ram(), &dirty).unwrap();
    mark(&dirty, &[2]);
    let epoch = dirty.begin_epoch().unwrap();
    assert_refused(&place, writer, epoch, &[1, 2]);
    assert!(is_restored(&dirty, &[1, 2]));
}

#[test]
fn first_part_that_was_not_written_is_not_released() {
    let (place, dirty) = (Place::new(), marked(&[0]));
    let mut epoch = dirty.begin_epoch().unwrap();
    let mut writer = open(&place);
    mark(&dirty, &[2]);
    writer.write_diff(&ram(), &epoch.extend().unwrap()).unwrap();
    assert_refused(&place, writer, epoch, &[0, 2]);
    assert!(is_restored(&dirty, &[0, 2]));
}

/// Btrfs can share the blocks of an image.
#[cfg(target_os = "linux")]
#[test]
fn shared_image_discards_the_writes_of_the_epoch() {
    use test_machine::{FileSystem, LoopMount, needs};

    needs!(Mount(FileSystem::BTRFS));
    let mount = LoopMount::new(FileSystem::BTRFS).unwrap();
    let (place, dirty) = (Place::on(mount.path()), marked(&[0]));
    let image = tempfile::tempfile_in(mount.path()).unwrap();
    image.set_len(SIZE).unwrap();
    let epoch = dirty.begin_epoch().unwrap();
    let mut writer = open(&place);
    writer.write_full(&ram()).unwrap();
    assert!(writer.reflink_full(&image).unwrap());
    let error = writer.commit_and_release(epoch).unwrap_err();
    let refused = matches!(error, SnapshotError::EpochNotWritten { .. });
    assert!(refused, "{error}");
    assert!(is_restored(&dirty, &[0]));

    // As a member of a group, after the check.
    let mut epoch = dirty.begin_epoch().unwrap();
    let mut writer = open(&place);
    writer.write_full(&ram()).unwrap();
    writer.check_epoch(&mut epoch).unwrap();
    assert!(writer.reflink_full(&image).unwrap());
    let error = writer.finish().unwrap_err();
    assert!(
        matches!(error, SnapshotError::EpochNotWritten { .. }),
        "{error}"
    );
    place.assert_untouched();
}

#[test]
fn pre_copy_of_a_diff_or_of_all_the_ram_releases_the_epoch() {
    let (place, ram) = (Place::new(), ram());
    for full in [false, true] {
        let dirty = marked(&[0, 7]);
        let mut epoch = dirty.begin_epoch().unwrap();
        let mut writer = open(&place);
        if full {
            writer.write_full(&ram).unwrap();
        } else {
            writer.write_diff(&ram, epoch.bitmap()).unwrap();
        }
        for round in 0..4 {
            mark(&dirty, &[0, 20 + round]);
            writer.write_diff(&ram, &epoch.extend().unwrap()).unwrap();
        }
        assert!(epoch.extend().unwrap().is_clean(), "needs no write");
        writer.commit_and_release(epoch).unwrap();
        assert!(dirty.is_clean());
    }
}

#[test]
fn full_write_while_an_epoch_is_open_covers_it() {
    let (place, dirty, ram) = (Place::new(), marked(&[0]), ram());
    let mut epoch = dirty.begin_epoch().unwrap();
    mark(&dirty, &[1]);
    let _ = epoch.extend().unwrap();
    let mut writer = open(&place);
    writer.write_full(&ram).unwrap();
    writer.commit_and_release(epoch).unwrap();
    assert!(dirty.is_clean());
}

#[test]
fn epoch_of_a_rebuilt_bitmap_is_released() {
    let (place, dirty, ram) = (Place::new(), marked(&[3]), ram());
    for granule in [16384, 1024] {
        mark(&dirty, &[5]);
        dirty.rebuild(granule).unwrap();
        let mut epoch = dirty.begin_epoch().unwrap();
        dirty.rebuild(PAGE).unwrap();
        mark(&dirty, &[9]);
        let mut writer = open(&place);
        writer.write_diff(&ram, epoch.bitmap()).unwrap();
        writer.write_diff(&ram, &epoch.extend().unwrap()).unwrap();
        writer.commit_and_release(epoch).unwrap();
        assert!(dirty.is_clean());
    }
}

/// The caller chooses the durability: see `commit_and_release`.
#[test]
fn marks_are_released_at_the_commit_at_any_durability() {
    let (place, ram) = (Place::new(), ram());
    for durability in [Durability::None, Durability::Barrier, Durability::Full] {
        let dirty = marked(&[1]);
        let epoch = dirty.begin_epoch().unwrap();
        let mut writer = MemoryWriter::options()
            .durability(durability)
            .open(&place.dest, SIZE, PAGE)
            .unwrap();
        writer.write_diff(&ram, epoch.bitmap()).unwrap();
        writer.commit_and_release(epoch).unwrap();
        assert!(dirty.is_clean());
    }
}

#[test]
fn reclaimed_save_does_not_replace_the_next_one() {
    let (place, dirty, mut ram) = (Place::new(), marked(&[0]), ram());
    let save = || {
        let parent = memory_writer::ImageId::from_bytes([7; 16]);
        MemoryWriter::options()
            .layout(Layout::Sealed)
            .seal(Seal::new().parent(parent))
            .open(&place.dest, SIZE, PAGE)
            .unwrap()
    };
    let stuck = dirty.begin_epoch().unwrap();
    let mut stuck_writer = save();
    stuck_writer.write_diff(&ram, stuck.bitmap()).unwrap();
    assert!(dirty.reclaim_epoch().unwrap());

    ram[PAGE as usize] = 2;
    mark(&dirty, &[1]);
    let next = dirty.begin_epoch().unwrap();
    let mut writer = save();
    writer.write_diff(&ram, next.bitmap()).unwrap();
    writer.commit_and_release(next).unwrap();
    let saved = place.read();
    let error = stuck_writer.commit_and_release(stuck).unwrap_err();
    let reclaimed = matches!(error, SnapshotError::EpochReclaimed { .. });
    assert!(reclaimed, "{error}");
    assert!(place.read() == saved, "the later save stays");
    place.assert_nothing_else();
    assert!(dirty.is_clean());
}

/// As a member of a group, whose check comes before its commit.
#[test]
fn marks_taken_after_the_check_are_not_released() {
    let (place, dirty) = (Place::new(), marked(&[0]));
    let mut epoch = dirty.begin_epoch().unwrap();
    let mut writer = open(&place);
    writer.write_diff(&ram(), epoch.bitmap()).unwrap();
    writer.check_epoch(&mut epoch).unwrap();
    mark(&dirty, &[2]);
    let _ = epoch.extend().unwrap();
    let commit = || writer.finish().unwrap().commit();
    let error = epoch.release_after(commit).unwrap_err();
    assert!(matches!(error, ReleaseError::Extended(_)), "{error:?}");
    place.assert_untouched();
    assert!(is_restored(&dirty, &[0, 2]));
}

#[test]
fn stream_releases_no_marks_taken_after_the_check() {
    let dirty = marked(&[0]);
    let mut epoch = dirty.begin_epoch().unwrap();
    let mut stream = PackedStream::new(Vec::new(), SIZE, PAGE).unwrap();
    stream.write_full(&ram()).unwrap();
    stream.check_epoch(&mut epoch).unwrap();
    mark(&dirty, &[2]);
    let _ = epoch.extend().unwrap();
    let error = epoch.release_after(|| stream.finish()).unwrap_err();
    assert!(matches!(error, ReleaseError::Extended(_)), "{error:?}");
    assert!(is_restored(&dirty, &[0, 2]));
}
