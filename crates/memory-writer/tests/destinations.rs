//! Destinations that cannot be replaced are refused and left unchanged.

mod support;

use memory_writer::{MemoryWriter, OpenError, SnapshotError};
use support::{Place, assert_nothing_but};

const SIZE: u64 = 4 << 20;
const PAGE: u64 = 16384;

#[test]
fn directory_as_destination_is_refused() {
    let place = Place::new();
    let dir = place.path().join("guest.mem.d");
    std::fs::create_dir(&dir).unwrap();
    let error = MemoryWriter::open(&dir, SIZE, PAGE).unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::Open(OpenError::NotAFile { is_dir: true, .. })
        ),
        "{error:?}"
    );
    assert_nothing_but(&dir, &[]);
}

#[test]
fn destination_in_a_missing_directory_is_refused() {
    let place = Place::new();
    let error = MemoryWriter::open(place.path().join("missing/guest.mem"), SIZE, PAGE).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Open(OpenError::OpenDirectory { .. })),
        "{error:?}"
    );
    place.assert_untouched();
}

#[test]
fn dangling_symlink_as_destination_is_refused() {
    let place = Place::new();
    let link = place.path().join("link.mem");
    std::os::unix::fs::symlink("nowhere/guest.mem", &link).unwrap();
    let error = MemoryWriter::open(&link, SIZE, PAGE).unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::Open(OpenError::DanglingSymlink { .. })
        ),
        "{error:?}"
    );
    assert_nothing_but(place.path(), &["guest.mem", "link.mem"]);
}

#[cfg(target_os = "linux")]
#[test]
fn destination_in_a_read_only_directory_is_refused() {
    use test_machine::{ReadOnlyBind, needs};

    needs!(Root);
    let place = Place::new();
    let read_only = ReadOnlyBind::of(place.path()).unwrap();
    let error = MemoryWriter::open(read_only.path().join("guest.mem"), SIZE, PAGE).unwrap_err();
    assert!(matches!(error, SnapshotError::Open(_)), "{error:?}");
    place.assert_untouched();
}
