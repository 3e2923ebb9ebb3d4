//! Recycled files that other processes use.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rstest::rstest;
use support::names;
use support::recycling::{
    MIB, SIZE, one_at_a_time, recycled_files, recycling, save, with_recycled_file,
};
use test_machine::{FileSystem, LoopMount, Need, TinyTmpfs, needs, recycling_dir};

/// A way of using a file and reading its bytes later.
type Hold = fn(&Path) -> Box<dyn Fn() -> Vec<u8>>;

fn open(path: &Path) -> Box<dyn Fn() -> Vec<u8>> {
    let file = File::open(path).unwrap();
    Box::new(move || {
        let mut bytes = vec![0; SIZE];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    })
}

fn open_to_write(path: &Path) -> Box<dyn Fn() -> Vec<u8>> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    Box::new(move || {
        let mut bytes = vec![0; SIZE];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    })
}

fn second_name(path: &Path) -> Box<dyn Fn() -> Vec<u8>> {
    let elsewhere = tempfile::tempdir_in(path.parent().unwrap()).unwrap();
    let link = elsewhere.path().join("link");
    fs::hard_link(path, &link).unwrap();
    Box::new(move || {
        assert!(elsewhere.path().exists());
        fs::read(&link).unwrap()
    })
}

/// As a restored VM uses it: mapped, with the descriptor closed.
fn map(path: &Path) -> Box<dyn Fn() -> Vec<u8>> {
    let map = Map::new(&File::open(path).unwrap());
    Box::new(move || map.bytes())
}

#[allow(unsafe_code, reason = "a mapping is what is tested")]
mod mapping {
    use super::*;

    pub(crate) struct Map(std::ptr::NonNull<std::ffi::c_void>);

    impl Map {
        pub(crate) fn new(file: &File) -> Self {
            let length = std::num::NonZero::new(SIZE).unwrap();
            let (prot, flags) = (
                nix::sys::mman::ProtFlags::PROT_READ,
                nix::sys::mman::MapFlags::MAP_PRIVATE,
            );
            // SAFETY: a new mapping at an address of the kernel's choice.
            Self(unsafe { nix::sys::mman::mmap(None, length, prot, flags, file, 0) }.unwrap())
        }

        pub(crate) fn bytes(&self) -> Vec<u8> {
            let mut bytes = vec![0; SIZE];
            // SAFETY: the mapping has SIZE readable bytes until it is dropped, and `bytes` has the
            // same size. They do not overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(self.0.as_ptr().cast(), bytes.as_mut_ptr(), SIZE);
            }
            bytes
        }
    }

    impl Drop for Map {
        fn drop(&mut self) {
            // SAFETY: it was mapped with this length, and nothing borrows from it.
            unsafe { nix::sys::mman::munmap(self.0, SIZE) }.unwrap();
        }
    }
}

use mapping::Map;

#[rstest]
#[case::open(open as Hold)]
#[case::open_to_write(open_to_write)]
#[case::mapped(map)]
#[case::hard_linked(second_name)]
fn users_of_the_old_file_keep_its_bytes(#[case] hold: Hold) {
    let _turn = one_at_a_time();
    let dir = recycling_dir();
    let dest = dir.path().join("dest");
    save(&recycling(), &dest, 1);
    let held = hold(&dest);
    save(&recycling(), &dest, 2);
    assert!(recycled_files(dir.path()).is_empty(), "it was not kept");
    assert!(!save(&recycling(), &dest, 3));
    assert_eq!(held(), [1; SIZE]);
    assert!(save(&recycling(), &dest, 4), "the one of 2s");
    assert_eq!(held(), [1; SIZE]);
}

#[rstest]
#[case::open(open as Hold)]
#[case::open_to_write(open_to_write)]
#[case::mapped(map)]
#[case::hard_linked(second_name)]
fn users_of_the_recycled_file_keep_its_bytes(#[case] hold: Hold) {
    let _turn = one_at_a_time();
    let (dir, dest, recycled_file) = with_recycled_file();
    let held = hold(&recycled_file);
    assert!(!save(&recycling(), &dest, 3));
    assert_eq!(held(), [1; SIZE]);
    assert!(save(&recycling(), &dest, 4), "the one of 2s");
    assert_eq!(held(), [1; SIZE]);
    assert_eq!(recycled_files(dir.path()).len(), 1);
}

/// Leases count all users of a file on each file system that supports recycling.
#[rstest]
#[case::ext4(FileSystem::EXT4)]
#[case::xfs(FileSystem::XFS)]
#[case::btrfs(FileSystem::BTRFS)]
fn files_on_disk_are_recycled_unless_in_use(#[case] fs: &'static FileSystem) {
    let _turn = one_at_a_time();
    if Need::Mount(fs).met("files_on_disk_are_recycled_unless_in_use") {
        let mount = LoopMount::new(fs).unwrap();
        assert_recycles_unless_in_use(mount.path());
    }
}

#[test]
fn files_on_tmpfs_are_recycled_unless_in_use() {
    let _turn = one_at_a_time();
    if Need::Root.met("files_on_tmpfs_are_recycled_unless_in_use") {
        let tmpfs = TinyTmpfs::new(MIB).unwrap();
        assert_recycles_unless_in_use(tmpfs.path());
    }
}

fn assert_recycles_unless_in_use(dir: &Path) {
    let dest = dir.join("dest");
    save(&recycling(), &dest, 1);
    save(&recycling(), &dest, 2);
    assert!(save(&recycling(), &dest, 3));
    for hold in [open as Hold, open_to_write, map, second_name] {
        let held = hold(&dest);
        save(&recycling(), &dest, 4);
        save(&recycling(), &dest, 5);
        save(&recycling(), &dest, 6);
        assert_eq!(held(), [3; SIZE]);
        drop(held);
        save(&recycling(), &dest, 3);
        assert!(save(&recycling(), &dest, 3));
    }
}

#[test]
fn a_stacked_file_system_does_not_recycle() {
    let _turn = one_at_a_time();
    needs!(Root);
    let below = TinyTmpfs::new(8 * MIB).unwrap();
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(below.path().join(name)).unwrap();
    }
    let merged = below.path().join("merged");
    let at = |name| below.path().join(name).display().to_string();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower"),
        at("upper"),
        at("work")
    );
    let mounted = nix::mount::mount(
        Some("overlay"),
        &merged,
        Some("overlay"),
        nix::mount::MsFlags::empty(),
        Some(options.as_str()),
    );
    mounted.expect("mount");
    let dest = merged.join("dest");
    save(&recycling(), &dest, 1);
    let held = map(&dest);
    save(&recycling(), &dest, 2);
    save(&recycling(), &dest, 3);
    let (seen, left) = (held(), names(&merged));
    drop(held);
    nix::mount::umount(&merged).unwrap();
    assert_eq!(seen, [1; SIZE]);
    assert_eq!(left, ["dest"]);
}
