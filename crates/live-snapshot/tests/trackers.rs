//! What is refused before the pause, and how a tracker starts and ends.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]
#![allow(unsafe_code)]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/memory.rs"]
mod memory;
#[path = "support/scene.rs"]
mod scene;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest::PAGE;
use live_snapshot::{
    LiveError, LiveSnapshot, LiveTracker as _, Method, UffdTracker, UffdTrackerError,
};
use memory::{Kind, Memory};
use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
use nix::sys::prctl::set_dumpable;
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use rstest::rstest;
use scene::{SIZE, Scene};
use test_machine::needs;

/// What the writer would refuse after the pause is refused before it.
#[rstest]
#[case::diff_without_a_parent(true, Seal::new(), "parent")]
#[case::full_image_with_a_parent(false, Seal::new().parent(ImageId::from_bytes([7; 16])), "parent")]
fn begin_returns_the_errors_of_the_writer(
    #[case] diff: bool,
    #[case] seal: Seal,
    #[case] reason: &str,
) {
    needs!(Userfaultfd);
    let scene = Scene::new();
    for method in [Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy] {
        let path = scene.dir.path().join("refused.mem");
        let options = MemoryWriter::options()
            .layout(Layout::Packed)
            .seal(seal.clone());
        let writer = options.open(&path, SIZE, PAGE).unwrap();
        let options = LiveSnapshot::options().method(method).diff(diff);
        let error = options.begin(&scene.guest.tracker, writer).unwrap_err();
        assert!(matches!(error, LiveError::Write(_)), "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

/// Once a snapshot is committed, nothing but the tracker keeps the memory registered, also while
/// its thread handles faults.
#[test]
fn tracker_is_replaced_right_after_a_snapshot() {
    needs!(Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let memory = Arc::new(Memory::new(Kind::Private, SIZE / 4));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let vcpu = || {
            let pages = (0..SIZE / 4 / PAGE).cycle();
            for page in pages.take_while(|_| !stop.load(Ordering::SeqCst)) {
                memory.ram.write_at(page * PAGE, &[1]).unwrap();
            }
        };
        scope.spawn(vcpu);
        scope.spawn(vcpu);
        for round in 0..30 {
            let tracker = UffdTracker::start(&memory.ram);
            let tracker = Arc::new(tracker.unwrap_or_else(|error| {
                stop.store(true, Ordering::SeqCst);
                panic!("round {round}: {error}")
            }));
            let writer = MemoryWriter::open(dir.path().join("full.mem"), SIZE / 4, PAGE);
            let live = LiveSnapshot::options().begin(&tracker, writer.unwrap());
            let frozen = live.unwrap().freeze().unwrap();
            match round % 2 {
                0 => _ = frozen.commit().unwrap(),
                _ => drop(frozen),
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn merging_of_equal_pages_ends() {
    needs!(Userfaultfd);
    let memory = Memory::new(Kind::Private, SIZE);
    let address = memory.address(0);
    // SAFETY: the memory is mapped, and this does not change its contents.
    let merged = unsafe {
        use nix::sys::mman::{MmapAdvise, madvise};
        madvise(address.cast(), SIZE as usize, MmapAdvise::MADV_MERGEABLE)
    };
    if merged.is_err() {
        return; // a kernel without KSM
    }
    let is_mergeable = || {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", address.as_ptr().addr());
        let mapping = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = mapping.skip(1).find(|line| line.starts_with("VmFlags:"));
        flags.unwrap().split_whitespace().any(|flag| flag == "mg")
    };
    assert!(is_mergeable());
    let _tracker = UffdTracker::start(&memory.ram).unwrap();
    assert!(!is_mergeable());
}

#[test]
fn privileged_process_may_track_writes() {
    needs!(Userfaultfd);
    UffdTracker::available().unwrap();
}

/// Set for the child that gives up its privileges.
const CHILD: &str = "RAMSNAP_TEST_UNPRIVILEGED";

/// Its standard input is an open `/dev/userfaultfd`. Run by the next test.
#[test]
#[ignore = "run by another test"]
fn unprivileged_child() {
    use std::os::fd::AsFd;

    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let (user, group) = (Uid::from_raw(65534), Gid::from_raw(65534));
    setresgid(group, group, group).unwrap();
    setresuid(user, user, user).unwrap();
    let memory = Arc::new(Memory::new(Kind::Private, SIZE));
    let device = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let options = UffdTracker::options().userfaultfd(device);
    // Its page table belongs to root until then.
    let error = options.start(&memory.ram).unwrap_err();
    assert!(matches!(error, UffdTrackerError::Pagemap(_)), "{error:?}");
    assert!(error.to_string().contains("dumpable"), "{error}");
    set_dumpable(true).unwrap();
    let everyone_may = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if everyone_may.is_ok_and(|value| value.trim() == "0") {
        let error = UffdTracker::available().unwrap_err();
        assert!(matches!(error, UffdTrackerError::Open(_)), "{error:?}");
    }
    // The device is for any number of guests.
    for _ in 0..2 {
        let tracker = Arc::new(options.start(&memory.ram).unwrap());
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("full.mem");
        let writer = MemoryWriter::open(&path, SIZE, PAGE).unwrap();
        let live = LiveSnapshot::options().begin(&tracker, writer).unwrap();
        let frozen = live.freeze().unwrap();
        memory.ram.write_at(5 * PAGE, &[9]).unwrap();
        frozen.commit().unwrap();
        assert_eq!(tracker.bitmap().dirty_pages(), 1);
    }
}

#[test]
fn unprivileged_process_tracks_by_a_device_it_received() {
    needs!(Root, Userfaultfd);
    let mut device = std::fs::File::options();
    let device = device.read(true).write(true).open("/dev/userfaultfd");
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--ignored", "--exact", "--nocapture", "unprivileged_child"]);
    let child = child.env(CHILD, "1").stdin(device.unwrap());
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{output:?}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
fn other_descriptors_are_refused() {
    needs!(Userfaultfd);
    let memory = Arc::new(Memory::new(Kind::Private, SIZE));
    let file = std::fs::File::open("/dev/null").unwrap();
    let options = UffdTracker::options().userfaultfd(file.into());
    let error = options.start(&memory.ram).unwrap_err();
    assert!(matches!(error, UffdTrackerError::Passed(_)), "{error:?}");
}
