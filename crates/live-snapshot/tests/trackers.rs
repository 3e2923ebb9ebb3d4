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
use live_snapshot::{LiveError, LiveSnapshot, Method, UffdTracker};
use memory::{Kind, Memory};
use memory_writer::{ImageId, Layout, MemoryWriter, Seal};
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
