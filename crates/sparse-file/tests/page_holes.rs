//! Checks when the holes of a file identify the pages that were written.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rstest::rstest;
use sparse_file::{
    ExtentKind, ExtentSource, HolesUnknown, PageHoles, PagesUnknown, check_holes_are_zeros,
    extents, grow, reserve,
};
use support::Fs;
use test_machine::{FileSystem, LoopMount, Overlay, TinyTmpfs, needs};

const PAGE: u64 = 4096;

#[rstest]
fn pages_are_identified_where_a_block_is_a_page(
    #[values(Fs::Tmpfs, Fs::Ext4, Fs::Xfs, Fs::Btrfs)] fs: Fs,
) {
    let Some(place) = fs.mount("pages_are_identified_where_a_block_is_a_page") else {
        return;
    };
    let file = place.file();
    grow(&file, 64 * PAGE).expect("grown");
    file.write_all_at(&[7; 8192], 5 * PAGE).expect("written");
    let mut holes = PageHoles::new();
    holes.check(&file, place.path(), PAGE).expect("identified");
    holes
        .check(&file, place.path(), 4 * PAGE)
        .expect("identified");
    // In pages smaller than a block.
    let error = holes.check(&file, place.path(), 1024).expect_err("coarse");
    assert!(
        matches!(
            error,
            PagesUnknown::Coarse {
                page_size: 1024,
                granularity: 4096,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn pages_smaller_than_a_block_are_refused() {
    needs!(Mount(FileSystem::XFS_16K));
    let mount = LoopMount::new(FileSystem::XFS_16K).expect("mounted");
    let file = tempfile::tempfile_in(mount.path()).expect("file");
    let mut holes = PageHoles::new();
    let error = holes.check(&file, mount.path(), PAGE).expect_err("coarse");
    assert!(
        error.to_string().contains("pages of at least 16384 bytes"),
        "{error}"
    );
    holes.check(&file, mount.path(), 16384).expect("identified");
}

/// A huge page is written as a whole, although the file system reports small blocks.
#[test]
fn pages_of_a_tmpfs_of_huge_pages_are_refused() {
    const TEST: &str = "pages_of_a_tmpfs_of_huge_pages_are_refused";
    needs!(Root);
    let Ok(mount) = TinyTmpfs::of_huge_pages(64 << 20) else {
        test_machine::not_run(TEST, "this kernel has no huge pages for tmpfs");
        return;
    };
    let file = tempfile::tempfile_in(mount.path()).expect("file");
    let result = PageHoles::new().check(&file, mount.path(), PAGE);
    // Linux 6.14 and later allocate a small page for a small write.
    let small = {
        let sample = tempfile::tempfile_in(mount.path()).expect("file");
        grow(&sample, 8 << 20).expect("grown");
        sample.write_all_at(&[1], 4 << 20).expect("written");
        sample
            .metadata()
            .map(|it| std::os::unix::fs::MetadataExt::blocks(&it))
            .expect("metadata")
            * 512
            == PAGE
    };
    assert_eq!(result.is_ok(), small, "{result:?}");
}

/// Reading them puts zeros into the page cache, which are reported as data.
#[rstest]
fn file_with_reserved_blocks_is_refused(#[values(Fs::Ext4, Fs::Xfs)] fs: Fs) {
    let Some(place) = fs.mount("file_with_reserved_blocks_is_refused") else {
        return;
    };
    let file = place.file();
    reserve(&file, 256 * PAGE).expect("reserved");
    file.write_all_at(&[7; PAGE as usize], 0).expect("written");
    file.read_exact_at(&mut [0; PAGE as usize], 100 * PAGE)
        .expect("read");
    let listed = sparse_file::extents(&file).expect("listed");
    let data = listed.map(|extent| extent.expect("listed"));
    let reported = data
        .filter(|extent| extent.kind == sparse_file::ExtentKind::Data)
        .any(|extent| extent.range.contains(&(100 * PAGE)));
    assert!(reported, "a page that was not written");
    let error = PageHoles::new().check(&file, place.path(), PAGE);
    assert!(
        matches!(error, Err(PagesUnknown::Reserved { offset: 4096 })),
        "{error:?}"
    );
}

/// The rest of a small reserved extent becomes zeros that count as written.
#[test]
fn ext4_that_writes_zeros_around_pages_is_refused() {
    needs!(Mount(FileSystem::EXT4));
    let mount = LoopMount::new(FileSystem::EXT4).expect("mounted");
    let remount = |option: &str| {
        let mut command = test_machine::tool("mount");
        let status = command.args(["-o", option]).arg(mount.path()).status();
        assert!(status.expect("mount runs").success(), "{option}");
    };
    remount("remount,dioread_lock");
    let file = tempfile::tempfile_in(mount.path()).expect("file");
    reserve(&file, 4 * PAGE).expect("reserved");
    file.write_all_at(&[7; PAGE as usize], PAGE)
        .expect("written");
    file.sync_all().expect("synced");
    // This is the reason for the refusal: written pages are not distinguishable from the zeros.
    PageHoles::check_reserved(&file).expect("no extent is left as reserved");
    let extents = sparse_file::extents(&file).expect("listed");
    let extents: Vec<_> = extents
        .map(|extent| extent.expect("listed").range)
        .collect();
    assert_eq!(extents, [0..4 * PAGE], "all is data");

    let refused = PageHoles::new().check(&file, mount.path(), PAGE);
    assert!(
        matches!(refused, Err(PagesUnknown::ZerosBeside { .. })),
        "{refused:?}"
    );
    let new = tempfile::tempfile_in(mount.path()).expect("file");
    let refused = PageHoles::check_new(&new, PAGE);
    assert!(
        matches!(refused, Err(PagesUnknown::ZerosBeside { .. })),
        "{refused:?}"
    );
    remount("remount,dioread_nolock");
    PageHoles::check_new(&new, PAGE).expect("identified");
}

/// `mountinfo` does not show the options that the superblock contains.
#[rstest::rstest]
#[case::locking("-Emount_opts=dioread_lock")]
#[case::journaled("-ojournal_data")]
fn ext4_that_is_made_to_write_zeros_around_pages_is_refused(#[case] option: &str) {
    needs!(Mount(FileSystem::EXT4));
    let mount = LoopMount::new(FileSystem::EXT4).expect("mounted");
    let place = mount.path().to_str().expect("a path of text");
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("read");
    let mut mounts = mounts.lines().map(|line| line.split(' '));
    let device =
        mounts.find_map(|mut line| Some((line.next()?, line.next()?)).filter(|it| it.1 == place));
    let (device, _) = device.expect("it is mounted");
    let run = |tool: &str, arguments: &[&str]| {
        let mut command = test_machine::tool(tool);
        let output = command.args(arguments).output().expect("runs");
        assert!(output.status.success(), "{tool}: {output:?}");
    };
    // Keeps the disk attached while it is not mounted.
    let _held = File::open(device).expect("opened");
    run("umount", &[place]);
    run("tune2fs", &[option, device]);
    run("mount", &[device, place]);
    let new = tempfile::tempfile_in(mount.path()).expect("file");
    let refused = PageHoles::check_new(&new, PAGE);
    assert!(
        matches!(refused, Err(PagesUnknown::ZerosBeside { .. })),
        "{refused:?}"
    );
}

#[test]
fn holes_of_files_that_are_not_regular_are_not_used() {
    let null = File::open("/dev/null").expect("opened");
    let error = check_holes_are_zeros(&null).expect_err("a device");
    assert!(matches!(error, HolesUnknown::NotAFile), "{error:?}");
}

#[test]
fn holes_of_a_memfd_are_used_and_those_of_huge_pages_are_not() {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    let memfd = |flags| File::from(memfd_create(c"ram", flags).expect("made"));
    check_holes_are_zeros(&memfd(MFdFlags::empty())).expect("tmpfs");
    let huge = check_holes_are_zeros(&memfd(MFdFlags::MFD_HUGETLB)).expect_err("hugetlbfs");
    assert!(
        matches!(&huge, HolesUnknown::FileSystem { file_system } if file_system == "hugetlbfs"),
        "{huge:?}"
    );
}

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

fn data(file: &File) -> Vec<std::ops::Range<u64>> {
    let listed = extents(file).expect("listed");
    let listed = listed.map(|extent| extent.expect("listed"));
    listed
        .filter(|extent| extent.kind == ExtentKind::Data)
        .map(|extent| extent.range)
        .collect()
}
