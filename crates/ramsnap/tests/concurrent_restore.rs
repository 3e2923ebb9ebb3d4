//! Guests, VMMs and other runs of the tool that use RAM while it is restored.

#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::fcntl::{FcntlArg, fcntl};
use rstest::rstest;
use support::held::{ALLOCATING, Held, half_restored};
use support::ram_file::bytes;
use support::{PAGE, RAM, Work};
use test_machine::{FileSystem, LoopMount, Need, needs};

/// A guest is started with the file while the images are checked, and uses its first, last and
/// other pages.
#[test]
fn ram_of_a_guest_started_during_the_checks_is_kept() {
    needs!(Strace);
    let work = Work::with_chain();
    let guest = work.create("guest", RAM);
    let restore = "restore full.mem -o guest";
    // The room is reserved last.
    let reserving = (ALLOCATING.to_owned(), 1);
    let held = support::held::Held::before(&work.command(restore), &reserving).expect("held");
    work.fails(restore, 3, &["another `ramsnap restore`"]);
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
    needs!(Strace);
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

/// Another program truncates the RAM while it is written. Later writes, or the program, extend it
/// to its old size, so that zeros are left where RAM was.
#[rstest]
#[case::between_two_writes("pwrite64", 2, false)]
#[case::after_the_last_write("fsync", 1, true)]
fn ram_that_is_truncated_during_a_restore_is_an_error(
    #[case] call: &str,
    #[case] number: usize,
    #[case] extended: bool,
    #[values(None, Some("/dev/shm"))] dir: Option<&str>,
) {
    needs!(Strace);
    let work = Work::with_ram();
    // The last page is written last, and has data.
    work.change(RAM / PAGE - 1, 1);
    work.good("dump ram -o full.mem");
    let dir = dir.map_or(work.path(""), std::path::PathBuf::from);
    let guest = tempfile::NamedTempFile::new_in(dir).unwrap();
    guest.as_file().set_len(RAM).unwrap();
    let command = work.command(&format!("restore full.mem -o {}", guest.path().display()));
    let held = Held::before(&command, &(call.to_owned(), number)).expect("held");
    guest.as_file().set_len(PAGE).unwrap();
    if extended {
        guest.as_file().set_len(RAM).unwrap();
    }
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    for words in ["was replaced, resized or written to", "was emptied"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(guest.as_file().metadata().unwrap().len() == RAM);
    assert!(bytes(guest.as_file()).iter().all(|byte| *byte == 0));
}

/// Another program truncates the RAM, extends it again, and accesses it through a mapping. The
/// holes become pages of zeros.
#[rstest]
#[case::between_two_writes("pwrite64", 2)]
#[case::after_the_last_write("fsync", 1)]
fn ram_that_is_truncated_and_touched_is_an_error(#[case] call: &str, #[case] number: usize) {
    needs!(Strace);
    let work = Work::with_ram();
    work.change(RAM / PAGE - 1, 1);
    work.good("dump ram -o full.mem");
    let guest = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    guest.as_file().set_len(RAM).unwrap();
    let command = work.command(&format!("restore full.mem -o {}", guest.path().display()));
    let held = Held::before(&command, &(call.to_owned(), number)).expect("held");
    guest.as_file().set_len(PAGE).unwrap();
    guest.as_file().set_len(RAM).unwrap();
    support::mapped::touch(support::mapped::map(guest.as_file(), RAM), RAM);
    assert_eq!(guest.as_file().metadata().unwrap().blocks() * 512, RAM);
    let (status, error) = held.release();
    assert_eq!(status.code(), Some(3), "{error}");
    for words in ["was replaced, resized or written to", "was emptied"] {
        assert!(error.contains(words), "{error}");
    }
    assert!(bytes(guest.as_file()).iter().all(|byte| *byte == 0));
}

/// The file is replaced before the last check: the path now leads to another file.
#[test]
fn ram_that_is_replaced_during_a_restore_is_an_error() {
    needs!(Strace);
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
    for words in [
        "guest",
        "was replaced, resized or written to",
        "was emptied",
    ] {
        assert!(error.contains(words), "{error}");
    }
    assert!(bytes(&guest).iter().all(|byte| *byte == 0));
    assert!(work.read("guest") == before);
}

#[rstest]
#[case::dump("dump guest -o out")]
#[case::diff("diff full.mem --ram guest -o out")]
#[case::compared("diff full.mem --ram guest")]
#[case::raw_image("convert raw:guest -o out")]
#[case::raw_base("merge raw:guest -o out")]
fn ram_that_is_being_restored_is_not_read(#[case] command: &str) {
    needs!(Strace);
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

/// Set if the mapping is split, and no descriptor of the file stays open.
const SPLIT: &str = "RAMSNAP_TEST_SPLIT";

/// Not a test: runs as another process. Maps a file, and ends when its stdin does.
#[test]
fn a_vmm() {
    let Some(path) = std::env::var_os(MAPPED) else {
        return;
    };
    let file = File::options().read(true).write(true).open(path).unwrap();
    let start = support::mapped::map(&file, RAM);
    if std::env::var_os(SPLIT).is_some() {
        support::mapped::split(start);
        drop(file);
    }
    println!("\nmapped");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// Another process that runs [`a_vmm`].
struct Vmm {
    process: Child,
    /// Open until the end: the process prints more.
    _output: BufReader<ChildStdout>,
}

impl Vmm {
    /// Returns once the process has mapped `ram`, and has split the mapping if `split` is set.
    fn start(ram: &Path, split: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "a_vmm", "--nocapture"])
            .env(MAPPED, ram)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if split {
            command.env(SPLIT, "1");
        }
        let mut process = command.spawn().unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut lines = output.by_ref().lines();
        assert!(lines.any(|line| line.unwrap() == "mapped"));
        Self {
            process,
            _output: output,
        }
    }

    fn id(&self) -> u32 {
        self.process.id()
    }

    fn end(mut self) {
        drop(self.process.stdin.take());
        self.process.wait().unwrap();
    }
}

/// The RAM is read through a mapping of the process. On btrfs, mappings are listed with another
/// device than files.
#[rstest]
#[case::here(false)]
#[case::btrfs(true)]
fn a_process_whose_ram_is_being_restored_is_not_read(#[case] on_btrfs: bool) {
    const TEST: &str = "a_process_whose_ram_is_being_restored_is_not_read";
    if !Need::Strace.met(TEST)
        || on_btrfs && !(Need::Root.met(TEST) && Need::Mount(FileSystem::BTRFS).met(TEST))
    {
        return;
    }
    let work = Work::with_chain();
    let disk = on_btrfs.then(|| LoopMount::new(FileSystem::BTRFS).unwrap());
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
    let vmm = Vmm::start(&ram, false);
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
    vmm.end();
}

/// The kernel has a link to the file for each part of the mapping. The file has another name by
/// now.
#[test]
fn split_mapping_of_ram_being_restored_is_refused() {
    needs!(Strace, Root);
    let work = Work::with_chain();
    let guest = work.create("mapped", RAM);
    let vmm = Vmm::start(&work.path("mapped"), true);
    std::fs::hard_link(work.path("mapped"), work.path("guest")).unwrap();
    std::fs::remove_file(work.path("mapped")).unwrap();
    let held = half_restored(&work);
    let full = format!("dump --pid {} --live --region mapped -o out", vmm.id());
    work.fails(&full, 3, &["ramsnap restore", "wait"]);
    assert_eq!(held.release().0.code(), Some(0));
    assert!(bytes(&guest) == work.read("first"));
    let dump = work.good(&full);
    assert!(!dump.err.contains("cannot open"), "{}", dump.err);
    vmm.end();
}

#[test]
fn ram_that_is_read_is_not_restored_to() {
    needs!(Strace);
    let work = Work::with_chain();
    work.copy("ram", "guest");
    let command = work.command("dump guest -o out");
    let held = Held::before(&command, &("pwrite64".to_owned(), 1)).expect("held");
    let restore = "restore full.mem -o guest --force";
    work.fails(restore, 3, &["is reading the RAM", "nothing was written"]);
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
