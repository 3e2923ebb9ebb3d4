//! Shared memory that another process has registered with a userfaultfd.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::fchown;
use std::process::Command;

use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, fork};
use page_reader::{MappedMemory, RamLayout};
use process_memory::{
    LazyFillError, ProcessMaps, Unexamined, check_lazy_fill, check_lazy_fill_of_memory,
    check_lazy_fill_of_region, hidden_processes,
};
use rstest::rstest;
use support::child::Child;
use test_machine::{FileSystem, LoopMount, Overlay, TinyTmpfs, needs};
use test_memory::{Mapping, Registered, register_minor, register_missing};

const SIZE: usize = 2 << 20;

/// Forks a child that calls `act` and stops.
fn child(act: impl FnOnce() -> Option<Registered>) -> Child {
    // SAFETY: no other thread of this process holds a lock: nextest runs each test in a separate
    // process, and fork acquires the locks of the C library.
    unsafe { Child::stopped_after(act) }
}

fn memfd(flags: MFdFlags) -> File {
    let file = File::from(memfd_create(c"guest-ram", flags).unwrap());
    file.set_len(SIZE as u64).unwrap();
    file
}

fn on_tmpfs() -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(SIZE as u64).unwrap();
    file
}

fn huge_pages() -> File {
    memfd(MFdFlags::MFD_HUGETLB)
}

fn small_pages() -> File {
    memfd(MFdFlags::empty())
}

#[track_caller]
fn assert_filled_in(checked: Result<Unexamined, LazyFillError>, process: u32) {
    match checked {
        Err(error @ LazyFillError::InProgress { .. }) => {
            assert!(error.to_string().contains(&format!("process {process} (")));
            let LazyFillError::InProgress { pid, .. } = error else {
                unreachable!("matched above")
            };
            assert_eq!(pid, process);
        }
        other => panic!("{other:?}"),
    }
}

fn whole(file: &File) -> Mapping {
    Mapping::of_file(file.as_fd(), SIZE, true)
}

fn missing(file: &File) -> Option<Registered> {
    let mapping = whole(file);
    let registered = register_missing(&mapping, SIZE);
    std::mem::forget(mapping);
    Some(registered)
}

fn minor(file: &File) -> Option<Registered> {
    let mapping = whole(file);
    let registered = register_minor(&mapping, SIZE);
    std::mem::forget(mapping);
    Some(registered)
}

#[rstest]
#[case::memfd(small_pages, missing)]
#[case::memfd_minor(small_pages, minor)]
#[case::tmpfs(on_tmpfs, missing)]
#[case::huge_pages(huge_pages, missing)]
fn memory_that_a_process_fills_is_refused(
    #[case] file: fn() -> File,
    #[case] register: fn(&File) -> Option<Registered>,
) {
    needs!(Userfaultfd, Root);
    let file = file();
    let _ = check_lazy_fill(&file).unwrap();
    let child = child(|| register(&file));
    assert_filled_in(check_lazy_fill(&file), child.pid());
    // A mapping of this process, in which missing pages are zeros.
    let mapping = whole(&file);
    let layout = RamLayout::single(0, SIZE as u64).unwrap();
    // SAFETY: mapped until the end of the test.
    let memory = unsafe { page_reader::HostMemory::new(mapping.as_ptr(), SIZE) };
    let guest = MappedMemory::new(layout, [memory]).unwrap();
    assert_filled_in(check_lazy_fill_of_memory(&guest), child.pid());
    let maps = ProcessMaps::of_this_process().unwrap();
    let region = maps.at(mapping.address()).unwrap();
    assert_filled_in(check_lazy_fill_of_region(region), child.pid());

    // Mappings of another file do not matter, and an ended process fills nothing.
    let _ = check_lazy_fill(&small_pages()).unwrap();
    drop(child);
    let _ = check_lazy_fill(&file).unwrap();
    let _ = check_lazy_fill_of_memory(&guest).unwrap();
}

#[test]
fn memory_filled_in_this_process_is_refused() {
    needs!(Userfaultfd, Root);
    let file = small_pages();
    let mapping = whole(&file);
    let registered = register_missing(&mapping, SIZE / 2);
    assert_filled_in(check_lazy_fill(&file), std::process::id());
    drop(registered);
    let _ = check_lazy_fill(&file).unwrap();
}

/// The mappings are listed with a device other than that of `fstat`, because the lower and upper
/// file systems differ.
#[test]
fn a_file_on_overlayfs_that_is_filled_is_refused() {
    needs!(Userfaultfd, Mount(FileSystem::EXT4));
    let lower = LoopMount::new(FileSystem::EXT4).unwrap();
    let upper = TinyTmpfs::new(2 * SIZE as u64).unwrap();
    let [changed, work] = ["upper", "work"].map(|name| upper.path().join(name));
    std::fs::create_dir(&changed).unwrap();
    std::fs::create_dir(&work).unwrap();
    let overlay = Overlay::of(lower.path(), &changed, &work).unwrap();
    let open = |name: &str| {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options.open(overlay.path().join(name)).unwrap();
        file.set_len(SIZE as u64).unwrap();
        file
    };
    let (file, other) = (open("ram"), open("other"));
    let _ = check_lazy_fill(&file).unwrap();
    let child = child(|| missing(&file));
    assert_filled_in(check_lazy_fill(&file), child.pid());
    // Opened again, for reading.
    let again = File::open(overlay.path().join("ram")).unwrap();
    assert_filled_in(check_lazy_fill(&again), child.pid());
    let _ = check_lazy_fill(&other).unwrap();
    drop(child);
    let _ = check_lazy_fill(&file).unwrap();
    // The check has allocated no page.
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    assert_eq!(blocks, 0);
}

/// A file that cannot be mapped is not reported as complete.
#[test]
fn a_file_on_overlayfs_that_cannot_be_read_is_an_error() {
    needs!(Root);
    let upper = TinyTmpfs::new(2 * SIZE as u64).unwrap();
    let [lower, changed, work] = ["lower", "upper", "work"].map(|name| upper.path().join(name));
    for dir in [&lower, &changed, &work] {
        std::fs::create_dir(dir).unwrap();
    }
    let overlay = Overlay::of(&lower, &changed, &work).unwrap();
    let file = File::create(overlay.path().join("ram")).unwrap();
    assert!(matches!(
        check_lazy_fill(&file),
        Err(LazyFillError::File(_))
    ));
}

/// Pages that are filled in a private mapping do not reach the file.
#[test]
fn a_private_mapping_that_is_filled_does_not_matter() {
    needs!(Userfaultfd, Root);
    let file = small_pages();
    let mapping = Mapping::of_file(file.as_fd(), SIZE, false);
    let _registered = register_missing(&mapping, SIZE);
    let _ = check_lazy_fill(&file).unwrap();
}

/// `/proc/<pid>/maps` is empty for such a process, those of its threads are not.
#[test]
fn a_process_whose_first_thread_ended_is_found() {
    needs!(Userfaultfd, Root);
    let file = small_pages();
    let (mut ready, done) = std::io::pipe().unwrap();
    // SAFETY: as in `child`.
    let child = match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => Child(child),
        ForkResult::Child => {
            let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            let _held = missing(&file);
            std::thread::spawn(move || {
                let leader = format!("/proc/self/task/{}/stat", std::process::id());
                while !std::fs::read_to_string(&leader).unwrap().contains(") Z ") {
                    std::thread::yield_now();
                }
                (&done).write_all(b"!").unwrap();
                loop {
                    std::thread::park();
                }
            });
            // SAFETY: ends this thread alone.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
            unreachable!("the thread has ended")
        }
    };
    std::io::Read::read_exact(&mut ready, &mut [0]).unwrap();
    assert_filled_in(check_lazy_fill(&file), child.pid());
}

#[test]
fn a_file_on_disk_is_not_searched_for() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let _ = check_lazy_fill(&file).unwrap();
    let _ = check_lazy_fill(&File::open("/dev/null").unwrap()).unwrap();
}

/// Runs `work` in a thread that has dropped its privileges. The process keeps them.
fn without_privilege<T: Send>(user: u32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the call takes no address, and changes this thread only.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
            assert_eq!(changed, 0);
            work()
        });
        thread.join().unwrap()
    })
}

#[test]
fn an_unexaminable_process_of_the_owner_is_returned() {
    needs!(Userfaultfd, Root);
    // A user id without other processes on this machine.
    const USER: u32 = 1_948_211;
    let file = small_pages();
    let child = child(|| missing(&file));
    let unexamined = without_privilege(USER, || check_lazy_fill(&file)).unwrap();
    let unexamined = unexamined.processes;
    assert!(unexamined.iter().any(|process| process.pid == child.pid()));
    let text = unexamined[0].to_string();
    assert!(
        text.starts_with("process ") && text.ends_with(')'),
        "{text}"
    );

    // Processes of users other than the owner are not returned, as documented.
    let file = small_pages();
    fchown(&file, Some(USER), None).unwrap();
    let unexamined = without_privilege(USER, || check_lazy_fill(&file)).unwrap();
    assert_eq!(unexamined.processes, []);
}

/// The file that `checks_a_file_elsewhere` checks.
const CHECKED: &str = "RAMSNAP_TEST_CHECKED";

/// Not a test: prints the processes that are hidden from a check in another namespace.
#[test]
fn checks_a_file_elsewhere() {
    let Some(path) = std::env::var_os(CHECKED) else {
        return;
    };
    let mut options = File::options();
    let file = options.read(true).write(true).open(path).unwrap();
    let (shared, private) = (whole(&file), Mapping::private(SIZE));
    let maps = ProcessMaps::of_this_process().unwrap();
    let region = |mapping: &Mapping| check_lazy_fill_of_region(maps.at(mapping.address()).unwrap());
    println!("processes: hidden {:?}", hidden_processes().unwrap());
    for (name, checked) in [
        ("file", check_lazy_fill(&file)),
        ("shared mapping", region(&shared)),
        ("private mapping", region(&private)),
    ] {
        match checked {
            Ok(unexamined) => println!("{name}: hidden {:?}", unexamined.hidden),
            Err(LazyFillError::InProgress { .. }) => println!("{name}: filled"),
            Err(other) => panic!("{name}: {other:?}"),
        }
    }
}

/// As root of the namespace, who owns the file.
const IN_USER_NAMESPACE: &str = "exec setpriv --reuid=12345 --regid=12345 --clear-groups \
     unshare --user --map-root-user";
const AS_OTHER: &str = "exec setpriv --reuid=12345 --regid=12345 --clear-groups";

/// In another PID namespace a process that fills the memory is not found. The result says so.
#[rstest]
#[case::of_the_namespace("mount -t proc proc /proc", "exec", "hidden [OutsidePidNamespace]")]
#[case::hidden_from_others(
    "mount -t proc -o hidepid=2 proc /proc",
    AS_OTHER,
    "hidden [OutsidePidNamespace, HidePid]"
)]
#[case::not_hidden_from_a_group(
    "mount -t proc -o hidepid=2,gid=12345 proc /proc",
    AS_OTHER,
    "hidden [OutsidePidNamespace]"
)]
#[case::not_hidden_from_root(
    "mount -t proc -o hidepid=2 proc /proc",
    "exec",
    "hidden [OutsidePidNamespace]"
)]
// Root is in the group of the case above, which is the default, and in no group of this one.
#[case::not_hidden_from_privilege(
    "mount -t proc -o hidepid=4 proc /proc",
    "exec",
    "hidden [OutsidePidNamespace]"
)]
#[case::hidden_from_root_of_a_user_namespace(
    "mount -t proc -o hidepid=4 proc /proc",
    IN_USER_NAMESPACE,
    "hidden [OutsidePidNamespace, HidePid]"
)]
#[case::of_the_host("true", "exec", "filled")]
fn hidden_processes_are_returned(#[case] mount: &str, #[case] exec: &str, #[case] expected: &str) {
    needs!(Userfaultfd, Root);
    if exec == IN_USER_NAMESPACE {
        needs!(UserNamespace);
    }
    let named = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    named.as_file().set_len(SIZE as u64).unwrap();
    fchown(named.as_file(), Some(12345), None).unwrap();
    let child = child(|| missing(named.as_file()));
    assert_filled_in(check_lazy_fill(named.as_file()), child.pid());

    let program = test_memory::world_executable();
    let run = format!(
        "{mount} && {exec} \"$0\" --exact checks_a_file_elsewhere --nocapture --test-threads 1"
    );
    let output = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c"])
        .arg(run)
        .arg(program.path())
        .env(CHECKED, named.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let processes = match expected {
        "filled" => "hidden []",
        hidden => hidden,
    };
    for line in [
        format!("processes: {processes}"),
        format!("file: {expected}"),
        format!("shared mapping: {expected}"),
        "private mapping: hidden []".to_owned(),
    ] {
        // The harness begins the first line.
        assert!(text.lines().any(|it| it.ends_with(&line)), "{text}");
    }
}
