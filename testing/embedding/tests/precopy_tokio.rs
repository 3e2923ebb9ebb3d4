//! The example `precopy_tokio`: it saves a guest, and a cancelled save leaves nothing behind.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(unreachable_pub, reason = "the modules are those of an example")]

#[path = "../../../crates/kvm-backend/examples/precopy/guest.rs"]
mod guest;
#[path = "../examples/precopy_tokio/save.rs"]
mod save;

use guest::{Guest, PAGE, RAM};
use memory_writer::{CancelToken, Progress, SnapshotError};
use test_machine::needs;
use tokio::runtime::Builder;
use tokio::sync::watch;

#[test]
fn the_example_saves_a_consistent_image() {
    needs!(Kvm);
    let runtime = Builder::new_current_thread().enable_time().build();
    runtime.unwrap().block_on(save::demo()).unwrap();
}

#[test]
fn a_cancelled_save_leaves_no_file_and_all_marks() {
    needs!(Kvm);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.mem");
    let guest = Guest::start().unwrap();
    let token = CancelToken::new();
    token.cancel();
    let (progress, _receiver) = watch::channel(Progress::new(0, 0));
    let saved = save::save_blocking(&guest, &path, &token, &progress);
    let error = saved.err().unwrap();
    assert!(
        matches!(error.downcast_ref(), Some(SnapshotError::Cancelled { .. })),
        "{error:?}"
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let marked = guest.ram.dirty_bitmap().dirty_pages();
    assert_eq!(marked, RAM / PAGE);
}
