//! Restoring into existing RAM.

#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use rstest::rstest;
use support::held::Held;
use support::{Ended, PAGE, RAM, Work};
use test_machine::{HugeFs, LoopFs, LoopMount, Need, TinyTmpfs};

/// RAM in a memfd of this process, and its path.
fn memfd(len: u64) -> (File, String) {
    let fd: OwnedFd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    (file, path)
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_guests_memfd_is_captured_and_another_one_restored_in_place() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM);
    guest.write_all_at(&work.read("first"), 0).unwrap();
    work.good(&format!("dump {path} -o full2.mem"));
    guest.write_all_at(&work.read("ram"), 0).unwrap();
    work.good(&format!("diff full2.mem --ram {path} -o d.mem"));

    let (new, path) = memfd(RAM);
    work.good(&format!("restore full2.mem d.mem -o {path}"));
    assert!(bytes(&new) == work.read("ram"));
    // Zero pages take no memory.
    assert!(new.metadata().unwrap().blocks() * 512 < RAM / 2);
}

#[test]
fn ram_in_use_is_overwritten_only_by_force_and_wholly() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM);
    guest
        .write_all_at(&[7; 3 * PAGE as usize], 900 * PAGE)
        .unwrap();
    let before = bytes(&guest);
    work.fails(
        &format!("restore full.mem -o {path}"),
        2,
        &["not empty", "--force"],
    );
    assert!(bytes(&guest) == before);
    work.good(&format!("restore full.mem -o {path} --force"));
    assert!(bytes(&guest) == work.read("first"));
}

#[test]
fn ram_of_another_size_stays_as_it_is() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM + PAGE);
    guest.write_all_at(&[7; 10], 0).unwrap();
    work.fails(
        &format!("restore full.mem -o {path} --force"),
        1,
        &["must be equal"],
    );
    let mut ten = [0; 10];
    guest.read_exact_at(&mut ten, 0).unwrap();
    assert_eq!(ten, [7; 10]);
}

/// Writes fail from the third on. The first only tests whether the RAM is writable.
#[test]
fn a_restore_that_fails_in_the_middle_leaves_the_ram_empty() {
    if !Need::Strace.met("a_restore_that_fails_in_the_middle_leaves_the_ram_empty") {
        return;
    }
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    guest.write_all_at(&[7; 10], 0).unwrap();
    let mut strace = Command::new("strace");
    strace
        .args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64"])
        .args(["-e", "inject=pwrite64:error=EIO:when=3+", support::RAMSNAP])
        .args(["restore", "full.mem", "--force", "-o", "guest"])
        .current_dir(work.path(""));
    Ended::of(&mut strace).fails(3, &["Input/output error", "was emptied"]);
    assert!(bytes(&guest).iter().all(|byte| *byte == 0));
    assert_eq!(guest.metadata().unwrap().len(), RAM);
}

#[test]
fn ram_stays_as_it_is_where_there_is_no_room() {
    if !Need::Root.met("ram_stays_as_it_is_where_there_is_no_room") {
        return;
    }
    let work = Work::with_chain();
    // Room for a part of the present pages.
    let disk = TinyTmpfs::new(128 << 10).unwrap();
    let path = disk.path().join("ram");
    let guest = create(&path);
    guest.write_all_at(&[7; 10], 0).unwrap();
    let before = (bytes(&guest), guest.metadata().unwrap().blocks());
    let restore = format!("restore full.mem --force -o {}", path.display());
    work.fails(&restore, 3, &["make room", "131072", "nothing was written"]);
    assert!((bytes(&guest), guest.metadata().unwrap().blocks()) == before);
}

/// The pages of the old RAM count as room.
#[test]
fn ram_that_fills_its_file_system_is_overwritten() {
    if !Need::Root.met("ram_that_fills_its_file_system_is_overwritten") {
        return;
    }
    let work = Work::with_chain();
    let disk = TinyTmpfs::new(512 << 10).unwrap();
    let path = disk.path().join("ram");
    let guest = create(&path);
    let full = (0..).find_map(|page| guest.write_all_at(&[7; 4096], page * PAGE).err());
    assert_eq!(full.unwrap().kind(), std::io::ErrorKind::StorageFull);
    work.good(&format!("restore full.mem --force -o {}", path.display()));
    assert!(bytes(&guest) == work.read("first"));
}

#[test]
fn ram_that_is_sealed_against_writing_stays_as_it_is() {
    let work = Work::with_chain();
    let fd = memfd_create("ram", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let guest = File::from(fd);
    guest.set_len(RAM).unwrap();
    guest.write_all_at(&[7; 10], 0).unwrap();
    let before = bytes(&guest);
    fcntl(&guest, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), guest.as_raw_fd());
    let restore = format!("restore full.mem --force -o {path}");
    work.fails(&restore, 3, &["cannot write", "as it was"]);
    assert!(bytes(&guest) == before);
}

/// RLIMIT_FSIZE, which the shell takes in blocks of 512 bytes.
#[test]
fn ram_larger_than_a_file_may_be_stays_as_it_is() {
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    guest.write_all_at(&[7; 10], 0).unwrap();
    let before = bytes(&guest);
    let script = format!(
        "ulimit -f 8192; exec {} restore full.mem --force -o guest",
        support::RAMSNAP
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).current_dir(work.path(""));
    Ended::of(&mut shell).fails(3, &["cannot write", "File too large", "as it was"]);
    assert!(bytes(&guest) == before);
}

#[test]
fn ram_stays_as_it_is_where_an_image_is_damaged() {
    let work = Work::with_chain();
    let (guest, path) = memfd(RAM);
    work.rot("full.mem", 5000);
    // First empty RAM, then RAM in use.
    for force in ["", " --force"] {
        let restore = format!("restore full.mem -o {path}{force}");
        work.fails(&restore, 1, &["damaged"]);
        assert_eq!(guest.metadata().unwrap().blocks() > 0, !force.is_empty());
        guest.write_all_at(&[7; 10], 0).unwrap();
    }
    let mut ten = [0; 10];
    guest.read_exact_at(&mut ten, 0).unwrap();
    assert_eq!(ten, [7; 10]);
}

/// hugetlbfs has no write(2).
#[test]
fn ram_of_huge_pages_is_restored() {
    if !Need::HugePages.met("ram_of_huge_pages_is_restored") {
        return;
    }
    let work = Work::with_chain();
    let huge = HugeFs::new(None).unwrap();
    let path = huge.path().join("ram");
    let guest = create(&path);
    let restore = |images: &str| format!("restore {images} -o {}", path.display());
    work.good(&restore("full.mem"));
    assert!(bytes(&guest) == work.read("first"));
    work.fails(&restore("full.mem d1.mem d2.mem"), 2, &["--force"]);
    work.good(&restore("full.mem d1.mem d2.mem --force"));
    assert!(bytes(&guest) == work.read("ram"));
}

#[test]
fn a_new_file_of_huge_pages_is_refused_before_images_are_read() {
    if !Need::HugePages.met("a_new_file_of_huge_pages_is_refused_before_images_are_read") {
        return;
    }
    let work = Work::with_chain();
    work.rot("full.mem", 5000);
    let huge = HugeFs::new(None).unwrap();
    let out = huge.path().join("out");
    for verb in ["restore full.mem", "dump ram", "merge full.mem d1.mem"] {
        let command = format!("{verb} -o {}", out.display());
        work.fails(&command, 3, &["hugetlbfs", "write(2)"]);
    }
    assert_eq!(support::list(huge.path()), [""; 0]);
}

#[test]
fn ram_of_huge_pages_stays_as_it_is_where_there_are_too_few() {
    if !Need::HugePages.met("ram_of_huge_pages_stays_as_it_is_where_there_are_too_few") {
        return;
    }
    let work = Work::with_chain();
    // Two of the four pages.
    let huge = HugeFs::new(Some(4 << 20)).unwrap();
    let path = huge.path().join("ram");
    let guest = create(&path);
    let zeros = bytes(&guest);
    for force in ["", " --force"] {
        let restore = format!("restore full.mem -o {}{force}", path.display());
        work.fails(&restore, 3, &["huge pages", "as it was"]);
    }
    assert!(bytes(&guest) == zeros);
    assert_eq!(guest.metadata().unwrap().blocks(), 0);
}

#[test]
fn ram_is_not_restored_to_files_of_another_user() {
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
    if !Need::Root.met("ram_is_not_restored_to_files_of_another_user") {
        return;
    }
    let work = Work::with_chain();
    let shared = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(shared.path(), 0o1777);
    let path = shared.path().join("guest");
    let guest = create(&path);
    let restore = format!("restore full.mem -o {}", path.display());
    // A file of another user, then a file that other users may read.
    mode(&path, 0o600);
    chown(&path, Some(65534), None).unwrap();
    work.fails(&restore, 2, &["65534", "--force"]);
    chown(&path, Some(0), None).unwrap();
    mode(&path, 0o644);
    work.fails(&restore, 2, &["chmod 600", "--force"]);
    assert_eq!(guest.metadata().unwrap().blocks(), 0);
    // A link of another user to a file of root.
    std::fs::remove_file(&path).unwrap();
    let roots = work.create("roots", RAM);
    symlink(work.path("roots"), &path).unwrap();
    lchown(&path, Some(65534), None).unwrap();
    for (dir, force) in [(0o1777, ""), (0o1777, " --force"), (0o777, " --force")] {
        mode(shared.path(), dir);
        let code = work.run(&format!("{restore}{force}")).code;
        assert!(matches!(code, Some(2 | 3)), "{code:?}");
        assert_eq!(roots.metadata().unwrap().blocks(), 0);
    }
    // Directories that a group may write to are refused as well.
    chown(shared.path(), None, Some(812_345)).unwrap();
    for dir in [0o2775, 0o3775] {
        mode(shared.path(), dir);
        for restore in [&restore, &format!("{restore} --force")] {
            work.fails(restore, 2, &["link", "another user"]);
        }
        let save = format!(
            "dump {} -o {} --force",
            work.path("full.mem").display(),
            path.display()
        );
        assert_ne!(work.run(&save).code, Some(0));
        assert_eq!(roots.metadata().unwrap().blocks(), 0);
    }
    // Links of this user are followed.
    mode(shared.path(), 0o1777);
    lchown(&path, Some(0), None).unwrap();
    work.good(&restore);
    work.assert_same("roots", "first");
}

/// A guest is started with the file while the images are checked, and uses its first, last and
/// other pages.
#[test]
fn ram_of_a_guest_started_during_the_checks_is_kept() {
    if !Need::Strace.met("ram_of_a_guest_started_during_the_checks_is_kept") {
        return;
    }
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let restore = "restore full.mem -o guest";
    // The room is reserved last.
    let reserving = (ALLOCATING.to_owned(), 1);
    let held = support::held::Held::before(&work.command(restore), &reserving).expect("held");
    work.fails(restore, 3, &["another restore"]);
    for page in [0, 900, RAM / PAGE - 1] {
        guest.write_all_at(&[7; 10], page * PAGE).unwrap();
    }
    let before = bytes(&guest);
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(2), "{error}");
    assert!(error.contains("not empty"), "{error}");
    assert!(bytes(&guest) == before);
}

/// The guest begins to write to its RAM after the room for the RAM is reserved.
#[test]
fn reserved_room_is_left_to_a_guest_that_was_started() {
    if !Need::Strace.met("reserved_room_is_left_to_a_guest_that_was_started") {
        return;
    }
    let work = Work::with_chain();
    let guest = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let path = guest.path().display().to_string();
    let guest = guest.as_file();
    guest.set_len(RAM).unwrap();
    let chain = memory_image::Chain::open_sealed(&[work.path("full.mem")]).unwrap();
    let last = (ALLOCATING.to_owned(), chain.stored_runs().count());
    let command = work.command(&format!("restore full.mem -o {path}"));
    let held = Held::before(&command, &last).expect("held");
    guest.write_all_at(&[7; 10], 900 * PAGE).unwrap();
    let before = bytes(guest);
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(2), "{error}");
    assert!(bytes(guest) == before);
    assert!(guest.metadata().unwrap().blocks() * 512 > PAGE, "{error}");
}

/// Any write, and any hole, would set the time of modification.
#[rstest]
#[case::empty("restore full.mem -o guest", false, 1)]
#[case::in_use("restore full.mem -o guest --force", true, 1)]
#[case::not_forced("restore full.mem -o guest", true, 2)]
fn a_refused_restore_does_not_write(
    #[case] restore: &str,
    #[case] in_use: bool,
    #[case] code: i32,
) {
    let work = Work::with_chain();
    work.rot("full.mem", 5000);
    let guest = work.create("guest", RAM);
    if in_use {
        guest.write_all_at(&[7; 10], 0).unwrap();
    }
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    guest.set_modified(long_ago).unwrap();
    work.fails(restore, code, &[]);
    assert_eq!(guest.metadata().unwrap().modified().unwrap(), long_ago);
}

/// The file is replaced before the last check: the path now leads to another file.
#[test]
fn ram_that_is_replaced_during_a_restore_is_an_error() {
    if !Need::Strace.met("ram_that_is_replaced_during_a_restore_is_an_error") {
        return;
    }
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let command = work.command("restore full.mem -o guest");
    // All data is written, and the sync is about to begin.
    let held = Held::before(&command, &("fsync".to_owned(), 1)).expect("held");
    assert!(bytes(&guest) == work.read("first"));
    let other = work.create("other", RAM);
    other.write_all_at(&[7; 10], 0).unwrap();
    let before = bytes(&other);
    std::fs::rename(work.path("other"), work.path("guest")).unwrap();
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    for words in ["guest", "was replaced or resized", "was emptied"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(bytes(&guest).iter().all(|byte| *byte == 0));
    assert!(work.read("guest") == before);
}

/// The system call that reserves room and makes holes.
const ALLOCATING: &str = "fallocate";

/// Returns a restore that is held after it has written a part of the RAM.
fn half_restored(work: &Work) -> Held {
    let command = work.command("restore full.mem -o guest");
    Held::before(&command, &("pwrite64".to_owned(), 2)).expect("held")
}

#[rstest]
#[case::dump("dump guest -o out")]
#[case::diff("diff full.mem --ram guest -o out")]
#[case::compared("diff full.mem --ram guest")]
#[case::raw_image("convert raw:guest -o out")]
#[case::raw_base("merge raw:guest -o out")]
fn ram_that_is_being_restored_is_not_read(#[case] command: &str) {
    if !Need::Strace.met("ram_that_is_being_restored_is_not_read") {
        return;
    }
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let held = half_restored(&work);
    assert!(bytes(&guest) != work.read("first"));
    work.fails(command, 3, &["ramsnap restore", "guest", "wait"]);
    assert_eq!(held.release().0.code(), Some(0));
    let code = work.run(command).code;
    assert!(matches!(code, Some(0 | 1)), "{code:?}");
}

/// The file that [`a_vmm`] maps.
const MAPPED: &str = "RAMSNAP_TEST_MAPPED";

/// Not a test: runs as another process. Maps a file, and ends when its stdin does.
#[test]
fn a_vmm() {
    let Some(path) = std::env::var_os(MAPPED) else {
        return;
    };
    let file = File::options().read(true).write(true).open(path).unwrap();
    support::mapped::map(&file, RAM);
    println!("\nmapped");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// The RAM is read through a mapping of the process. On btrfs, mappings are listed with another
/// device than files.
#[rstest]
#[case::here(false)]
#[case::btrfs(true)]
fn a_process_whose_ram_is_being_restored_is_not_read(#[case] on_btrfs: bool) {
    const TEST: &str = "a_process_whose_ram_is_being_restored_is_not_read";
    if !Need::Strace.met(TEST) || on_btrfs && !(Need::Root.met(TEST) && Need::Btrfs.met(TEST)) {
        return;
    }
    let work = Work::with_chain();
    let disk = on_btrfs.then(|| LoopMount::new(LoopFs::Btrfs).unwrap());
    let ram = match &disk {
        None => work.path("guest"),
        Some(disk) => {
            let ram = disk.path().join("guest");
            std::os::unix::fs::symlink(&ram, work.path("guest")).unwrap();
            ram
        }
    };
    let guest = File::create_new(&ram).unwrap();
    guest.set_len(RAM).unwrap();
    let guest = File::options().read(true).write(true).open(&ram).unwrap();
    let mut vmm = Command::new(std::env::current_exe().unwrap());
    let mut vmm = vmm
        .args(["--exact", "a_vmm", "--nocapture"])
        .env(MAPPED, &ram)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Open until the end: the other process prints more.
    let mut output = BufReader::new(vmm.stdout.take().unwrap());
    let mut lines = output.by_ref().lines();
    assert!(lines.any(|line| line.unwrap() == "mapped"));
    let held = half_restored(&work);
    let full = format!(
        "dump --pid {} --live --region {} -o out",
        vmm.id(),
        ram.display()
    );
    work.fails(&full, 3, &["ramsnap restore", "wait"]);
    assert_eq!(held.release().0.code(), Some(0));
    assert!(bytes(&guest) == work.read("first"));
    work.good(&full);
    drop(vmm.stdin.take());
    vmm.wait().unwrap();
}

#[test]
fn ram_that_is_read_is_not_restored_to() {
    if !Need::Strace.met("ram_that_is_read_is_not_restored_to") {
        return;
    }
    let work = Work::with_chain();
    work.copy("ram", "guest");
    let command = work.command("dump guest -o out");
    let held = Held::before(&command, &("pwrite64".to_owned(), 1)).expect("held");
    let restore = "restore full.mem -o guest --force";
    work.fails(restore, 3, &["reads the RAM", "nothing was written"]);
    work.assert_same("guest", "ram");
    // Several readers are allowed at once.
    work.good("dump guest -o again");
    assert_eq!(held.release().0.code(), Some(0));
    work.good("diff out --ram guest");
    work.good(restore);
}

/// A VMM may lock its RAM in any way.
#[rstest]
#[case::flock(false)]
#[case::all_of_it_by_fcntl(true)]
fn ram_that_its_vmm_has_locked_is_read_and_restored(#[case] by_fcntl: bool) {
    let work = Work::with_chain();
    work.copy("ram", "guest");
    let guest = File::options()
        .read(true)
        .write(true)
        .open(work.path("guest"))
        .unwrap();
    if by_fcntl {
        let all = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as nix::libc::c_short,
            l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&guest, FcntlArg::F_OFD_SETLK(&all)).unwrap();
    } else {
        guest.try_lock().unwrap();
    }
    work.good("dump guest -o out");
    work.good("diff full.mem --ram guest -o d.mem");
    work.good("restore full.mem -o guest --force");
    assert!(bytes(&guest) == work.read("first"));
}

/// Users press Ctrl-C twice.
#[test]
fn a_second_signal_does_not_leave_a_part_of_the_ram() {
    if !Need::Strace.met("a_second_signal_does_not_leave_a_part_of_the_ram") {
        return;
    }
    let work = Work::with_chain();
    // tmpfs reserves the stored pages run by run.
    let guest = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let path = guest.path().display().to_string();
    let guest = guest.as_file();
    guest.set_len(RAM).unwrap();
    let chain = memory_image::Chain::open_sealed(&[work.path("full.mem")]).unwrap();
    let reserving = chain.stored_runs().count();
    for call in [("pwrite64", 3), (ALLOCATING, reserving as u64 + 1)] {
        guest.write_all_at(&[7; 10], 0).unwrap();
        let command = work.command(&format!("restore full.mem -o {path} --force"));
        let call = (call.0.to_owned(), call.1.try_into().unwrap());
        let mut held = Held::before(&command, &call).expect("held");
        assert!(!held.signal(Signal::SIGINT), "it empties the RAM");
        assert!(!held.signal(Signal::SIGINT), "it goes on with that");
        let (status, error) = held.release();
        assert_eq!(status.code(), Some(130), "{error}");
        for words in [&path, "part of the RAM", "one more signal", "emptied"] {
            assert!(error.contains(words), "{error}");
        }
        assert!(bytes(guest).iter().all(|byte| *byte == 0));
    }
}

/// Returns a restore that is held before all of the RAM, which is written, goes to its disk.
fn before_the_sync(work: &Work) -> Held {
    let command = work.command("restore full.mem -o guest");
    Held::before(&command, &("fsync".to_owned(), 1)).expect("held")
}

#[test]
fn two_signals_during_the_sync_let_it_end() {
    if !Need::Strace.met("two_signals_during_the_sync_let_it_end") {
        return;
    }
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let mut held = before_the_sync(&work);
    assert!(!held.signal(Signal::SIGINT));
    assert!(!held.signal(Signal::SIGINT));
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(0), "{error}");
    assert!(error.contains("all of the RAM") && error.contains("one more signal"));
    assert!(!error.contains("part of the RAM"), "{error}");
    assert!(bytes(&guest) == work.read("first"));
}

#[test]
fn a_third_signal_during_the_sync_says_that_the_ram_is_whole() {
    if !Need::Strace.met("a_third_signal_during_the_sync_says_that_the_ram_is_whole") {
        return;
    }
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let mut held = before_the_sync(&work);
    assert!(!held.signal(Signal::SIGINT));
    assert!(!held.signal(Signal::SIGTERM));
    assert!(held.signal(Signal::SIGTERM), "the third ends it");
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    for words in ["error: ", "guest", "all of the RAM", "`sync`"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(!error.contains("part of the RAM"), "{error}");
    assert!(bytes(&guest) == work.read("first"));
}

#[test]
fn a_third_signal_says_that_a_part_of_the_ram_is_left() {
    if !Need::Strace.met("a_third_signal_says_that_a_part_of_the_ram_is_left") {
        return;
    }
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let mut held = half_restored(&work);
    assert!(!held.signal(Signal::SIGINT));
    assert!(!held.signal(Signal::SIGTERM));
    assert!(held.signal(Signal::SIGTERM), "the third ends it");
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    for words in ["error: ", "guest", "part of the RAM", "start no guest"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(bytes(&guest).iter().any(|byte| *byte != 0));
}

/// Signals that end a process without a message by default.
#[rstest]
fn other_deadly_signals_leave_no_part_of_the_ram(
    #[values(
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGXCPU,
        Signal::SIGVTALRM,
        Signal::SIGPROF
    )]
    signal: Signal,
) {
    if !Need::Strace.met("other_deadly_signals_leave_no_part_of_the_ram") {
        return;
    }
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let mut held = half_restored(&work);
    assert!(!held.signal(signal), "it empties the RAM");
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(128 + signal as i32), "{error}");
    assert!(bytes(&guest).iter().all(|byte| *byte == 0));
}

/// Creates a file as large as the RAM.
fn create(path: &Path) -> File {
    let options = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path);
    let file = options.unwrap();
    file.set_len(RAM).unwrap();
    file
}
