//! A process that forks or is killed during a snapshot.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]
#![allow(unsafe_code)]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/memory.rs"]
mod memory;

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use dirty_bitmap::Policy;
use guest::{Guest, Images, PAGE, assert_same};
use live_snapshot::{LiveSnapshot, Method};
use memory::Kind;
use memory_writer::{Layout, MemoryWriter, Progress};
use nix::libc;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use rstest::rstest;
use test_machine::needs;

const SIZE: u64 = 4 << 20;

/// The child has private memory of its own, which is not tracked. The parent's is.
#[rstest]
fn forked_child_writes_its_own_memory(#[values(false, true)] is_frozen: bool) {
    needs!(Userfaultfd);
    let guest = Guest::with_policy(Kind::Private, SIZE, Policy::Pages);
    guest.fill();
    let mut images = Images::new(Layout::Sealed, SIZE);
    let fork_and_wait = || {
        // SAFETY: the child only writes mapped memory, and ends.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                for page in 0..SIZE / PAGE {
                    let address = guest.memory.address(page * PAGE);
                    // SAFETY: in the RAM, which no reference covers.
                    unsafe { address.cast::<u64>().write_volatile(99) };
                }
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(7) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 7)));
            }
        }
    };
    let live = LiveSnapshot::options();
    let live = live.begin(&guest.tracker, images.next(false)).unwrap();
    if !is_frozen {
        fork_and_wait();
    }
    guest.write_pages([3], 2);
    let ram = guest.contents();
    let frozen = live.freeze().unwrap();
    if is_frozen {
        fork_and_wait();
    }
    guest.write_pages([3, 600], 3);
    frozen.commit().unwrap();
    assert_same(&images.contents(), &ram);
    assert_eq!(guest.dirty(), [3, 600].into());
}

const JOB: &str = "RAMSNAP_TEST_LIVE_SNAPSHOT";

/// The process of `killed_process_leaves_the_destination`, not a test by itself.
#[test]
fn dies_in_the_middle_of_a_snapshot() {
    let Ok(job) = std::env::var(JOB) else {
        return;
    };
    let (step, method, path) = match job.splitn(3, ' ').collect::<Vec<_>>()[..] {
        [step, method, path] => (step.parse::<u64>().unwrap(), method, path),
        ref other => panic!("{other:?}"),
    };
    let mut methods = Method::ALL.into_iter();
    let method = methods.find(|one| one.to_string() == method).unwrap();
    let guest = Guest::private(SIZE);
    guest.fill();
    let callback = move |progress: Progress| {
        if progress.done >= step << 20 {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        ControlFlow::Continue(())
    };
    let options = MemoryWriter::options()
        .chunk_size(1 << 20)
        .progress(callback);
    let writer = options.open(path, SIZE, PAGE).unwrap();
    let live = LiveSnapshot::options().method(method);
    let live = live.begin(&guest.tracker, writer).unwrap();
    let _ = live.freeze().unwrap().commit();
    unreachable!("the process is killed");
}

#[rstest]
fn killed_process_leaves_the_destination(
    #[values(0, 2, 4)] step: u64,
    #[values(Method::CopyOnWrite, Method::PreCopy)] method: Method,
) {
    needs!(Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.mem");
    std::fs::write(&path, b"old").unwrap();
    let job = format!("{step} {method} {}", path.display());
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "dies_in_the_middle_of_a_snapshot"])
        .env(JOB, job)
        .output()
        .unwrap();
    assert_eq!(child.status.signal(), Some(libc::SIGKILL), "{child:?}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let guest = Guest::private(SIZE);
    guest.fill();
    let ram = guest.contents();
    let writer = MemoryWriter::open(&path, SIZE, PAGE).unwrap();
    let live = LiveSnapshot::options()
        .begin(&guest.tracker, writer)
        .unwrap();
    live.freeze().unwrap().commit().unwrap();
    assert_same(&std::fs::read(&path).unwrap(), &ram);
    assert_eq!(names(dir.path()), ["full.mem"]);
}

fn names(dir: &Path) -> Vec<OsString> {
    let names = std::fs::read_dir(dir).unwrap();
    names.map(|entry| entry.unwrap().file_name()).collect()
}
