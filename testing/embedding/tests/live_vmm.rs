//! The code of `docs/guides/live-snapshots.md`: it takes, cancels and restores live snapshots.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(unreachable_pub, reason = "the modules are those of an example")]

#[path = "../../../crates/kvm-backend/examples/precopy/guest.rs"]
#[allow(dead_code, reason = "this tracker needs no dirty log")]
mod guest;
#[path = "../examples/live_vmm/live.rs"]
mod live;
#[path = "../examples/live_vmm/run.rs"]
mod run;

use std::sync::Arc;

use guest::{Guest, PAGE, RAM};
use live_snapshot::{CancelToken, LiveError, LiveTracker, UffdTracker};
use test_machine::needs;

#[test]
fn the_vmm_of_the_guide_saves_and_restores() {
    needs!(Kvm, Userfaultfd);
    run::demo().unwrap();
}

#[test]
fn a_cancelled_snapshot_leaves_no_file_and_all_marks() {
    needs!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::start().unwrap();
    let tracker = Arc::new(UffdTracker::start(&guest.ram).unwrap());
    let token = CancelToken::new();
    token.cancel();
    let path = dir.path().join("full.mem");
    let taken = live::snapshot(&guest, &tracker, &path, None, &token);
    let error = taken.err().unwrap();
    assert!(
        matches!(error.downcast_ref(), Some(LiveError::Cancelled)),
        "{error:?}"
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(tracker.bitmap().dirty_pages(), RAM / PAGE);
}

#[test]
fn a_vmm_adds_fewer_than_60_lines() {
    let code = include_str!("../examples/live_vmm/live.rs").lines();
    let code = code.map(str::trim);
    let code = code.filter(|line| !line.is_empty() && !line.starts_with("//"));
    assert!(code.count() < 60);
}
