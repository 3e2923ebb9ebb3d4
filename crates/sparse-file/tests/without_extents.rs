//! Files without extents on ext4, ext3 and ext2: no hole of them is used.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rstest::rstest;
use sparse_file::{
    ExtentKind, ExtentSource, HolesUnknown, PageHoles, PagesUnknown, check_holes_are_zeros,
    extents, grow,
};
use support::data;
use test_machine::{FileSystem, LoopMount, Overlay, needs};

const PAGE: u64 = 4096;

/// Returns a file of 256 pages in which the pages 20 and 60 to 99 were written, and are not synced.
fn written(dir: &Path) -> (std::path::PathBuf, File) {
    let path = dir.join("ram");
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(&path).expect("file");
    write(&file);
    (path, file)
}

fn write(file: &File) {
    grow(file, 256 * PAGE).expect("grown");
    file.write_all_at(b"data", 20 * PAGE).expect("written");
    file.write_all_at(&[7; 40 * PAGE as usize], 60 * PAGE)
        .expect("written");
}

/// Asserts that no hole of the file is used.
fn assert_all_is_data(file: &File) {
    let why = check_holes_are_zeros(file).expect_err("not used");
    assert!(matches!(why, HolesUnknown::NoExtents), "{why:?}");
    assert_eq!(data(file), [0..file.metadata().expect("metadata").len()]);
    let listed = extents(file).expect("listed");
    assert_eq!(listed.source(), ExtentSource::NotUsed);
    let refused = PageHoles::check_new(file, PAGE);
    assert!(
        matches!(refused, Err(PagesUnknown::Holes(HolesUnknown::NoExtents))),
        "{refused:?}"
    );
}

/// ext4 reports delayed blocks of such files as a hole until they are written back. All these file
/// systems have one number in `statfs(2)`.
#[rstest]
#[case::ext4(FileSystem::EXT4_NO_EXTENTS)]
#[case::ext3(FileSystem::EXT3)]
#[case::ext2(FileSystem::EXT2)]
fn file_without_extents_is_data(#[case] fs: &'static FileSystem) {
    needs!(Mount(fs));
    let mount = LoopMount::new(fs).expect("mounted");
    let (path, file) = written(mount.path());
    assert_all_is_data(&file);
    file.sync_all().expect("synced");
    assert_all_is_data(&file);
    assert_all_is_data(&File::open(path).expect("opened"));
    let refused = PageHoles::new().check(&file, mount.path(), PAGE);
    assert!(
        matches!(refused, Err(PagesUnknown::Holes(_))),
        "{refused:?}"
    );
}

/// `chattr -e`, or a file that was created before the file system had extents.
#[test]
fn file_without_extents_among_others_is_data() {
    needs!(Mount(FileSystem::EXT4));
    let mount = LoopMount::new(FileSystem::EXT4).expect("mounted");
    let path = mount.path().join("ram");
    let file = File::create_new(&path).expect("file");
    without_extents(&path);
    write(&file);
    drop(file);
    assert_all_is_data(&File::open(&path).expect("opened"));
    let (_, other) = written(&tempfile::tempdir_in(mount.path()).expect("made").keep());
    check_holes_are_zeros(&other).expect("used");
    assert_eq!(data(&other), [20 * PAGE..21 * PAGE, 60 * PAGE..100 * PAGE]);
}

fn without_extents(path: &Path) {
    let mut chattr = test_machine::tool("chattr");
    let status = chattr.arg("-e").arg(path).status();
    assert!(status.expect("chattr runs").success());
}

#[test]
fn file_that_loses_its_extents_during_the_listing_is_data() {
    needs!(Mount(FileSystem::EXT4));
    let mount = LoopMount::new(FileSystem::EXT4).expect("mounted");
    let path = mount.path().join("ram");
    let file = File::create_new(&path).expect("file");
    grow(&file, 64 * PAGE).expect("grown");
    file.write_all_at(&[7; PAGE as usize], PAGE)
        .expect("written");
    file.sync_all().expect("synced");
    let file = File::open(&path).expect("opened");
    let mut listed = extents(&file).expect("listed");
    let first = listed.next().expect("some").expect("listed");
    assert_eq!((first.range, first.kind), (0..PAGE, ExtentKind::Hole));
    without_extents(&path);
    let rest: Vec<_> = listed.by_ref().map(|it| it.expect("listed")).collect();
    assert_eq!(rest.len(), 1, "{rest:?}");
    assert_eq!(
        (rest[0].range.clone(), rest[0].kind),
        (PAGE..64 * PAGE, ExtentKind::Data)
    );
    assert_eq!(listed.source(), ExtentSource::CutShort);
}

#[test]
fn file_in_its_inode_is_data_until_it_has_extents() {
    needs!(Mount(FileSystem::EXT4_INLINE_DATA));
    let mount = LoopMount::new(FileSystem::EXT4_INLINE_DATA).expect("mounted");
    let small = File::create_new(mount.path().join("small")).expect("file");
    small.write_all_at(b"data", 0).expect("written");
    small.sync_all().expect("synced");
    let small = File::options()
        .read(true)
        .write(true)
        .open(mount.path().join("small"))
        .expect("opened");
    assert_all_is_data(&small);
    grow(&small, 64 * PAGE).expect("grown");
    small
        .write_all_at(&[7; PAGE as usize], 9 * PAGE)
        .expect("written");
    // Both writes are data, with or without extents.
    for at in [0, 9 * PAGE] {
        let held = data(&small);
        assert!(held.iter().any(|data| data.contains(&at)), "{held:?}");
    }
    small.sync_all().expect("synced");
    check_holes_are_zeros(&small).expect("used");
    assert_eq!(data(&small), [0..PAGE, 9 * PAGE..10 * PAGE]);
}

#[test]
fn file_without_extents_under_an_overlay_is_data() {
    needs!(Mount(FileSystem::EXT4_NO_EXTENTS));
    let mount = LoopMount::new(FileSystem::EXT4_NO_EXTENTS).expect("mounted");
    let overlay = Overlay::within(mount.path()).expect("mounted");
    let (_, file) = written(overlay.path());
    assert_eq!(data(&file), [0..256 * PAGE]);
    let why = check_holes_are_zeros(&file).expect_err("not used");
    assert!(matches!(why, HolesUnknown::FileSystem { .. }), "{why:?}");
}
