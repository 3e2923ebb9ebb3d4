//! Holes of files on overlayfs, as its layers report them.
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
use support::{Fs, data};
use test_machine::Overlay;

const PAGE: u64 = 4096;

#[rstest]
#[case::ext4(Fs::Ext4)]
#[case::xfs(Fs::Xfs)]
#[case::btrfs(Fs::Btrfs)]
fn pages_on_an_overlay_are_identified_as_on_its_layer(#[case] fs: Fs) {
    let Some(place) = fs.mount("pages_on_an_overlay_are_identified_as_on_its_layer") else {
        return;
    };
    let overlay = Overlay::within(place.path()).expect("mounted");
    let file = tempfile::tempfile_in(overlay.path()).expect("file");
    PageHoles::check_new(&file, PAGE).expect("identified in an empty file");
    grow(&file, 64 * PAGE).expect("grown");
    PageHoles::check_new(&file, PAGE).expect("identified in a file without data");
    file.write_all_at(&[7; 8192], 5 * PAGE).expect("written");
    check_holes_are_zeros(&file).expect("used");
    assert_eq!(data(&file), [5 * PAGE..7 * PAGE]);
    let mut holes = PageHoles::new();
    holes
        .check(&file, overlay.path(), PAGE)
        .expect("identified");
    let error = holes.check(&file, overlay.path(), 1024);
    assert!(
        matches!(error, Err(PagesUnknown::Coarse { .. })),
        "{error:?}"
    );
}

/// It cannot be distinguished from a server that reports wrong holes.
#[test]
fn holes_of_an_overlay_on_tmpfs_are_not_used() {
    let Some(place) = Fs::Tmpfs.mount("holes_of_an_overlay_on_tmpfs_are_not_used") else {
        return;
    };
    let overlay = Overlay::within(place.path()).expect("mounted");
    let file = tempfile::tempfile_in(overlay.path()).expect("file");
    grow(&file, 64 * PAGE).expect("grown");
    let used = check_holes_are_zeros(&file);
    assert!(
        matches!(&used, Err(HolesUnknown::FileSystem { file_system }) if file_system == "overlay"),
        "{used:?}"
    );
    assert_eq!(data(&file), [0..64 * PAGE]);
}

/// Mounts an overlay of directories on two file systems. The lower one contains a file "ram" with
/// data in its second and its last page.
fn over_two(lower: &Path, upper: &Path) -> Overlay {
    let ram = File::create(lower.join("ram")).expect("file");
    grow(&ram, 64 * PAGE).expect("grown");
    ram.write_all_at(&[7; PAGE as usize], PAGE)
        .expect("written");
    ram.write_all_at(&[7; PAGE as usize], 63 * PAGE)
        .expect("written");
    let [upper, work] = ["upper", "work"].map(|name| upper.join(name));
    std::fs::create_dir(&upper).expect("made");
    std::fs::create_dir(&work).expect("made");
    Overlay::of(lower, &upper, &work).expect("mounted")
}

/// The probe writes to the upper layer.
#[test]
fn pages_of_a_file_in_another_layer_are_refused() {
    const TEST: &str = "pages_of_a_file_in_another_layer_are_refused";
    let (Some(lower), Some(upper)) = (Fs::Xfs.mount(TEST), Fs::Ext4.mount(TEST)) else {
        return;
    };
    let overlay = over_two(lower.path(), upper.path());
    let path = overlay.path().join("ram");
    let file = File::open(&path).expect("opened");
    check_holes_are_zeros(&file).expect("used");
    let mut holes = PageHoles::new();
    let error = holes
        .check(&file, overlay.path(), PAGE)
        .expect_err("not identified");
    assert!(matches!(error, PagesUnknown::OtherLayer), "{error:?}");
    // A new file in the same directory, where the probe writes.
    let new = tempfile::tempfile_in(overlay.path()).expect("file");
    holes.check(&new, overlay.path(), PAGE).expect("identified");
}

/// The first open for writing moves the file to the upper layer.
#[test]
fn file_moved_to_another_layer_during_the_listing_is_data() {
    const TEST: &str = "file_moved_to_another_layer_during_the_listing_is_data";
    let (Some(lower), Some(upper)) = (Fs::Ext4.mount(TEST), Fs::Tmpfs.mount(TEST)) else {
        return;
    };
    let overlay = over_two(lower.path(), upper.path());
    let path = overlay.path().join("ram");
    let file = File::open(&path).expect("opened");
    let last = || 63 * PAGE..64 * PAGE;
    assert_eq!(data(&file), [PAGE..2 * PAGE, last()]);

    let mut listed = extents(&file).expect("listed");
    let first = listed.next().expect("some").expect("listed");
    assert_eq!((first.range, first.kind), (0..PAGE, ExtentKind::Hole));
    File::options().write(true).open(&path).expect("moved");
    let rest: Vec<_> = listed.by_ref().map(|it| it.expect("listed")).collect();
    assert_eq!(rest.len(), 1);
    assert_eq!(
        (rest[0].range.clone(), rest[0].kind),
        (PAGE..64 * PAGE, ExtentKind::Data)
    );
    assert_eq!(listed.source(), ExtentSource::CutShort);
    drop(listed);
    assert_eq!(data(&file), [0..64 * PAGE]);
}
