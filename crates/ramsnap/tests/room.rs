//! Room for restored RAM: a restore in place reserves it before any data is lost.

#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::statvfs::statvfs;
use support::{Ended, PAGE, Work, noise};
use test_machine::{FileSystem, HugeFs, LoopMount, TinyTmpfs, needs, tool};

/// The RAM that is restored, all of it noise.
const LARGE: u64 = 16 << 20;

/// An ext4 of 32 MiB that reserves some percent for root.
struct Ext4 {
    dir: tempfile::TempDir,
    _image: tempfile::NamedTempFile,
}

impl Ext4 {
    fn new(percent: &str) -> Self {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(32 << 20).unwrap();
        let dir = tempfile::tempdir().unwrap();
        done(
            tool("mkfs.ext4")
                .args(["-q", "-F", "-m", percent])
                .arg(image.path()),
        );
        done(
            tool("mount")
                .args(["-o", "loop"])
                .args([image.path(), dir.path()]),
        );
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        Self { dir, _image: image }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        done(tool("umount").arg(self.dir.path()));
    }
}

fn done(command: &mut Command) {
    let ended = command.output().unwrap();
    assert!(ended.status.success(), "{command:?}: {ended:?}");
}

/// A full image of noise.
fn large(work: &Work) {
    let ram = work.create("large", LARGE);
    ram.write_all_at(&noise(1, LARGE), 0).unwrap();
    work.good("dump large -o large.mem");
}

/// A guest's RAM: the first pages are in use.
fn guest(dir: &Path, pages: u64) -> (PathBuf, File) {
    let path = dir.join("guest");
    let options = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    let file = options.unwrap();
    file.set_len(LARGE).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    file.write_all_at(&noise(2, pages * PAGE), 0).unwrap();
    file.sync_all().unwrap();
    (path, file)
}

/// Takes blocks until `left` bytes are available to any user.
fn fill(dir: &Path, left: u64) {
    let available = || {
        let found = statvfs(dir).unwrap();
        found.blocks_available() * found.fragment_size()
    };
    let ballast = File::create(dir.join("ballast")).unwrap();
    let more = available().checked_sub(left).unwrap();
    sparse_file::reserve(&ballast, more).unwrap();
    ballast.sync_all().unwrap();
    assert!(available() <= left, "{} of {left}", available());
}

/// Returns the contents of the file and its allocated size in MiB, as a file system may allocate a
/// few blocks for itself.
fn bytes(file: &File) -> (Vec<u8>, u64) {
    let mut bytes = vec![0; LARGE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    (bytes, file.metadata().unwrap().blocks() / 2048)
}

/// Blocks that the kernel reserves for itself are reported as free, and are not usable.
#[test]
fn ram_on_ext4_stays_where_only_reserved_blocks_are_left() {
    needs!(Root, Mount(FileSystem::EXT4));
    let work = Work::empty();
    large(&work);
    let disk = Ext4::new("0");
    let (path, file) = guest(disk.path(), 1);
    fill(disk.path(), LARGE - (256 << 10));
    let before = bytes(&file);
    let restore = format!("restore large.mem --force -o {}", path.display());
    work.fails(&restore, 3, &["cannot reserve them", "nothing was written"]);
    assert!(bytes(&file) == before);
    // The blocks of the file itself count if they are overwritten.
    drop(file);
    fs::remove_file(disk.path().join("ballast")).unwrap();
    work.good(&restore);
    assert!(fs::read(&path).unwrap() == work.read("large"));
    fill(disk.path(), 0);
    work.good(&restore);
}

/// Blocks that are reserved for root are not usable for other users.
#[test]
fn ram_of_a_user_stays_where_only_roots_blocks_are_left() {
    needs!(Root, Mount(FileSystem::EXT4));
    let work = Work::empty();
    large(&work);
    // A directory that the user can read.
    let public = tempfile::tempdir().unwrap();
    fs::set_permissions(public.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (from, to) in [
        (work.path("large.mem"), public.path().join("large.mem")),
        (support::RAMSNAP.into(), public.path().join("ramsnap")),
    ] {
        fs::copy(from, &to).unwrap();
        fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let disk = Ext4::new("40");
    let (path, file) = guest(disk.path(), 1);
    chown(&path, Some(65534), None).unwrap();
    fill(disk.path(), 8 << 20);
    let before = bytes(&file);
    let mut restore = Command::new(public.path().join("ramsnap"));
    restore
        .args(["restore", "large.mem", "--force", "-o"])
        .arg(&path);
    restore.current_dir(public.path()).uid(65534).gid(65534);
    Ended::of(&mut restore).fails(3, &["cannot reserve them", "nothing was written"]);
    assert!(bytes(&file) == before);
}

/// A hole does not free blocks that are shared with a copy.
#[test]
fn ram_on_xfs_stays_where_its_blocks_are_shared() {
    needs!(Root, Mount(FileSystem::XFS));
    let work = Work::empty();
    large(&work);
    let disk = LoopMount::new(FileSystem::XFS).unwrap();
    let (path, file) = guest(disk.path(), LARGE / PAGE);
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true);
    let copy = options.open(disk.path().join("copy")).unwrap();
    copy.set_len(LARGE).unwrap();
    sparse_file::share_blocks(&file, &copy, LARGE).unwrap();
    copy.sync_all().unwrap();
    fill(disk.path(), LARGE / 2);
    let before = bytes(&file).0;
    let restore = format!("restore large.mem --force -o {}", path.display());
    work.fails(&restore, 3, &["cannot reserve them", "nothing was written"]);
    assert!(bytes(&file).0 == before);
    fs::remove_file(disk.path().join("ballast")).unwrap();
    work.good(&restore);
    assert!(bytes(&file).0 == work.read("large"));
    assert!(bytes(&copy).0 == before);
}

/// If room cannot be reserved, the needed room must be free, and a warning is printed.
#[test]
fn ram_on_btrfs_is_overwritten_with_a_warning() {
    needs!(Root, Mount(FileSystem::BTRFS));
    let work = Work::empty();
    large(&work);
    let disk = LoopMount::new(FileSystem::BTRFS).unwrap();
    let (path, file) = guest(disk.path(), LARGE / PAGE);
    let restore = format!("restore large.mem --force -o {}", path.display());
    fill(disk.path(), LARGE / 2);
    let before = bytes(&file).0;
    work.fails(&restore, 3, &["make room", "nothing was written"]);
    assert!(bytes(&file).0 == before);
    fs::remove_file(disk.path().join("ballast")).unwrap();
    // Blocks are free once the transaction is committed.
    nix::unistd::syncfs(&file).unwrap();
    let ended = work.good(&restore);
    assert!(ended.err.contains("cannot reserve room"), "{}", ended.err);
    assert!(bytes(&file).0 == work.read("large"));
}

/// Reserved blocks are released if the restore fails before it writes.
#[test]
fn a_refused_restore_gives_back_what_it_reserved() {
    let work = Work::empty();
    large(&work);
    work.rot("large.mem", 5 << 20);
    let ram = work.create("guest", LARGE);
    ram.write_all_at(&noise(3, 4 * PAGE), 8 * PAGE).unwrap();
    ram.sync_all().unwrap();
    let before = bytes(&ram);
    work.fails("restore large.mem --force -o guest", 1, &["damaged"]);
    ram.sync_all().unwrap();
    assert_eq!(bytes(&ram).1, before.1);
    assert!(bytes(&ram) == before);
}

/// Zeros that an image stores take no room where they are restored.
#[test]
fn stored_zeros_are_restored_as_holes() {
    needs!(Root);
    let work = Work::empty();
    let ram = work.create("ram", LARGE);
    ram.write_all_at(&noise(1, 8 * PAGE), 100 * PAGE).unwrap();
    work.good("dump ram -o zeros.mem --keep-zeros");
    work.good("restore zeros.mem -o new");
    work.assert_same("new", "ram");
    let blocks = |path: &Path| path.metadata().unwrap().blocks() * 512;
    assert!(blocks(&work.path("new")) < 1 << 20);

    let disk = TinyTmpfs::new(1 << 20).unwrap();
    let new = disk.path().join("new");
    work.good(&format!("restore zeros.mem -o {}", new.display()));
    assert!(fs::read(&new).unwrap() == work.read("ram"));
    fs::remove_file(&new).unwrap();
    // In place: empty, and over RAM.
    let (path, file) = guest(disk.path(), 0);
    for force in ["", " --force"] {
        work.good(&format!("restore zeros.mem -o {}{force}", path.display()));
        assert!(bytes(&file).0 == work.read("ram"));
        assert!(blocks(&path) < 1 << 20);
        file.write_all_at(&noise(2, 4 * PAGE), 0).unwrap();
    }
    // Data that is not zeros does not fit.
    let noise = work.create("noise", LARGE);
    noise.write_all_at(&support::noise(1, 2 << 20), 0).unwrap();
    work.good("dump noise -o noise.mem --keep-zeros");
    let before = bytes(&file);
    for output in ["guest --force", "new"] {
        let restore = format!("restore noise.mem -o {}/{output}", disk.path().display());
        work.fails(&restore, 3, &["make room", "nothing was written"]);
    }
    assert!(bytes(&file) == before);
}

#[test]
fn zeros_restored_to_huge_pages_take_none() {
    needs!(HugePages);
    let work = Work::empty();
    work.create("zeros", 8 << 20);
    work.good("dump zeros -o zeros.mem");
    let huge = HugeFs::new(None).unwrap();
    let path = huge.path().join("ram");
    let file = File::create(&path).unwrap();
    file.set_len(8 << 20).unwrap();
    work.good(&format!("restore zeros.mem -o {}", path.display()));
    assert_eq!(file.metadata().unwrap().blocks(), 0);
}

#[test]
fn sealed_huge_pages_are_not_reported_as_too_few() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsRawFd;
    needs!(HugePages);
    let work = Work::empty();
    work.create("zeros", 8 << 20);
    work.good("dump zeros -o zeros.mem");
    let flags = MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB;
    let file = File::from(memfd_create("ram", flags).unwrap());
    file.set_len(8 << 20).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let error = work.run(&format!("restore zeros.mem -o {path}"));
    error.fails(3, &["cannot write", "unchanged", "not permitted"]);
}

/// overlayfs has no way to reserve blocks. The room is compared before images are read.
#[test]
fn empty_ram_where_room_cannot_be_reserved_is_checked_too() {
    needs!(Root);
    let work = Work::empty();
    large(&work);
    for (size, needed) in [(LARGE / 2, true), (2 * LARGE, false)] {
        let disk = TinyTmpfs::new(size).unwrap();
        let [lower, upper, inside] = ["lower", "upper", "work"].map(|name| disk.path().join(name));
        for dir in [&lower, &upper, &inside] {
            fs::create_dir(dir).unwrap();
        }
        let overlay = test_machine::Overlay::of(&lower, &upper, &inside).unwrap();
        let (path, file) = guest(overlay.path(), 0);
        let restore = format!("restore large.mem -o {}", path.display());
        if needed {
            let needs = format!("needs {LARGE} bytes");
            let before = work.read("large.mem");
            work.rot("large.mem", 5000);
            work.fails(&restore, 3, &[&needs, "make room", "nothing was written"]);
            fs::write(work.path("large.mem"), before).unwrap();
        } else {
            work.good(&restore)
                .warns(&["overlay", "cannot reserve room", "left empty"]);
            assert!(bytes(&file).0 == work.read("large"));
        }
    }
}
