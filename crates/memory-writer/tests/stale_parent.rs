//! A diff that names another parent than the image that its marks build on is refused.

mod support;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{ImageId, Layout, MemoryWriter, PackedStream, Seal, SnapshotError};
use rstest::rstest;
use support::images::{PAGE, options};
use support::{Place, pattern};

const SIZE: u64 = 8 * PAGE;

fn writer(place: &Place, seal: Seal, layout: Layout) -> MemoryWriter {
    options(layout, seal).open(&place.dest, SIZE, PAGE).unwrap()
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
fn failed_or_raw_save_does_not_set_the_parent() {
    let (place, ram) = (Place::new(), pattern(SIZE as usize, 1));
    let marks = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
    let full = save(&place, &ram, &marks, None);
    let epoch = marks.begin_epoch().unwrap();
    let unwritten = writer(&place, Seal::new(), Layout::Packed);
    unwritten.commit_and_release(epoch).unwrap_err();
    assert_eq!(marks.parent_id(), Some(full.to_bytes()));
    // A raw image has no id, so any parent may follow it.
    let epoch = marks.begin_epoch().unwrap();
    let mut raw = writer(&place, Seal::new(), Layout::Raw);
    raw.write_full(&ram).unwrap();
    raw.commit_and_release(epoch).unwrap();
    assert_eq!(marks.parent_id(), None);
}
