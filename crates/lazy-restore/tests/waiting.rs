//! Waits until all pages are in memory: progress and cancellation.
#![cfg(target_os = "linux")]

mod support;

use std::ops::ControlFlow;
use std::sync::mpsc;
use std::thread;

use lazy_restore::{LazyRam, WaitError};
use rstest::rstest;
use support::open_chain;
use test_images::{Images, whole};
use test_machine::needs;

const PAGE: u64 = 4096;

/// A base with holes, and two diffs: 16 MiB.
fn full_and_two_diffs() -> Images {
    Images::new(16 << 20, PAGE)
        .with([0..1000, 1500..3000, 3500..4096])
        .with((0..400).map(|i| 10 * i..10 * i + 1))
        .with([900..1100, 2000..2003, 3200..3300])
}

#[rstest]
#[case::this_call_reads(false)]
#[case::a_thread_reads(true)]
fn wait_reports_progress_up_to_the_total(#[case] prefetch: bool) {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let options = LazyRam::options().prefetch(prefetch);
    let ram = options.start(open_chain(&images)).unwrap();
    let mut seen = Vec::new();
    ram.wait_with(&mut |progress| {
        seen.push(progress);
        ControlFlow::Continue(())
    })
    .unwrap();
    let total = ram.progress().total;
    assert!(seen.iter().all(|progress| progress.total == total));
    assert!(seen.is_sorted_by_key(|progress| progress.done));
    if !prefetch {
        assert_eq!((seen[0].done, seen.last().unwrap().done), (0, total));
    }
    assert_eq!(ram.progress().done, total);
}

/// The first wait reads, and the second one waits for it.
#[test]
fn cancelled_wait_lets_another_one_continue() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let ram = LazyRam::options()
        .prefetch(false)
        .start(open_chain(&images))
        .unwrap();
    let (reads, is_reading) = mpsc::channel();
    let (cancel, cancelled) = mpsc::channel::<()>();
    thread::scope(|scope| {
        // Dropped by a panic, which ends the first wait.
        let cancel = cancel;
        let first = scope.spawn(|| {
            ram.wait_with(&mut move |progress| match progress.done {
                0 => ControlFlow::Continue(()),
                _ => {
                    reads.send(()).unwrap();
                    cancelled.recv().unwrap();
                    ControlFlow::Break(())
                }
            })
        });
        is_reading.recv().unwrap();
        let mut calls = 0;
        let second = ram.wait_with(&mut |_| {
            calls += 1;
            match calls {
                1 => ControlFlow::Continue(()),
                _ => ControlFlow::Break(()),
            }
        });
        assert!(matches!(second, Err(WaitError::Cancelled)), "{second:?}");
        let third = scope.spawn(|| ram.wait());
        cancel.send(()).unwrap();
        let first = first.join().unwrap();
        assert!(matches!(first, Err(WaitError::Cancelled)), "{first:?}");
        third.join().unwrap().unwrap();
    });
    assert_eq!(ram.progress().done, ram.progress().total);
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}

#[test]
fn cancelled_wait_is_no_error_of_the_memory() {
    needs!(Userfaultfd);
    let images = full_and_two_diffs();
    let ram = LazyRam::options().start(open_chain(&images)).unwrap();
    let error = ram.wait_with(&mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, WaitError::Cancelled), "{error:?}");
    assert!(ram.error().is_none());
    ram.wait().unwrap();
}
