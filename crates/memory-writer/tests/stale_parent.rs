//! A diff that names another parent than the image that its marks build on is refused.

mod support;

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use dirty_bitmap::{DirtyBitmap, ParentImage};
use memory_writer::{ImageId, Layout, MemoryWriter, PackedStream, Seal, SnapshotError};
use rstest::rstest;
use support::images::{PAGE, options};
use support::{Place, pattern};

const SIZE: u64 = 8 * PAGE;

/// Opens a writer to a path of its own.
fn writer(place: &Place, seal: Seal, layout: Layout) -> MemoryWriter {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = NUMBER.fetch_add(1, Relaxed).to_string();
    let dest = place.dest.with_extension(name);
    options(layout, seal).open(dest, SIZE, PAGE).unwrap()
}

/// Commits an image of all pages, or of the marked ones on top of `parent`, and returns its id.
fn save(place: &Place, ram: &Vec<u8>, marks: &DirtyBitmap, parent: Option<ImageId>) -> ImageId {
    let epoch = marks.begin_epoch().unwrap();
    let seal = parent.map_or_else(Seal::new, |parent| Seal::new().parent(parent));
    let mut writer = writer(place, seal, Layout::Packed);
    match parent {
        Some(_) => drop(writer.write_diff(ram, epoch.bitmap()).unwrap()),
        None => writer.write_full(ram).unwrap(),
    }
    let id = writer.image_id().unwrap();
    writer.commit_and_release(epoch).unwrap();
    id
}

#[rstest]
fn stale_parent_is_refused_and_no_mark_is_lost(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let full = save(&place, &ram, &marks, None);
    marks.mark(PAGE).unwrap();
    let first = save(&place, &ram, &marks, Some(full));
    marks.mark(3 * PAGE).unwrap();

    let mut epoch = marks.begin_epoch().unwrap();
    let mut stale = writer(&place, Seal::new().parent(full), layout);
    let whole = stale.write_diff(&ram, epoch.bitmap()).unwrap_err();
    let extension = epoch.extend().unwrap();
    let added = stale.write_diff(&ram, &*extension).unwrap_err();
    for error in [whole, added] {
        let SnapshotError::StaleParent { parent, newest, .. } = error else {
            panic!("{error:?}");
        };
        assert_eq!((parent, newest), (full, first));
        let text = error.to_string();
        for named in [full.to_string(), first.to_string()] {
            assert!(text.contains(&named), "{text}");
        }
    }
    drop((stale, epoch));
    assert_eq!(marks.dirty_pages(), 1);
    // On top of the image that was committed last, it is accepted.
    save(&place, &ram, &marks, Some(first));
    assert!(marks.is_clean());
}

#[test]
fn stream_with_a_stale_parent_is_refused() {
    let ram = pattern(SIZE as usize, 1);
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let epoch = marks.begin_epoch().unwrap();
    let mut stream = PackedStream::new(Vec::new(), SIZE, PAGE).unwrap();
    let full = stream.image_id();
    stream.write_full(&ram).unwrap();
    drop(stream.finish_and_release(epoch).unwrap());
    assert_eq!(marks.parent_id(), Some(full.to_bytes()));

    let other = Seal::new().parent(ImageId::from_bytes([7; 16]));
    let mut out = Vec::new();
    let options = PackedStream::options().seal(other);
    let mut stream = options.open(&mut out, SIZE, PAGE).unwrap();
    let error = stream.write_diff(&ram, &marks).unwrap_err();
    assert!(
        matches!(error, SnapshotError::StaleParent { .. }),
        "{error:?}"
    );
    drop(stream);
    assert!(out.is_empty());
}

#[test]
fn failed_or_raw_save_sets_no_parent_id() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let full = save(&place, &ram, &marks, None);
    let epoch = marks.begin_epoch().unwrap();
    let unwritten = writer(&place, Seal::new(), Layout::Packed);
    unwritten.commit_and_release(epoch).unwrap_err();
    assert_eq!(marks.parent_id(), Some(full.to_bytes()));
    let epoch = marks.begin_epoch().unwrap();
    let mut raw = writer(&place, Seal::new(), Layout::Raw);
    raw.write_full(&ram).unwrap();
    raw.commit_and_release(epoch).unwrap();
    assert_eq!(marks.parent(), ParentImage::Raw);
    assert_eq!(marks.parent_id(), None);
}

#[rstest]
fn parent_with_an_id_after_a_raw_image_is_refused(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let full = save(&place, &ram, &marks, None);
    marks.mark(PAGE).unwrap();
    let epoch = marks.begin_epoch().unwrap();
    let mut raw = writer(&place, Seal::new(), Layout::Raw);
    raw.write_full(&ram).unwrap();
    raw.commit_and_release(epoch).unwrap();

    marks.mark(3 * PAGE).unwrap();
    let mut diff = writer(&place, Seal::new().parent(full), layout);
    let epoch = marks.begin_epoch().unwrap();
    let error = diff.write_diff(&ram, epoch.bitmap()).unwrap_err();
    assert!(
        matches!(error, SnapshotError::ParentNotRaw { parent, .. } if parent == full),
        "{error:?}"
    );
    drop((diff, epoch));
    assert_eq!(marks.dirty_pages(), 1);
    // The raw image was sealed with this id, or is not the parent of the next diff.
    for parent in [ParentImage::Id(full.to_bytes()), ParentImage::Unknown] {
        marks.set_parent(parent);
        let mut diff = writer(&place, Seal::new().parent(full), layout);
        diff.write_diff(&ram, &marks).unwrap();
    }
    marks.set_parent(ParentImage::Raw);
    let epoch = marks.begin_epoch().unwrap();
    let mut diff = writer(&place, Seal::new().on_raw_image(), layout);
    diff.write_diff(&ram, epoch.bitmap()).unwrap();
    diff.commit_and_release(epoch).unwrap();
}

#[test]
fn stream_with_a_parent_id_after_a_raw_image_is_refused() {
    let ram = pattern(SIZE as usize, 1);
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    marks.set_parent(ParentImage::Raw);
    let seal = Seal::new().parent(ImageId::from_bytes([7; 16]));
    let options = PackedStream::options().seal(seal);
    let mut stream = options.open(Vec::new(), SIZE, PAGE).unwrap();
    let error = stream.write_diff(&ram, &marks).unwrap_err();
    assert!(
        matches!(error, SnapshotError::ParentNotRaw { .. }),
        "{error:?}"
    );
}

#[rstest]
fn diff_over_its_own_parent_is_refused(
    #[values(Layout::Sealed, Layout::Packed)] full: Layout,
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let mut writer = options(full, Seal::new())
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    writer.write_full(&ram).unwrap();
    let parent = writer.image_id().unwrap();
    writer.commit().unwrap();
    let diff = options(layout, Seal::new().parent(parent));
    let error = diff.open(&place.dest, SIZE, PAGE).unwrap_err();
    assert!(
        matches!(error, SnapshotError::ReplacesParent { parent: named, .. } if named == parent),
        "{error:?}"
    );
    let copy = diff.allow_replacing_parent(true);
    drop(copy.open(&place.dest, SIZE, PAGE).unwrap());
    // Another diff may replace it.
    let other = options(layout, Seal::new().parent(ImageId::from_bytes([7; 16])));
    drop(other.open(&place.dest, SIZE, PAGE).unwrap());
}

/// As for a member of a group.
#[test]
fn checked_epoch_sets_the_parent_when_it_is_released() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let mut epoch = marks.begin_epoch().unwrap();
    let mut full = writer(&place, Seal::new(), Layout::Packed);
    full.write_full(&ram).unwrap();
    full.check_epoch(&mut epoch).unwrap();
    let id = full.image_id().unwrap().to_bytes();
    let staged = full.finish().unwrap();
    epoch.release_after(|| staged.commit()).unwrap();
    assert_eq!(marks.parent_id(), Some(id));
}

#[test]
fn raw_parent_after_an_image_with_an_id_is_refused() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let full = save(&place, &ram, &marks, None);
    marks.mark(PAGE).unwrap();
    let epoch = marks.begin_epoch().unwrap();
    let mut diff = writer(&place, Seal::new().on_raw_image(), Layout::Packed);
    let error = diff.write_diff(&ram, epoch.bitmap()).unwrap_err();
    assert!(
        matches!(error, SnapshotError::RawParent { newest, .. } if newest == full),
        "{error:?}"
    );
    drop((diff, epoch));
    // The full image was turned into a raw one.
    marks.set_parent_id(None);
    let epoch = marks.begin_epoch().unwrap();
    let mut diff = writer(&place, Seal::new().on_raw_image(), Layout::Packed);
    diff.write_diff(&ram, epoch.bitmap()).unwrap();
    diff.commit_and_release(epoch).unwrap();
}

/// Both writers were opened before the parent was there.
#[test]
fn diff_over_a_parent_that_appeared_is_refused() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let open = |seal| {
        let options = options(Layout::Packed, seal);
        options.open(&place.dest, SIZE, PAGE).unwrap()
    };
    let mut full = open(Seal::new());
    let parent = full.image_id().unwrap();
    let mut diff = open(Seal::new().parent(parent));
    let epoch = marks.begin_epoch().unwrap();
    full.write_full(&ram).unwrap();
    full.commit_and_release(epoch).unwrap();
    marks.mark(PAGE).unwrap();
    let epoch = marks.begin_epoch().unwrap();
    diff.write_diff(&ram, epoch.bitmap()).unwrap();
    let error = diff.commit_and_release(epoch).unwrap_err();
    assert!(
        matches!(error, SnapshotError::ReplacesParent { .. }),
        "{error:?}"
    );
    assert_eq!(marks.dirty_pages(), 1);
}

#[rstest]
fn diff_over_an_ancestor_is_refused(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(false, true)] on_raw_image: bool,
) {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let mut full = options(layout, Seal::new())
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    full.write_full(&ram).unwrap();
    let base = full.image_id().unwrap();
    full.commit().unwrap();
    let seal = match on_raw_image {
        true => Seal::new().on_raw_image(),
        false => Seal::new().parent(ImageId::from_bytes([7; 16])),
    };
    let others = [ImageId::from_bytes([8; 16]), base];
    let seal = seal.ancestors(others);
    let error = options(layout, seal.clone())
        .open(&place.dest, SIZE, PAGE)
        .unwrap_err();
    assert!(
        matches!(error, SnapshotError::ReplacesParent { parent, .. } if parent == base),
        "{error:?}"
    );
    // It appears while the diff is written.
    let dest = place.dest.with_extension("new");
    let mut diff = options(layout, seal).open(&dest, SIZE, PAGE).unwrap();
    marks.mark(PAGE).unwrap();
    diff.write_diff(&ram, &marks).unwrap();
    std::fs::copy(&place.dest, &dest).unwrap();
    let error = diff.commit().unwrap_err();
    assert!(
        matches!(error, SnapshotError::ReplacesParent { parent, .. } if parent == base),
        "{error:?}"
    );
}

/// The holes of a raw diff are used on this file system.
#[cfg(target_os = "linux")]
#[test]
fn raw_diff_over_the_image_its_marks_build_on_is_refused() {
    use test_machine::{FileSystem, LoopMount, needs};

    needs!(Mount(FileSystem::EXT4));
    let mount = LoopMount::new(FileSystem::EXT4).unwrap();
    let (place, ram) = (Place::on(mount.path()), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let epoch = marks.begin_epoch().unwrap();
    let mut full = options(Layout::Packed, Seal::new())
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    full.write_full(&ram).unwrap();
    let parent = full.image_id().unwrap();
    full.commit_and_release(epoch).unwrap();

    marks.mark(PAGE).unwrap();
    let raw = |dest| MemoryWriter::open(dest, SIZE, PAGE).unwrap();
    let is_refused = |error| matches!(error, SnapshotError::ReplacesParent { parent: named, .. } if named == parent);
    assert!(is_refused(
        raw(&place.dest).write_diff(&ram, &marks).unwrap_err()
    ));
    let dest = place.dest.with_extension("new");
    let mut diff = raw(&dest);
    diff.write_diff(&ram, &marks).unwrap();
    std::fs::copy(&place.dest, &dest).unwrap();
    assert!(is_refused(diff.commit().unwrap_err()));
    // A full image needs no other, also if marked pages are written again.
    let mut full = raw(&place.dest);
    full.write_full(&ram).unwrap();
    full.write_diff(&ram, &marks).unwrap();
    full.commit().unwrap();
}

/// A raw diff names no parent: the writer knows it by the marks, whichever write it is of.
#[rstest]
fn raw_diff_over_its_parent_is_refused_by_each_write(#[values(false, true)] in_order: bool) {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let epoch = marks.begin_epoch().unwrap();
    let mut full = options(Layout::Sealed, Seal::new());
    full = full.durability(memory_writer::Durability::None);
    let mut full = full.open(&place.dest, SIZE, PAGE).unwrap();
    full.write_full(&ram).unwrap();
    full.commit_and_release(epoch).unwrap();
    marks.mark(PAGE).unwrap();
    let epoch = marks.begin_epoch().unwrap();
    let raw = options(Layout::Raw, Seal::new()).allow_ambiguous_diff(true);
    let mut diff = raw.open(&place.dest, SIZE, PAGE).unwrap();
    let runs = || [PAGE..2 * PAGE].into_iter();
    let refused = match in_order {
        true => diff
            .write_diff_in_order(&ram, epoch.bitmap(), runs())
            .map(drop),
        false => {
            diff.write_runs(&ram, runs).unwrap();
            diff.count_as_written(epoch.bitmap())
        }
    };
    let error = refused.unwrap_err();
    assert!(
        matches!(error, SnapshotError::ReplacesParent { .. }),
        "{error:?}"
    );
}

/// Without a mark no write is needed, and no write compares the parents.
#[test]
fn stale_parent_of_a_clean_epoch_is_refused() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let full = save(&place, &ram, &marks, None);
    marks.mark(PAGE).unwrap();
    let first = save(&place, &ram, &marks, Some(full));
    let epoch = marks.begin_epoch().unwrap();
    let mut stale = writer(&place, Seal::new().parent(full), Layout::Packed);
    stale.write_runs(&ram, std::iter::empty).unwrap();
    let error = stale.commit_and_release(epoch).unwrap_err();
    assert!(
        matches!(error, SnapshotError::StaleParent { .. }),
        "{error:?}"
    );
    assert_eq!(marks.parent_id(), Some(first.to_bytes()));
}
