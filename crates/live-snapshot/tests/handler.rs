//! The thread that handles write faults fails. The only test of its program: it looks for the
//! descriptor of the userfaultfd.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]
#![allow(unsafe_code)]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/memory.rs"]
mod memory;

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use guest::{Guest, Images, PAGE, assert_same};
use live_snapshot::{
    LiveError, LiveSnapshot, LiveSnapshotOptions, LiveTracker, Method, UffdCheckpointError,
    UffdTracker,
};
use memory_writer::{Layout, MemoryWriter};
use nix::libc;
use test_machine::needs;

const SIZE: u64 = 4 << 20;

/// Replaces the descriptor of the userfaultfd of this process by a directory, which cannot be read.
/// The handler notices it at the next fault, to which this leads.
fn break_the_handler(guest: &Guest) {
    let is_fault = |fd: &RawFd| {
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}"));
        link.is_ok_and(|link| link.to_string_lossy().contains("userfaultfd"))
    };
    let names = std::fs::read_dir("/proc/self/fd").unwrap();
    let names = names.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let found: Vec<RawFd> = names.filter(is_fault).collect();
    let [fault] = found[..] else {
        panic!("{found:?}");
    };
    let directory = File::open("/").unwrap();
    // SAFETY: the descriptor stays open, and its owner closes it.
    let replaced = unsafe { libc::dup2(directory.as_raw_fd(), fault) };
    assert_eq!(replaced, fault);
    guest.write_pages([3], 7);
    // The write continues because the userfaultfd is closed, before the handler has failed.
    while guest.tracker.mark_discarded().is_ok() {
        std::thread::yield_now();
    }
}

#[test]
fn failed_handler_ends_snapshots_and_not_the_guest() {
    needs!(Userfaultfd);
    for is_frozen in [false, true] {
        let guest = Guest::private(SIZE);
        guest.fill();
        let mut images = Images::new(Layout::Sealed, SIZE);
        let path = images.dir().join("other.mem");
        let begin = |options: LiveSnapshotOptions| {
            let writer = MemoryWriter::open(&path, SIZE, PAGE).unwrap();
            options.begin(&guest.tracker, writer)
        };
        let live = begin(LiveSnapshot::options()).unwrap();
        #[track_caller]
        fn assert_untracked<T: std::fmt::Debug>(result: Result<T, LiveError>) {
            let error = result.unwrap_err();
            assert!(matches!(error, LiveError::Tracker(_)), "{error:?}");
            let text = error.to_string();
            assert!(
                text.contains("the handler of write faults has failed"),
                "{text}"
            );
        }
        if is_frozen {
            let frozen = live.freeze().unwrap();
            break_the_handler(&guest);
            assert_untracked(frozen.commit());
        } else {
            break_the_handler(&guest);
            // A page to be protected.
            guest.tracker.mark_range(0, PAGE).unwrap();
            assert_untracked(live.freeze());
        }
        // No write waits.
        guest.write_pages(0..SIZE / PAGE, 8);
        for method in Method::ALL {
            assert_untracked(begin(LiveSnapshot::options().method(method)));
        }
        let error = guest
            .tracker
            .set_baseline(live_snapshot::ParentImage::Unknown)
            .unwrap_err();
        assert!(
            matches!(error, UffdCheckpointError::Untracked(_)),
            "{error:?}"
        );
        assert!(!path.exists());
        let tracker = Arc::new(UffdTracker::start(&guest.memory.ram).unwrap());
        let live = LiveSnapshot::options()
            .begin(&tracker, images.next(false))
            .unwrap();
        let ram = guest.contents();
        let frozen = live.freeze().unwrap();
        guest.write_pages([5, 6], 9);
        frozen.commit().unwrap();
        assert_same(&images.contents(), &ram);
    }
}
