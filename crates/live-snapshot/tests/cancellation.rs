//! Snapshots that are cancelled, or that fail, leave the guest and the destination as they were.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/memory.rs"]
mod memory;
#[path = "support/scene.rs"]
mod scene;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use guest::{PAGE, assert_same};
use live_snapshot::{CancelToken, LiveError, LiveSnapshot, Method};
use memory_writer::{MemoryWriter, SnapshotError};
use rstest::rstest;
use scene::{SIZE, Scene, assert_cancelled, options};
use test_machine::{TinyTmpfs, needs};

#[derive(Clone, Copy, Debug)]
enum Point {
    BeforeBegin,
    BeforeFreeze,
    BeforeWrite,
    DropOfBegun,
    DropOfFrozen,
    DropOfWritten,
    DropOfParts,
}

#[rstest]
fn cancelled_snapshot_leaves_no_trace(
    #[values(Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy)] method: Method,
    #[values(false, true)] diff: bool,
    #[values(
        Point::BeforeBegin,
        Point::BeforeFreeze,
        Point::BeforeWrite,
        Point::DropOfBegun,
        Point::DropOfFrozen,
        Point::DropOfWritten,
        Point::DropOfParts
    )]
    point: Point,
) {
    needs!(Userfaultfd);
    let scene = Scene::new();
    let token = CancelToken::new();
    let options = options(method, &token).diff(diff);
    let begin = || options.begin(&scene.guest.tracker, scene.writer());
    let write = || scene.guest.write_pages([5, 100], 3);
    let frozen = || {
        let live = begin().unwrap();
        write();
        let frozen = live.freeze().unwrap();
        scene.guest.write_pages([6, 5], 4);
        frozen
    };
    match point {
        Point::BeforeBegin => {
            token.cancel();
            assert_cancelled(begin());
            return scene.assert_unharmed([]);
        }
        Point::BeforeFreeze => {
            let live = begin().unwrap();
            write();
            token.cancel();
            assert_cancelled(live.freeze());
            return scene.assert_unharmed([5]);
        }
        Point::DropOfBegun => {
            let live = begin().unwrap();
            write();
            drop(live);
            return scene.assert_unharmed([5]);
        }
        Point::BeforeWrite => {
            let frozen = frozen();
            token.cancel();
            assert_cancelled(frozen.commit());
        }
        Point::DropOfFrozen => drop(frozen()),
        Point::DropOfWritten => drop(frozen().write().unwrap()),
        Point::DropOfParts => {
            let written = frozen().write().unwrap();
            assert_eq!(written.report().method, method);
            let (mut writer, mut epoch, _) = written.into_parts();
            writer.check_epoch(&mut epoch).unwrap();
        }
    }
    scene.assert_unharmed([5, 6]);
}

/// Cancels at the first call of the progress callback, then at the second one, and so on.
#[rstest]
fn cancellation_at_any_step_of_the_write_leaves_no_trace(
    #[values(Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy)] method: Method,
    #[values(false, true)] by_token: bool,
) {
    needs!(Userfaultfd);
    for step in 0.. {
        let scene = Scene::new();
        let token = CancelToken::new();
        let calls = Arc::new(AtomicU32::new(0));
        let callback = {
            let (token, calls) = (token.clone(), Arc::clone(&calls));
            move |_| {
                let is_due = calls.fetch_add(1, Ordering::SeqCst) == step;
                match is_due {
                    true if by_token => token.cancel(),
                    true => return ControlFlow::Break(()),
                    false => {}
                }
                ControlFlow::Continue(())
            }
        };
        let writer = scene.open(&Scene::options().chunk_size(1 << 20).progress(callback));
        let run = || {
            let live = options(method, &token)
                .remainder(0)
                .begin(&scene.guest.tracker, writer)?;
            scene.guest.write_pages([5], 3);
            let frozen = live.freeze()?;
            frozen.write()
        };
        let result = run();
        if calls.load(Ordering::SeqCst) <= step {
            drop(result.unwrap());
            assert!(step >= 4);
            return;
        }
        assert_cancelled(result);
        let was_written = scene.guest.dirty().contains(&5);
        scene.assert_unharmed(was_written.then_some(5));
    }
}

#[test]
fn second_snapshot_is_refused_and_the_first_one_unharmed() {
    needs!(Userfaultfd);
    let scene = Scene::new();
    let other = scene.dir.path().join("other.mem");
    let second = |method| {
        let writer = MemoryWriter::open(&other, SIZE, PAGE).unwrap();
        let options = LiveSnapshot::options().method(method);
        options.begin(&scene.guest.tracker, writer)
    };
    let assert_refused = || {
        for method in Method::ALL {
            let refused = second(method);
            assert!(matches!(refused, Err(LiveError::InProgress)), "{refused:?}");
        }
        assert!(
            scene
                .guest
                .tracker
                .set_baseline(live_snapshot::ParentImage::Unknown)
                .is_err()
        );
        assert!(!other.exists());
    };
    let live = LiveSnapshot::options();
    let live = live.begin(&scene.guest.tracker, scene.writer()).unwrap();
    assert_refused();
    let ram = scene.guest.contents();
    let frozen = live.freeze().unwrap();
    scene.guest.write_pages([3, 8], 4);
    assert_refused();
    let written = frozen.write().unwrap();
    // All pages are written, but the marks are not released yet.
    let refused = second(Method::CopyOnWrite);
    assert!(matches!(refused, Err(LiveError::Tracker(_))), "{refused:?}");
    written.commit().unwrap();
    let image = std::fs::read(scene.dir.path().join("diff.mem")).unwrap();
    assert_same(&image, &ram);
    assert_eq!(scene.guest.dirty(), [3, 8].into());
}

#[rstest]
fn full_disk_cancels_the_snapshot(
    #[values(Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy)] method: Method,
) {
    needs!(Userfaultfd, Root);
    let tmpfs = TinyTmpfs::new(2 << 20).unwrap();
    let scene = Scene::on(tempfile::tempdir_in(tmpfs.path()).unwrap());
    let run = || {
        let live = LiveSnapshot::options().method(method);
        let live = live.begin(&scene.guest.tracker, scene.writer())?;
        scene.guest.write_pages([5], 3);
        let frozen = live.freeze()?;
        scene.guest.write_pages([6], 4);
        frozen.commit()
    };
    let error = run().unwrap_err();
    let LiveError::Write(SnapshotError::MemoryIo { source, .. }) = &error else {
        panic!("{error:?}");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    let dirty = scene.guest.dirty();
    scene.assert_unharmed(dirty);
}
