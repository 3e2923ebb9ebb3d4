//! A diff over its own parent is refused in the directory that the commit renames in, also if the
//! path of the destination leads elsewhere by then.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use memory_writer::{ImageId, Layout, Seal, SnapshotError};
use rstest::rstest;
use support::images::{PAGE, options};
use support::pattern;

const SIZE: u64 = 8 * PAGE;

/// Writes a full image and returns its id.
fn full(dest: &Path) -> ImageId {
    let mut writer = options(Layout::Packed, Seal::new())
        .open(dest, SIZE, PAGE)
        .unwrap();
    writer.write_full(&pattern(SIZE as usize, 1)).unwrap();
    let id = writer.image_id().unwrap();
    writer.commit().unwrap();
    id
}

/// A way in which a path comes to lead elsewhere.
#[derive(Clone, Copy, Debug)]
enum Moved {
    /// The directory of the path is a link, which gets another target.
    Link,
    /// The directory is renamed, and another one gets its name.
    Directory,
}

#[rstest]
fn parent_is_looked_for_where_the_commit_renames(
    #[values(Moved::Link, Moved::Directory)] moved: Moved,
    #[values(true, false)] in_opened: bool,
) {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| dir.path().join(name);
    let [first, second, link] = ["first", "second", "link"].map(of);
    fs::create_dir(&first).unwrap();
    fs::create_dir(&second).unwrap();
    let parent = full(&of("parent.mem"));
    let opened = match moved {
        Moved::Link => {
            symlink(&first, &link).unwrap();
            link.clone()
        }
        Moved::Directory => first.clone(),
    };
    let mut writer = options(Layout::Packed, Seal::new().parent(parent))
        .open(opened.join("vm.mem"), SIZE, PAGE)
        .unwrap();
    writer
        .write_runs(&pattern(SIZE as usize, 2), || std::iter::once(0..PAGE))
        .unwrap();
    let renames_in = match moved {
        Moved::Link => {
            fs::remove_file(&link).unwrap();
            symlink(&second, &link).unwrap();
            first
        }
        Moved::Directory => {
            fs::rename(&first, of("renamed")).unwrap();
            fs::rename(&second, &first).unwrap();
            of("renamed")
        }
    };
    let at = match in_opened {
        true => renames_in.join("vm.mem"),
        // The path leads here.
        false => opened.join("vm.mem"),
    };
    fs::copy(of("parent.mem"), &at).unwrap();
    let before = fs::read(&at).unwrap();
    match writer.commit() {
        Err(SnapshotError::ReplacesParent { parent: named, .. }) => {
            assert!(in_opened);
            assert_eq!(named, parent);
        }
        other => {
            other.unwrap();
            assert!(!in_opened);
        }
    }
    assert!(fs::read(&at).unwrap() == before);
}

/// A raw file records no parent, and a raw diff needs it nevertheless.
#[rstest]
fn raw_diff_does_not_replace_an_image_that_its_seal_names(#[values(true, false)] ancestor: bool) {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("parent.mem");
    let parent = full(&dest);
    let seal = match ancestor {
        true => Seal::new().on_raw_image().ancestors([parent]),
        false => Seal::new().parent(parent),
    };
    let before = fs::read(&dest).unwrap();
    let ram = pattern(SIZE as usize, 2);
    let raw = options(Layout::Raw, seal);
    let is_refused = |error: &SnapshotError| matches!(error, SnapshotError::ReplacesParent { parent: named, .. } if *named == parent);
    let mut writer = raw.open(&dest, SIZE, PAGE).unwrap();
    let runs = || std::iter::once(0..PAGE);
    let error = writer.write_runs(&ram, runs).unwrap_err();
    assert!(is_refused(&error), "{error:?}");
    let error = writer.write_zeros(runs).unwrap_err();
    assert!(is_refused(&error), "{error:?}");
    drop(writer);
    // As it is written without a writer.
    let stage = raw.stage(&dest).unwrap();
    let error = raw.check_replaced(&stage).unwrap_err();
    assert!(is_refused(&error), "{error:?}");
    let permitted = raw.clone().allow_replacing_parent(true);
    permitted.check_replaced(&stage).unwrap();
    let elsewhere = raw.stage(dir.path().join("other")).unwrap();
    raw.check_replaced(&elsewhere).unwrap();
    drop((stage, elsewhere));
    assert!(fs::read(&dest).unwrap() == before);
    // A full image needs no other.
    let mut writer = raw.open(&dest, SIZE, PAGE).unwrap();
    writer.write_full(&ram).unwrap();
    writer.commit().unwrap();
    assert!(fs::read(&dest).unwrap() == ram);
}
