//! Checks when the holes of a file identify the pages that were written.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rstest::rstest;
use sparse_file::{HolesUnknown, PageHoles, PagesUnknown, check_holes_are_zeros, grow, reserve};
use support::Fs;
use test_machine::{FileSystem, LoopMount, TinyTmpfs, needs};

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

/// A diff that a writer accepts can be read back, in pages of any size.
#[test]
fn pages_that_a_writer_accepts_are_identified() {
    const TEST: &str = "pages_that_a_writer_accepts_are_identified";
    needs!(
        Root,
        Mount(FileSystem::XFS_16K),
        Mount(FileSystem::EXT4),
        Mount(FileSystem::BTRFS)
    );
    let mounted = |fs| LoopMount::new(fs).expect("mounted");
    let disks = [FileSystem::XFS_16K, FileSystem::EXT4, FileSystem::BTRFS].map(mounted);
    let memory = TinyTmpfs::new(64 << 20).expect("mounted");
    let huge = TinyTmpfs::of_huge_pages(64 << 20);
    if huge.is_err() {
        test_machine::not_run(TEST, "of huge pages: this kernel has none for tmpfs");
    }
    let dirs = disks.iter().map(|mount| mount.path());
    let dirs = dirs.chain([memory.path()]);
    for dir in dirs.chain(huge.as_ref().ok().map(|mount| mount.path())) {
        let mut accepted = 0;
        for page in (9..=22).map(|shift| 1_u64 << shift) {
            let file = tempfile::tempfile_in(dir).expect("file");
            if PageHoles::check_new(&file, page).is_err() {
                continue;
            }
            accepted += 1;
            grow(&file, 8 * page).expect("grown");
            file.write_all_at(&vec![7; page as usize], 2 * page)
                .expect("written");
            let identified = PageHoles::new().check(&file, dir, page);
            assert!(identified.is_ok(), "{page} in {dir:?}: {identified:?}");
        }
        assert!(accepted > 0, "{dir:?}");
    }
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

/// Writes a page of a small reserved extent, whose rest becomes zeros that count as written. This
/// is the reason for refusals: written pages are not distinguishable from the zeros.
fn assert_zeros_count_as_written(dir: &Path) -> File {
    let file = tempfile::tempfile_in(dir).expect("file");
    reserve(&file, 4 * PAGE).expect("reserved");
    file.write_all_at(&[7; PAGE as usize], PAGE)
        .expect("written");
    file.sync_all().expect("synced");
    PageHoles::check_reserved(&file).expect("no extent is left as reserved");
    let extents = sparse_file::extents(&file).expect("listed");
    let extents: Vec<_> = extents
        .map(|extent| extent.expect("listed").range)
        .collect();
    assert_eq!(extents, [0..4 * PAGE], "all is data");
    file
}

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
    let file = assert_zeros_count_as_written(mount.path());
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

#[test]
fn directory_with_an_extent_size_hint_is_refused() {
    needs!(Mount(FileSystem::XFS));
    let mount = LoopMount::new(FileSystem::XFS).expect("mounted");
    let hint = |size: &str| {
        let mut command = test_machine::tool("xfs_io");
        let command = command.args(["-c", &format!("extsize {size}")]);
        let status = command.arg(mount.path()).status();
        assert!(status.expect("xfs_io runs").success());
    };
    hint("64k");
    let file = tempfile::tempfile_in(mount.path()).expect("file");
    grow(&file, 64 * PAGE).expect("grown");
    file.write_all_at(&[7; PAGE as usize], 0).expect("written");
    file.sync_all().expect("synced");
    PageHoles::check_reserved(&file).expect_err("the rest of the extent is reserved");
    let refused = PageHoles::check_new(&file, PAGE);
    assert!(
        matches!(refused, Err(PagesUnknown::ExtentSize { size: 65536 })),
        "{refused:?}"
    );
    hint("0");
    let file = tempfile::tempfile_in(mount.path()).expect("file");
    PageHoles::check_new(&file, PAGE).expect("identified");
}

/// `mountinfo` does not show the options that the superblock contains.
#[rstest::rstest]
#[case::locking("-Emount_opts=dioread_lock")]
#[case::journaled("-ojournal_data")]
#[case::without_delayed_allocation("-onodelalloc")]
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
    assert_zeros_count_as_written(mount.path());
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
